"""Throughput: statistics of made-up clock readings, and real workers with a tiny model."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from conftest import Finished, run_qexp

from qexp.config import ThroughputConfig
from qexp.errors import StageError
from qexp.files import from_json, to_json
from qexp.measurement.activity import Activity
from qexp.measurement.host import read_host
from qexp.measurement.load import LoadRequest, clock_requests, run_load
from qexp.measurement.sweep_models import SweepModel
from qexp.measurement.throughput import (
    Round,
    Served,
    Setting,
    ThroughputResult,
    ThroughputRow,
    by_processes,
    round_of,
    served,
    settings,
)
from qexp.report.page import render_markdown
from qexp.report.results import Evidence, ThroughputEvidence
from qexp.tracking import registry
from qexp.tracking import runs as tracking
from qexp.tracking.metrics import of_throughput, throughput_table


def test_a_round_counts_while_all_workers_are_at_work() -> None:
    """From 1 s to 3 s: one worker does 2 requests of a second each, the other 4 of half a second, a part as a part."""
    found = round_of([[1.0, 2.0, 3.0], [0.75, 1.25, 1.75, 2.25, 2.75, 3.25]], 8)
    assert found.images_per_second == pytest.approx(8 * (2 + 4) / 2)
    assert found.request_s == (1.0, 1.0, *[0.5] * 5)
    alone = round_of([[0.0, 0.1, 0.2, 0.4]], 1)
    assert alone.images_per_second == pytest.approx(3 / 0.4)


def test_a_percentile_is_there_where_the_requests_hold_it() -> None:
    few, many = (served("int8", [Round(100.0, (0.01,) * count)]) for count in (99, 100))
    assert few.p99_ms is None and many.p99_ms == pytest.approx(10) and few.p50_ms == pytest.approx(10)
    both = served("int8", [Round(100.0, (0.01,) * 50), Round(400.0, (0.02,) * 50)])
    assert both.requests == 100 and both.rate.median == pytest.approx(200)


def test_requests_follow_each_other_for_so_many_seconds() -> None:
    def ticks(step: float) -> Iterator[float]:
        now = 0.0
        while True:
            yield now
            now += step

    quick, slow = ticks(0.3), ticks(9.0)
    assert clock_requests(lambda: None, 1.0, lambda: next(quick)) == pytest.approx([0, 0.3, 0.6, 0.9, 1.2])
    assert clock_requests(lambda: None, 1.0, lambda: next(slow)) == [0, 9, 18], "workers overlap, whatever they take"


def test_settings_fill_the_cores() -> None:
    tried = {(one.workers, one.threads) for one in settings(6, None, None, [1])}
    assert tried == {(1, 1), (3, 1), (6, 1), (1, 2), (3, 2), (1, 4), (1, 6)}
    assert [(one.workers, one.batch_size) for one in settings(2, [2, 4], [1], [1, 8])] == [(2, 1), (2, 8)]
    assert settings(2, [4], None, [1]) == ()
    assert {key: len(found) for key, found in by_processes(settings(2, None, None, [1, 8])).items()} == {
        (1, 1): 2, (2, 1): 2, (1, 2): 2
    }  # fmt: skip


def _row(workers: int, threads: int, size: int, rates: dict[str, float], p99_ms: float | None) -> ThroughputRow:
    """Rates that spread by 1 % around those given."""
    float_, int8 = (
        Served(name, (0.99 * rate, rate, 1.01 * rate), 4.0, p99_ms, 500)
        for name, rate in (("fp32_onnx", rates["float"]), ("int8_fx", rates["int8"]))
    )
    return ThroughputRow(Setting(workers, threads, size), float_, int8)


RESULT = ThroughputResult(
    (
        _row(1, 1, 1, {"float": 100, "int8": 300}, 6.0),
        _row(2, 1, 1, {"float": 190, "int8": 590}, 8.0),
        _row(1, 2, 1, {"float": 150, "int8": 400}, 5.0),
        _row(1, 1, 8, {"float": 130, "int8": 590}, 20.0),
        _row(2, 1, 8, {"float": 250, "int8": 1000}, None),
    ),
    cores=2,
    pinned=True,
)


def test_the_setting_that_serves_most_within_a_limit() -> None:
    free = RESULT.best("int8")
    assert free and free.setting == Setting(2, 1, 8) and free.served.rate.low < 1000 < free.served.rate.high
    limited = RESULT.best("int8", 10.0)
    assert limited and limited.setting == Setting(2, 1, 1), "where too few requests were timed, no limit is kept"
    level = RESULT.best("int8", 25.0)
    assert level and level.setting == Setting(1, 1, 8), "of two that are not told apart, the one with fewer cores"
    assert RESULT.best("float", 4.0) is None


def test_cores_that_a_rate_takes() -> None:
    few, more = RESULT.needed("int8", 280, 10.0), RESULT.needed("int8", 500, 10.0)
    assert few and (few.machines, few.cores, few.each.setting) == (1, 1, Setting(1, 1, 1))
    assert more and (more.machines, more.cores, more.each.setting) == (1, 2, Setting(2, 1, 1))
    lower = RESULT.rows[4].int8.rate.low
    beyond = RESULT.needed("int8", 10 * lower + 1)
    assert beyond and (beyond.machines, beyond.cores) == (11, 22), "by the lower end of the interval"
    assert RESULT.needed("float", 10, 4.0) is None


def test_a_busy_machine_and_too_few_rounds_are_said() -> None:
    assert RESULT.shortcomings == ()
    busy = replace(RESULT, max_busy_percent=5.0, activities=(Activity(10, 10, 0, 2, 2), Activity(10, 10, 6, 2, 2)))
    assert busy.shortcomings == (
        "the machine was busy: other programs or the CPU quota took up to 30 % of the workers' cores, and at most 5 % "
        "is allowed (--max-busy-percent)",
    )
    one = ThroughputResult((replace(RESULT.rows[0], int8=Served("int8", (1.0,), 1.0, None, 3)),), 2, True)
    assert one.shortcomings == ("of at least 3 rounds that it takes, 1 were made (--load-rounds)",)
    with pytest.raises(ValueError, match="a round with 1 worker of 1 thread, batch size 1 is missing"):
        from_json(ThroughputResult, to_json(one))


def test_report_says_what_to_run(evidence: Evidence) -> None:
    found = ThroughputEvidence(
        "models:/smallnet-digits-fp32/1", "models:/smallnet-digits-int8/1", RESULT, read_host(2), "0" * 32, 10.0, 2000.0
    )
    assert "## Throughput" not in render_markdown(evidence)
    section = render_markdown(replace(evidence, throughput=found)).split("## Throughput")[1].split("\n## ")[0]
    assert "Within 10 ms for 99 of 100 requests, int8 serves 590 images a second (576 to 605) with" in section
    assert "with 2 workers of 1 thread, batch size 1, 99 of 100 requests within 8.00 ms; the fastest float" in section
    assert "For 2,000 images a second, int8 needs 8 cores of 4 machines like this one, each with 2 workers" in section
    assert "| 2 | 1 | 1 | `fp32_onnx` | 190 (185.3 to 194.8) | 4 / 8 | 590 (575.5 to 604.8) | 4 / 8 | 3.11x" in section
    assert "3 rounds with new processes" in section
    logged = dict[str, float]()
    for step, values in of_throughput(found):
        logged |= {f"{name} {step}": value for name, value in values.items()}
    assert logged["int8_images_per_second None"] == pytest.approx(590, rel=1e-3)
    assert logged["throughput/images_per_second/int8_2x1 8"] == pytest.approx(1000, rel=1e-3)
    assert "throughput/p99_ms/int8_2x1 8" not in logged and logged["throughput/p99_ms/int8_2x1 1"] == 8.0
    assert throughput_table(found)["p99_ms"].count(None) == 2


@pytest.mark.slow
def test_workers_that_really_run(in_use: Finished) -> None:
    uri, cores = in_use.summary["int8"], len(os.sched_getaffinity(0))
    few = "--batch-sizes 2 --load-seconds 0.05 --load-rounds 2 --threads-per-worker 1 --max-busy-percent 100".split()
    asked = ["--max-p99-ms", "100000", "--images-per-second", "0.001"]
    done = run_qexp(in_use.folder, "throughput", "--model-uri", uri, *few, *asked)
    assert done.code == 0, done.stderr
    mlflow.set_tracking_uri(in_use.uri)
    found = tracking.read_result(ThroughputEvidence, done.summary["run_id"], "throughput")
    tried = {(row.setting.workers, row.setting.threads, row.setting.batch_size) for row in found.result.rows}
    assert tried == {(1, 1, 2), (max(1, cores // 2), 1, 2), (cores, 1, 2)} and found.result.cores == cores
    for row in found.result.rows:
        assert len(row.int8.images_per_second) == 2 and row.int8.requests >= 4 * row.setting.workers
        assert row.int8.model.startswith("int8_fx") and row.float.model in ("fp32", "fp32_traced")
    assert found.result.shortcomings == ("of at least 3 rounds that it takes, 2 were made (--load-rounds)",)
    assert found.host.cpu == read_host(None).cpu and found.max_p99_ms == 100000
    run = tracking.find_run(found.run_id)
    assert run.data.tags["qexp.stage"] == "throughput" and "throughput/images_per_second/int8_1x1" in run.data.metrics
    version = registry.find_version(uri, "int8")
    assert version.tags["throughput_run_id"] == found.run_id

    elsewhere = "from qexp.pipeline import setup\nfrom dataclasses import replace\nread = setup.read_host\n"
    elsewhere += "setup.read_host = lambda threads: replace(read(threads), cpu='Unknown CPU')"
    refused = run_qexp(in_use.folder, "throughput", "--model-uri", uri, before=elsewhere)
    assert refused.code == 2 and refused.stderr.splitlines()[-1] == (
        f"error: --model-uri {uri}: was not timed on this CPU (Unknown CPU), so its fastest float is not known; run "
        f"`qexp latency --model-uri {uri}` first"
    )


@pytest.mark.slow
def test_a_worker_that_fails_ends_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.pt2").write_bytes(b"no model")
    int8, fp32 = SweepModel("int8_fx", str(tmp_path)), SweepModel("fp32", str(tmp_path))
    one = settings(1, [1], [1], [1])
    request = LoadRequest(int8, (fp32,), one, ("fp32",), "", (3, 8, 8), 1, 100.0, ThroughputConfig())
    with pytest.raises(StageError, match=r"^the workers failed with exit code 1; see the lines above$"):
        run_load(request, registry.child_environment(1))
    assert "a worker failed: " in capfd.readouterr().err
