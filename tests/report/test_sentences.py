"""The statements of the report: each with values that make it true and with the opposite ones. How they are worded
is for people to read in golden/."""

from dataclasses import replace
from typing import Any

import pytest
from cases import ONNX, champion_stays, ship_int8, with_onnx
from conftest import latency_row, with_gate, with_int8, with_rows, with_speedups

from qexp.data.duplicates import Duplicates
from qexp.files import from_json
from qexp.measurement.accuracy import Accuracy, Comparison
from qexp.measurement.cost import TORCHINFO
from qexp.measurement.gate import GateResult, Succession
from qexp.models.contents import FileContents
from qexp.models.preprocessing import Preprocessing
from qexp.quantization.budget import BudgetResult, BudgetTry
from qexp.quantization.sensitivity import SensitivityResult
from qexp.report import sentences, tables
from qexp.report.results import Evidence, InRuntime


def _has(text: list[str] | str, *words: str) -> list[bool]:
    whole = text if isinstance(text, str) else " ".join(text)
    return [word in whole for word in words]


@pytest.mark.parametrize(
    ("mean", "std", "said"),
    [
        (None, None, "values from 0 to 255, not normalised"),
        ((0.0,), (1.0,), "values from 0 to 255, not normalised"),
        ((0.5,), (0.25,), "values from 0 to 255, minus the mean 0.5, divided by the standard deviation 0.25"),
    ],
)
def test_what_a_model_of_others_is_given(mean: Any, std: Any, said: str) -> None:
    found = Preprocessing(48, 192, channels="grey", mean=mean, std=std, input_range=(0.0, 255.0))
    assert sentences.preprocessing(found) == f"grey images, resized to 48 x 192 px (bilinear), {said}"


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


# --- verdict and alias


def test_answer_has_verdict_accuracy_size_and_speed(evidence: Evidence) -> None:
    text = sentences.answer(with_speedups(evidence, {1: 4.0, 8: 10.0}))
    assert text.startswith("**Ship int8.** `models:/smallnet-digits-int8/1` ")
    assert all(_has(text, "falls by 0.50 points", "4.00x smaller", "4.00x to 10.00x as fast", "95 % interval"))
    slow = with_int8(with_speedups(evidence, {1: 0.5, 8: 0.8}), size_bytes=7_200_000)
    failed = GateResult("failed", ("too slow",), ("min_speedup",))
    text = sentences.answer(with_gate(_with_comparison(slow, top1_drop_points=-0.25), failed))
    assert text.startswith("**Keep float.** ") and "`models:/smallnet-digits-fp32/1`" in text
    assert all(_has(text, "rises by 0.25 points", "4.00x larger", "0.50x to 0.80x as fast: it is slower"))
    assert not any(_has(text, "it is faster", "smaller"))


@pytest.mark.parametrize(
    ("speedup", "passed", "said"),
    [
        (1.0, True, "but on average it is not shown to be faster"),
        (0.5, True, "but on average it is slower"),
        (1.5, False, "and on average it is faster"),
    ],
)
def test_for_size_only(evidence: Evidence, speedup: float, passed: bool, said: str) -> None:
    gate = evidence.gate if passed else GateResult("failed", ("too slow",), ("min_speedup",))
    text = sentences.verdict(with_gate(with_speedups(evidence, {1: speedup}), gate))
    assert text.startswith("**Ship int8 for its size only.** ") and said in text
    assert _has(text, "--min-speedup 0") == [not passed]
    assert _has(text, "If time matters more than size, take `fp32`") == [speedup <= 1]


def test_a_champion_that_stays_is_named_first(evidence: Evidence) -> None:
    found = champion_stays(evidence)
    text = sentences.verdict(found)
    assert text.index(str(found.before_uri)) < text.index(found.int8.version_uri) and "beside" not in text
    assert sentences.alias(found) == ""
    since = replace(found, now_uri="models:/smallnet-digits-int8/9")
    assert all(_has(sentences.verdict(since), "`models:/smallnet-digits-int8/9`, the present champion", "of that time"))


