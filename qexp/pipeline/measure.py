"""What is measured of models: their answers on the images of a data set, and their times, all side by side.

Plain functions: modules, tensors and folders go in, results come out. The figures feed `decide.py` and the report.
"""

import copy
import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qexp.config import Config
from qexp.data.datasets import Dataset
from qexp.errors import StageError, first_line
from qexp.foundation.extras import has_openvino, how_to_install
from qexp.measurement.accuracy import compare, measure_accuracy, predict_logits
from qexp.measurement.compiled import has_compiler
from qexp.measurement.host import Host
from qexp.measurement.latency import LatencyResult
from qexp.measurement.sweep import SweepRequest, run_sweep
from qexp.measurement.sweep_models import (
    BASELINE,
    BF16_OPENVINO,
    COMPILED,
    EAGER,
    IN_OPENVINO,
    ONNX,
    ROUNDED,
    SweepModel,
    folded_baselines,
    freeze,
    in_bf16,
    int8_models,
    rounds_like,
    unfolded,
)
from qexp.models.folding import folded as folded_model
from qexp.models.names import BY_OPENVINO, OPENVINO, OPENVINO_BF16
from qexp.models.preprocessing import Shape, preprocessing_of
from qexp.models.taken import is_onnx
from qexp.pipeline.shares import predict_part
from qexp.progress import say
from qexp.quantization import KERNELS
from qexp.report.results import Bf16Evidence, Int8Evidence, LatencyEvidence

SPLITS = ("train", "validation", "test")


def predict_splits(
    model: Callable[[Tensor], Tensor], dataset: Dataset, label: str, splits: tuple[str, ...] = SPLITS
) -> dict[str, Tensor]:
    """Logits of a model by split; of an int8 model, as an engine has returned it, too."""
    return {name: predict_part(model, dataset, name, f"{label} on {name} images") for name in splits}


def measure_bf16(
    config: Config, host: Host, dataset: Dataset, model: Any, fp32_logits: Tensor, folded: bool = False
) -> dict[str, Bf16Evidence]:
    """Size and accuracy of the baselines in bf16 on the test images, by name; without those that are not timed, or do
    not run. With `folded`, also of those in which a pool is folded away."""
    found = {}
    timed = _rounded(config, host, is_onnx(model))
    for name in (*timed, *(folded_baselines(timed) if timed and folded else ())):
        try:
            make = _in_openvino if unfolded(name) == BF16_OPENVINO else _in_torch
            predict, size_bytes = make(model if name == unfolded(name) else _folded(model), model.spec.shape)
            logits = predict_logits(predict, dataset.test.images, label=f"{name} on test images")
        except Exception as error:  # whatever an operation without bf16 raises
            say(f"the accuracy of {name} is not measured: {first_line(error)}")
            continue
        against = compare(fp32_logits, logits, dataset.test.labels)
        drop = against.top1_drop_points, against.top1_drop_low_points, against.top1_drop_high_points
        found[name] = Bf16Evidence(size_bytes, measure_accuracy(logits, dataset.test.labels), *drop)
    return found


def _folded(model: Any) -> nn.Module:
    example = torch.rand(2, *model.spec.shape, generator=torch.Generator().manual_seed(0))
    found = folded_model(model, example)
    if found is None:
        raise StageError("it has no pool that can be folded away")
    return found


def _in_torch(model: Any, shape: Shape) -> tuple[Callable[[Tensor], Tensor], int]:
    """The model in bf16 by TorchScript, and the bytes of its file."""
    saved = io.BytesIO()
    module = freeze(copy.deepcopy(model), shape, torch.bfloat16)
    torch.jit.save(module, saved)
    return in_bf16(module), saved.tell()


def _in_openvino(model: Any, shape: Shape) -> tuple[Callable[[Tensor], Tensor], int]:
    """The model in bf16 by OpenVINO, and the bytes of its ONNX file."""
    from qexp.models.onnx_file import export
    from qexp.models.openvino_file import OpenvinoClassifier

    if is_onnx(model):
        content = model.canonical.SerializeToString()
    else:
        with tempfile.TemporaryDirectory() as folder:
            export(copy.deepcopy(model), torch.zeros(2, *shape), file := Path(folder, "fp32.onnx"))
            content = file.read_bytes()
    return OpenvinoClassifier(content, bf16=True).forward, len(content)


