"""An accuracy budget: layers go back to fp32, most sensitive first, until the drop on validation is within it.

The upper end of the drop's 95 % interval must be within the budget, as in the gate.

The number of layers in fp32 is 0 at first (beyond those of `keep_fp32`), then 1, 2, 4, 8 and so on until the drop is
within the budget; a bisection between the last two counts then looks for the smallest. That takes about 2 log2(n) tries
for n layers instead of n. It assumes that more layers in fp32 are no worse. Where the noise of few validation images
breaks this assumption, fewer layers might have been enough, but the model found is within the budget.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from qexp.config import QuantizeConfig
from qexp.errors import InputError
from qexp.foundation.quantities import Finite, Number, Points
from qexp.measurement.accuracy import Comparison, paired_drop_interval
from qexp.progress import say
from qexp.quantization import QuantizedModel, quantize_model

NAMES_IN_A_LINE = 4


@dataclass(frozen=True)
class BudgetTry:
    """One quantization: all layers that were asked to stay fp32, and fp32 minus int8 validation top-1.

    The upper end of the drop's 95 % interval decides; None in results of versions in which the drop itself did.
    """

    kept_layers: tuple[str, ...]
    validation_top1_drop_points: Points
    validation_top1_drop_high_points: Finite | None = None


@dataclass(frozen=True)
class BudgetResult:
    """All tries in their order, and whether one of them was within the budget, as `images` images show it."""

    max_top1_drop_points: Finite
    tries: tuple[BudgetTry, ...]
    met: bool
    images: Number = 0

    @property
    def least_high_points(self) -> float:
        """Upper end of the drop's interval where no image changes."""
        return paired_drop_interval(0, 0, self.images)[1]

    @property
    def too_few_images(self) -> bool:
        """Whether even a model that answers as fp32 does would not be shown to be within the budget."""
        return self.images > 0 and self.least_high_points > self.max_top1_drop_points


def quantize_within_budget(
    model: nn.Module,
    calibration_images: Tensor,
    options: QuantizeConfig,
    reduce_range: bool,
    order: tuple[str, ...],
    compared: Callable[[QuantizedModel], Comparison],
) -> tuple[QuantizedModel, BudgetResult]:
    """The int8 model with the fewest kept layers that is within the budget, else the one with the lowest upper end.

    Where there are too few images to show that any model is within the budget, the first try is the only one.

    Args:
        model, calibration_images, reduce_range: as for `quantize_model`.
        options: with one engine and `max_top1_drop`; `max_tries` limits the quantizations, the first included.
        order: names of layers, in the order in which they go back to fp32 (`most_sensitive_first`).
        compared: a model with fp32 on validation images.

    Raises:
        InputError: no budget was given.
        StageError: as `quantize_model`.
    """
    budget = options.max_top1_drop
    if budget is None:
        raise InputError("--quantize-max-top1-drop auto: a budget is a number of percentage points, 0 or more")
    asked = tuple(options.keep_fp32 or ())
    more = tuple(name for name in order if name not in asked)
    result = BudgetResult(budget, (), met=False)
    best: QuantizedModel | None = None
    lowest = math.inf
    failed, met, count = -1, None, _next_count(-1, None, len(more))
    while count is not None and len(result.tries) < options.max_tries and not result.too_few_images:
        kept = asked + more[:count]
        chosen = options.model_copy(update={"keep_fp32": list(kept)})
        quantized = quantize_model(model, calibration_images, chosen, reduce_range)
        found = compared(quantized)
        high = found.top1_drop_high_points
        if high <= budget:
            best, met = quantized, count
        else:
            failed = count
            if high < lowest:
                best = quantized
        lowest = min(lowest, high)
        tried = BudgetTry(kept, found.top1_drop_points, high)
        result = BudgetResult(budget, (*result.tries, tried), met is not None, found.images)
        _say(result, options.max_tries)
        count = _next_count(failed, met, len(more))
    assert best is not None
    return best, result


def _next_count(failed: int, met: int | None, layers: int) -> int | None:
    """How many of `layers` to keep next, None if no try is left that could tell more.

    `failed` is the largest count that was over the budget, -1 before any, `met` the smallest that was within it.
    """
    if met is None:
        return min(max(failed + 1, 2 * failed), layers) if failed < layers else None
    return (failed + met) // 2 if met - failed > 1 else None


def _say(result: BudgetResult, most_tries: int) -> None:
    tried, budget = result.tries[-1], result.max_top1_drop_points
    kept = tried.kept_layers
    names = ", ".join(kept[:NAMES_IN_A_LINE]) + (", ..." if len(kept) > NAMES_IN_A_LINE else "")
    say(
        f"accuracy budget, try {len(result.tries)} of {most_tries}: validation top-1 drop "
        f"{tried.validation_top1_drop_points:.2f} points, upper end {tried.validation_top1_drop_high_points:.2f} "
        f"(at most {budget:g}) with {len(kept)} {'layer' if len(kept) == 1 else 'layers'} kept in fp32"
        + (f": {names}" if names else "")
    )
    if result.too_few_images and not result.met:
        say(
            f"warning: accuracy budget: {result.images} validation images cannot show a drop of at most {budget:g} "
            f"points: where no image changes, the upper end is {result.least_high_points:.2f}; no more tries"
        )