def test_a_faster_version_beside_the_one_asked_for(evidence: Evidence) -> None:
    two = with_onnx(evidence)
    rows = [latency_row(1, {"fp32": 4.0, "int8_fx": 1.0, "int8_onnx": 0.5})]
    assert ONNX not in sentences.verdict(with_rows(two, *rows))  # it is too much less accurate
    first, other = two.versions
    other = replace(other, int8=replace(other.int8, comparison=first.int8.comparison))
    two = replace(two, versions=(first, other))
    said = sentences.verdict(with_rows(two, *rows))
    assert f"Take `{ONNX}`" in said and "it takes 2.00 times as long as `int8_onnx`" in said
    assert ONNX not in sentences.verdict(two)


def test_alias(evidence: Evidence) -> None:
    failed = GateResult("failed", ("too large",), ("min_size_ratio",))
    replaced = replace(evidence, succession=Succession(True, ("better: size",)), before_uri="models:/x/7")
    assert sentences.alias(evidence).endswith("has the registry alias `champion`.")
    assert "it replaces `models:/x/7`: better: size" in sentences.alias(replaced)
    assert "earlier decision" in sentences.alias(with_gate(evidence, failed, champion=True))
    assert "does not get" in sentences.alias(with_gate(evidence, failed))
    assert "`qexp promote`" in sentences.alias(replace(evidence, champion=False))


def test_each_failed_limit_has_its_words(evidence: Evidence) -> None:
    said = {
        limit: sentences.verdict(with_gate(with_speedups(evidence, {1: 0.5}), GateResult("failed", ("x",), (limit,))))
        for limit in sentences.FAILED_LIMITS
    }
    assert all(words in said[limit] for limit, words in sentences.FAILED_LIMITS.items())
    assert "fails the gate: too slow." in sentences.verdict(with_gate(evidence, GateResult("failed", ("too slow",))))


def test_kernels_and_engines_of_the_models_are_told(evidence: Evidence) -> None:
    models = sentences.explained(ship_int8(evidence))
    assert list(models) == list(ship_int8(evidence).latency.rows[0].stats)
    assert "oneDNN's kernels" in models["int8_fx_onednn"] and "default kernels" in models["int8_fx"]
    assert ONNX in models["int8_onnx"] and "kernels" not in models["int8_onnx"]
    # A version that has been deleted since has no evidence: its times stay in the table.
    alone = replace(ship_int8(evidence), versions=ship_int8(evidence).versions[:1])
    assert sentences.explained(alone)["int8_onnx"] == f"the int8 version `{ONNX}`"


# --- training


def test_training(evidence: Evidence) -> None:
    assert all(_has(sentences.training(evidence), "configured 3 epochs (12 s)", "epoch 3", "3.00 points higher"))
    stopped = sentences.training(_with_train(evidence, stopped_early=True, best_epoch=2))
    assert all(_has(stopped, "Early stopping", "epoch 2", "(55.00 %)")) and "configured" not in stopped[0]
    one = _with_train(evidence, epochs=evidence.fp32.train.epochs[:1], best_epoch=1)
    assert "1 epoch (" in sentences.training(one)[0]
    accuracy = {**evidence.fp32.accuracy, "train": Accuracy(93.0, 99.0, 1294)}
    worse = replace(evidence, fp32=replace(evidence.fp32, accuracy=accuracy))
    assert "1.00 points lower" in sentences.training(worse)[2]


