"""How the range of an activation is chosen from what calibration images show of it.

The same four for every engine: torch's own observers (torch.ao and torchao have classes of the same names), and a
percentile of the histogram that one of them keeps.
"""

from typing import Any

import torch
from torch import Tensor

from qexp.config import QuantizeConfig


def observer_class(kinds: Any, options: QuantizeConfig) -> Any:
    """The class of `options.observer` from the module `kinds`, torch.ao.quantization.observer or torchao's copy."""
    if options.observer == "percentile":
        return _percentile_of(kinds.HistogramObserver, options.percentile)
    names = {
        "histogram": "HistogramObserver",
        "minmax": "MinMaxObserver",
        "moving_average": "MovingAverageMinMaxObserver",
    }
    return getattr(kinds, names[options.observer])


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
