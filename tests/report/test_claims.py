"""Every sentence of the report, with values that make it true and with the opposite ones."""

from dataclasses import replace
from typing import Any

import pytest
from conftest import with_gate, with_int8, with_speedups

from qexp.data.duplicates import Duplicates
from qexp.measurement.accuracy import Accuracy, Comparison
from qexp.measurement.cost import TORCHINFO
from qexp.measurement.gate import GateResult, Succession
from qexp.models.contents import FileContents
from qexp.report import claims
from qexp.report.results import Evidence


def _with_comparison(evidence: Evidence, **changed: float) -> Evidence:
    comparison = {**evidence.int8.comparison, "test": replace(evidence.int8.comparison["test"], **changed)}
    return with_int8(evidence, comparison=comparison)


def _with_train(evidence: Evidence, **changed: object) -> Evidence:
    return replace(evidence, fp32=replace(evidence.fp32, train=replace(evidence.fp32.train, **changed)))


def _with_cost(evidence: Evidence, **changed: object) -> Evidence:
    """Of the int8 model and, but for what runs in int8, of the fp32 model; all of new `macs` are of layers in int8."""
    if "macs" in changed:
        changed = {"conv_linear_macs": changed["macs"], "int8_macs": changed["macs"]} | changed
    counted = {name: value for name, value in changed.items() if name != "int8_macs"}
    fp32_cost = replace(evidence.int8.fp32_cost, **counted)
    return with_int8(evidence, cost=replace(evidence.int8.cost, **changed), fp32_cost=fp32_cost)


def _with_sizes(evidence: Evidence, fp32_bytes: int, int8_bytes: int) -> Evidence:
    return with_int8(replace(evidence, fp32=replace(evidence.fp32, size_bytes=fp32_bytes)), size_bytes=int8_bytes)


# --- the answer


def test_answer_of_a_model_that_can_ship(evidence: Evidence) -> None:
    text = claims.answer(with_speedups(evidence, {1: 4.0, 8: 10.0}))
    assert text.startswith("**Ship int8**: top-1 drop 0.50 points (at most 1). Ship `models:/smallnet-digits-int8/1`.")
    assert "falls by 0.50 points" in text
    assert "the file is 4.00x smaller" in text
    assert (
        "Against the fastest float at each batch size (fp32), int8 is faster at every batch size: 4.00x to 10.00x"
        in text
    )
    assert text.endswith("Over the registered fp32 program, int8 is 4.00x to 10.00x as fast.")


def test_answer_when_everything_went_wrong(evidence: Evidence) -> None:
    worse = with_speedups(_with_sizes(evidence, 450_000, 1_800_000), {1: 0.5, 8: 0.8})
    failed = GateResult("failed", ("too slow",), ("min_speedup",))
    text = claims.answer(with_gate(_with_comparison(worse, top1_drop_points=-0.25), failed))
    assert text.startswith("**Keep float**: too slow. Ship `models:/smallnet-digits-fp32/1`.")
    assert "rises by 0.25 points" in text
    assert "the file is 4.00x larger" in text
    assert "int8 is slower at every batch size: 0.50x to 0.80x as fast" in text
    assert "faster" not in text and "smaller" not in text


def test_answer_when_nothing_changed(evidence: Evidence) -> None:
    level = with_speedups(_with_sizes(evidence, 1000, 1000), {1: 1.0, 8: 1.0})
    text = claims.answer(_with_comparison(level, top1_drop_points=0.0))
    assert text.startswith("**Ship int8 for its size only**")
    assert "does not change" in text and "not smaller" in text
    assert "int8 is not shown to be faster or slower at every batch size (at a confidence" in text


# --- training


def test_training_to_the_end(evidence: Evidence) -> None:
    length, kept, fit = claims.training(evidence)
    assert length == "Training took 3 epochs and 12 s; it ran to the configured number of epochs."
    best = "The weights of epoch 3 were kept, for the best validation top-1 during training (65.00 %)"
    assert kept == f"{best}; of equal ones, the lowest loss decides."
    assert fit == "fp32 top-1 on the training images is 3.00 points above that on the test images."


