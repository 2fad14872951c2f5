"""docs/reference/mlflow.md names what a real job leaves in MLflow, all of it and nothing else."""

import re
from functools import partial

import mlflow
import pytest
from conftest import REPOSITORY, Finished
from mlflow.entities import Run

from qexp.tracking.store import all_pages

PAGE = (REPOSITORY / "docs" / "reference" / "mlflow.md").read_text()
NAME = re.compile(r"`([^`]+)`")
STAGES = ("main", "train", "sensitivity", "quantize", "latency", "report")


def _rows(heading: str) -> list[list[str]]:
    """Cells of the table below a heading."""
    section = re.split(r"^#+ ", PAGE.split(f"# {heading}\n", 1)[1], flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def _named(heading: str, *words: str) -> tuple[set[str], set[str]]:
    """Names in the first column, of the rows whose second begins with one of `words`: those that are always there, and
    all."""
    always, known = set[str](), set[str]()
    for first, second, *rest in _rows(heading):
        if not words or re.split("[, ]", second)[0] in words:
            names = set(NAME.findall(first))
            known |= names
            always |= names if "optional" not in f"{second} {rest}" else set()
    return always, known


@pytest.fixture(scope="module")
def runs(finished: Finished) -> dict[str, Run]:
    """The runs of the job by stage."""
    client = mlflow.MlflowClient(finished.uri)
    found = {run.data.tags["qexp.stage"]: run for run in client.search_runs(["1"])}
    assert set(found) == set(STAGES)
    return found


@pytest.mark.parametrize("stage", ["main", "train", "quantize", "latency"])
def test_metrics_of_a_run_are_those_named(stage: str, runs: dict[str, Run], finished: Finished) -> None:
    logged = {re.sub(r"^(latency/\w+/)\w+$", r"\1<name>", name) for name in runs[stage].data.metrics}
    always, known = _named(stage)
    assert always <= logged <= known
    for name, step, _ in _rows(stage):
        for one in set(NAME.findall(name)) & set(runs[stage].data.metrics):
            points = mlflow.MlflowClient(finished.uri).get_metric_history(runs[stage].info.run_id, one)
            assert (
                sorted({point.step for point in points}) == {"epoch": [1, 2, 3, 4], "batch size": [1, 8], "": [0]}[step]
            ), one


@pytest.mark.parametrize("stage", ["sensitivity", "report"])
def test_other_runs_have_no_metrics(stage: str, runs: dict[str, Run]) -> None:
    assert not runs[stage].data.metrics


@pytest.mark.parametrize("stage", STAGES)
def test_tags_of_a_run_are_those_named(stage: str, runs: dict[str, Run]) -> None:
    logged = {name for name in runs[stage].data.tags if not name.startswith("mlflow.")}
    always, known = _named("Tags of runs", "all", stage)
    assert always <= logged <= known


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_are_what_was_chosen_for_the_stage(stage: str, runs: dict[str, Run]) -> None:
    logged = runs[stage].data.params
    named = {name for words, text in _rows("Parameters") for name in NAME.findall(text) if stage in words.split(", ")}
    always = {name for words, text in _rows("Parameters") for name in NAME.findall(text) if words == "all"}
    sections = {name.removesuffix("*") for name in named if name.endswith("*")}
    assert always | {name for name in named if not name.endswith("*")} <= set(logged)
    assert "auto" not in logged.values() and len(logged) <= 30
    if stage != "main":
        assert all(name in always or any(name.startswith(section) for section in sections) for name in logged)
        assert all(any(name.startswith(section) for name in logged) for section in sections)


@pytest.mark.parametrize("stage", STAGES)
def test_artifacts_are_those_named(stage: str, runs: dict[str, Run], finished: Finished) -> None:
    found = mlflow.MlflowClient(finished.uri).list_artifacts(runs[stage].info.run_id)
    named = {NAME.findall(row[0])[0] for row in _rows("Artifacts") if stage in row[1].split(", ") or row[1] == "all"}
    assert {file.path for file in found} - {"results"} == named - {"results"}


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_tags_of_a_version_are_those_named(kind: str, finished: Finished) -> None:
    client = mlflow.MlflowClient(finished.uri)
    always, known = _named("Tags of a version", "both", kind)
    assert always <= set(client.get_model_version(f"smallnet-digits-{kind}", "1").tags) <= known


def test_runs_have_the_models_in_and_out_that_are_named(runs: dict[str, Run], finished: Finished) -> None:
    client = mlflow.MlflowClient(finished.uri)
    names = {
        model.model_id: model.name.split("-")[-1] for model in all_pages(partial(client.search_logged_models, ["1"]))
    }
    read, made = dict[str, set[str]](), dict[str, set[str]]()
    for stage, run in runs.items():
        run = client.get_run(run.info.run_id)  # a search leaves models out
        read[stage] = {names[found.model_id] for found in run.inputs.model_inputs}
        made[stage] = {names[found.model_id] for found in run.outputs.model_outputs}
    nothing = set[str]()
    both = {"fp32", "int8"}
    assert made == {"main": both, "train": {"fp32"}, "quantize": {"int8"}} | dict.fromkeys(
        ("sensitivity", "latency", "report"), nothing
    )
    assert read == {"quantize": {"fp32"}, "latency": both, "report": {"int8"}} | dict.fromkeys(
        ("main", "train", "sensitivity"), nothing
    )


def test_models_are_ranked_by_data_set_as_the_page_says(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow.set_tracking_uri(finished.uri)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    values: dict[str, list[mlflow.entities.LoggedModel]] = {}
    exec(code, values)
    assert {model.name for model in values["found"]} == {"smallnet-fp32", "smallnet-int8"}
    reached = [
        next(one.value for one in model.metrics if (one.key, one.dataset_name) == ("test_top1_percent", "digits-test"))
        for model in values["found"]
    ]
    assert reached == sorted(reached, reverse=True) and reached[0] > 50
    other = mlflow.search_logged_models(
        experiment_ids=["1"], datasets=[{"dataset_name": "other-test"}], output_format="list"
    )
    assert other == []
    digests = {one.dataset_digest for model in values["found"] for one in model.metrics if one.dataset_name}
    assert len(digests) == 3  # of train, validation and test: the same for both models