def test_of_equal_epochs_the_loss_is_said_to_decide(evidence: Evidence) -> None:
    first, second, third = evidence.fp32.train.epochs
    equal = replace(second, validation_top1_percent=third.validation_top1_percent)
    assert "loss" not in sentences.training(evidence)[1]
    assert "loss" in sentences.training(_with_train(evidence, epochs=(first, equal, third)))[1]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"bf16": False}, "CPU, fp32; peak learning rate 0.2"),
        ({"device": "cuda", "processes": 4, "times_resumed": 2}, "CUDA, 4 processes, bf16 autocast"),
        ({"times_resumed": 1}, "; resumed 1 time"),
        ({"threads": 2, "optimizer": "sgd"}, "bf16 autocast on 2 threads, channels-last; sgd, peak"),
        ({"threads": 2, "waiting": "default"}, "on 2 threads that spin while they wait, channels-last; "),
        ({"threads": 2, "waiting": "passive"}, "on 2 threads, channels-last; "),
        ({"skipped_steps": 3}, "; 3 steps skipped"),
    ],
)
def test_training_setup(evidence: Evidence, changed: dict[str, Any], words: str) -> None:
    assert words in sentences.training_setup(_with_train(evidence, **changed))


# --- accuracy


@pytest.mark.parametrize(
    ("drop", "words"), [(0.5, "falls by 0.50"), (-0.5, "rises by 0.50"), (0.0, "does not"), (-0.001, "does not")]
)
def test_a_drop_has_its_sign(evidence: Evidence, drop: float, words: str) -> None:
    top1, top3 = (_with_comparison(evidence, **{f"top{k}_drop_points": drop}) for k in (1, 3))
    assert f"top-1 on the test images {words}" in sentences.accuracy(top1)[0]
    assert f"top-3 {words}" in sentences.accuracy(top3)[0]


@pytest.mark.parametrize(
    ("low", "high", "meaning"),
    [
        (0.1, 0.9, "less accurate"),
        (-0.9, -0.1, "more accurate"),
        (-0.1, 0.9, "may be chance"),
        (0.0, 0.9, "may be chance"),
    ],
)
def test_what_the_interval_means(evidence: Evidence, low: float, high: float, meaning: str) -> None:
    changed = _with_comparison(evidence, top1_drop_low_points=low, top1_drop_high_points=high)
    words = ("less accurate", "more accurate", "may be chance")
    assert _has(sentences.accuracy(changed)[0], *words) == [meaning == word for word in words]


def test_flips_and_agreement_are_those_of_the_test_images(evidence: Evidence) -> None:
    assert all(_has(sentences.accuracy(evidence)[1], "99.00 %", "on 5 images", "int8 on 3"))
    other = Comparison(9.0, 8.0, 10.0, 9.0, 50.0, 40, 1, 1294)
    comparison = {**evidence.int8.comparison, "train": other, "validation": other}
    assert sentences.accuracy(with_int8(evidence, comparison=comparison)) == sentences.accuracy(evidence)


def test_bf16_counts_where_it_is_accurate(evidence: Evidence) -> None:
    full = ship_int8(evidence)
    assert "so int8 is compared with it" in " ".join(sentences.accuracy(full))
    assert "so int8 is not compared with it" in " ".join(sentences.accuracy(replace(full, floats=("fp32",))))
    assert "bf16` was not measured" in " ".join(sentences.accuracy(evidence))
    assert "bf16" not in " ".join(sentences.accuracy(with_speedups(evidence, {1: 2.0})))  # was not timed


def test_what_is_compiled_has_the_accuracy_of_bf16(evidence: Evidence) -> None:
    full = ship_int8(evidence)
    rows = tuple(replace(row, stats=row.stats | {"bf16_compiled": row.stats["bf16"]}) for row in full.latency.rows)
    measured = replace(full.measured, latency=replace(full.latency, rows=rows))
    said = " ".join(sentences.accuracy(replace(full, measured=measured)))
    assert "compared with it; the same holds for `bf16_compiled`, which rounds in the same places or in fewer." in said
    unknown = " ".join(sentences.accuracy(replace(full, measured=replace(measured, bf16=None))))
    assert "The accuracy of `bf16` and `bf16_compiled` was not measured, so int8 is not compared with them." in unknown


