"""The sentences on latency, with values that make them true and with the opposite ones."""

from dataclasses import replace

import pytest
from conftest import latency_row, with_rows, with_speedups

from qexp.measurement.activity import Activity
from qexp.report import speed
from qexp.report.results import Evidence


def test_faster_at_every_size(evidence: Evidence) -> None:
    first, over_fp32, saved, how, loaded = speed.latency(with_speedups(evidence, {1: 2.0, 8: 4.0}))
    assert first.startswith(
        "Against the fastest float at each batch size (fp32), int8 is faster at every batch size: 2.00x to 4.00x as "
        "fast, 2.83x in the geometric mean ("
    )
    assert over_fp32 == "Over the registered fp32 program, int8 is 2.00x to 4.00x as fast."
    assert saved == (
        "The time saved per batch against the fastest float grows with the batch size: 2.00 ms at 1, 24.00 ms at 8."
    )
    assert "2 threads. All models are loaded anew 5 times for each batch size and take turns in 20 short rounds" in how
    assert "an int8 model took 0.99 to 1.01 times as long as a second copy of it" in how
    assert loaded == "Models are loaded from the registry as `qexp.load(uri)` loads them."


def test_slower_at_every_size(evidence: Evidence) -> None:
    first, _, saved, *_ = speed.latency(with_speedups(evidence, {1: 0.8, 8: 0.5}))
    assert "int8 is slower at every batch size: 0.50x to 0.80x as fast" in first
    assert "does not grow with the batch size: -1.00 ms at 1, -32.00 ms at 8" in saved
    assert "faster" not in first


def test_the_fastest_float_is_another_at_each_size(evidence: Evidence) -> None:
    rows = [
        latency_row(1, {"fp32": 4.0, "fp32_onnx": 2.0, "int8_fx": 1.0}),
        latency_row(8, {"fp32": 4.0, "fp32_onnx": 5.0, "int8_fx": 5.0}),
    ]
    first = speed.faster_where(with_rows(evidence, *rows))
    assert "(fp32_onnx, fp32), int8 is faster at batch size 1; slower at batch size 8: 0.80x to 2.00x as fast" in first


def test_weights_of_batch_sizes_are_said(evidence: Evidence) -> None:
    found = with_speedups(evidence, {1: 2.0, 8: 4.0})
    latency = replace(found.latency, weights={1: 1.0})
    weighted = replace(found, measured=replace(found.measured, latency=latency))
    assert "2.00x in the weighted mean (" in speed.faster_where(weighted)


def test_mixed(evidence: Evidence) -> None:
    first = speed.faster_where(with_speedups(evidence, {1: 0.5, 2: 1.0, 8: 2.0, 16: 3.0, 32: 1.005}))
    assert (
        "int8 is faster at batch size 8, 16; slower at batch size 1; not shown to be faster or slower at batch size 2, "
        "32 (at a confidence that leaves 5 % for all comparisons of the sweep): 0.50x to 3.00x as fast"
    ) in first


def test_what_is_told_apart_depends_on_the_noise(evidence: Evidence) -> None:
    quiet, noisy = (
        speed.faster_where(with_speedups(evidence, {1: 0.96, 8: 1.04}, noise_percent=noise)) for noise in (1, 5)
    )
    assert "faster at batch size 8; slower at batch size 1" in quiet
    assert "not shown to be faster or slower at every batch size" in noisy


def test_noise_and_rounds_are_those_of_all_batch_sizes(evidence: Evidence) -> None:
    rows = [
        latency_row(1, {"fp32": 4.0, "int8_fx": 1.0}, rounds=20, noise_percent=2),
        latency_row(8, {"fp32": 4.0, "int8_fx": 1.0}, rounds=90, noise_percent=7),
    ]
    how = speed.latency(with_rows(evidence, *rows))[-2]
    assert "in 20 to 90 short rounds" in how and "took 0.93 to 1.07 times" in how


def test_too_few_rounds_are_admitted(evidence: Evidence) -> None:
    enough, few = (speed.latency(with_speedups(evidence, {1: 2.0}, rounds=rounds)) for rounds in (6, 5))
    assert "with its 95 % interval (Student's t over the loads)" in enough[-2]
    assert "with an interval that fewer than 6 rounds in 3 loads do not support" in few[-2]
    assert not [sentence for sentence in enough if "No verdict" in sentence]
    assert [sentence for sentence in few if sentence.startswith("**No verdict rests on these times**: 5 rounds in 5 l")]


def test_time_saved_that_shrinks(evidence: Evidence) -> None:
    saved = speed.latency(with_speedups(evidence, {1: 4.0, 8: 1.06}))[2]
    assert "does not grow with the batch size: 3.00 ms at 1, 1.81 ms at 8" in saved


def test_larger_batches_are_larger_whatever_their_order(evidence: Evidence) -> None:
    """Batch sizes are sorted when they are read; a result that was read from a file may not be."""
    saved = speed.latency(with_speedups(evidence, {128: 2.0, 8: 2.0, 1: 2.0}))[2]
    assert "grows with the batch size: 2.00 ms at 1, 256.00 ms at 128" in saved


def test_one_batch_size_says_nothing_about_larger_ones(evidence: Evidence) -> None:
    sentences = speed.latency(with_speedups(evidence, {8: 2.0}))
    assert len(sentences) == 4 and "larger batch" not in " ".join(sentences)


def test_of_several_kernels_the_chosen_ones_are_named(evidence: Evidence) -> None:
    rows = [
        latency_row(batch, {"fp32": 8.0, "int8_fx": 2.0, "int8_fx_onednn": 1.0}, noise_percent=1) for batch in (1, 8)
    ]
    both = ("int8_fx_onednn", "int8_fx")
    measured = replace(evidence.measured, contenders={evidence.int8.version_uri: both})
    chosen = replace(evidence.versions[0], name="int8_fx_onednn")
    how = speed.latency(with_rows(replace(evidence, versions=(chosen,), measured=measured), *rows))[-1]
    assert "of int8 kernels, those of int8_fx_onednn won (mean over fp32: int8_fx_onednn " in how
    assert "a plain `mlflow.pytorch.load_model` uses those of x86" in how


@pytest.mark.parametrize(("others_s", "said"), [(0.4, False), (4.0, True)])
def test_what_others_did_is_said(evidence: Evidence, others_s: float, said: bool) -> None:
    row = replace(latency_row(1, {"fp32": 4.0, "int8_fx": 1.0}), activity=Activity(10.0, 12.0, others_s, 2, 2))
    found = with_rows(evidence, row)
    latency = replace(found.latency, max_busy_percent=5.0)
    sentences = speed.latency(replace(found, measured=replace(found.measured, latency=latency)))
    assert (
        any(sentence.startswith("**No verdict rests on these times**: the machine was busy") for sentence in sentences)
        == said
    )
    percent = 100 * others_s / 10 / 2
    assert (
        f"In 10 s of wall time, the timed process used 12 s of CPU time and others {others_s:.0f} s on 2 cores; at no "
        f"batch size did others take more than {percent:.1f} % of the timed cores."
    ) in sentences
