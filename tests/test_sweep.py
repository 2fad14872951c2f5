"""The latency sweep as a process of its own, and what happens when it fails."""

import mlflow
import pytest
from conftest import Finished

from qexp import registry
from qexp.config import LatencyConfig
from qexp.errors import StageError
from qexp.sweep import SweepRequest, run_sweep

OPTIONS = LatencyConfig(batch_sizes=[1, 4], warmup=1, min_repeats=3, min_seconds=0.0)


def test_sweep_of_registered_versions(finished: Finished) -> None:
    mlflow.set_tracking_uri(finished.uri)
    request = SweepRequest(finished.summary["fp32"], finished.summary["int8"], 32, 1, OPTIONS)
    result = run_sweep(request, registry.child_environment(1))
    assert result.threads == 1 and [row.batch_size for row in result.rows] == [1, 4]
    assert all(row.fp32.repeats == row.int8.repeats == 3 and row.int8.p50_ms > 0 for row in result.rows)


def test_a_sweep_that_fails_is_a_stage_error(finished: Finished) -> None:
    mlflow.set_tracking_uri(finished.uri)
    request = SweepRequest("models:/nothing/1", "models:/nothing/2", 32, 1, OPTIONS)
    with pytest.raises(StageError, match="models:/nothing/2 failed with exit code 1"):
        run_sweep(request, registry.child_environment(1))
