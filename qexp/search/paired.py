"""Points of a search compared on the same validation images, image by image, over the seeds of calibration."""

import base64
import zlib
from collections.abc import Sequence
from math import comb, sqrt
from statistics import NormalDist, fmean, median

import numpy as np
from numpy.typing import ArrayLike

from qexp.evidence import BelowBest, SearchPoint


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
    second, of few seeds, is pooled over the better half of the other points (the rest may be broken). With one seed it
    is unknown and left out. The intervals hold together at 95 % (Bonferroni, over all pairs of points): the best is
    only the best as measured, and the largest of many equal ones lies above the others by chance.
    """
    seeds = min(len(point.correct_by_seed) for point in points)
    if not seeds:
        return None
    correct = {id(point): _matrix(point, seeds, images) for point in points}
    differences = [correct[id(best)] - correct[id(point)] for point in points]  # [seeds, images], -1, 0 or 1
    of_seeds = _pooled_variance_of_seeds(points, best, differences) if seeds > 1 else 0.0
    z = NormalDist().inv_cdf(1 - 0.025 / max(1, comb(len(points), 2)))
    found = []
    for point, difference in zip(points, differences, strict=True):
        margin = 0.0 if point is best else z * sqrt(_variance_of_images(difference.mean(axis=0)) + of_seeds)
        found.append(BelowBest(best.top1_percent - point.top1_percent, 100 * margin))
    return tuple(found)


def _pooled_variance_of_seeds(
    points: Sequence[SearchPoint], best: SearchPoint, differences: Sequence[np.ndarray]
) -> float:
    others = [(point.top1_percent, d) for point, d in zip(points, differences, strict=True) if point is not best]
    middle = median(top1 for top1, _ in others) if others else 0.0
    variances = [_variance_of_seeds(d) for top1, d in others if top1 >= middle]
    return max(0.0, fmean(variances)) if variances else 0.0


def _matrix(point: SearchPoint, seeds: int, images: int) -> np.ndarray:
    return np.stack([unpack(text, images) for text in point.correct_by_seed[:seeds]]).astype(float)


def _variance_of_images(of_images: np.ndarray) -> float:
    total = len(of_images) + 2
    return float((of_images**2).sum() + 1 - of_images.sum() ** 2 / total) / total**2


def _variance_of_seeds(difference: np.ndarray) -> float:
    """What the choice of seeds adds to the variance of the mean of differences [seeds, images]: that of the seeds'
    means, less what the images of each would bring by themselves."""
    seeds, images = difference.shape
    of_seed, of_image = difference.mean(axis=1, keepdims=True), difference.mean(axis=0, keepdims=True)
    rest = difference - of_seed - of_image + difference.mean()
    residual = (rest**2).sum() / ((seeds - 1) * max(1, images - 1))
    return float((of_seed.var(ddof=1) - residual / images) / seeds)
