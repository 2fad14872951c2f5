"""Logits that tie count by expectation, whatever the order of the classes: values worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import with_int8
from pydantic import TypeAdapter

from qexp.files import from_json, to_json
from qexp.measurement.accuracy import Accuracy, compare, measure_accuracy, top_k_credit
from qexp.pipeline.predict import _most_likely, table
from qexp.report import sentences
from qexp.report.results import Evidence

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("logits", "k", "expected"),
    [
        ([0.0, 0.0, 0.0, 0.0, 0.0], 1, [0.2] * 5),
        ([0.0, 0.0, 0.0, 0.0, 0.0], 3, [0.6] * 5),
        ([2.0, 1.0, 1.0, 0.0, 1.0], 1, [1, 0, 0, 0, 0]),
        ([2.0, 1.0, 1.0, 0.0, 1.0], 3, [1, 2 / 3, 2 / 3, 0, 2 / 3]),  # two of the three places are left
        ([2.0, 2.0, 1.0, 1.0, 0.0], 3, [1, 1, 0.5, 0.5, 0]),
        ([2.0, 1.0, 0.5, 0.0, 0.0], 3, [1, 1, 1, 0, 0]),  # a tie below the border changes nothing
        ([INF, INF, 0.0, -INF, -INF], 1, [0.5, 0.5, 0, 0, 0]),
        ([0.0, -0.0, -1.0, -1.0, -1.0], 1, [0.5, 0.5, 0, 0, 0]),
        ([NAN, 1.0, 1.0, 0.0, 0.0], 3, [0] * 5),
    ],
)
def test_credit_by_hand(logits: list[float], k: int, expected: list[float]) -> None:
    """Of each class as the label. The credits of all classes add up to k places, whatever ties."""
    credit = top_k_credit(torch.tensor(logits).expand(5, 5), torch.arange(5), k)
    assert credit.tolist() == pytest.approx(expected)
    assert credit.sum().item() == pytest.approx(0 if math.isnan(logits[0]) else k)


def test_the_order_of_the_classes_does_not_matter() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randint(0, 4, (500, 10)).float(), torch.randint(0, 10, (500,))
    order = torch.randperm(10)
    place = order.argsort()
    assert measure_accuracy(logits[:, order], place[labels]) == measure_accuracy(logits, labels)
    ranks = (logits + 1e-3 * torch.rand(400, 500, 10)).argsort(dim=2, descending=True)  # ties broken by chance
    drawn = 100 * (ranks[..., :3] == labels[:, None]).any(2).double().mean().item()
    assert measure_accuracy(logits, labels).top3_percent == pytest.approx(drawn, abs=0.5)


def test_tied_images_are_counted() -> None:
    logits = torch.tensor([[3.0, 3.0, 0.0, 0.0], [3.0, 2.0, 1.0, 1.0], [3.0, 2.0, 1.0, 0.0]])
    found = measure_accuracy(logits, torch.tensor([1, 3, 3]))
    assert (found.top1_tied_images, found.top3_tied_images) == (1, 1)
    assert found.top1_percent == pytest.approx(100 * 0.5 / 3) and found.top1_correct == 0.5
    assert found.top3_percent == pytest.approx(100 * 1.5 / 3) and found.top3_correct == 1.5
    assert isinstance(measure_accuracy(logits[2:], torch.tensor([0])).top1_correct, int)


def test_comparison_takes_differences_of_credits() -> None:
    fp32 = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    int8 = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    found = compare(fp32, int8, torch.zeros(3, dtype=torch.int64))
    assert (found.only_fp32_correct_images, found.only_int8_correct_images) == (0.5, 0.5)
    assert found.top1_drop_points == 0 and found.agreement_percent == pytest.approx(100 * (0.5 + 1 + 0.5) / 3)
    thirds = torch.tensor([[1.0, 1.0, 1.0]]).expand(3, 3)
    whole = compare(thirds, fp32[:1].expand(3, 3), torch.zeros(3, dtype=torch.int64))
    assert whole.only_int8_correct_images == 2 and isinstance(whole.only_int8_correct_images, int)


def test_models_that_tie_do_not_agree_on_the_lower_class() -> None:
    flat = torch.zeros(1, 4)
    assert compare(flat, flat, torch.tensor([0])).agreement_percent == 25.0
    assert compare(flat, torch.eye(4)[:1], torch.tensor([0])).agreement_percent == 25.0
    broken = torch.full((1, 4), NAN)
    assert compare(broken, broken, torch.tensor([0])).agreement_percent == 0.0


def test_accuracy_of_earlier_versions_is_read_back() -> None:
    read = from_json(Accuracy, '{"top1_percent": 90.0, "top3_percent": 98.0, "images": 359}')
    assert read == Accuracy(90.0, 98.0, 359, 0, 0)
    assert from_json(Accuracy, to_json(replace(read, top3_tied_images=3))).top3_tied_images == 3


def test_whole_flips_stay_whole_in_json(evidence: Evidence) -> None:
    found = evidence.int8.comparison["test"]
    halves = replace(found, only_int8_correct_images=2.5)
    back = TypeAdapter(type(found)).validate_json(TypeAdapter(type(found)).dump_json(halves))
    assert (back.only_fp32_correct_images, back.only_int8_correct_images) == (5, 2.5)
    assert isinstance(back.only_fp32_correct_images, int)


def test_the_report_says_what_ties(evidence: Evidence) -> None:
    assert "the label ties" not in " ".join(sentences.accuracy(evidence))
    tied = with_int8(evidence, accuracy={**evidence.int8.accuracy, "test": Accuracy(93.5, 98.25, 359, 1, 3)})
    (said,) = (sentence for sentence in sentences.accuracy(tied) if sentence.startswith("In int8, the label ties"))
    assert "the top 1 on 1 and" in said and "the top 3 on 3 of 359 test images" in said
    halves = replace(evidence.int8.comparison["test"], only_fp32_correct_images=1.5)
    split = with_int8(evidence, comparison={**evidence.int8.comparison, "test": halves})
    assert "Only fp32 is right on 1.50 images, only int8 on 3." in sentences.accuracy(split)[1]


def test_predictions_say_that_others_are_as_likely() -> None:
    (found,) = _most_likely(["a.png"], torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]]), list("vwxyz"), 2)
    assert found.classes == ("v", "w") and found.equal_left_out == 2
    assert found.probabilities[1] == pytest.approx(1 / (3 + torch.e + torch.e**-1), abs=1e-6)
    assert table([found])[0].endswith("2 more as likely as the last")
    (clear,) = _most_likely(["a.png"], torch.tensor([[3.0, 2.0, 1.0, 1.0, 0.0]]), list("vwxyz"), 2)
    assert clear.equal_left_out == 0 and "likely" not in table([clear])[0]
    (all_of_them,) = _most_likely(["a.png"], torch.zeros(1, 3), list("abc"), 5)
    assert all_of_them.equal_left_out == 0 and all_of_them.probabilities == pytest.approx((1 / 3,) * 3)