def test_images_that_are_in_several_parts(evidence: Evidence) -> None:
    def said(found: Duplicates | None) -> list[str]:
        data = replace(evidence.fp32.data, duplicates=found)
        return sentences.accuracy(replace(evidence, fp32=replace(evidence.fp32, data=data)))[3:]

    assert "was not counted" in said(None)[0]
    assert said(Duplicates(0, 0, 0, 0, 0))[0].startswith("No test image")
    some, judged, twice = said(Duplicates(38, 3, 40, 5, 2))
    assert all(_has(some, "**40 of 359 test images", "38 are training", "3 validation"))
    assert judged.startswith("5 of 144 validation images") and twice.startswith("2 images are")


# --- size and MACs


@pytest.mark.parametrize(
    ("fp32", "int8", "words"), [(4, 1, "4.00x smaller"), (1, 4, "4.00x larger"), (1, 1, "same size")]
)
def test_size(evidence: Evidence, fp32: int, int8: int, words: str) -> None:
    found = with_int8(replace(evidence, fp32=replace(evidence.fp32, size_bytes=fp32)), size_bytes=int8)
    (sentence,) = sentences.size(found)
    assert words in sentence


def test_weights_alone(evidence: Evidence) -> None:
    fp32 = replace(evidence.fp32, contents=FileContents(1_600_000, 100_000, 100_000))
    found = with_int8(replace(evidence, fp32=fp32), contents=FileContents(410_000, 10_000, 30_000))
    assert "3.90x smaller" in sentences.size(found)[1]


@pytest.mark.parametrize(
    ("macs", "grow"),
    [
        ({1: 1000, 128: 128_000}, True),
        ({2: 2000, 3: 3000}, True),
        ({8: 8000, 1: 1000}, True),
        ({1: 1000, 8: 8001}, False),
    ],
)
def test_growth_of_macs(evidence: Evidence, macs: dict[int, int], grow: bool) -> None:
    first = sentences.macs(_with_cost(evidence, macs=macs))[0]
    assert first.startswith("MACs grow" if grow else "MACs do not grow")


def test_one_batch_size_says_nothing_about_growth(evidence: Evidence) -> None:
    (share,) = sentences.macs(_with_cost(evidence, macs={8: 8000}))
    assert "grow" not in share and "100.0 % of all MACs" in share


def test_layers_in_fp32_folds_attention_and_counts_of_earlier_versions(evidence: Evidence) -> None:
    quantize = replace(evidence.int8.quantize, float_layers=("network.3", "network.22"))
    halves = _with_cost(with_int8(evidence, quantize=quantize), int8_macs={1: 500, 8: 4000, 128: 64_000})
    assert all(_has(sentences.macs(halves), "50.0 %", "2 layers stay in fp32 (network.3, network.22)"))
    small, large = ({1: count, 8: 8 * count} for count in (15_000_000, 120_000_000))
    folded = replace(evidence.int8.cost, macs=small, conv_linear_macs=small, int8_macs=small)
    before = replace(evidence.int8.fp32_cost, macs=large, conv_linear_macs=large)
    assert "from 120.0 million to 15.0 million at batch size 1" in " ".join(
        sentences.macs(with_int8(evidence, cost=folded, fp32_cost=before))
    )
    layers = {1: 960, 8: 7680}
    attention = _with_cost(evidence, macs={1: 1000, 8: 8000}, conv_linear_macs=layers, int8_macs=layers)
    assert all(_has(sentences.macs(attention), "96.0 % of all MACs", "4.0 % of the MACs belong to no layer"))
    old = {"macs": {1: 1010}, "conv_linear_macs": {1: 1000}, "int8_macs": {1: 1000}, "counted_by": TORCHINFO}
    assert all(_has(sentences.macs(_with_cost(evidence, **old)), "100.0 % of the MACs of conv", "torchinfo"))
    assert not any(_has(sentences.macs(evidence), "torchinfo", "folded", "attention", "stay in fp32"))