def test_training_that_stopped_early(evidence: Evidence) -> None:
    length, kept, _ = claims.training(_with_train(evidence, stopped_early=True, best_epoch=2))
    assert "early stopping ended it" in length and "configured number" not in length
    assert "epoch 2 were kept" in kept and "(55.00 %)" in kept


def test_training_of_one_epoch(evidence: Evidence) -> None:
    one = _with_train(evidence, epochs=evidence.fp32.train.epochs[:1], best_epoch=1)
    assert "took 1 epoch and" in claims.training(one)[0]


def test_training_images_worse_than_test_images(evidence: Evidence) -> None:
    accuracy = {**evidence.fp32.accuracy, "train": Accuracy(93.0, 99.0, 1294)}
    worse = replace(evidence, fp32=replace(evidence.fp32, accuracy=accuracy))
    assert "is 1.00 points below that on the test images" in claims.training(worse)[2]


@pytest.mark.parametrize(("bf16", "words"), [(True, "bf16 autocast"), (False, "fp32")])
def test_training_pace(evidence: Evidence, bf16: bool, words: str) -> None:
    assert (
        claims.training_pace(_with_train(evidence, bf16=bf16))
        == f"3 epochs in 12 s on CPU, {words}, peak learning rate 0.2"
    )


def test_training_pace_tells_of_processes_and_stops(evidence: Evidence) -> None:
    told = claims.training_pace(_with_train(evidence, device="cuda", processes=4, times_resumed=1))
    assert "12 s on CUDA, 4 processes, resumed 1 time, " in told
    assert "resumed 2 times, " in claims.training_pace(_with_train(evidence, times_resumed=2))


# --- accuracy


@pytest.mark.parametrize(
    ("drop", "words"),
    [
        (0.5, "falls by 0.50 points"),
        (-0.5, "rises by 0.50 points"),
        (0.0, "does not change"),
        (-0.001, "does not change"),
    ],
)
def test_drop_has_its_sign(evidence: Evidence, drop: float, words: str) -> None:
    first = claims.accuracy(_with_comparison(evidence, top1_drop_points=drop))[0]
    assert f"top-1 on the 359 test images {words};" in first
    top3 = claims.accuracy(_with_comparison(evidence, top3_drop_points=drop))[0]
    assert f"Top-3 {words}." in top3


@pytest.mark.parametrize(
    ("low", "high", "meaning"),
    [
        (0.1, 0.9, "so int8 is less accurate, more than chance"),
        (-0.9, -0.1, "so int8 is more accurate, more than chance"),
        (-0.1, 0.9, "which includes no change at all"),
        (0.0, 0.9, "which includes no change at all"),
    ],
)
def test_interval_is_explained(evidence: Evidence, low: float, high: float, meaning: str) -> None:
    changed = _with_comparison(evidence, top1_drop_low_points=low, top1_drop_high_points=high)
    first = claims.accuracy(changed)[0]
    assert f"95 % interval of the drop is {low:+.2f} to {high:+.2f} points, {meaning}" in first
    assert sum(words in first for words in ("less accurate", "more accurate", "no change at all")) == 1


def test_flips_and_agreement(evidence: Evidence) -> None:
    second = claims.accuracy(evidence)[1]
    assert second == ("The two models agree on 99.00 % of the test images. 5 images only fp32 gets right, 3 only int8.")
    one = claims.accuracy(_with_comparison(evidence, only_fp32_correct_images=1, only_int8_correct_images=0))[1]
    assert "1 image only fp32 gets right, 0 only int8" in one


def test_accuracy_is_that_of_the_test_images(evidence: Evidence) -> None:
    other = Comparison(9.0, 8.0, 10.0, 9.0, 50.0, 40, 1, 1294)
    comparison = {**evidence.int8.comparison, "train": other, "validation": other}
    changed = with_int8(evidence, comparison=comparison)
    assert claims.accuracy(changed) == claims.accuracy(evidence)


