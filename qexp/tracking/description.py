"""The texts on the pages of registered models and their versions, as Markdown: made from tags and from the sweep.

The registry stores them, and writes them anew whenever a tag changes.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from qexp.foundation.text import as_markdown, opaque
from qexp.measurement.latency import LatencyResult
from qexp.measurement.sweep_models import SweepModel
from qexp.models.names import BY_OPENVINO, OPENVINO_BF16, RUNTIMES
from qexp.tracking.store import is_missing, page_of_run, page_of_version, uri_of
from qexp.tracking.tags import TAGS, tags_of

KERNELS = "\n\nKernels:"  # begins what is said about them in a version's description; no tag has line breaks there
LONGEST_LIST = 1000  # characters of a description that names of classes or layers take; PostgreSQL has room for 5,000


def of_version(found: ModelVersion) -> str:
    """Markdown for a version's page, from its tags: the answer, figures, links, what it takes and gives, how to load
    it. What a tag of an older version does not say is left out."""
    tags, lines = opaque(dict(found.tags)), list[str]()
    if "verdict" in tags:  # without Markdown: a list of versions shows how the text begins, as it is
        lines += [f"{tags['verdict'].capitalize()}: {tags.get('verdict_reason', '')}.", ""]
    elif "gate_reason" in tags:
        lines += [f"Gate {tags['gate_reason']}.", ""]
    if tags.get("verified") == "false":
        lines += ["Not verified: loaded in a clean subprocess, it did not give the same logits.", ""]
    lines += ["| | |", "| :-- | :-- |", *(f"| {name} | {text} |" for name, text in _rows(found) if text), ""]
    uri = opaque(repr(uri_of(found)))
    load = {
        "pytorch": f"model = mlflow.pytorch.load_model({uri})",
        "onnx": f"model = mlflow.pyfunc.load_model({uri})  # predict(images)['logits'], of a numpy array",
    }[tags_of(found).known("flavor") or "pytorch"]
    text = as_markdown("\n".join([*lines, "To load it:", "", f"```python\n{load}\n```"]))
    _, begins, kernels = (found.description or "").partition(KERNELS)
    return f"{text}{begins}{kernels}"


def with_kernels(text: str, measured: str) -> str:
    """A version's description with `measured` as what it says of kernels."""
    return f"{text.split(KERNELS)[0].rstrip()}{KERNELS} {measured}"


def about_kernels(result: LatencyResult, found: Sequence[SweepModel]) -> str:
    """Which kernels of an int8 version, or which runtime, were the faster ones, and how to get them. `found` has the
    fastest first."""
    first = found[0]
    if first.backend in RUNTIMES:
        return _about_runtimes(result, found)
    means = ", ".join(f"{one.backend} {result.mean_speedup(one.name):.2f}x" for one in found)
    default = ", which are the default" if first.backend == "x86" else ""
    text = f"`qexp.load(uri)` uses the `{first.backend}` kernels{default}."
    text += f" Mean speed-up over fp32 as measured: {means}."
    if default:
        return text
    return (
        f"{text} TorchScript packs int8 weights at load for the engine of the process, `x86` unless it was set: for "
        f"the same speed without qexp, set `torch.backends.quantized.engine = {first.backend!r}` before loading. "
        "Outputs are the same either way."
    )


def _about_runtimes(result: LatencyResult, found: Sequence[SweepModel]) -> str:
    first = found[0].backend
    means = ", ".join(f"{one.backend} {result.mean_speedup(one.name):.2f}x" for one in found)
    text = f"`qexp.load(uri)` uses the runtime `{first}`. Mean speed-up over fp32 as measured: {means}."
    if first not in BY_OPENVINO:
        return text
    threads = f'"INFERENCE_NUM_THREADS": {result.threads}, "PERFORMANCE_HINT": "LATENCY"'
    options = f'{{{threads}, "INFERENCE_PRECISION_HINT": "{"bf16" if first == OPENVINO_BF16 else "f32"}"}}'
    return (
        f'{text} Without qexp: `openvino.Core().compile_model("model.onnx", "CPU", {options})`; it is fastest for one '
        "batch size, given by `reshape`, and with the file that `qexp.load(uri).save(file)` writes, which lacks "
        "roundings that only ONNX Runtime needs. MLflow's `load_model` takes ONNX Runtime, which rounds otherwise."
    )