# --- inference time


@pytest.mark.parametrize(
    ("speedups", "said"),
    [
        ({1: 2.0, 8: 4.0}, "2.00x to 4.00x as fast: it is faster at every batch size."),
        ({1: 0.8, 8: 0.5}, "0.50x to 0.80x as fast: it is slower at every batch size."),
        ({1: 1.0, 8: 1.0}, "1.00x as fast: no difference is shown at any batch size."),
        ({8: 2.0}, "2.00x as fast: it is faster at batch size 8."),
        (
            {1: 0.5, 2: 1.0, 8: 2.0, 16: 3.0, 32: 1.005},
            "0.50x to 3.00x as fast: it is faster at batch sizes 8 and 16 and slower at batch size 1; no difference is "
            "shown at batch sizes 2 and 32.",
        ),
    ],
)
def test_where_int8_is_faster(evidence: Evidence, speedups: dict[int, float], said: str) -> None:
    assert sentences.faster_where(with_speedups(evidence, speedups))[0].endswith(said)


def test_the_noise_decides_what_is_shown(evidence: Evidence) -> None:
    quiet, noisy = (
        sentences.faster_where(with_speedups(evidence, {1: 0.96, 8: 1.04}, noise_percent=noise))[0] for noise in (1, 5)
    )
    assert all(_has(quiet, "faster at batch size 8", "slower at batch size 1"))
    assert "no difference is shown at any batch size" in noisy


def test_the_fastest_float_may_be_another_at_each_batch_size(evidence: Evidence) -> None:
    rows = [
        latency_row(1, {"fp32": 4.0, "fp32_onnx": 2.0, "int8_fx": 1.0}),
        latency_row(8, {"fp32": 4.0, "fp32_onnx": 5.0, "int8_fx": 5.0}),
    ]
    said = sentences.faster_where(with_rows(evidence, *rows))[0]
    assert all(_has(said, "0.80x to 2.00x", "faster at batch size 1", "slower at batch size 8"))


@pytest.mark.parametrize(
    ("speedups", "said"),
    [
        ({1: 2.0, 8: 4.0}, "saves 2.00 ms per batch at batch size 1 and 24.0 ms at batch size 8; the time saved grows"),
        (
            {1: 4.0, 8: 1.06},
            "saves 3.00 ms per batch at batch size 1 and 1.81 ms at batch size 8; the time saved does",
        ),
        ({1: 0.8, 8: 0.5}, "loses 1.00 ms per batch at batch size 1 and 32.0 ms at batch size 8."),
        ({1: 0.8, 8: 2.0}, "loses 1.00 ms per batch at batch size 1 and saves 16.0 ms at batch size 8; the time saved"),
        ({128: 2.0, 8: 2.0, 1: 2.0}, "saves 2.00 ms per batch at batch size 1 and 256 ms at batch size 128"),
    ],
)
def test_time_saved(evidence: Evidence, speedups: dict[int, float], said: str) -> None:
    assert said in " ".join(sentences.latency(with_speedups(evidence, speedups)))


def test_one_batch_size_says_nothing_about_larger_ones(evidence: Evidence) -> None:
    assert len(sentences.latency(with_speedups(evidence, {8: 2.0}))) == 2


def test_rounds_noise_and_intervals_are_those_of_all_batch_sizes(evidence: Evidence) -> None:
    rows = [
        latency_row(1, {"fp32": 4.0, "int8_fx": 1.0}, rounds=20, noise_percent=2),
        latency_row(8, {"fp32": 4.0, "int8_fx": 1.0}, rounds=90, noise_percent=7),
    ]
    said = sentences.how_timed(with_rows(evidence, *rows))
    assert all(_has(said, "for 20 to 90 rounds", "it took 0.93 to 1.07 times"))
    enough, few = (with_speedups(evidence, {1: 2.0}, rounds=rounds) for rounds in (6, 5))
    assert _has(sentences.how_timed(enough), "Student's t", "not reliable") == [True, False]
    assert _has(sentences.how_timed(few), "Student's t", "not reliable") == [False, True]
    support = "do not support a verdict"
    assert _has(sentences.latency(enough) + sentences.latency(few), support) == [True]
    assert _has(sentences.latency(enough), support) == [False]


