"""The sentences on latency, with values that make them true and with the opposite ones."""

from dataclasses import replace

from conftest import latency_row, with_gate, with_rows, with_speedups

from qexp import advice, claims, speed
from qexp.evidence import Evidence
from qexp.gate import GateResult


def test_faster_at_every_size(evidence: Evidence) -> None:
    first, saved, how = speed.latency(with_speedups(evidence, {1: 2.0, 8: 4.0}))
    assert first == "int8 is faster than fp32 at every batch size: 2.00x to 4.00x faster."
    assert saved == "The time saved per batch grows with the batch size: 2.00 ms at 1, 24.00 ms at 8."
    assert "2 threads, all models in 20 short rounds in random order" in how
    assert "An int8 model against a second copy of itself gave 0.99x to 1.01x" in how
    assert how.endswith("Models are loaded from the registry as `qexp.load(uri)` loads them.")


def test_slower_at_every_size(evidence: Evidence) -> None:
    first, saved, _ = speed.latency(with_speedups(evidence, {1: 0.8, 8: 0.5}))
    assert first == "int8 is slower than fp32 at every batch size: 1.25x to 2.00x slower."
    assert "does not grow with the batch size: -1.00 ms at 1, -32.00 ms at 8" in saved
    assert "faster" not in first


def test_mixed(evidence: Evidence) -> None:
    first = speed.latency(with_speedups(evidence, {1: 0.5, 2: 1.0, 8: 2.0, 16: 3.0, 32: 1.005}))[0]
    assert first == (
        "int8 is faster than fp32 at batch size 8, 16; slower than fp32 at batch size 1; "
        "indistinguishable from fp32 within the noise at batch size 2, 32."
    )


def test_what_is_told_apart_depends_on_the_noise(evidence: Evidence) -> None:
    speedups = {1: 0.96, 8: 1.04}
    quiet = speed.latency(with_speedups(evidence, speedups, noise_percent=1))[0]
    assert quiet == "int8 is faster than fp32 at batch size 8; slower than fp32 at batch size 1."
    noisy = speed.latency(with_speedups(evidence, speedups, noise_percent=5))[0]
    assert noisy == "int8 is indistinguishable from fp32 within the noise at batch size 1, 8."
    assert "faster" not in noisy and "slower" not in noisy


def test_noise_and_rounds_are_those_of_all_batch_sizes(evidence: Evidence) -> None:
    rows = [
        latency_row(1, {"fp32": 4.0, "int8_fx": 1.0}, rounds=20, noise_percent=2),
        latency_row(8, {"fp32": 4.0, "int8_fx": 1.0}, rounds=90, noise_percent=7),
    ]
    how = speed.latency(with_rows(evidence, *rows))[-1]
    assert "in 20 to 90 short rounds" in how and "gave 0.93x to 1.07x" in how


def test_too_few_rounds_for_an_interval_are_admitted(evidence: Evidence) -> None:
    enough, few = (speed.latency(with_speedups(evidence, {1: 2.0}, rounds=rounds))[-1] for rounds in (6, 5))
    assert "the rounds' ratios, with its 95 % interval." in enough
    assert "with the smallest and the largest (6 rounds make a 95 % interval)." in few


def test_few_rounds_are_not_called_noise(evidence: Evidence) -> None:
    few = with_speedups(evidence, {1: 4.0, 8: 4.0}, rounds=5)
    said = "int8 is not told apart from fp32 by fewer than 6 rounds (`--min-repeats`) at batch size 1, 8."
    assert speed.latency(few)[0] == said


def test_time_saved_that_shrinks(evidence: Evidence) -> None:
    saved = speed.latency(with_speedups(evidence, {1: 4.0, 8: 1.06}))[1]
    assert "does not grow with the batch size: 3.00 ms at 1, 1.81 ms at 8" in saved


def test_larger_batches_are_larger_whatever_their_order(evidence: Evidence) -> None:
    """Batch sizes are sorted when they are read; a result that was read from a file may not be."""
    saved = speed.latency(with_speedups(evidence, {128: 2.0, 8: 2.0, 1: 2.0}))[1]
    assert "grows with the batch size: 2.00 ms at 1, 256.00 ms at 128" in saved


def test_one_batch_size_says_nothing_about_larger_ones(evidence: Evidence) -> None:
    sentences = speed.latency(with_speedups(evidence, {8: 2.0}))
    assert sentences[0] == "int8 is faster than fp32 at every batch size: 2.00x faster."
    assert len(sentences) == 2 and "larger batch" not in " ".join(sentences)


def test_of_several_kernels_the_chosen_ones_are_named(evidence: Evidence) -> None:
    rows = [
        latency_row(batch, {"fp32": 8.0, "int8_fx": 2.0, "int8_fx_onednn": 1.0}, noise_percent=1) for batch in (1, 8)
    ]
    both = ("int8_fx_onednn", "int8_fx")
    measured = replace(evidence.measured, contenders={evidence.int8.version_uri: both})
    chosen = replace(evidence.versions[0], name="int8_fx_onednn")
    several = with_rows(replace(evidence, versions=(chosen,), measured=measured), *rows)
    first, *_, how = speed.latency(several)
    assert first.startswith("int8 is faster than fp32 at every batch size: ")
    assert "of int8 kernels, those of int8_fx_onednn won (mean over fp32: int8_fx_onednn " in how
    assert "a plain `mlflow.pytorch.load_model` uses those of x86" in how


def test_a_busy_machine_is_named(evidence: Evidence) -> None:
    quiet = speed.latency(evidence)
    assert not [sentence for sentence in quiet if "busy" in sentence]
    row = evidence.latency.rows[1]
    noisy = replace(row, stats=row.stats | {"int8_fx": replace(row.stats["int8_fx"], p90_ms=7 * 0.8)})
    busy = with_rows(evidence, evidence.latency.rows[0], noisy, evidence.latency.rows[2])
    assert "busy" not in claims.answer(busy)  # clearly faster all the same
    failed = with_gate(busy, GateResult(False, ("speed-up 2 at batch size 8, lower end 0.5",)))
    for sentences in (speed.latency(busy), [claims.answer(failed)], advice.recommendation(failed)):
        assert [sentence for sentence in sentences if "busy**: at batch size 8 p90 is up to 7.0 times" in sentence]
    other = replace(row, stats=row.stats | {"bf16": replace(row.stats["bf16"], p90_ms=7 * 1.6)})
    assert "busy" not in str(speed.latency(with_rows(evidence, other)))  # the answer does not rest on it