def _with_duplicates(evidence: Evidence, found: Duplicates | None) -> Evidence:
    return replace(evidence, fp32=replace(evidence.fp32, data=replace(evidence.fp32.data, duplicates=found)))


def test_what_training_has_seen_of_the_test_images(evidence: Evidence) -> None:
    assert claims.accuracy(_with_duplicates(evidence, None))[2:] == [
        "Whether test images are among the training images was not counted."
    ]
    (none,) = claims.accuracy(_with_duplicates(evidence, Duplicates(0, 0, 0, 0, 0)))[2:]
    assert none.startswith("No test image equals a training or validation image")
    some, judged, twice = claims.accuracy(_with_duplicates(evidence, Duplicates(38, 3, 40, 5, 2)))[2:]
    assert some.startswith("**40 of 359 test images equal a training or validation image, pixel by pixel: accuracy on ")
    assert "38 a training image" in some and "3 a validation image" in some
    assert judged.startswith("5 of 144 validation images equal a training image")
    assert twice.startswith("2 images are in the data set with several labels")
    seen = _with_duplicates(evidence, Duplicates(38, 3, 40, 5, 2)).images_seen_before
    assert seen == {"test_images_also_in_training": 40}
    assert _with_duplicates(evidence, None).images_seen_before == {}


# --- size


@pytest.mark.parametrize(
    ("fp32_bytes", "int8_bytes", "words"),
    [
        (1_800_000, 450_000, "is 4.00x smaller: 0.450 MB instead of 1.800 MB"),
        (450_000, 1_800_000, "is 4.00x larger: 1.800 MB instead of 0.450 MB"),
        (450_000, 450_000, "is not smaller: 0.450 MB instead of 0.450 MB"),
    ],
)
def test_size(evidence: Evidence, fp32_bytes: int, int8_bytes: int, words: str) -> None:
    (sentence,) = claims.size(_with_sizes(evidence, fp32_bytes, int8_bytes))
    assert words in sentence


def test_what_is_in_the_files(evidence: Evidence) -> None:
    assert len(claims.size(evidence)) == 1  # not measured by an earlier version
    fp32 = replace(evidence.fp32, contents=FileContents(1_600_000, 100_000, 100_000))
    found = with_int8(replace(evidence, fp32=fp32), contents=FileContents(410_000, 10_000, 30_000))
    alone = claims.size(found)[1]
    assert alone.startswith(
        "The weights alone (with biases, scales and statistics) are 3.90x smaller: 0.410 MB instead"
    )


# --- MACs


def test_macs_in_proportion_to_the_batch(evidence: Evidence) -> None:
    growth, share = claims.macs(_with_cost(evidence, macs={1: 15_000_000, 128: 1_920_000_000}))
    assert growth == "MACs grow in proportion to the batch size: 15.0 million at 1, 1.92 billion at 128."
    assert "100.0 % of all MACs" in share and "stayed fp32" not in share


def test_macs_out_of_proportion(evidence: Evidence) -> None:
    growth = claims.macs(_with_cost(evidence, macs={1: 1000, 8: 8001, 128: 128_000}))[0]
    assert "MACs do not grow in proportion to the batch size" in growth


@pytest.mark.parametrize("macs", [{2: 2000, 3: 3000}, {8: 8000, 1: 1000}])
def test_proportion_does_not_need_a_batch_of_one_in_front(evidence: Evidence, macs: dict[int, int]) -> None:
    assert "MACs grow in proportion" in claims.macs(_with_cost(evidence, macs=macs))[0]


def test_one_batch_size_says_nothing_about_growth(evidence: Evidence) -> None:
    sentences = claims.macs(_with_cost(evidence, macs={8: 8000}))
    assert len(sentences) == 1 and "grow" not in sentences[0]


def test_layers_that_stayed_fp32_are_named(evidence: Evidence) -> None:
    quantize = replace(evidence.int8.quantize, float_layers=("network.3", "network.22"))
    changed = with_int8(evidence, quantize=quantize)
    share = claims.macs(_with_cost(changed, int8_macs={1: 500, 8: 4000, 128: 64_000}))[-1]
    assert "50.0 % of all MACs" in share and "2 layers stayed fp32: network.3, network.22" in share


