"""`qexp models`: what a list of versions holds, from the tags of a finished run."""

import mlflow
import pytest
from conftest import Finished, run_qexp
from stores import new_store

from qexp.errors import InputError
from qexp.tracking.catalog import as_table, list_models

INT8_LINEAGE = {
    "fp32_uri", "dataset", "data_digest", "calibration_digest", "calibration_samples", "config_uri", "git_commit",
    "cpu", "cpu_features", "threads", "train_run_id", "quantize_run_id", "latency_run_id",
}  # fmt: skip


def test_json_has_every_version_with_figures_and_lineage(finished: Finished) -> None:
    done = run_qexp(finished.folder, "models", uri=finished.uri)
    assert done.code == 0 and len(done.stdout.splitlines()) == 1, done.stderr
    fp32, int8 = done.summary["models"]
    assert (fp32["uri"], int8["uri"]) == (finished.summary["fp32"], finished.summary["int8"])
    assert fp32["aliases"] == int8["aliases"] == ["challenger", "champion"]
    for version, kind in ((fp32, "fp32"), (int8, "int8")):
        assert version["test_top1_percent"] == pytest.approx(finished.summary[f"{kind}_top1_percent"], abs=1e-3)
        assert version["size_mb"] == pytest.approx(finished.summary[f"{kind}_size_mb"], abs=1e-3)
        assert version["p50_ms"] > 0 and version["p50_batch_size"] == 1
    assert int8["top1_drop_low_points"] <= int8["top1_drop_points"] <= int8["top1_drop_high_points"]
    assert int8["smallest_speedup"] == pytest.approx(finished.summary["smallest_speedup"], abs=1e-3)
    assert int8["gate_reason"] == finished.summary["gate_reason"] and int8["engine"] == "fx"
    assert set(int8["lineage"]) == INT8_LINEAGE and all(int8["lineage"].values())
    assert int8["lineage"]["fp32_uri"] == fp32["uri"] and int8["lineage"]["threads"] >= 1
    header, *lines = done.stderr.splitlines()
    assert header.split()[:4] == ["NAME", "VERSION", "ALIASES", "ENGINE"] and len(lines) == 2
    assert lines[1].startswith("smallnet-digits-int8  1        challenger,champion  fx ")
    threads = int8["lineage"]["threads"]
    assert f"{int8['p50_ms']:.3g} at 1, {threads} thread" in lines[1] and "SMALLEST SPEED-UP" in header


def test_configuration_of_the_lineage_is_that_of_the_version(finished: Finished) -> None:
    mlflow.set_tracking_uri(finished.uri)
    (int8,) = list_models("*-int8")
    assert "calibration_samples: 64" in mlflow.artifacts.load_text(int8["lineage"]["config_uri"])


def test_names_and_patterns(finished: Finished) -> None:
    mlflow.set_tracking_uri(finished.uri)
    assert [row["name"] for row in list_models("smallnet-digits-fp32")] == ["smallnet-digits-fp32"]
    assert len(list_models("smallnet-*")) == 2
    with pytest.raises(InputError, match=r"NAME vgg16: .*; there are: smallnet-digits-fp32, smallnet-digits-int8"):
        list_models("vgg16")


def test_versions_of_other_people_and_without_tags(tmp_path_factory: pytest.TempPathFactory) -> None:
    mlflow.set_tracking_uri(new_store(tmp_path_factory.mktemp("others")))
    assert list_models() == [] and as_table([]) == "no models are registered"
    client = mlflow.MlflowClient()
    for name, tags in (("theirs", {}), ("old-fp32", {"kind": "fp32", "test_top1_percent": "90.0", "size_mb": "4,5"})):
        client.create_registered_model(name)
        for _ in range(11):
            client.create_model_version(name, "file:///nowhere", tags=tags)
    rows = list_models()
    assert [(row["name"], row["version"]) for row in rows] == [("old-fp32", number) for number in range(11, 0, -1)]
    assert as_table(rows).splitlines()[1].split() == ["old-fp32", "11", "-", "fp32", "90.00", *["-"] * 11]
