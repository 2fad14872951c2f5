"""What the points of a search say: the best, those that no other beats in both objectives, and the one to take."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from math import sqrt

from qexp.report.results import BelowBest, SearchPoint, SearchResult
from qexp.search.paired import compare_with_best


def conclude(
    study: str, objective: str, points: Sequence[SearchPoint], fp32_top1_percent: float, validation_images: int
) -> SearchResult:
    """The best point, the Pareto front, and the winner: the cheapest of all that are not shown to be worse than the
    best on the same images."""
    points = sorted({_key(point): point for point in points}.values(), key=_key)
    best = max(points, key=lambda point: (point.top1_percent, -point.calibration_samples))
    paired = compare_with_best(points, best, validation_images)
    below = paired or _from_spread(points, best, validation_images)
    margins = [found.margin_points for point, found in zip(points, below, strict=True) if point is not best]
    near = [_plain(point) for point, found in zip(points, below, strict=True) if not found.is_shown]
    plain = tuple(_plain(point) for point in points)
    return SearchResult(
        study, objective, plain, _plain(best), _winner(near), pareto_front(plain),
        statistics.median(margins) if margins else 100 / validation_images, fp32_top1_percent, validation_images,
        below_best=below, is_paired=paired is not None,
    )  # fmt: skip


def _from_spread(points: Sequence[SearchPoint], best: SearchPoint, images: int) -> tuple[BelowBest, ...]:
    """For trials of earlier versions, which do not say which images are right: the margin is twice the standard error
    of the difference of two means, from the spread between seeds pooled over the better half of the points (of the
    others, some may be broken), and at least one validation image."""
    middle = statistics.median(point.top1_percent for point in points)
    pooled = sqrt(statistics.fmean(point.spread_points**2 for point in points if point.top1_percent >= middle))
    seeds = min(len(point.top1_by_seed_percent) for point in points)
    margin = max(2 * pooled * sqrt(2 / seeds), 100 / images)
    return tuple(BelowBest(best.top1_percent - point.top1_percent, margin) for point in points)


def _plain(point: SearchPoint) -> SearchPoint:
    """Without what belongs to single images, which the study keeps."""
    return replace(point, correct_by_seed=())


def pareto_front(points: Sequence[SearchPoint]) -> tuple[SearchPoint, ...]:
    """Points that no other one beats in one objective without losing in the other, the cheapest first; of equal
    ones, all.

    Without a second objective: the best point alone. By what was measured; noise is not considered.
    """
    front: list[SearchPoint] = []
    for point in sorted(points, key=lambda point: (point.cost or 0.0, -point.top1_percent)):
        last = front[-1] if front else None
        if last is None or point.top1_percent > last.top1_percent or _as_good(point, last):
            front.append(point)
    return tuple(front)


def _as_good(point: SearchPoint, other: SearchPoint) -> bool:
    return point.cost is not None and (point.cost, point.top1_percent) == (other.cost, other.top1_percent)


def _winner(near: Sequence[SearchPoint]) -> SearchPoint:
    """The smallest sample count; where there is a second objective, the most accurate of those that are as cheap as
    the cheapest, as far as the intervals can tell."""
    if near[0].cost is None:
        return min(near, key=lambda point: (point.calibration_samples, -point.top1_percent))
    cheapest = min(near, key=lambda point: point.cost or 0.0)
    alike = [point for point in near if _as_cheap(point, cheapest)]
    return min(alike, key=lambda point: (-point.top1_percent, point.calibration_samples, point.cost))


def _as_cheap(point: SearchPoint, cheapest: SearchPoint) -> bool:
    if point.speedup is None or cheapest.speedup is None:
        return point.cost == cheapest.cost
    return point.speedup.high >= cheapest.speedup.low


def _key(point: SearchPoint) -> tuple[int | str, ...]:
    return point.calibration_samples, point.observer, point.engine, point.weight_scale, point.fp32_layers