def test_a_fold_that_saves_macs_is_told(evidence: Evidence) -> None:
    assert "Quantization leaves those of each layer as they are; " in claims.macs(evidence)[-1]
    small, large = ({1: count, 8: 8 * count} for count in (15_000_000, 120_000_000))
    folded = replace(evidence.int8.cost, macs=small, conv_linear_macs=small, int8_macs=small)
    before = replace(evidence.int8.fp32_cost, macs=large, conv_linear_macs=large)
    growth, share = claims.macs(with_int8(evidence, cost=folded, fp32_cost=before))
    assert "15.0 million at 1" in growth
    assert (
        "Quantization runs after folding the pool, which cuts MACs from 120.0 million to 15.0 million at batch size 1; "
        in share
    )


def test_products_of_no_layer_are_told(evidence: Evidence) -> None:
    macs, layers = {1: 1000, 8: 8000}, {1: 960, 8: 7680}
    share, rest = claims.macs(_with_cost(evidence, macs=macs, conv_linear_macs=layers, int8_macs=layers))[1:]
    assert "; 96.0 % of all MACs run in int8 afterwards." in share
    assert rest.startswith("4.0 % of them belong to no layer with weights (inside attention")


def test_macs_of_an_earlier_version_are_marked(evidence: Evidence) -> None:
    counted = {"macs": {1: 1010}, "conv_linear_macs": {1: 1000}, "int8_macs": {1: 1000}}
    share, marked = claims.macs(_with_cost(evidence, counted_by=TORCHINFO, **counted))
    assert "100.0 % of the MACs of convolution and linear layers" in share
    assert "counted by an earlier version with torchinfo" in marked
    assert not any("torchinfo" in sentence for sentence in claims.macs(evidence))


# --- gate and quantization


def test_gate_that_passed(evidence: Evidence) -> None:
    text = claims.gate(evidence)
    assert text == "Gate passed: top-1 drop 0.50 points (at most 1); the int8 version is `champion`."


def test_gate_that_failed(evidence: Evidence) -> None:
    failed = GateResult("failed", ("size ratio 2.50 is not at least 3",), ("min_size_ratio",))
    text = claims.gate(with_gate(evidence, failed))
    assert text == "Gate failed: size ratio 2.50 is not at least 3; `champion` stays where it was."
    earlier = claims.gate(with_gate(evidence, failed, champion=True))
    assert earlier.endswith("the int8 version is `champion` all the same, by an earlier decision.")
    assert "`qexp promote` decides on that" in claims.gate(with_gate(evidence, evidence.gate, champion=False))


def test_gate_beside_a_champion(evidence: Evidence) -> None:
    stays = Succession(False, ("beside it: as good, but in nothing better",))
    found = replace(evidence, champion=False, succession=stays, before_uri="models:/smallnet-digits-int8/7")
    text = claims.gate(found)
    assert text.startswith("Gate passed: ") and text.endswith("; `champion` stays where it was.")
    assert "Against the champion: the champion stays: beside it: as good" in text
    better = replace(found, champion=True, succession=Succession(True, ("better: size",)))
    assert claims.gate(better).endswith("replaces the champion: better: size; the int8 version is `champion`.")


def test_a_percentile_is_said(evidence: Evidence) -> None:
    result = replace(evidence.int8.quantize, observer="percentile", percentile=99.9)
    assert claims.quantization(result) == "percentile (99.9 %) observer, weights per channel"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "minmax observer, weights per channel"),
        (
            {"per_channel": False, "reduce_range": True},
            "minmax observer, weights per layer, range reduced by one bit",
        ),
        (
            {"saturating_layers": ("a", "b")},
            "minmax observer, weights per channel, range of the weights of 2 layers reduced by one bit",
        ),
    ],
)
def test_quantization(evidence: Evidence, changes: dict[str, Any], text: str) -> None:
    changed = replace(evidence.int8.quantize, observer="minmax", **changes)
    assert claims.quantization(changed) == text
