"""Points of a search compared on the same validation images, image by image, over the seeds of calibration."""

import base64
import zlib
from collections.abc import Sequence
from math import comb, sqrt
from statistics import median

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri, stdtrit

from qexp.report.results import BelowBest, SearchPoint


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
    middle = median(top1 for top1, _ in others)
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
