"""The best number of threads at each batch size, from sweeps whose times are made up."""

from dataclasses import replace

from conftest import latency_row

from qexp.measurement.latency import LatencyResult
from qexp.measurement.threads import best_threads
from qexp.report.page import render_markdown
from qexp.report.results import Evidence
from qexp.tracking.metrics import of_threads, threads_table

FLOATS = ("fp32", "fp32_onnx")
ONE = {1: {"fp32": 1.0, "fp32_onnx": 0.6, "int8": 0.2}, 8: {"fp32": 8.0, "fp32_onnx": 5.0, "int8": 1.6}}
TWO = {1: {"fp32": 0.9, "fp32_onnx": 1.2, "int8": 0.201}, 8: {"fp32": 4.4, "fp32_onnx": 2.8, "int8": 0.9}}


def _sweep(threads: int, times: dict[int, dict[str, float]], rounds: int = 20) -> LatencyResult:
    rows = tuple(latency_row(size, ms, rounds) for size, ms in times.items())
    return LatencyResult("fp32", rows, (), threads)


def _scattered(result: LatencyResult) -> LatencyResult:
    """With times of which every other load takes 2.5 times as long, as on a busy machine."""
    (row,) = result.rows
    factors = [1.0 if load % 2 else 2.5 for load, rounds in enumerate(row.loads) for _ in range(rounds)]
    slowed = {
        name: tuple(ms * factor for ms, factor in zip(found, factors, strict=True))
        for name, found in row.round_ms.items()
    }
    return replace(result, rows=(replace(row, round_ms=slowed),))


def test_fewer_threads_where_more_are_not_shown_to_be_faster() -> None:
    small, large = best_threads((_sweep(2, TWO), _sweep(1, ONE)), "int8", FLOATS)
    assert (small.batch_size, small.float.threads, small.int8.threads) == (1, 1, 1)
    assert small.float.shown and not small.int8.shown  # 0.2 and 0.201 ms are within the noise of 1 %
    assert small.float.models == {1: "fp32_onnx", 2: "fp32"} and small.float.p50_ms == {1: 0.6, 2: 0.9}
    assert (large.float.threads, large.int8.threads) == (2, 2) and large.float.shown and large.int8.shown
    assert abs(large.speedup.median / (2.8 / 0.9) - 1) < 0.02
    assert small.speedup.low < 3 < small.speedup.high  # on one number of threads: paired
    logged = dict(of_threads((small, large)))
    assert logged[8] == {"latency/best_threads/float": 2.0, "latency/best_threads/int8": 2.0}
    table = threads_table((small, large))
    assert len(table["p50_ms"]) == 8 and sum(table["best"]) == 4


def test_each_on_its_best_number_of_threads() -> None:
    """Then the times are of different sweeps, and their ratio has an interval of its own."""
    slow = {8: {"fp32": 8.0, "fp32_onnx": 5.0, "int8": 0.5}}
    (row,) = best_threads((_sweep(2, {8: TWO[8]}), _sweep(1, slow)), "int8", FLOATS)
    assert (row.float.threads, row.int8.threads) == (2, 1)
    assert abs(row.speedup.median / (2.8 / 0.5) - 1) < 0.02
    assert row.speedup.low < row.speedup.median < row.speedup.high


def test_speedup_is_over_the_float_on_its_fastest_number_of_threads() -> None:
    """Also where times scatter so much that fewer threads are not told apart, and are named for that."""
    two, one = (_sweep(threads, {8: times[8]}) for threads, times in ((2, TWO), (1, ONE)))
    (row,) = best_threads((_scattered(two), _scattered(one)), "int8", FLOATS)
    assert (row.float.threads, row.float.fastest, row.float.shown) == (1, 2, False)
    assert row.speedup.median < 4  # 2.8 over 0.9 ms; 5.0 over 0.9 would be 5.6


def test_too_few_rounds_name_the_fastest_and_show_nothing() -> None:
    (row,) = best_threads((_sweep(2, {1: TWO[1]}, 2), _sweep(1, {1: ONE[1]}, 2)), "int8", FLOATS)
    assert row.float.threads == 1 and not row.float.shown


def test_report_has_the_table_where_several_numbers_were_timed(evidence: Evidence) -> None:
    assert "best number of threads" not in render_markdown(evidence)
    times = {
        row.batch_size: {name: 1.7 * one.p50_ms for name, one in row.stats.items()} for row in evidence.latency.rows
    }
    measured = replace(evidence.measured, other_threads=(_sweep(1, times),))
    text = render_markdown(replace(evidence, measured=measured))
    assert "all other figures are those on 2 threads" in text
    assert "| 1 | 0.850 on 1, 0.500 on 2 | 2 threads | 0.425 on 1, 0.250 on 2 | 2 threads | 2.00 (" in text
