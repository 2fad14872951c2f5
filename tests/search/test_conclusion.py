"""The conclusion of a search, from points made by hand."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qexp.files import from_json, to_json
from qexp.measurement.latency import Ratio
from qexp.search import findings
from qexp.search.conclusion import conclude, pack, pareto_front, unpack
from qexp.search.results import SearchPoint, SearchResult


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
    findings.save_figures(result, tmp_path)
    with Image.open(tmp_path / f"{name}.png") as image:
        assert image.width >= 500 and image.height >= 350
    assert from_json(SearchResult, to_json(result)) == result


def _measured(count: int, correct: np.ndarray, **more: Any) -> SearchPoint:
    """A point from truth values [seeds, images]."""
    return replace(
        _point(count, *(100 * correct.mean(axis=1)).tolist(), **more), correct_by_seed=tuple(map(pack, correct))
    )


@pytest.mark.parametrize("images", [1, 7, 8, 144, 5000])
def test_which_images_are_right_survives_packing(images: int) -> None:
    correct = np.random.RandomState(images).rand(images) < 0.9
    text = pack(correct)
    assert (unpack(text, images) == correct).all() and len(text) < images / 6 + 40


def test_one_image_is_no_difference_with_one_seed() -> None:
    right = np.ones((1, 256), bool)
    points = []
    for count, wrong in ((8, 40), (16, 4), (32, 1), (64, 0)):
        correct = right.copy()
        correct[0, :wrong] = False
        points.append(_measured(count, correct))
    result = _conclude(points, images=256)
    assert result.is_paired and result.winner.calibration_samples == 16 and result.not_told_apart == 2
    assert [found.is_shown for found in result.below_best] == [True, False, False, False]
    assert not any(point.correct_by_seed for point in (*result.points, *result.front, result.winner, result.best))
    assert "with one calibration subset, what others would give is unknown" in findings._note(result)


def test_the_same_images_tell_more_than_the_same_figures() -> None:
    """Ten images lost and none gained is a difference; 30 lost and 20 gained is none."""
    best, lost, mixed = (np.ones((1, 500), bool) for _ in range(3))
    best[0, :20] = lost[0, :30] = False
    mixed[0, 20:50] = False
    for other, shown in ((lost, True), (mixed, False)):
        result = _conclude([_measured(8, other), _measured(16, best)], images=500)
        assert result.below_best[0].difference_points == pytest.approx(2)
        assert result.below_best[0].is_shown is shown


def test_a_spread_between_seeds_widens_the_margin() -> None:
    """The same mean difference, from every seed alike or from one seed alone."""
    best = np.ones((3, 2000), bool)
    steady, wild = best.copy(), best.copy()
    steady[:, :30] = False
    wild[0, :90] = False
    margins = [
        _conclude([_measured(8, other), _measured(16, best)], images=2000).below_best[0] for other in (steady, wild)
    ]
    assert margins[0].difference_points == pytest.approx(margins[1].difference_points)
    assert margins[0].is_shown and not margins[1].is_shown


@pytest.mark.parametrize("seeds", [1, 3])
def test_equal_points_are_told_apart_in_one_study_of_twenty_at_most(seeds: int) -> None:
    """Each image has a chance of its own, which all points share, and each trial draws anew."""
    random, images, studies = np.random.RandomState(0), 300, 200
    false_findings = 0
    for _ in range(studies):
        chance = np.where(random.rand(images) < 0.9, 0.99, random.rand(images))
        points = [_measured(n + 1, random.rand(seeds, images) < chance) for n in range(8)]
        false_findings += any(found.is_shown for found in _conclude(points, images=images).below_best)
    assert false_findings <= 0.05 * studies + 2 * (0.05 * 0.95 * studies) ** 0.5


def test_a_study_with_trials_of_an_earlier_version_falls_back_and_says_so() -> None:
    old, new = _point(8, 89.8, 90.0), _measured(512, np.random.RandomState(0).rand(2, 5000) < 0.9)
    result = _conclude([old, new])
    assert not result.is_paired and "trials of an earlier version" in findings._note(result)
    later = ("below_best", "is_paired")
    text = json.dumps({key: value for key, value in json.loads(to_json(result)).items() if key not in later})
    assert from_json(SearchResult, text).below_best == ()
