"""What the runs of a real pipeline look like in a real store."""

import json
import math
import os
import tempfile
from functools import reduce
from pathlib import Path
from typing import Any

import mlflow
import pytest
from conftest import Finished
from mlflow.entities import Run
from stores import new_store

from qexp.config import Config, QuantizeConfig, load_config
from qexp.errors import InputError
from qexp.files import to_json
from qexp.measurement.host import read_host
from qexp.quantization.sensitivity import SensitivityResult
from qexp.report.results import Evidence, Fp32Evidence, Int8Evidence, LatencyEvidence
from qexp.tracking import runs as tracking
from qexp.tracking.store import use_store


@pytest.fixture
def runs(finished: Finished) -> dict[str, Run]:
    """Runs of the finished pipeline by name."""
    mlflow.set_tracking_uri(finished.uri)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("qexp-digits")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def test_a_damaged_result_is_one_line(evidence: Evidence, tmp_path: Path) -> None:
    """Also where it is whole JSON, but lacks what was measured on the test images, or the times of a model."""
    mlflow.set_tracking_uri(new_store(tmp_path))
    with mlflow.start_run(experiment_id="0") as run:
        tracking.log_result("fp32", evidence.fp32)
    (file,) = tmp_path.rglob("fp32.json")
    assert tracking.read_result(Fp32Evidence, run.info.run_id, "fp32") == evidence.fp32
    no_test = json.dumps(json.loads(file.read_text()) | {"accuracy": {}})
    untimed = json.loads(to_json(evidence.measured))
    untimed["latency"]["rows"][0]["stats"].pop("int8_fx")
    not_times = ["", "{", "[]", "{}", "null", "NaN", "[" * 100_000, '{"a": ' * 10_000, "\udcff", no_test]
    for text, kind in [*((text, Fp32Evidence) for text in not_times), (json.dumps(untimed), LatencyEvidence)]:
        file.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(InputError, match=rf"^runs:/{run.info.run_id}/results/fp32.json: is damaged \(.+\)$"):
            tracking.read_result(kind, run.info.run_id, "fp32")
    file.unlink()
    file.mkdir()
    with pytest.raises(InputError, match=rf"^runs:/{run.info.run_id}/results/fp32.json: ") as refused:
        tracking.read_result(Fp32Evidence, run.info.run_id, "fp32")
    assert tempfile.gettempdir() not in str(refused.value)  # where the copy is that was read


# A result, one of its values by its path, what stands there, and what is said of it.
SENSELESS = [
    ("fp32", "accuracy.test.images", -1, "greater than or equal to 1"),
    ("fp32", "accuracy.test.top1_percent", 101, "less than or equal to 100"),
    ("fp32", "accuracy.test.top1_percent", math.nan, "finite number"),
    ("fp32", "accuracy.test.top3_percent", 50, "top-1 of 94 % is more than top-3 of 50 %"),
    ("fp32", "accuracy.test.top1_tied_images", 360, "more images are tied than the 359 that there are"),
    ("fp32", "size_bytes", 0, "0 bytes"),
    ("fp32", "data.classes", [], "no classes"),
    ("fp32", "train.best_epoch", 4, "no epoch 4"),
    ("fp32", "train.epochs", [], "no epoch 3"),
    (
        "int8",
        "comparison.test.only_int8_correct_images",
        355,
        "right with one model alone than the 359",
    ),
    ("int8", "comparison.test.top1_drop_low_points", 2, "ends below where it begins"),
    ("int8", "fp32_cost.macs", {}, "multiply-accumulates of a batch size are missing"),
    ("int8", "cost.int8_macs.1", 1001, "more multiply-accumulates are in int8"),
    ("latency", "latency.rows", [], "times of a model are missing"),
    ("latency", "latency.rows.0.stats.fp32.p50_ms", 0, "greater than"),
    ("latency", "latency.rows.0.stats.fp32.p50_ms", 1.2, "the percentiles at batch size 1 fall"),
    ("latency", "latency.rows.0.round_ms.fp32", [], "times of a round at batch size 1 are missing"),
    ("latency", "latency.rows.1.noise.low", 0, "greater than"),
    ("latency", "latency.weights", {"2": 1.0}, "no times that count"),
]


@pytest.mark.parametrize(("kind", "path", "value", "why"), SENSELESS)
def test_a_result_that_makes_no_sense_is_one_line(
    kind: str, path: str, value: Any, why: str, evidence: Evidence, monkeypatch: pytest.MonkeyPatch
) -> None:
    result: Any = {"fp32": evidence.fp32, "int8": evidence.int8, "latency": evidence.measured}[kind]
    changed = json.loads(to_json(result))
    *parents, last = path.split(".")
    inner = reduce(lambda found, key: found[int(key) if isinstance(found, list) else key], parents, changed)
    inner[last] = value
    texts = iter([to_json(result), json.dumps(changed)])
    monkeypatch.setattr(tracking, "_read_text", lambda run_id, file: next(texts))
    assert tracking.read_result(type(result), "0", kind) == result
    with pytest.raises(InputError, match=rf"^runs:/0/results/{kind}.json: is damaged \([^\n]*{why}"):
        tracking.read_result(type(result), "0", kind)