@dataclass(frozen=True)
class ToTime:
    """An int8 version of a sweep: its engine, of the kernels and runtimes of that engine those that must not be timed,
    with the reasons, whether a pool was folded away, and whether what is float may be computed in bf16."""

    engine: str
    left_out: Mapping[str, str] = field(default_factory=dict)
    folded: bool = False
    in_bf16: bool = False

    @classmethod
    def of(cls, int8: Int8Evidence) -> "ToTime":
        """A version whose accuracy in each runtime is known, or why it is not."""
        unknown = {OPENVINO: "its accuracy there was not measured when the version was made"}
        left_out = {name: why for name, why in (unknown | int8.runtimes_left_out).items() if name not in int8.runtimes}
        in_bf16 = OPENVINO_BF16 in {**int8.runtimes, **int8.runtimes_left_out}
        return cls(int8.quantize.engine, left_out, int8.quantize.folded, in_bf16)


@dataclass(frozen=True)
class LocalVersions:
    """Files of registered versions here: the fp32 version's weights file, and the folder of each version by URI."""

    fp32_uri: str
    weights: Path
    folders: Mapping[str, str]

    @property
    def fp32_folder(self) -> str:
        return self.folders[self.fp32_uri]


def time_versions(
    config: Config,
    host: Host,
    files: LocalVersions,
    int8s: Mapping[str, ToTime],
    bf16: dict[str, Bf16Evidence],
    environment: dict[str, str],
) -> LatencyEvidence:
    """Time int8 versions, each with all kernels or runtimes that it has, and the baselines beside them, in a clean
    subprocess; in one more for each other number of threads that is asked for.

    Args:
        int8s: by URI.
        bf16: what `measure_bf16` has found, to be shown with the times of those baselines that are timed.
        environment: of the subprocess.
    """
    timed = {uri: _with_kernels(config, files.folders[uri], int8) for uri, int8 in int8s.items()}
    folded = any(int8.folded for int8 in int8s.values())
    gone = {
        model.name: reason
        for uri, int8 in int8s.items()
        for model in timed[uri]
        if (reason := _why_not(model, int8, host))
    }
    for name, reason in gone.items():
        say(f"{name} is left out: {reason}")
    models = [model for found in timed.values() for model in found if model.name not in gone]
    results = [
        time_models(config, replace(host, threads=threads), files, models, models[0].name, environment, folded)
        for threads in thread_counts(config, host)
    ]
    result, *others = (replace(one, models_left_out=gone | one.models_left_out) for one in results)
    for shortcoming in result.shortcomings:
        say(f"warning: no verdict rests on these times: {shortcoming}")
    there = result.rows[0].stats
    names = {
        uri: _fastest_first(config, result, [one for one in found if one.name in there]) for uri, found in timed.items()
    }
    return LatencyEvidence(
        files.fp32_uri,
        names,
        result,
        replace(host, threads=result.threads),
        run_id="",
        other_threads=tuple(others),
        **rounded_fields(config, host, bf16, folded),
    )


def rounded_fields(
    config: Config, host: Host, found: Mapping[str, Bf16Evidence], folded: bool = False
) -> dict[str, Any]:
    """What is known of the baselines in bf16 that are timed, by the fields of `LatencyEvidence`."""
    timed = _rounded(config, host)
    without_pool = {name: found[name] for name in folded_baselines(timed) if name in found} if folded else {}
    return {name: found.get(name) for name in timed} | {"folded_bf16": without_pool}


def _rounded(config: Config, host: Host, onnx_file: bool = False) -> list[str]:
    """The floats whose accuracy stands for those that round and are timed."""
    timed = [name for name in ROUNDED if not why_not_timed(name, config, host, onnx_file)]
    return list(dict.fromkeys(map(rounds_like, timed)))