def _rows(found: ModelVersion) -> Iterator[tuple[str, str]]:
    """The table of a version's description; an empty text where a tag is missing."""
    typed = tags_of(found)
    wrong = [name for name in found.tags if name in TAGS and typed.known(name) is None]
    right = {name: text for name, text in found.tags.items() if name not in wrong}
    tags = defaultdict(str, opaque(right))

    def told(text: str, *names: str) -> str:
        """`text` with these tags in it, numbers in four digits."""
        return text.format(*(_short(tags[name]) for name in names)) if set(names) <= set(right) else ""

    yield "Test top-1", told("{} % on {}", "test_top1_percent", "dataset")
    if fp32 := right.get("fp32_uri"):
        drops = ("top1_drop_points", "top1_drop_low_points", "top1_drop_high_points")
        yield "Drop", told("{} points (95 % interval {} to {})", *drops)
        yield "Made from", f"[{opaque(fp32)}]({page_of_version(fp32)})"
    calibrated = told(", {} calibration images", "calibration_samples")
    layers = tags["float_layers"].replace("none", "")
    left = f"; in fp32: {layers if len(layers) <= LONGEST_LIST else 'see tag `float_layers`'}" if layers else ""
    folded = ", after a pool was folded into the linear layer behind it" if tags["folded"] == "true" else ""
    yield "Engine", tags["engine"] and f"{tags['engine']}{folded}{calibrated}{left}"
    mean = told("{}x the fastest float in the mean over batch sizes; ", "mean_speedup")
    yield "Speed", told(f"{mean}{{}}x at the batch size where it gains least", "smallest_speedup")
    times = ("p50_ms", "p50_batch_size", "p50_threads", "cpu")
    yield "Time (p50)", told("{} ms at batch size {} on {} threads of {}", *times)
    differ = tags["logits_differ"].replace("none", "")
    yield "Logits", differ and f"beside those that were recorded: {differ}"
    yield "Size", told("{} MB", "size_mb")
    if typed.known("image_size") and "preprocessing" not in wrong:
        channels, height, width = typed.input.shape
        images = f"float32 {'RGB' if channels == 3 else 'grey'} images in [0, 1]"
        yield "Input", f"{images}, [N, {channels}, {height}, {width}]; normalisation is inside"
    if classes := typed.known("classes"):
        names = opaque(", ".join(classes.names or ()))
        order = names if 0 < len(names) <= LONGEST_LIST else classes.place
        yield "Output", f"logits [N, {classes.count}] in the order {order}"
    yield "Promotion", tags["promotion_reason"]
    runs = {"training": "train_run_id", "quantization": "quantize_run_id", "latency": "latency_run_id"}
    links = [f"[{name}]({page})" for name, tag in runs.items() if (page := _page(right.get(tag, "")))]
    if page := _page(right.get("report_run_id", "")):
        links.insert(0, f"[report]({page}/artifacts/report/report.html)")
    yield "Runs", ", ".join(links)


def _short(text: str) -> str:
    """A number in four digits; anything else as it is."""
    try:
        return text if text.isdecimal() else f"{float(text):.4g}"
    except ValueError:
        return text


def _page(run_id: str) -> str:
    """The address of a run's page; the empty text if the run is gone."""
    try:
        return page_of_run(run_id) if run_id else ""
    except MlflowException as error:
        if is_missing(error):
            return ""
        raise


def of_model(kind: str, dataset: str | None) -> str:
    """What the versions of a registered model are."""
    what = {
        "fp32": "Trained classifiers in fp32. The alias `champion` follows that of the int8 model",
        "int8": "Classifiers quantized to int8. The version with the alias `champion` is the one to ship",
    }[kind]
    of = f" The data set is {opaque(dataset)}." if dataset else ""
    return as_markdown(f"{what}; the description of each version says what was measured and links its runs.{of}")
