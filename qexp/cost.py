"""What a model costs apart from time: parameters, multiply-accumulates (MACs), and how many of them run in int8."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torchinfo
from torch import nn


@dataclass(frozen=True)
class Cost:
    """MACs by batch size: all (torchinfo's total_mult_adds), those of Conv2d and Linear, and those of them in int8.

    The rest is what torchinfo counts for batch norm, which is folded into the convolutions before they are quantized.
    """

    parameters: int
    macs: dict[int, int]
    conv_linear_macs: dict[int, int]
    int8_macs: dict[int, int]

    @property
    def int8_percent(self) -> float:
        """Share of the multiply-accumulates of Conv2d and Linear layers that run in int8, in percent."""
        return 100 * sum(self.int8_macs.values()) / max(1, sum(self.conv_linear_macs.values()))


def measure_cost(model: nn.Module, image_size: int, batch_sizes: Sequence[int], int8_layers: Sequence[str]) -> Cost:
    """Count on the fp32 `model`; `int8_layers` names those of its layers that the int8 model runs in int8."""
    named = dict(model.named_modules())
    quantized = {id(named[name]) for name in int8_layers}
    summaries = {batch_size: _summarize(model, image_size, batch_size) for batch_size in batch_sizes}
    layers = {
        batch_size: [layer for layer in summary.summary_list if isinstance(layer.module, nn.Conv2d | nn.Linear)]
        for batch_size, summary in summaries.items()
    }
    return Cost(
        parameters=int(summaries[batch_sizes[0]].total_params),
        macs={batch: int(summary.total_mult_adds) for batch, summary in summaries.items()},
        conv_linear_macs={batch: sum(int(layer.macs) for layer in found) for batch, found in layers.items()},
        int8_macs={
            batch: sum(int(layer.macs) for layer in found if layer.layer_id in quantized)
            for batch, found in layers.items()
        },
    )


def _summarize(model: nn.Module, image_size: int, batch_size: int) -> torchinfo.ModelStatistics:
    shape = (batch_size, 3, image_size, image_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchinfo 1.8 reads a tensor's typed storage, which torch wants to drop
        return torchinfo.summary(model, input_size=shape, verbose=0, device="cpu", mode="eval")