def test_run_tree(runs: dict[str, Run], finished: Finished) -> None:
    children = {"train-smallnet", "sensitivity-smallnet", "quantize-fx-64", "latency-smallnet", "report"}
    assert set(runs) == {"smallnet-digits"} | children
    assert runs["smallnet-digits"].data.tags["qexp.stage"] == "main"
    assert all(run.info.status == "FINISHED" for run in runs.values())
    assert runs["smallnet-digits"].info.run_id == finished.summary["run_id"]
    for name in children:
        assert runs[name].data.tags["mlflow.parentRunId"] == runs["smallnet-digits"].info.run_id
    assert all(len(run.data.tags["mlflow.note.content"]) > 20 for run in runs.values())


def test_every_run_has_the_resolved_configuration_and_the_host(runs: dict[str, Run]) -> None:
    for run in runs.values():
        config = tracking.read_config(run.info.run_id)
        assert config.train.epochs == 4 and config.latency.batch_sizes == [1, 8]
        assert run.data.params["config.model"] == "smallnet"
        assert '"cpu"' in mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/host.json")


def test_curves_have_one_value_an_epoch(runs: dict[str, Run]) -> None:
    client = mlflow.MlflowClient()
    names = ["train/loss", "train/top1", "train/top3", "val/loss", "val/top1", "val/top3"]
    for name in [*names, "train/learning_rate", "train/images_per_s"]:
        history = client.get_metric_history(runs["train-smallnet"].info.run_id, name)
        assert [metric.step for metric in history] == [1, 2, 3, 4], name


def test_each_model_has_its_own_metrics(runs: dict[str, Run]) -> None:
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("qexp-digits")
    models = client.search_logged_models([experiment.experiment_id])
    assert sorted(model.name for model in models) == ["smallnet-fp32", "smallnet-int8"]
    for model in models:
        kind = model.name.removeprefix("smallnet-")
        stage = {"fp32": "train-smallnet", "int8": "quantize-fx-64"}[kind]
        assert model.source_run_id == runs[stage].info.run_id
        names = {metric.key for metric in model.metrics}
        assert {"test_top1_percent", "test_top3_percent", "size_mb", "parameters", "macs", "p50_ms"} <= names
        own = runs[stage].data.metrics["size_mb"]
        assert [metric.value for metric in model.metrics if metric.key == "size_mb"] == [own]


def test_each_model_has_its_own_latency(runs: dict[str, Run]) -> None:
    """And none of another: baselines and kernels that were not chosen are no models of the registry."""
    client = mlflow.MlflowClient()
    measured = tracking.read_result(LatencyEvidence, runs["latency-smallnet"].info.run_id, "latency")
    (chosen, *_) = measured.names["models:/smallnet-digits-int8/1"]
    for model in client.search_logged_models([client.get_experiment_by_name("qexp-digits").experiment_id]):
        name = {"fp32": "fp32", "int8": chosen}[model.name.removeprefix("smallnet-")]
        own = {metric.step: metric.value for metric in model.metrics if metric.key == "p50_ms"}
        assert own == {row.batch_size: pytest.approx(row.stats[name].p50_ms) for row in measured.latency.rows}


def test_experiment_has_a_description_and_a_view_of_the_answers(runs: dict[str, Run]) -> None:
    """And keeps what people write there."""
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("qexp-digits")
    assert "ship as int8 on this CPU" in experiment.tags["mlflow.note.content"]
    view = json.loads(experiment.tags["mlflow.sharedViewState.qexp-verdicts"])
    main = runs["smallnet-digits"].data
    columns = json.loads(view["state"])["selectedColumns"]
    assert set(columns) == {f"metrics.`{name}`" for name in main.metrics} | {
        f"tags.`qexp.{name}`" for name in ("verdict", "engine")
    }
    assert "Default" not in [found.name for found in client.search_experiments() if "mlflow.note.content" in found.tags]


def test_a_description_that_people_wrote_stays(empty_store: mlflow.MlflowClient) -> None:
    experiment = empty_store.get_experiment_by_name("qexp-test").experiment_id
    empty_store.set_experiment_tag(experiment, "mlflow.note.content", "ours")
    with tracking.start_run("train-x", "note"):
        pass
    assert empty_store.get_experiment(experiment).tags["mlflow.note.content"] == "ours"


def test_models_are_logged_once(empty_store: mlflow.MlflowClient) -> None:
    with tracking.start_run("latency-x", "note") as run_id:
        made = mlflow.create_external_model("made").model_id
        read = mlflow.create_external_model("read").model_id
        for _ in range(2):
            tracking.log_models([read, read], [made])
    run = empty_store.get_run(run_id)
    assert [found.model_id for found in run.inputs.model_inputs] == [read]
    assert [found.model_id for found in run.outputs.model_outputs].count(made) == 1


