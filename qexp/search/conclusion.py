"""What the points of a search say: the best, those that no other beats in both objectives, and the winner.

Fed by the points that a study keeps; job.py calls `conclude`, and findings.py shows its result. Points are compared on
the same validation images, image by image, over the seeds of calibration.
"""

import base64
import statistics
import zlib
from collections.abc import Sequence
from dataclasses import replace
from math import comb, sqrt

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri, stdtrit

from qexp.search.results import BelowBest, SearchPoint, SearchResult


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


# --- Points compared on the same images ---


def pack(correct: ArrayLike) -> str:
    """Truth values, one an image, as text: bits, compressed, in base64."""
    return base64.b64encode(zlib.compress(np.packbits(np.asarray(correct, dtype=bool)).tobytes())).decode()


def unpack(text: str, images: int) -> np.ndarray:
    """What was packed: bool [images]."""
    return np.unpackbits(np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8), count=images).astype(bool)


def compare_with_best(points: Sequence[SearchPoint], best: SearchPoint, images: int) -> tuple[BelowBest, ...] | None:
    """Every point against the best, on the same images; None where a point does not say which images it gets right.

    Images and seeds are two crossed samples: the variance of a mean difference is the sum of what images add and what
    seeds add. The first is that of the differences image by image, averaged over the seeds, with 1/2 added to each
    cell as in Agresti and Min (Statistics in Medicine 24, 2005), so that it does not vanish when nothing flips. The
    second, of few seeds, is one for all points: the interaction of points and seeds in their top-1, of the best and
    the better half of the others (the rest may be broken). With one seed it is unknown and left out. Each part
    has its own quantile, that of the seeds Student's; what single images with single seeds vary is in both, which
    errs on the wide side. The intervals hold together at 95 % (Bonferroni, over all pairs of points): the best is only
    the best as measured, and the largest of many equal ones lies above the others by chance.
    """
    seeds = min(len(point.correct_by_seed) for point in points)
    if not seeds:
        return None
    correct = [_matrix(point, seeds, images) for point in points]
    differences = [correct[points.index(best)] - of_point for of_point in correct]  # [seeds, images], -1, 0 or 1
    of_seeds, freedom = _variance_of_seeds(points, best, correct)
    level = 1 - 0.025 / max(1, comb(len(points), 2))
    z, t = float(ndtri(level)), float(stdtrit(freedom, level))
    found = []
    for point, difference in zip(points, differences, strict=True):
        margin = 0.0
        if point is not best:
            margin = 100 * sqrt(z**2 * _variance_of_images(difference.mean(axis=0)) + t**2 * of_seeds)
        found.append(BelowBest(best.top1_percent - point.top1_percent, margin))
    return tuple(found)


def _variance_of_seeds(
    points: Sequence[SearchPoint], best: SearchPoint, correct: Sequence[np.ndarray]
) -> tuple[float, int]:
    """What the choice of seeds adds to the variance of the mean difference of two points, and its degrees of freedom.

    What a seed does to all points alike cancels in a difference.
    """
    others = [(point.top1_percent, matrix) for point, matrix in zip(points, correct, strict=True) if point is not best]
    seeds = len(correct[0])
    if seeds == 1 or not others:
        return 0.0, 1
    middle = statistics.median(top1 for top1, _ in others)
    better = [matrix for top1, matrix in others if top1 >= middle] + [correct[points.index(best)]]
    top1 = np.stack([matrix.mean(axis=1) for matrix in better])  # [points, seeds]
    rest = top1 - top1.mean(axis=1, keepdims=True) - top1.mean(axis=0, keepdims=True) + top1.mean()
    freedom = (len(better) - 1) * (seeds - 1)
    return float(2 * (rest**2).sum() / freedom / seeds), freedom


def _matrix(point: SearchPoint, seeds: int, images: int) -> np.ndarray:
    return np.stack([unpack(text, images) for text in point.correct_by_seed[:seeds]]).astype(float)


def _variance_of_images(of_images: np.ndarray) -> float:
    total = len(of_images) + 2
    return float((of_images**2).sum() + 1 - of_images.sum() ** 2 / total) / total**2