def test_a_baseline_that_dropped_out_is_said(evidence: Evidence) -> None:
    without = replace(evidence.latency, models_left_out={"fp32_eager": "no such operator"})
    said = sentences.how_timed(replace(evidence, measured=replace(evidence.measured, latency=without)))
    assert "Baseline `fp32_eager` was not timed: no such operator." in said


def test_kernels_that_won_and_those_that_are_level(evidence: Evidence) -> None:
    def said(onednn_ms: float) -> str:
        rows = [latency_row(size, {"fp32": 8.0, "int8_fx": 2.0, "int8_fx_onednn": onednn_ms}) for size in (1, 8)]
        measured = replace(evidence.measured, names={evidence.int8.version_uri: ("int8_fx_onednn", "int8_fx")})
        chosen = replace(evidence.versions[0], name="int8_fx_onednn")
        return sentences.latency(with_rows(replace(evidence, versions=(chosen,), measured=measured), *rows))[-1]

    assert "they are the fastest" in said(1.0) and "no other kernels are shown to be faster" in said(2.0)


def test_a_file_that_two_runtimes_run(evidence: Evidence) -> None:
    """The runtime that won, and beside its figures those of the other one."""
    first = evidence.int8
    lost = replace(first.comparison["test"], top1_drop_points=0.5, top1_drop_low_points=-0.3, agreement_percent=97.5)
    other = InRuntime({"test": Accuracy(91.25, 99.0, 359)}, {"test": lost})
    quantized = replace(first.quantize, engine="onnx")
    int8 = replace(first, quantize=quantized, runtime="openvino", runtimes={"onnxruntime": other})
    names = ("int8_onnx_openvino", "int8_onnx")
    measured = replace(evidence.measured, names={int8.version_uri: names})
    both = replace(evidence, versions=(replace(evidence.versions[0], int8=int8, name=names[0]),), measured=measured)
    both = with_rows(both, latency_row(1, {"fp32": 8.0, "int8_onnx_openvino": 1.0, "int8_onnx": 2.0}))
    said = sentences.accuracy(both)
    words = ["are those in OpenVINO, which `qexp.load` uses", "for 97.50 % of the test images"]
    words.append("In ONNX Runtime, which rounds otherwise, top-1 of the same file falls by 0.50 points")
    assert all(_has(said, *words))
    assert "`qexp.load` uses that of `int8_onnx_openvino`: it is the fastest" in sentences.latency(both)[-1]
    told = sentences.explained(both)
    assert told["int8_onnx_openvino"].endswith("run by OpenVINO") and told["int8_onnx"].endswith("run by ONNX Runtime")
    rows = {row[0]: row[5] for row in tables.accuracy(both)[1]}
    assert rows["smallnet int8 in ONNX Runtime"] == "91.25 %"
    assert rows["smallnet int8 in OpenVINO"] == f"{first.accuracy['test'].top1_percent:.2f} %"
    left_out = replace(both.latency, models_left_out={"int8_onnx_openvino": "OpenVINO is not installed"})
    said = sentences.how_timed(replace(both, measured=replace(both.measured, latency=left_out)))
    assert "`int8_onnx_openvino` was not timed: OpenVINO is not installed." in said


# --- layers, budget, quantization


