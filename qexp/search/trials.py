"""One trial of a search: quantize as its parameters say, and measure what the study looks at, on validation images."""

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qexp.config import Config, LatencyConfig, QuantizeConfig
from qexp.data.datasets import Dataset, calibration_subset
from qexp.measurement.accuracy import measure_accuracy, predict_logits, top_k_credit
from qexp.measurement.host import Host
from qexp.measurement.latency import AGAIN, LatencyRow, Run, measure_latency
from qexp.quantization import QuantizedModel, quantize_model
from qexp.report.results import SearchPoint
from qexp.search.paired import pack
from qexp.tracking.results import Fp32

ROUNDS = 10  # of 40 ms for each model: about a second


@dataclass(frozen=True)
class Bench:
    """What all trials of a worker use: nothing here is made or read again for a trial.

    `order` has the layers that go back to fp32, most sensitive first; `fp32_p50_ms` is what speed-ups of trials turn
    into ms with, None where no trial is timed.
    """

    config: Config
    host: Host
    dataset: Dataset
    fp32: Fp32
    order: tuple[str, ...]
    fp32_p50_ms: float | None


def options_for(options: QuantizeConfig, order: tuple[str, ...], params: dict[str, Any]) -> QuantizeConfig:
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


def measure_point(bench: Bench, params: dict[str, Any]) -> SearchPoint:
    """Quantize once a seed, evaluate each on the validation images; time and weigh the first.

    Raises:
        StageError: as `quantize_model`.
    """
    search = bench.config.search
    options = options_for(bench.config.quantize, bench.order, params)
    made = [_quantized(bench, options, index) for index in range(search.seeds_per_point)]
    logits = [_logits(bench, quantized) for quantized in made]
    labels = bench.dataset.validation.labels
    top1 = tuple(measure_accuracy(found, labels).top1_percent for found in logits)
    correct = tuple(pack(top_k_credit(found, labels, 1) > 0.5) for found in logits)
    size = made[0].saved_bytes() if search.objective == "top1+size" else None
    spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
    measured: dict[str, Any] = {"top1_by_seed_percent": top1, "size_bytes": size, "correct_by_seed": correct}
    if bench.fp32_p50_ms is not None:
        row = time_against_fp32(bench.fp32, made[0], search.latency_batch_size)
        speedup = row.speedups["int8"]
        p50 = bench.fp32_p50_ms / speedup.median
        measured |= {"speedup": speedup, "noise": row.noise, "latency_p50_ms": p50}
    return SearchPoint(**params, top1_percent=statistics.fmean(top1), spread_points=spread, **measured)


def _quantized(bench: Bench, options: QuantizeConfig, index: int) -> QuantizedModel:
    """With the calibration subset of one seed."""
    count, seed = options.calibration_samples, (bench.config.seed + index) % 2**32
    assert count is not None
    subset, _ = calibration_subset(bench.dataset.train, count, seed)
    return quantize_model(bench.fp32.model, subset.images, options, not bench.host.has_int8_dot_product)


def _logits(bench: Bench, quantized: QuantizedModel) -> Tensor:
    return predict_logits(quantized.module, bench.dataset.validation.images, label="int8 on validation images")


def time_against_fp32(fp32: Fp32, quantized: QuantizedModel | None, batch_size: int) -> LatencyRow:
    """fp32 and int8 in turns, int8 as it is after loading; without int8, fp32 against itself."""
    size = fp32.model.spec.image_size
    images = torch.rand((batch_size, 3, size, size), generator=torch.Generator().manual_seed(0))

    def prepare(batch_size: int) -> dict[str, Run]:
        int8 = quantized.reloaded() if quantized else fp32.model
        again = quantized.reloaded() if quantized else fp32.model
        return {"fp32": lambda: fp32.model(images), "int8": lambda: int8(images), AGAIN: lambda: again(images)}

    options = LatencyConfig(batch_sizes=[batch_size], min_repeats=ROUNDS, min_seconds=0.0)
    with torch.no_grad():
        (row,) = measure_latency(prepare, "fp32", "int8", options)
    return row
