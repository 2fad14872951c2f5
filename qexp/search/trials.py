"""The trials of a worker: quantize as a trial's parameters say, and measure what the search looks at.

Only validation images are looked at. setup.py makes the `Bench`, which all trials of a worker use; queue.py gives
the trials and keeps what they find; each trial has a run in MLflow (tracking/search_runs.py).
"""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial
from torch import Tensor

from qexp.config import Config, LatencyConfig, QuantizeConfig, flat_params
from qexp.data.datasets import Dataset, calibration_subset
from qexp.errors import first_line
from qexp.measurement.accuracy import measure_accuracy, predict_logits, top_k_credit
from qexp.measurement.host import Host
from qexp.measurement.latency import AGAIN, LatencyRow, Run, measure_latency
from qexp.models.classifier import Classifier
from qexp.progress import say
from qexp.quantization import QuantizedModel, quantize_model
from qexp.search import queue
from qexp.search.conclusion import pack
from qexp.search.results import SearchPoint
from qexp.search.study import Params, Study, known_point
from qexp.tracking import runs as tracking
from qexp.tracking import search_runs

ROUNDS = 10  # of 40 ms for each model: about a second
WAIT_S = 1.0  # between two looks at what other workers are at


@dataclass(frozen=True)
class Bench:
    """What all trials of a worker use: nothing here is made or read again for a trial.

    `model` is the fp32 model, with its top-1 on the validation images. `order` has the layers that go back to fp32,
    most sensitive first. `fp32_p50_ms` turns the speed-ups of trials into ms; None where no trial is timed.
    """

    config: Config
    host: Host
    dataset: Dataset
    model: Classifier
    model_uri: str
    model_bytes: int
    fp32_top1_percent: float
    order: tuple[str, ...]
    fp32_p50_ms: float | None


def do_trials(study: Study, bench: Bench) -> None:
    """Return when no trial of the study waits or runs: one whose worker dies comes back to the queue."""
    waiting = False
    while True:
        if trial := queue.take_trial(study, _end_run_of_dead_worker):
            do_trial(study, bench, trial)
            waiting = False
        elif left := queue.open_trials(study):
            if not waiting:
                say(f"no trial is waiting; {left} running on other workers (repeated here if one dies)")
            waiting = True
            time.sleep(WAIT_S)
        else:
            return


def do_trial(study: Study, bench: Bench, trial: optuna.Trial) -> None:
    """Measure one trial. If measuring fails, the trial has failed, in MLflow and in the study, and the worker takes the
    next one; whatever else fails ends the worker, and the trial is done again."""
    failed = False
    try:
        params = queue.suggest(study, trial)
        with queue.alive(study, trial), tracking.start_run(f"trial-{trial.number:03d}", _in_words(params)) as run_id:
            trial.set_user_attr("run_id", run_id)
            with search_runs.logging_params(run_id, _params_of_run(bench, params)):
                try:
                    point = known_point(study, params) or measure_point(bench, params)
                except Exception:  # whatever a library raises: of this way to quantize, not of the study
                    failed = True
                    raise
            search_runs.log_trial(run_id, _metrics(point), point.top1_by_seed_percent, bench.config.seed)
    except BaseException as error:
        if not failed or not isinstance(error, Exception):
            queue.give_back(study, trial)
            raise
        say(f"trial {trial.number}: {_in_words(params)} failed: {first_line(error)}")
        queue.fail(study, trial, f"{type(error).__name__}: {error}"[:500])
        return
    if queue.finish(study, trial, point):
        say(f"trial {trial.number}: {_in_words(params)}: {_found(point)}")
    else:
        search_runs.end_as_killed(run_id, "missed heartbeats: the trial was given to another worker")
        say(f"trial {trial.number}: was given to another worker after missed heartbeats")


def _end_run_of_dead_worker(trial: FrozenTrial, again: bool) -> None:
    reason = f"its worker {trial.user_attrs.get('worker', 'unknown')} is gone"
    then = "it is done again" if again else "it is given up, since others died at it before"
    run_id = trial.user_attrs.get("run_id")
    if run_id and search_runs.end_as_killed(run_id, f"{reason}; {then}"):
        say(f"trial {trial.number}: {reason}; {then}")


def options_for(options: QuantizeConfig, order: tuple[str, ...], params: Params) -> QuantizeConfig:
    """The quantization that a trial's parameters stand for."""
    asked = list(options.keep_fp32 or ())
    more = [name for name in order if name not in asked][: params["fp32_layers"]]
    chosen = {
        "calibration_samples": params["calibration_samples"],
        "observer": params["observer"],
        "engine": [params["engine"]],
        "per_channel": params["weight_scale"] == "channel",
        "keep_fp32": asked + more or None,
    }
    return options.model_copy(update=chosen)