def test_sensitive_layers(evidence: Evidence) -> None:
    found = evidence.int8.sensitivity
    assert found
    said = sentences.sensitivity(found)
    assert all(_has(said[0], "95.00 % in fp32", "93.00 % with all", "of 8 bits, of 7 in 1 layer, as with engine fx"))
    assert "`network.0` changes the class probabilities most" in said[1] and "0.031 nats" in said[1]
    assert "`network.0` has the lowest" in said[2] and said[3].startswith("No layer")
    silent = tuple(replace(layer, sqnr_db=None, kl_only_int8_nats=0.0) for layer in found.layers)
    assert len(sentences.sensitivity(replace(found, layers=silent))) == 3
    worse = replace(found.layers[0], only_int8_lost_images=10)
    better = replace(found.layers[1], only_fp32_gained_images=9)
    said = sentences.sensitivity(replace(found, layers=(worse, better)))[3:]
    assert "only layer in int8, `network.0` lowers" in said[0] and "only layer in fp32, `network.3` raises" in said[1]


def test_sensitivity_of_an_earlier_version_has_no_divergence() -> None:
    text = (
        '{"layers": [{"layer": "a", "sqnr_db": 40.0, "top1_only_int8_percent": 70.0, "top1_only_fp32_percent": 95.0}], '
        '"fp32_top1_percent": 95.0, "int8_top1_percent": 95.0, "images": 1000, "observer": "minmax", '
        '"per_channel": true}'
    )
    overall, noisiest = sentences.sensitivity(from_json(SensitivityResult, text))
    assert "1,000 validation images" in overall and "`a` has the lowest" in noisiest


@pytest.mark.parametrize(
    ("tries", "met", "kept", "words"),
    [
        (
            (BudgetTry((), 0.25),),
            True,
            (),
            ("is met after 1 try; no layer", "all layers in int8", "falls by 0.25"),
        ),
        ((BudgetTry(("a",), -0.25),), True, ("a",), ("1 layer stays in fp32 (a)", "all other layers", "rises by 0.25")),
        # The first try was the best: its drop is what the version has, not that of the last.
        ((BudgetTry((), 1.0), BudgetTry(("a",), 1.5)), False, (), ("**is not met** after 2 tries", "falls by 1.00")),
        ((BudgetTry((), 0.25, 1.5),), False, (), ("interval: +1.50 points", "1 try")),
    ],
)
def test_budget(
    evidence: Evidence, tries: tuple[BudgetTry, ...], met: bool, kept: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert sentences.budget(evidence) == []
    quantize = replace(evidence.int8.quantize, kept_layers=kept)
    found = with_int8(evidence, quantize=quantize, budget=BudgetResult(0.5, tries, met))
    assert all(_has(sentences.budget(found), *words))


def test_budget_that_the_images_cannot_show(evidence: Evidence) -> None:
    few = BudgetResult(0.5, (BudgetTry((), 0.25, 1.5),), False, images=144)
    said = sentences.budget(with_int8(evidence, budget=few))
    assert "144 validation images are too few" in said[1] and f"{few.least_high_points:.2f} points" in said[1]


def test_what_layers_in_fp32_cost(evidence: Evidence) -> None:
    cost = sentences.budget(ship_int8(evidence))[-1]
    assert all(_has(cost, "0.050 MB larger", "1.25x as long at batch size 1 (95 % interval 1.20 to 1.30)"))
    assert "At batch size 128, no difference" in cost and "1.01" not in cost


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "minmax observer, weights per channel"),
        ({"per_channel": False, "reduce_range": True}, "minmax observer, weights per layer, of 7 bits"),
        ({"saturating_layers": ("a", "b")}, "minmax observer, weights per channel, of 7 bits in 2 layers"),
        ({"observer": "percentile", "percentile": 99.9}, "percentile (99.9 %) observer, weights per channel"),
    ],
)
def test_quantization(evidence: Evidence, changes: dict[str, Any], text: str) -> None:
    assert sentences.quantization(replace(evidence.int8.quantize, **{"observer": "minmax"} | changes)) == text
