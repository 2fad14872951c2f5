"""The conclusion of a search, from points made by hand."""

import random
from pathlib import Path

import pytest
from PIL import Image

from qexp.evidence import SearchPoint, SearchResult, from_json, to_json
from qexp.latency import Ratio
from qexp.search import figures
from qexp.search.conclusion import conclude, pareto_front


def _point(
    count: int, *top1: float, ms: float | None = None, noise: float = 0.01, size: int | None = None
) -> SearchPoint:
    spread = max(top1) - min(top1)
    speedup = None if ms is None else Ratio(1 / ms, 1 / ms * (1 - noise), 1 / ms * (1 + noise))
    return SearchPoint(
        count, "histogram", "fx", "channel", 0, sum(top1) / len(top1), spread, top1, size, ms, speedup, speedup
    )


def _conclude(points: list[SearchPoint], images: int = 5000, objective: str = "top1"):  # type: ignore[no-untyped-def]
    return conclude("study", objective, points, 90.0, validation_images=images)


def test_winner_is_the_smallest_count_within_noise_of_the_best() -> None:
    result = _conclude([_point(8, 80.0, 80.0), _point(32, 89.8, 90.0), _point(512, 90.0, 90.2)])
    assert (result.best.calibration_samples, result.winner.calibration_samples) == (512, 32)
    assert result.front == (result.best,)


def test_without_spread_a_difference_of_one_validation_image_is_noise() -> None:
    points = [_point(8, 90.0, 90.0), _point(32, 91.0, 91.0), _point(64, 92.0, 92.0)]
    assert _conclude(points, images=100).winner.calibration_samples == 32
    assert _conclude(points, images=1000).winner.calibration_samples == 64


def test_broken_points_do_not_widen_the_noise() -> None:
    points = [_point(4, 10.0, 60.0), _point(8, 20.0, 70.0), _point(32, 90.0, 90.2), _point(64, 91.0, 91.2)]
    assert _conclude(points).winner.calibration_samples == 64


def test_winner_of_two_objectives_is_the_fastest_within_noise_of_the_best() -> None:
    points = [_point(8, 85.0, 85.1, ms=0.2), _point(16, 89.9, 90.0, ms=0.5), _point(32, 90.0, 90.1, ms=1.0)]
    result = _conclude(points, objective="top1+latency")
    assert (result.best.calibration_samples, result.winner.calibration_samples) == (32, 16)
    assert [point.calibration_samples for point in result.front] == [8, 16, 32]


def test_of_points_that_cannot_be_told_apart_in_speed_the_most_accurate_wins() -> None:
    points = [_point(16, 89.9, 90.0, ms=0.50, noise=0.05), _point(32, 90.0, 90.1, ms=0.51, noise=0.05)]
    assert _conclude(points, objective="top1+latency").winner.calibration_samples == 32
    assert _conclude([_point(16, 90.0, size=100), _point(32, 90.0, size=101)]).winner.calibration_samples == 16


def test_nothing_beats_a_point_of_the_front_and_something_beats_every_other() -> None:
    draw = random.Random(0)
    points = [_point(n + 1, float(draw.randint(80, 90)), size=draw.randint(1, 12)) for n in range(60)]
    front = pareto_front(points)

    def beaten(point: SearchPoint) -> bool:
        return any(
            (other.top1_percent, -(other.cost or 0)) != (point.top1_percent, -(point.cost or 0))
            and other.top1_percent >= point.top1_percent
            and (other.cost or 0) <= (point.cost or 0)
            for other in points
        )

    assert len({(point.top1_percent, point.cost) for point in front}) > 1
    assert {point.calibration_samples for point in front} == {p.calibration_samples for p in points if not beaten(p)}


def test_of_equal_points_the_front_has_all() -> None:
    points = [_point(8, 90.0, size=2), _point(16, 90.0, size=2), _point(32, 89.0, size=2), _point(64, 89.0, size=1)]
    assert [point.calibration_samples for point in pareto_front(points)] == [64, 8, 16]
    assert len(pareto_front([_point(8, 90.0), _point(16, 90.0)])) == 1  # of one objective there is no front


def test_a_point_that_was_measured_twice_counts_once() -> None:
    assert len(_conclude([_point(8, 90.0), _point(8, 90.0), _point(16, 91.0)]).points) == 2


@pytest.mark.parametrize(
    ("objective", "name"), [("top1", "search"), ("top1+latency", "pareto"), ("top1+size", "pareto")]
)
def test_figure_and_json(objective: str, name: str, tmp_path: Path) -> None:
    cost = {"top1": {}, "top1+latency": {"ms": 0.5}, "top1+size": {"size": 450_000}}[objective]
    result = _conclude([_point(count, 94.0, 94.0 + count / 512, **cost) for count in (8, 64, 512)], 144, objective)
    figures.save_figures(result, tmp_path)
    with Image.open(tmp_path / f"{name}.png") as image:
        assert image.width >= 500 and image.height >= 350
    assert from_json(SearchResult, to_json(result)) == result
