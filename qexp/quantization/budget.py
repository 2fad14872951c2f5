"""An accuracy budget: layers go back to fp32, most sensitive first, until the drop on validation is within it.

How many: none at first (beyond those of `keep_fp32`), then 1, 2, 4, 8 and so on until the drop is within the budget;
then a bisection between the last two counts looks for the fewest. That takes about 2 log2 of the layers needed, where
one layer a try would take all of them. It supposes that more layers in fp32 are no worse. Where the noise of few
validation images breaks this, fewer layers might have done, but the model is within the budget all the same.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from qexp.config import QuantizeConfig
from qexp.errors import InputError
from qexp.progress import say
from qexp.quantization import QuantizedModel, quantize_model

NAMES_IN_A_LINE = 4


@dataclass(frozen=True)
class BudgetTry:
    """One quantization: all layers that were asked to stay fp32, and fp32 minus int8 validation top-1."""

    kept_layers: tuple[str, ...]
    validation_top1_drop_points: float


@dataclass(frozen=True)
class BudgetResult:
    """All tries in their order, and whether one of them was within the budget."""

    max_top1_drop_points: float
    tries: tuple[BudgetTry, ...]
    met: bool


def quantize_within_budget(
    model: nn.Module,
    calibration_images: Tensor,
    options: QuantizeConfig,
    reduce_range: bool,
    order: tuple[str, ...],
    drop_of: Callable[[QuantizedModel], float],
) -> tuple[QuantizedModel, BudgetResult]:
    """The int8 model with the fewest kept layers that is within the budget, else the try with the smallest drop.

    Args:
        model, calibration_images, reduce_range: as for `quantize_model`.
        options: with one engine and `max_top1_drop`; `max_tries` limits the quantizations, the first included.
        order: names of layers, in the order in which they go back to fp32 (`most_sensitive_first`).
        drop_of: fp32 minus int8 top-1 on validation images, percentage points.

    Raises:
        InputError: no budget was given.
        StageError: as `quantize_model`.
    """
    budget = options.max_top1_drop
    if budget is None:
        raise InputError("--quantize-max-top1-drop auto: a budget is a number of percentage points, 0 or more")
    asked = tuple(options.keep_fp32 or ())
    more = tuple(name for name in order if name not in asked)
    tries: list[BudgetTry] = []
    best: QuantizedModel | None = None
    failed, met, count = -1, None, _next_count(-1, None, len(more))
    while count is not None and len(tries) < options.max_tries:
        kept = asked + more[:count]
        chosen = options.model_copy(update={"keep_fp32": list(kept)})
        quantized = quantize_model(model, calibration_images, chosen, reduce_range)
        drop = drop_of(quantized)
        if drop <= budget:
            best, met = quantized, count
        else:
            failed = count
            if met is None and all(drop < earlier.validation_top1_drop_points for earlier in tries):
                best = quantized
        tries.append(BudgetTry(kept, drop))
        _say(tries, budget, options.max_tries)
        count = _next_count(failed, met, len(more))
    assert best is not None
    return best, BudgetResult(budget, tuple(tries), met is not None)


def _next_count(failed: int, met: int | None, layers: int) -> int | None:
    """How many of `layers` to keep next, None if no try is left that could tell more.

    `failed` is the largest count that was over the budget, -1 before any, `met` the smallest that was within it.
    """
    if met is None:
        return min(max(failed + 1, 2 * failed), layers) if failed < layers else None
    return (failed + met) // 2 if met - failed > 1 else None


def _say(tries: list[BudgetTry], budget: float, most_tries: int) -> None:
    kept, drop = tries[-1].kept_layers, tries[-1].validation_top1_drop_points
    names = ", ".join(kept[:NAMES_IN_A_LINE]) + (", ..." if len(kept) > NAMES_IN_A_LINE else "")
    say(
        f"accuracy budget, try {len(tries)} of {most_tries}: validation top-1 drop {drop:.2f} points "
        f"(at most {budget:g}) with {len(kept)} {'layer' if len(kept) == 1 else 'layers'} kept in fp32"
        + (f": {names}" if names else "")
    )
