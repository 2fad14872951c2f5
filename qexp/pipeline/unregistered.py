"""The whole job without MLflow: the same stages, whose models lie in a folder for as long as it lasts.

`qexp check --no-register` and `qexp.check(…, register=False)` call it. Nothing is logged; the answer is what is
returned, and the report where `output_dir` says.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qexp.config import Config
from qexp.measurement.accuracy import to_float
from qexp.measurement.host import Host
from qexp.models.classifier import save_classifier
from qexp.models.contents import read_contents
from qexp.models.stored import load_stored, model_file
from qexp.models.taken import export_program, is_onnx, is_rebuilt
from qexp.pipeline.decide import decide
from qexp.pipeline.job import Job
from qexp.pipeline.jobs import latency_stage, quantize_all, take_stage
from qexp.pipeline.measure import LocalVersions, ToTime, measure_bf16
from qexp.pipeline.setup import check_kept, prepare, with_quantization_checked
from qexp.pipeline.shares import follow, leading
from qexp.pipeline.take import take, with_answers
from qexp.progress import say
from qexp.report.page import write_report
from qexp.report.results import UNREGISTERED, Evidence, Fp32Evidence, Int8Evidence
from qexp.tracking.registry import Registered
from qexp.tracking.results import Fp32, NewModel, Result
from qexp.training.distributed import read_group


def check_unregistered(config: Config, module: nn.Module | None = None) -> Evidence | None:
    """What the job has found; None in a process that only helps another one.

    Raises:
        InputError: as `run_main`.
        StageError: no engine could quantize the model, or it cannot be stored.
    """
    setup = prepare(config, None, store=False, named=module is None)
    setup = setup._replace(config=with_quantization_checked(setup.config, setup.dataset))
    config, host, dataset = setup
    if not read_group().leads:
        follow(dataset)
        return None
    taken = take(config, dataset, module)
    check_kept(config, taken)
    with leading(), tempfile.TemporaryDirectory() as folder:
        job = Unregistered(host, Path(folder), taken)
        fp32 = take_stage(job, setup, taken)
        setup = setup._replace(dataset=with_answers(dataset, fp32.model.spec, fp32.logits))
        quantized = quantize_all(job, setup, fp32)
        int8s = {int8.version_uri: ToTime.of(int8) for int8 in quantized.int8s}
        folded = any(one.folded for one in int8s.values())
        latency = latency_stage(
            job,
            config,
            fp32.version.uri,
            int8s,
            lambda: measure_bf16(config, host, dataset, fp32.model, fp32.logits["test"], folded),
        )
        evidence = decide(config, fp32.evidence, quantized.int8s, latency, quantized.failed)
        evidence = replace(evidence, champion=False)
    if config.output_dir:
        write_report(evidence, Path(config.output_dir).absolute())
        say(f"the report is in {Path(config.output_dir).absolute()}")
    return evidence


class Unregistered(Job):
    """A job whose stages are no runs, and whose models are files in a folder under the names that a registry would have
    given them."""

    def __init__(self, host: Host, folder: Path, taken: Any) -> None:
        super().__init__(host)
        self.folder, self.taken = folder, taken
        self.places: dict[str, Path] = {}
        self.weights = folder

    def _done(self, name: str, note: str, config: Config, work: Callable[[Path], Result], *others: Any) -> Any:
        """What `work` finds; a model gets its place in the folder."""
        place = self.folder / name
        place.mkdir()
        result = work(place)
        return self._keep(result, place) if isinstance(result, NewModel) else result

    def _keep(self, new: NewModel, place: Path) -> Fp32 | Int8Evidence:
        _store(new, place)
        file = model_file(place)
        with torch.no_grad():
            again = load_stored(place)(to_float(new.sample))
        same = torch.equal(again, new.expected)
        uri = UNREGISTERED if isinstance(new.evidence, Fp32Evidence) else f"int8-{new.evidence.quantize.label}"
        evidence = replace(
            new.evidence, version_uri=uri, size_bytes=file.stat().st_size, contents=read_contents(file), verified=same
        )
        self.places[uri] = place
        if isinstance(evidence, Int8Evidence):
            return evidence
        self.weights = file
        if is_rebuilt(self.taken):
            self.weights = place / "weights.safetensors"
            save_classifier(self.taken, self.weights)
        return Fp32(self.taken, Unnumbered(uri, "", "", "", evidence.size_bytes, same), evidence, new.logits)

    @contextmanager
    def files(self, fp32_uri: str, *int8_uris: str) -> Iterator[LocalVersions]:
        """Where the models are."""
        yield LocalVersions(fp32_uri, self.weights, {uri: str(self.places[uri]) for uri in (fp32_uri, *int8_uris)})


class Unnumbered(Registered):
    """A model that is in no registry."""

    @property
    def uri(self) -> str:
        """Its name."""
        return self.name


def _store(new: NewModel, place: Path) -> None:
    """Write a model as the registry would have it."""
    if is_onnx(new.stored):
        (place / "model.onnx").write_bytes(new.stored.SerializeToString())
    elif isinstance(new.stored, torch.jit.ScriptModule):
        torch.jit.save(new.stored, place / "model.pth")
    else:
        export_program(new.stored, to_float(new.sample[:2]), place / "model.pt2")
