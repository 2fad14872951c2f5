"""Results of stages as files in the folder of a job, from which they can be uploaded at any time.

The pipeline writes and reads them; `uploads.py` says what each looks like in MLflow.
"""

import hashlib
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from qexp.errors import InputError, first_line
from qexp.files import from_json, replacing
from qexp.measurement.accuracy import to_float
from qexp.models.classifier import ModelSpec, load_classifier, save_classifier
from qexp.models.program import load_program
from qexp.models.taken import export_program, is_onnx, is_rebuilt
from qexp.quantization.sensitivity import SensitivityResult
from qexp.report.promotion import Promotion
from qexp.report.results import Fp32Evidence, Int8Evidence, LatencyEvidence, ThroughputEvidence
from qexp.tracking.job_folder import RESULT
from qexp.tracking.registry import Registered


@dataclass(frozen=True)
class NewModel:
    """A model that is to be registered, and what was found about it.

    `stored` is what the registry stores: a classifier or another module, a TorchScript module or an ONNX model.
    `expected` are the logits that it must give for the uint8 images `sample` [N, C, H, W] when it is loaded again;
    `logits` are those of the data set, by split. `layers` is the table of its layers as text. `recorded` are some test
    `images` and its `logits` for them, with which other machines compare theirs; empty for an fp32 model.
    """

    evidence: Fp32Evidence | Int8Evidence
    stored: Any
    spec: ModelSpec
    sample: Tensor
    expected: Tensor
    logits: dict[str, Tensor]
    tags: dict[str, Any]
    layers: str
    recorded: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Fp32:
    """An fp32 model with its registered version, what was found out about it, and its logits by split.

    `model` is a `Classifier`, or another module that takes and gives the same and has its `spec`.
    """

    model: Any
    version: Registered
    evidence: Fp32Evidence
    logits: dict[str, Tensor]


@dataclass(frozen=True)
class WrittenReport:
    """That the report on an int8 version is in the folder `report` beside this result."""

    int8_uri: str


Result = NewModel | SensitivityResult | LatencyEvidence | ThroughputEvidence | Promotion | WrittenReport
KINDS: dict[str, Any] = {
    "fp32": Fp32Evidence,
    "int8": Int8Evidence,
    "sensitivity": SensitivityResult,
    "latency": LatencyEvidence,
    "throughput": ThroughputEvidence,
    "promotion": Promotion,
    "report": WrittenReport,
}


# Of a model, beside its result, which has their digests: nothing of them is opened before they have been compared.
FILES = ("model.safetensors", "model.onnx", "model.pth", "model.pt2", "tensors.safetensors", "model.json")


@dataclass(frozen=True)
class Kept:
    """A result that MLflow lacks, the run that it belongs to, and when it was found, in ms since 1970: metrics are
    logged with that time, so that logging them again changes nothing."""

    run_id: str
    at_ms: int
    result: Result


def kind_of(result: Result) -> str:
    """The name of a result's kind: of `results/KIND.json` among the artifacts of its run."""
    found = result.evidence if isinstance(result, NewModel) else result
    return next(name for name, kind in KINDS.items() if type(found) is kind)


def keep(folder: Path, run_id: str, result: Result) -> Kept:
    """Write a result to the folder of its stage. It is there as a whole, or not at all.

    Raises:
        StageError: the disk is full or the folder cannot be written.
    """
    kind = kind_of(result)
    if isinstance(result, NewModel):
        _save_model(folder, result)
    kept = Kept(run_id, int(1000 * time.time()), result)
    evidence = result.evidence if isinstance(result, NewModel) else result
    values = TypeAdapter(KINDS[kind]).dump_python(evidence, mode="json")
    files = {name: _digest(folder / name) for name in FILES if (folder / name).is_file()}
    about = {"kind": kind, "run_id": run_id, "at_ms": kept.at_ms, "files": files}
    text = json.dumps(about | {"result": values}, indent=2)
    with replacing(folder / RESULT) as temporary:
        temporary.write_text(text)
    return kept


def kept_in(folder: Path) -> Kept | None:
    """What `keep` wrote; None if there is no result.

    Raises:
        InputError: a file is missing or damaged.
    """
    if not (folder / RESULT).is_file():
        return None
    try:
        values = json.loads((folder / RESULT).read_text())
        for name, digest in values.get("files", {}).items():  # results of earlier versions name none
            if name not in FILES or _digest(folder / name) != digest:
                raise ValueError(f"{name} is not the file that was written")
        result = from_json(KINDS[values["kind"]], json.dumps(values["result"]))
        if values["kind"] in ("fp32", "int8"):
            result = _load_model(folder, result)
        return Kept(values["run_id"], values["at_ms"], result)
    except Exception as error:  # json, pydantic, safetensors, torch and onnx have their own types
        raise InputError(f"{folder}: the result that is kept there cannot be read ({first_line(error)})") from None


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _save_model(folder: Path, new: NewModel) -> None:
    if is_rebuilt(new.stored):
        save_classifier(new.stored, folder / "model.safetensors")
    elif is_onnx(new.stored):
        import onnx  # which only this engine needs

        with replacing(folder / "model.onnx") as temporary:
            onnx.save(new.stored, temporary)
    elif isinstance(new.stored, torch.jit.ScriptModule):
        with replacing(folder / "model.pth") as temporary:
            torch.jit.save(new.stored, temporary)
    else:
        with replacing(folder / "model.pt2") as temporary:
            export_program(new.stored, to_float(new.sample[:2]), temporary)
    tensors = {"sample": new.sample, "expected": new.expected} | {f"logits.{k}": v for k, v in new.logits.items()}
    tensors |= {f"recorded.{name}": found for name, found in new.recorded.items()}
    with replacing(folder / "tensors.safetensors") as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    with replacing(folder / "model.json") as temporary:
        temporary.write_text(json.dumps({"spec": asdict(new.spec), "tags": new.tags, "layers": new.layers}))


def _load_model(folder: Path, evidence: Fp32Evidence | Int8Evidence) -> NewModel:
    stored: Any
    if (file := folder / "model.safetensors").is_file():
        stored = load_classifier(file)
    elif (file := folder / "model.onnx").is_file():
        import onnx

        stored = onnx.load(file)
    elif (file := folder / "model.pt2").is_file():
        stored = load_program(file)
    else:
        stored = torch.jit.load(folder / "model.pth")
    values = json.loads((folder / "model.json").read_text())
    spec = TypeAdapter(ModelSpec).validate_json(json.dumps(values["spec"]))
    tensors = load_file(folder / "tensors.safetensors")
    logits = {name.removeprefix("logits."): tensors[name] for name in tensors if name.startswith("logits.")}
    recorded = {name.removeprefix("recorded."): tensors[name] for name in tensors if name.startswith("recorded.")}
    sample, expected = tensors["sample"].to(torch.uint8), tensors["expected"]
    return NewModel(evidence, stored, spec, sample, expected, logits, values["tags"], values["layers"], recorded)