def measure_point(bench: Bench, params: Params) -> SearchPoint:
    """Quantize once a seed, evaluate each on the validation images; time and weigh the first.

    Raises:
        StageError: as `quantize_model`.
    """
    search = bench.config.search
    options = options_for(bench.config.quantize, bench.order, params)
    made = [quantize_with_seed(bench, options, index) for index in range(search.seeds_per_point)]
    logits = [validation_logits(bench, quantized) for quantized in made]
    labels = bench.dataset.validation.labels
    top1 = tuple(measure_accuracy(found, labels).top1_percent for found in logits)
    correct = tuple(pack(top_k_credit(found, labels, 1) > 0.5) for found in logits)
    size = made[0].size_bytes if search.objective == "top1+size" else None
    spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
    measured: dict[str, Any] = {"top1_by_seed_percent": top1, "size_bytes": size, "correct_by_seed": correct}
    if bench.fp32_p50_ms is not None:
        row = time_against_fp32(bench.model, made[0], search.latency_batch_size)
        speedup = row.speedups["int8"]
        p50 = bench.fp32_p50_ms / speedup.median
        measured |= {"speedup": speedup, "noise": row.noise, "latency_p50_ms": p50}
    return SearchPoint(**params, top1_percent=statistics.fmean(top1), spread_points=spread, **measured)


def quantize_with_seed(bench: Bench, options: QuantizeConfig, index: int) -> QuantizedModel:
    """With the calibration subset of one seed."""
    count, seed = options.calibration_samples, (bench.config.seed + index) % 2**32
    assert count is not None
    subset, _ = calibration_subset(bench.dataset.calibration_images, count, seed)
    return quantize_model(bench.model, subset.pixels(), options, not bench.host.has_int8_dot_product)


def validation_logits(bench: Bench, quantized: QuantizedModel) -> Tensor:
    """What an int8 model says of the validation images."""
    return predict_logits(quantized.module, bench.dataset.validation.images, label="int8 on validation images")


def time_against_fp32(model: Classifier, quantized: QuantizedModel | None, batch_size: int) -> LatencyRow:
    """fp32 and int8 in turns, int8 as it is after loading; without int8, fp32 against itself."""
    shape = model.spec.shape
    images = torch.rand((batch_size, *shape), generator=torch.Generator().manual_seed(0))

    def load(batch_size: int) -> dict[str, Run]:
        int8 = quantized.reloaded() if quantized else model
        again = quantized.reloaded() if quantized else model
        return {"fp32": lambda: model(images), "int8": lambda: int8(images), AGAIN: lambda: again(images)}

    options = LatencyConfig(batch_sizes=[batch_size], min_repeats=ROUNDS, min_seconds=0.0)
    with torch.no_grad():
        (row,) = measure_latency(load, "fp32", "int8", options)
    return row


def _params_of_run(bench: Bench, params: Params) -> dict[str, object]:
    """The options of quantization, as other runs have them; all other options are on the parent run."""
    quantize = options_for(bench.config.quantize, bench.order, params)
    flat = flat_params(bench.config.model_copy(update={"quantize": quantize}))
    named = {name: value for name, value in flat.items() if name.startswith("quantize.")}
    return named | {"fp32_layers": params["fp32_layers"], "worker": queue.worker_name()}


def _metrics(point: SearchPoint) -> dict[str, float]:
    values = {"val/top1_mean": point.top1_percent, "val/top1_spread": point.spread_points}
    if point.size_bytes is not None:
        values["model/size_mb"] = point.size_bytes / 1e6
    if point.speedup and point.noise and point.latency_p50_ms is not None:
        values |= {"latency/p50_ms": point.latency_p50_ms, "latency/speedup": point.speedup.median}
        values |= {"latency/speedup_low": point.speedup.low, "latency/speedup_high": point.speedup.high}
        values |= {"latency/noise_low": point.noise.low, "latency/noise_high": point.noise.high}
    return values


def _in_words(params: Params) -> str:
    scale, layers = params["weight_scale"], params["fp32_layers"]
    words = f"{params['calibration_samples']} calibration images, {params['observer']}, {params['engine']}"
    words += f", a weight scale a {scale}" if scale == "layer" else ""
    return words + (f", {layers} layers in fp32" if layers else "")


def _found(point: SearchPoint) -> str:
    text = f"validation top-1 {point.top1_percent:.2f} %"
    if point.speedup:
        text += f", {point.latency_p50_ms:.3f} ms ({point.speedup.median:.2f}x faster than fp32)"
    return text + (f", {point.size_bytes / 1e6:.3f} MB" if point.size_bytes else "")