def thread_counts(config: Config, host: Host) -> list[int]:
    """The numbers of threads on which models are timed. The first one decides: that of all stages, or else the
    largest."""
    asked: list[int] = config.latency.threads or [host.threads]
    first = host.threads if host.threads in asked else max(asked)
    return [first, *(count for count in asked if count != first)]


def time_models(
    config: Config,
    host: Host,
    files: LocalVersions,
    int8: Sequence[SweepModel],
    repeated: str,
    environment: dict[str, str],
    folded: bool = False,
) -> LatencyResult:
    """Time the baselines and these int8 models in a clean subprocess on `host.threads` threads, the model named
    `repeated` twice. With `folded`, a pool is folded away in some of them: baselines are then timed folded, too."""
    asked: Sequence[str] = config.latency.baselines
    baselines, gone = list[str](), dict[str, str]()
    for name in asked:
        if why := why_not_timed(name, config, host, files.weights.suffix == ".onnx"):
            gone[name] = why
        elif name == EAGER and files.weights.suffix == ".pt2":
            gone[name] = "the model's own code is not there, only the program exported from it"
        else:
            baselines.append(name)
    for name, reason in gone.items():
        say(f"baseline {name} is left out: {reason}")
    baselines += folded_baselines(baselines) if folded else ()
    models = [SweepModel(name, files.fp32_folder) for name in (BASELINE, *baselines)] + list(int8)
    shape = preprocessing_of(config.data, config.preprocess).shape
    request = SweepRequest(tuple(models), repeated, str(files.weights), shape, host.threads, config.latency)
    result = run_sweep(request, environment | {"OMP_NUM_THREADS": str(host.threads)})
    return replace(result, models_left_out=gone | result.models_left_out)


def why_not_timed(name: str, config: Config, host: Host, onnx_file: bool = False) -> str:
    """Why a baseline is not timed: it is not asked for, or not to be had here; empty where it is.

    Args:
        onnx_file: the fp32 model is one.
    """
    if name not in config.latency.baselines:
        return "it is not among --baselines"
    if onnx_file and name == ONNX:
        return "fp32 is already the ONNX file in ONNX Runtime"
    if onnx_file and name not in IN_OPENVINO:
        return "the model is an ONNX file, and not a module of torch"
    if name in COMPILED and not has_compiler():
        return "no C++ compiler is installed: g++, or the one that the variable CXX names"
    if name in ROUNDED and not host.has_bf16:
        return f"{host.cpu} has no bf16 instructions"
    if name in IN_OPENVINO and not has_openvino():
        return f"OpenVINO is not installed: {how_to_install('openvino')}"
    return ""


def _why_not(model: SweepModel, int8: ToTime, host: Host) -> str:
    """Why a version is not timed with these kernels or in this runtime; empty where it is."""
    if model.backend in BY_OPENVINO and not has_openvino():
        return f"OpenVINO is not installed: {how_to_install('openvino')}"
    if model.backend == OPENVINO_BF16 and not host.has_bf16:
        return f"{host.cpu} has no bf16 instructions"
    return int8.left_out.get(str(model.backend), "")


def _with_kernels(config: Config, folder: str, int8: ToTime) -> tuple[SweepModel, ...]:
    """The default kernels or runtime, and beside them the others, or the one of them that was asked for."""
    default, *others = KERNELS[int8.engine]
    asked = config.quantize.backend
    if not int8.in_bf16:
        others = [one for one in others if one != OPENVINO_BF16]
    backends = (default, *(one for one in others if asked in (None, one)))
    return int8_models(folder, int8.engine, backends, int8.folded)


def _fastest_first(config: Config, result: LatencyResult, found: Sequence[SweepModel]) -> tuple[str, ...]:
    """The kernels that were asked for first, or else those that won; the default kernels unless others are faster."""
    asked = config.quantize.backend
    names = [one.name for one in found if asked in (None, one.backend)] or [one.name for one in found]
    first = result.winner(names)
    return tuple(one.name for one in sorted(found, key=lambda one: one.name != first))
