"""Accuracy with ties, NaN and few classes; the paired comparison by hand; how often its interval covers the truth."""

import numpy as np
import pytest
import torch
from torch import Tensor

from qexp.measurement.accuracy import (
    compare,
    measure_accuracy,
    paired_drop_interval,
    predict_logits,
    share_interval,
    to_float,
    top_k_credit,
)

NAN, INF = float("nan"), float("inf")


def _logits(best: list[int], classes: int = 4) -> Tensor:
    """Logits whose largest is at these classes; the lower numbers follow."""
    return torch.nn.functional.one_hot(torch.tensor(best), classes).float()


def test_to_float_maps_0_to_255_onto_0_to_1() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert to_float(pixels).tolist() == pytest.approx([0.0, 0.2, 1.0])
    assert pixels.tolist() == [0, 51, 255]


def test_logits_come_in_the_order_of_the_images() -> None:
    images = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1).expand(-1, 3, 2, 2)
    sizes: list[int] = []

    def model(batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        return batch.mean((2, 3)).double() * 255

    logits = predict_logits(model, images, batch_size=3)
    assert logits.dtype == torch.float32 and sizes == [3, 3, 1]
    assert logits[:, 0].tolist() == pytest.approx([0, 1, 2, 3, 4, 5, 6])


def test_logits_are_made_without_gradients() -> None:
    layer = torch.nn.Conv2d(3, 2, 1)
    images = torch.zeros(2, 3, 1, 1, dtype=torch.uint8)
    assert not predict_logits(lambda batch: layer(batch).flatten(1), images).requires_grad


@pytest.mark.parametrize(
    ("label", "top1", "top3"), [(0, False, True), (1, False, False), (2, False, True), (3, True, True)]
)
def test_top_k_by_hand(label: int, top1: bool, top3: bool) -> None:
    logits, labels = torch.tensor([[0.5, 0.1, 0.2, 0.9]]), torch.tensor([label])
    assert top_k_credit(logits, labels, 1).tolist() == [top1]
    assert top_k_credit(logits, labels, 3).tolist() == [top3]


def test_logits_with_nan_are_wrong() -> None:
    logits = torch.tensor([[NAN, 0.0, 0.0], [9.0, NAN, 0.0], [NAN, NAN, NAN], [9.0, 0.0, 0.0], [INF, 0.0, -INF]])
    labels = torch.zeros(5, dtype=torch.int64)
    assert top_k_credit(logits, labels, 1).tolist() == [False, False, False, True, True]
    assert top_k_credit(logits, labels, 3).tolist() == [False, False, False, True, True]


def test_with_two_classes_top_3_is_always_right() -> None:
    accuracy = measure_accuracy(_logits([0, 0, 1, 1], classes=2), torch.tensor([0, 1, 0, 1]))
    assert (accuracy.top1_percent, accuracy.top3_percent, accuracy.images) == (50.0, 100.0, 4)


def test_accuracy_by_hand() -> None:
    accuracy = measure_accuracy(_logits([0, 1, 2, 3, 3]), torch.tensor([0, 1, 0, 3, 2]))
    assert (accuracy.top1_percent, accuracy.images) == (60.0, 5)
    # The other classes tie, and two of three are among the best three: 3 + 2 * 2 / 3 of 5.
    assert accuracy.top3_percent == pytest.approx(100 * (3 + 4 / 3) / 5)
    assert (accuracy.top1_tied_images, accuracy.top3_tied_images) == (0, 2)


def test_comparison_by_hand() -> None:
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0, 1])
    fp32 = _logits([0, 1, 2, 3, 0, 1, 2, 0, 1, 2])  # the last three wrong
    int8 = _logits([0, 1, 2, 3, 1, 0, 3, 0, 0, 3])  # loses three, gains one, two stay wrong
    found = compare(fp32, int8, labels)
    assert (found.only_fp32_correct_images, found.only_int8_correct_images, found.images) == (3, 1, 10)
    assert found.top1_drop_points == pytest.approx(20.0)
    assert found.agreement_percent == pytest.approx(50.0)
    assert found.top3_drop_points == pytest.approx(100 * 2 / 3 / 10)  # five images and three whose label ties, at 2/3
    assert found.top1_drop_low_points < 20 < found.top1_drop_high_points


def test_a_better_int8_model_has_a_negative_drop() -> None:
    labels = torch.tensor([0, 1, 2, 3])
    found = compare(_logits([0, 1, 2, 2]), _logits([0, 1, 2, 3]), labels)
    assert found.top1_drop_points == -25.0
    assert (found.only_fp32_correct_images, found.only_int8_correct_images) == (0, 1)
    assert found.top1_drop_low_points < -25 + 25 and found.top1_drop_high_points > -25


def test_interval_by_hand() -> None:
    """8 lost, 2 gained of 98: total 100, drop (8.5 - 2.5) / 100, variance (11 - 36 / 100) / 100²."""
    low, high = paired_drop_interval(8, 2, 98)
    assert (low, high) == pytest.approx((6 - 1.959964 * 10.64**0.5, 6 + 1.959964 * 10.64**0.5))


def test_interval_turns_round_when_the_models_change_places() -> None:
    low, high = paired_drop_interval(8, 2, 98)
    assert paired_drop_interval(2, 8, 98) == pytest.approx((-high, -low))


def test_interval_has_a_width_when_nothing_flips() -> None:
    low, high = paired_drop_interval(0, 0, 1000)
    assert low == -high and 0.1 < high < 0.5
    assert paired_drop_interval(0, 0, 100)[1] > high  # fewer images say less
    labels = torch.tensor([0, 1, 2, 3])
    same = compare(_logits([0, 1, 2, 2]), _logits([0, 1, 2, 2]), labels)
    assert same.top1_drop_points == 0 and same.agreement_percent == 100
    assert same.top1_drop_low_points < 0 < same.top1_drop_high_points


@pytest.mark.parametrize(("lost", "gained", "images"), [(0.03, 0.01, 1000), (0.05, 0.05, 359), (0.01, 0.004, 2000)])
def test_interval_covers_the_true_drop_in_95_of_100_pairs(lost: float, gained: float, images: int) -> None:
    random = np.random.RandomState(0)
    counts = random.multinomial(images, [lost, gained, 1 - lost - gained], size=4000)
    truth = 100 * (lost - gained)
    intervals = [paired_drop_interval(int(b), int(c), images) for b, c, _ in counts]
    covered = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.92 <= covered <= 0.98


def test_interval_of_a_share_never_leaves_0_to_100_and_narrows() -> None:
    low, high = share_interval(90.0, 100)
    assert (low, high) == pytest.approx((82.56, 94.48), abs=0.01)  # Wilson's, as tables have it
    assert share_interval(100.0, 359)[1] == pytest.approx(100.0) and share_interval(0.0, 359)[0] == pytest.approx(0.0)
    assert share_interval(90.0, 10_000)[0] > low
