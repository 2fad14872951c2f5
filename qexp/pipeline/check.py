"""`qexp check`: the whole job on a model that was trained elsewhere, with the registry or without it."""

from typing import Any

from torch import nn

from qexp.config import Config
from qexp.errors import InputError
from qexp.pipeline.jobs import Reported, summary_of, whole_job
from qexp.pipeline.unregistered import check_unregistered
from qexp.tracking.plain import is_own
from qexp.tracking.store import use_store


def run_check(config: Config, register: bool = True) -> dict[str, Any] | None:
    """What `check` has found, as the last line of `qexp check`; None in a process that only helps another one."""
    found = check(config, register)
    return summary_of("check", found) if found else None


def check(config: Config, register: bool = True, module: nn.Module | None = None) -> Reported | None:
    """Take the model of `config`, or `module`, quantize, measure, gate, report.

    Args:
        register: put both models into MLflow's registry, and all that was found into a run; otherwise MLflow is not
            asked for anything, and the report is written where `output_dir` says.
    """
    if config.model.startswith("models:/"):
        use_store()
        if is_own(config.model):
            if not register:
                raise InputError(f"--no-register: must be left out; {config.model} is a version of qexp's own already")
            own = {"model": Config().model, "train": Config().train}
            return whole_job(config.model_copy(update=own), model_uri=config.model)
    if not register:
        evidence = check_unregistered(config, module)
        return Reported(evidence, "", "") if evidence else None
    return whole_job(config, module=module)
