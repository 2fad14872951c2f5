"""Observers: how the range of an activation is chosen from the values that calibration images give it.

Every engine has the same four, built on torch's own (torch.ao and torchao have classes of the same names):

- `minmax`: the smallest and the largest value.
- `histogram`: the range inside these that makes the squared error of quantization smallest, found in a histogram of all
  values.
- `percentile`: from the same histogram, the range that leaves out equal shares of the values at both ends.
- `batch_average`: the means, over all batches, of the smallest and of the largest value of a batch. torch's moving
  average is not used: it moves by 1 % a batch, so that after some dozens of batches the first one still dominates.

None depends on the order of the batches, except by rounding and by the bins with which a histogram begins.
"""

from typing import Any

import torch
from torch import Tensor

from qexp.config import QuantizeConfig


def observer_class(kinds: Any, options: QuantizeConfig) -> Any:
    """The class of `options.observer` from the module `kinds`, torch.ao.quantization.observer or torchao's copy."""
    if options.observer == "percentile":
        return _percentile_of(kinds.HistogramObserver, options.percentile)
    if options.observer == "batch_average":
        return _batch_average_of(kinds.MinMaxObserver)
    return {"histogram": kinds.HistogramObserver, "minmax": kinds.MinMaxObserver}[options.observer]


def calibration_batches(images: Tensor, most: int) -> tuple[Tensor, ...]:
    """Images [N, …] in as few batches of at most `most` as there can be, whose sizes differ by one at most: each batch
    counts alike in `batch_average`, so none may be much smaller than the others."""
    return images.tensor_split(-(-len(images) // most))


def _batch_average_of(minmax_observer: Any) -> Any:
    """`minmax_observer` with the means of the batches' extremes instead of the extremes of all."""

    class BatchAverageObserver(minmax_observer):
        batches = 0

        def forward(self, values: Tensor) -> Tensor:
            if values.numel() == 0:
                return values
            low, high = torch.aminmax(values.detach().to(self.min_val.dtype))
            self.batches += 1
            for kept, found in ((self.min_val, low), (self.max_val, high)):
                mean = found if self.batches == 1 else kept + (found - kept) / self.batches
                kept.resize_(mean.shape).copy_(mean)
            return values

    return BatchAverageObserver


def below(observer: Any, limit: float) -> Any:
    """`observer` of values that end at a limit, and that it hands on with this end."""

    class LimitedObserver(observer):
        def forward(self, values: Tensor) -> Tensor:
            return super().forward(values.clamp(max=limit))

    return LimitedObserver


def _percentile_of(histogram_observer: Any, percent: float) -> Any:
    """`histogram_observer` with a range that leaves out equal shares of the values at both ends."""

    class PercentileObserver(histogram_observer):
        def _non_linear_param_search(self) -> tuple[Tensor, Tensor]:
            left_out = (100 - percent) / 200
            shares = torch.cumsum(self.histogram.double(), 0) / self.histogram.double().sum()
            first = int((shares <= left_out).sum())
            last = int((shares < 1 - left_out).sum())
            width = (self.max_val - self.min_val) / self.bins
            return self.min_val + first * width, self.min_val + min(last + 1, self.bins) * width

    return PercentileObserver