def test_sensitivity_is_a_table_and_a_result(runs: dict[str, Run]) -> None:
    run_id = runs["sensitivity-smallnet"].info.run_id
    found = tracking.read_result(SensitivityResult, run_id, "sensitivity")
    assert len(found.layers) == 7 and found.images == 16
    columns = mlflow.artifacts.load_dict(f"runs:/{run_id}/tables/sensitivity.json")
    assert [row[0] for row in columns["data"]] == [layer.layer for layer in found.layers]
    int8 = tracking.read_result(Int8Evidence, runs["quantize-fx-64"].info.run_id, "int8")
    assert int8.sensitivity == found and int8.budget is None


def test_datasets_are_inputs_with_digests(runs: dict[str, Run]) -> None:
    inputs = runs["quantize-fx-64"].inputs.dataset_inputs
    contexts = {tag.value: item.dataset for item in inputs for tag in item.tags}
    assert set(contexts) == {"train", "validation", "test", "calibration"}
    assert len({dataset.digest for dataset in contexts.values()}) == 4


def test_report_and_tables_are_artifacts(runs: dict[str, Run]) -> None:
    client = mlflow.MlflowClient()
    for name in ("smallnet-digits", "report"):
        files = {file.path for file in client.list_artifacts(runs[name].info.run_id, "report")}
        assert {"report/report.html", "report/report.md", "report/metrics.json", "report/figures"} <= files
        figures = client.list_artifacts(runs[name].info.run_id, "report/figures")
        assert len(figures) == 8 and all((file.file_size or 0) > 5000 for file in figures)
    for name, table in (("quantize-fx-64", "accuracy"), ("latency-smallnet", "latency")):
        columns = mlflow.artifacts.load_dict(f"runs:/{runs[name].info.run_id}/tables/{table}.json")
        assert len(columns["data"]) == {"accuracy": 6, "latency": 2 * 4}[table]


def test_results_read_back(runs: dict[str, Run]) -> None:
    fp32 = tracking.read_result(Fp32Evidence, runs["train-smallnet"].info.run_id, "fp32")
    assert len(fp32.train.epochs) == 4 and fp32.data.test_images == 359
    latency = tracking.read_result(LatencyEvidence, runs["latency-smallnet"].info.run_id, "latency")
    assert [row.batch_size for row in latency.latency.rows] == [1, 8]
    with pytest.raises(InputError, match="nothing"):
        tracking.read_result(Fp32Evidence, runs["smallnet-digits"].info.run_id, "nothing")


@pytest.fixture
def empty_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> mlflow.MlflowClient:
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    mlflow.set_tracking_uri(new_store(tmp_path))
    use_store()
    tracking.use_experiment("test")
    return mlflow.MlflowClient()


@pytest.mark.parametrize(("error", "status"), [(ValueError("broken"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_a_run_ends_whatever_happens(error: BaseException, status: str, empty_store: mlflow.MlflowClient) -> None:
    with pytest.raises(type(error)), tracking.start_run("outer", "note") as outer:
        with tracking.start_run("inner", "note") as inner:
            raise error
    assert [empty_store.get_run(run_id).info.status for run_id in (outer, inner)] == [status, status]
    if status == "FAILED":
        assert "broken" in empty_store.get_run(inner).data.tags["qexp.error"]


def test_inside_mlflow_run_the_given_run_is_used_and_named(
    empty_store: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = empty_store.get_experiment_by_name("qexp-test").experiment_id
    for given, expected in (("caring-toad-123", "main"), ("my own name", "my own name")):
        run = empty_store.create_run(experiment, run_name=given)
        # What mlflow.projects has logged before the program starts must not clash with our parameters.
        empty_store.log_param(run.info.run_id, "epochs", "'auto'")
        monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
        with tracking.start_run("main", "note") as run_id:
            tracking.log_setup(Config(), tracking_host())
        assert run_id == run.info.run_id
        found = empty_store.get_run(run_id)
        assert (found.info.run_name, found.info.status) == (expected, "FINISHED")
        assert "MLFLOW_RUN_ID" not in os.environ


def tracking_host() -> "tracking.Host":
    from qexp.measurement.host import read_host

    return read_host(None)


def test_configuration_artifact_reads_back(empty_store: mlflow.MlflowClient) -> None:
    config = load_config(None, {"train": {"epochs": "7"}})
    with tracking.start_run("main", "note") as run_id:
        tracking.log_setup(config, tracking_host())
    assert tracking.read_config(run_id) == config


def test_parameters_fit_into_a_store(tmp_path: Path) -> None:
    layers = [f"network.features.denseblock4.denselayer{number}.conv1" for number in range(200)]
    mlflow.set_tracking_uri(new_store(tmp_path))
    with mlflow.start_run(experiment_id="0") as run:
        tracking.log_setup(Config(quantize=QuantizeConfig(keep_fp32=layers)), read_host(1))
    shown = mlflow.MlflowClient().get_run(run.info.run_id).data.params["quantize.keep_fp32"]
    assert len(shown) == 6000 and shown.startswith("['network.features.") and shown.endswith("…")
    assert tracking.read_config(run.info.run_id).quantize.keep_fp32 == sorted(layers)
