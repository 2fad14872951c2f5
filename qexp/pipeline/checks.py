"""What can be refused at once: before torch is imported, before there is a store, a folder or a run.

The commands call it first of all, and so does setup.py, for whoever calls the jobs from Python.
"""

import os
from pathlib import Path, PurePath

from qexp.config import Config, LatencyConfig
from qexp.data.folders import check_data_dir, check_places
from qexp.errors import InputError
from qexp.foundation.extras import check_package
from qexp.models.names import check_model_name, is_factory, is_model_name, parse_version_uri
from qexp.models.preprocessing import preprocessing_of

WEIGHTS_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")  # of files that hold weights and no code


def check_options(config: Config, new_model: bool, named: bool = True) -> None:
    """Raise InputError where an option names a model or a folder that there is not, or a package that is not
    installed, or two contradict each other.

    Args:
        new_model: whether `config` says which model and data are used; a registered version or a run may do so.
        named: whether its model is the name of one, and not of a module that is given.
    """
    if new_model:
        if named and config.model.startswith("models:/"):
            parse_version_uri(config.model, "MODEL")
        elif named:
            check_model_name(config.model)
        if config.trained_elsewhere and named and not (config.has_weights or ":" in config.model):
            allowed = "needs --weights, or a --model that comes with weights: a file, package.module:factory"
            raise InputError(f"--epochs 0: {allowed}")
        if config.data.dataset == "digits":
            check_package("digits", "--dataset digits", "sklearn")
        check_data_dir(config.data, needs_training=not config.trained_elsewhere)
        preprocessing_of(config.data, config.preprocess)
    else:
        check_places(config.data)
    check_profile(config.latency)
    check_output_dir(config.output_dir)


def model_options(
    given: str, architecture: str | None, weights: str | None = None, may_train: bool = False
) -> dict[str, str]:
    """The options `model` and `weights` that MODEL stands for, beside those that were given themselves.

    Raises:
        InputError: a file of weights without the architecture, two models, or, unless `may_train`, an architecture
            without weights.
    """
    if not given.startswith("models:/") and PurePath(given).suffix.lower() in WEIGHTS_SUFFIXES:
        if architecture is None:
            raise InputError(f"MODEL {given}: is weights alone; say with --model NAME of which architecture they are")
        if weights is not None:
            raise InputError(f"--weights {weights}: MODEL {given} is a file of weights already; leave one of them out")
        return {"model": architecture, "weights": given}
    if architecture is not None:
        raise InputError(f"--model {architecture}: MODEL {given} is a model already; leave one of them out")
    if not may_train and weights is None and is_model_name(given) and not is_factory(given):
        raise InputError(f"--weights: must be given: MODEL {given} is an architecture alone; a file, or DEFAULT")
    return {"model": given}


def check_profile(options: LatencyConfig) -> None:
    """Raise InputError where `profile` weighs a batch size that is not timed."""
    if others := [size for size in options.profile or {} if size not in options.batch_sizes]:
        timed = ", ".join(map(str, options.batch_sizes))
        raise InputError(f"--profile {others[0]}: must be one of the batch sizes that are timed: {timed}")


def check_output_dir(name: str | None) -> None:
    """Raise InputError if `output_dir` is set and cannot be made or written. Nothing is made to find out."""
    if name is None:
        return
    folder = Path(name).absolute()
    try:
        there = next(one for one in (folder, *folder.parents) if one.exists())
    except OSError as error:
        raise InputError(f"--output-dir {name}: cannot be looked at ({error.strerror})") from None
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "cannot be written" if there.is_dir() else "is not a folder"
        raise InputError(f"--output-dir {name}: must be a folder that can be written; {there} {why}")
