"""What a search finds: a point for each trial, and the result of all.

trials.py makes the points, which the study keeps as JSON; conclusion.py makes the result, which findings.py shows.
"""

from dataclasses import dataclass

from qexp.foundation.quantities import NotNegative, Number, Percent, Timed
from qexp.measurement.latency import Ratio


@dataclass(frozen=True)
class SearchPoint:
    """One way to quantize: validation top-1 over calibration subsets drawn with several seeds, and what it costs.

    `fp32_layers` of the most sensitive layers stayed fp32, beside those that no trial may quantize. `size_bytes` and
    `speedup` (over fp32, timed in turns) are there where the search looks at them; `latency_p50_ms` is the study's p50
    of fp32 over that speed-up, and `noise` what int8 showed against itself. `correct_by_seed` says for each seed which
    validation images int8 gets right (text made by `conclusion.pack`); empty in trials of earlier versions, and in a
    result.
    """

    calibration_samples: Number
    observer: str
    engine: str
    weight_scale: str
    fp32_layers: Number
    top1_percent: Percent
    spread_points: NotNegative
    top1_by_seed_percent: tuple[Percent, ...]
    size_bytes: Number | None = None
    latency_p50_ms: Timed | None = None
    speedup: Ratio | None = None
    noise: Ratio | None = None
    correct_by_seed: tuple[str, ...] = ()

    @property
    def cost(self) -> float | None:
        """The second objective, of which less is better: ms or bytes."""
        return self.latency_p50_ms if self.latency_p50_ms is not None else self.size_bytes


@dataclass(frozen=True)
class BelowBest:
    """How far the validation top-1 of a point lies below the best point's, and the margin within which that may be
    chance: the half width of its interval, simultaneous for all points."""

    difference_points: float
    margin_points: float

    @property
    def is_shown(self) -> bool:
        """Whether the point is worse beyond chance."""
        return self.difference_points > self.margin_points + 1e-9


@dataclass(frozen=True)
class SearchResult:
    """All points; `best` has the highest mean top-1, `front` is the Pareto front, the cheapest point first.

    `winner` is, of the points not shown to be worse than the best, the one with the smallest sample count, or the
    fastest or smallest one where there is a second objective. `below_best` says of each point how it compares with the
    best; it is empty in results of earlier versions. `noise_points` is the median of the margins. `is_paired` says
    whether they come from the same images, image by image, or from the spread between seeds alone, which leaves out
    that other images would give other figures. `fp32_cost` is that of the fp32 model, in ms or bytes.
    """

    study: str
    objective: str
    points: tuple[SearchPoint, ...]
    best: SearchPoint
    winner: SearchPoint
    front: tuple[SearchPoint, ...]
    noise_points: float
    fp32_top1_percent: float
    validation_images: int
    latency_batch_size: int | None = None
    fp32_cost: float | None = None
    failed_trials: int = 0
    below_best: tuple[BelowBest, ...] = ()
    is_paired: bool = False

    @property
    def not_told_apart(self) -> int:
        """How many points, beside the best, are not shown to be worse than it."""
        return max(0, sum(not found.is_shown for found in self.below_best) - 1)
