"""The search with a journal, on the store of a finished run: trials, resuming, failing, the registered winner."""

import shlex
import signal
import time
from collections import Counter
from pathlib import Path

import mlflow
import optuna
import pytest
import torch
from conftest import NO_FIGURES, PLAIN, Finished, of_pictures, run_qexp, start_qexp
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from stores import new_store

from qexp.config import Config, DataConfig, QuantizeConfig, load_config, parse_yaml
from qexp.data.datasets import load_dataset
from qexp.errors import InputError
from qexp.files import from_json
from qexp.models.networks import build_network
from qexp.search.findings import quantize_command
from qexp.search.results import SearchResult
from qexp.search.setup import _newest, _stopped_in_training
from qexp.tracking.runs import read_config

ONE = ["--sample-counts", "4", "--seeds-per-point", "1"]
COUNTS = ["--sample-counts", "8,32", "--seeds-per-point", "2", "--observers", "minmax,histogram"]


def _trials(in_use: Finished, parent: str) -> list[mlflow.entities.Run]:
    client = mlflow.MlflowClient(tracking_uri=in_use.uri)
    experiment = client.get_experiment_by_name("qexp-digits")
    children = f"tags.`mlflow.parentRunId` = '{parent}' and tags.`qexp.stage` = 'trial'"
    return list(client.search_runs([experiment.experiment_id], children))


def _study(in_use: Finished, name: str) -> optuna.Study:
    file = in_use.folder / "studies" / f"{name}.journal"
    return optuna.load_study(study_name=name, storage=JournalStorage(JournalFileBackend(str(file))))


def _running(in_use: Finished, name: str) -> list[str]:
    """The runs of trials that a study is at."""
    trials = _study(in_use, name).get_trials(states=[TrialState.RUNNING])
    return [trial.user_attrs["run_id"] for trial in trials if "run_id" in trial.user_attrs]


def test_grid_search_runs_every_point_once_and_goes_on_where_it_stopped(in_use: Finished) -> None:
    done = run_qexp(in_use.folder, "search", *COUNTS)
    assert done.code == 0, done.stderr
    trials = _trials(in_use, done.summary["run_id"])
    assert sorted(run.info.run_name for run in trials) == [f"trial-{number:03d}" for number in range(4)]
    for run in trials:
        assert run.info.status == "FINISHED" and 0 < run.data.metrics["val/top1_mean"] <= 100
    points = {
        (t.params["calibration_samples"], t.params["observer"]) for t in _study(in_use, done.summary["study"]).trials
    }
    assert points == {(count, observer) for count in (8, 32) for observer in ("minmax", "histogram")}
    artifacts = mlflow.MlflowClient(tracking_uri=in_use.uri).list_artifacts(done.summary["run_id"], "figures")
    assert [file.path for file in artifacts] == ["figures/search.png"]

    again = run_qexp(in_use.folder, "search", *COUNTS[:-1], "histogram,minmax")  # in another order, the same study
    assert again.code == 0, again.stderr
    assert again.summary["run_id"] == done.summary["run_id"]  # one for the study
    assert len(_trials(in_use, again.summary["run_id"])) == 4
    parent = mlflow.MlflowClient(tracking_uri=in_use.uri).get_run(again.summary["run_id"])
    assert parent.info.status == "FINISHED" and "are enough" in parent.data.tags["mlflow.note.content"]
    assert len(_study(in_use, done.summary["study"]).trials) == 4
    assert again.summary["winner"] == done.summary["winner"]
    assert again.summary["study_storage"] == f"studies/{done.summary['study']}.journal"
    assert (in_use.folder / again.summary["study_storage"]).is_file()
    command, winner = shlex.split(done.summary["quantize_command"]), done.summary["winner"]
    assert command[:3] == ["qexp", "quantize", "--model-uri"] and command[3] == done.summary["fp32"]
    assert command[command.index("--calibration-samples") + 1] == str(winner["calibration_samples"])
    assert command[command.index("--observer") + 1] == winner["observer"]

    for run in [parent, *trials]:  # the test images are not looked at
        assert not [name for name in run.data.metrics if name.startswith("test/")]
    assert "test images" not in done.stderr
    mixed = run_qexp(in_use.folder, "search", *ONE, "--study", done.summary["study"])
    assert mixed.code == 2 and f"--study {done.summary['study']}: was made for " in mixed.stderr


# The third trial waits for a signal.
WAITS = """
import time
from qexp.search import trials
measure, calls = trials.measure_point, []
def waits(*given):
    calls.append(1)
    while len(calls) == 3:
        time.sleep(0.01)
    return measure(*given)
trials.measure_point = waits
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)], ids=["killed", "stopped"])
def test_a_search_that_was_cut_off_goes_on(number: signal.Signals, code: int, in_use: Finished) -> None:
    name = number.name
    options = ["--sample-counts", "4,8,12,16", "--seeds-per-point", "1", "--study", name]
    process = start_qexp(in_use.folder, "search", *options, uri=in_use.uri, before=WAITS)
    process.wait_for_line("trial 1:")
    while not _running(in_use, name):
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait() == code
    before = [trial for trial in _study(in_use, name).trials if trial.state.is_finished() and trial.values]
    assert len(before) == 2
    with (in_use.folder / "studies" / f"{name}.journal").open("ab") as journal:
        journal.write(b'{"op_code":8,"worker_i')  # cut off while it wrote
    done = run_qexp(in_use.folder, "search", *options)
    assert done.code == 0 and done.stderr.count("is damaged; resuming") == 1, done.stderr
    trials = _trials(in_use, done.summary["run_id"])
    ended = Counter(run.info.status for run in trials)
    assert ended["FINISHED"] == 4 and ended.total() - ended["KILLED"] == 4
    complete = [trial for trial in _study(in_use, name).trials if trial.state == TrialState.COMPLETE]
    assert sorted(trial.params["calibration_samples"] for trial in complete) == [4, 8, 12, 16]
    assert mlflow.MlflowClient(tracking_uri=in_use.uri).get_run(done.summary["run_id"]).info.status == "FINISHED"


SHOW = """
from qexp.pipeline import jobs

jobs.run_quantize = lambda config, uri: {
    "command": "quantize", "uri": uri, "data_dir": config.data.data_dir,
    "quantize": config.quantize.model_dump(mode="json"),
}
"""


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (DataConfig(), QuantizeConfig(engine=["fx"], calibration_samples=512, observer="minmax")),
        (
            DataConfig(data_dir="two words"),
            QuantizeConfig(
                engine=["pt2e"], backend="onednn", calibration_samples=8, calibration_batch_size=4, per_channel=False,
                observer="percentile", percentile=99.5, fold_pool=True, keep_fp32=["network.0", "network.3"],
                allow_float=True, max_top1_drop=0.5, max_tries=3, sensitivity_images=16,
            ),
        ),
    ],
)  # fmt: skip
def test_the_command_for_the_winner_says_all_its_options(
    data: DataConfig, options: QuantizeConfig, tmp_path: Path
) -> None:
    (tmp_path / "two words").mkdir()
    command = quantize_command(Config(data=data), "models:/a-fp32/3", options)
    done = run_qexp(tmp_path, *shlex.split(command)[1:], before=SHOW)
    assert done.code == 0, done.stderr
    understood = QuantizeConfig.model_validate(done.summary["quantize"])
    assert (done.summary["uri"], done.summary["data_dir"], understood) == ("models:/a-fp32/3", data.data_dir, options)
    default = "qexp quantize --model-uri models:/a-fp32/3 --engine fx --calibration-samples 512 --observer minmax"
    assert (command == default) == (data == DataConfig())


BROKEN = """
from qexp import quantization
from qexp.errors import StageError

def refuse(*given):
    raise StageError("engine onnx cannot quantize this model: no reason")

quantization.ENGINES["onnx"] = refuse
"""


def test_a_trial_that_fails_says_why_and_the_study_goes_on(in_use: Finished) -> None:
    done = run_qexp(in_use.folder, "search", *ONE, "--engine", "onnx,fx", "--study", "half", before=BROKEN)
    assert done.code == 0, done.stderr
    summary = done.summary
    assert (summary["failed_trials"], summary["winner"]["engine"]) == (1, "fx")
    by_state = {trial.state: trial for trial in _study(in_use, "half").trials}
    assert "no reason" in by_state[TrialState.FAIL].user_attrs["error"]
    runs = {run.info.status: run for run in _trials(in_use, summary["run_id"])}
    assert (
        runs["FAILED"].data.params["quantize.engine"] == "['onnx']"
        and "no reason" in runs["FAILED"].data.tags["qexp.error"]
    )
    assert set(runs) == {"FAILED", "FINISHED"}


def test_a_study_in_which_all_trials_fail_fails(in_use: Finished) -> None:
    done = run_qexp(in_use.folder, "search", *ONE, "--engine", "onnx", "--study", "none", before=BROKEN)
    assert (done.code, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert "all 1 trials failed" in last and "no reason" in last
    client = mlflow.MlflowClient(tracking_uri=in_use.uri)
    run_id = _study(in_use, "none").user_attrs["run_id"]
    assert client.get_run(run_id).info.status == "FAILED"


def test_two_objectives(in_use: Finished, tmp_path: Path) -> None:
    options = ["--objective", "top1+size", "--sampler", "tpe", "--trials", "4", "--seeds-per-point", "1"]
    space = ["--sample-counts", "8,64", "--weight-scales", "channel,layer", "--fp32-layer-counts", "0,2"]
    space += ["--sensitivity-images", "16"]
    done = run_qexp(in_use.folder, "search", *options, *space)
    assert done.code == 0, done.stderr
    study = _study(in_use, done.summary["study"])
    assert len(study.trials) == 4 and [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    client = mlflow.MlflowClient(tracking_uri=in_use.uri)
    run = done.summary["run_id"]
    assert [file.path for file in client.list_artifacts(run, "figures")] == ["figures/pareto.png"]
    assert "tables/pareto.json" in [file.path for file in client.list_artifacts(run, "tables")]
    result = from_json(SearchResult, Path(client.download_artifacts(run, "results/search.json", tmp_path)).read_text())
    for point in result.points:
        values = [point.top1_percent, float(point.size_bytes or 0)]
        assert values in [trial.values for trial in study.trials]
        if not point.fp32_layers:
            assert (point.size_bytes or 0) < 1.2 * 450_000
    by_layers = {
        kept: [point.size_bytes or 0 for point in result.points if point.fp32_layers == kept] for kept in (0, 2)
    }
    assert max(by_layers[0], default=0) < min(by_layers[2], default=1 << 60)  # two layers take four times as much
    assert result.fp32_cost and result.fp32_cost > 1_700_000
    front = {(point.top1_percent, point.cost) for point in result.front}
    assert front == {tuple(trial.values) for trial in study.best_trials}


FEW_ROUNDS = """
from qexp.search import trials
trials.ROUNDS = 4
"""


def test_latency_is_measured_against_fp32_and_its_winner_registered(in_use: Finished) -> None:
    options = ["--objective", "top1+latency", "--latency-batch-size", "8", "--seeds-per-point", "1"]
    space = ["--sample-counts", "16", "--fp32-layer-counts", "0,3"]
    register = ["--register-best", "true", "--batch-sizes", "8", "--min-repeats", "3", "--min-seconds", "0", *PLAIN]
    done = run_qexp(in_use.folder, "search", *options, *space, *register, before=f"{NO_FIGURES}\n{FEW_ROUNDS}")
    assert done.code == 0, done.stderr
    client = mlflow.MlflowClient(tracking_uri=in_use.uri)
    study, winner = _study(in_use, done.summary["study"]), done.summary["winner"]
    for run in _trials(in_use, done.summary["run_id"]):
        speedup = run.data.metrics["latency/speedup"]
        assert run.data.metrics["latency/p50_ms"] == pytest.approx(study.user_attrs["fp32_p50_ms"] / speedup)
        assert run.data.metrics["latency/speedup_low"] <= speedup <= run.data.metrics["latency/speedup_high"]
    version = client.get_model_version(*done.summary["int8"].removeprefix("models:/").split("/"))
    params = client.get_run(version.run_id).data.params
    assert version.tags["calibration_samples"] == "16" and params["quantize.observer"] == winner["observer"]
    kept = study.user_attrs["layers_most_sensitive_first"][: winner["fp32_layers"]]
    assert set(version.tags["float_layers"].split(",")) == (set(kept) or {"none"})


def test_newest_version_is_the_newest_that_fits(finished: Finished) -> None:
    mlflow.set_tracking_uri(finished.uri)
    uri = finished.summary["fp32"]
    for values in ({}, {"data": {"image_size": "16"}}, {"train": {"epochs": "7"}}):
        assert _newest(load_config(None, values)) == uri
    assert _newest(load_config(None, {"data": {"image_size": "8"}})) is None
    for other in ({"seed": 5}, {"model": "vgg16"}):
        assert _newest(load_config(None, {}).model_copy(update=other)) is None


def test_a_model_with_weights_is_taken_once_and_searched(pictures: Path, tmp_path: Path) -> None:
    """Not trained for 0 epochs; and a version of other weights is not searched in its place."""
    torch.manual_seed(0)
    network = build_network("smallnet", 3, (3, 8, 8))
    torch.save(network.state_dict(), tmp_path / "a.pt")
    torch.save({name: value + 1e-3 for name, value in network.state_dict().items()}, tmp_path / "b.pt")
    words = ["--data-dir", str(pictures), *"--preprocess imagenet --resize 8 --crop 8".split(), *ONE]
    uri = new_store(tmp_path)
    done = run_qexp(tmp_path, "search", *words, "--weights", "a.pt", uri=uri)
    assert done.code == 0, done.stderr
    assert done.summary["fp32"] == "models:/smallnet-three-digits-fp32/1" and "import-smallnet" in done.stderr
    again = run_qexp(tmp_path, "search", *words, "--weights", "a.pt", uri=uri)
    assert again.summary["fp32"] == done.summary["fp32"] and again.summary["study"] == done.summary["study"]
    mlflow.set_tracking_uri(uri)
    made = read_config(mlflow.MlflowClient().get_model_version("smallnet-three-digits-fp32", "1").run_id)
    for weights, expected in (("a.pt", done.summary["fp32"]), ("b.pt", None), ("c.pt", None)):
        assert _newest(made.model_copy(update={"weights": str(tmp_path / weights)})) == expected
    gone = run_qexp(tmp_path, "search", *words, "--weights", "c.pt", uri=uri)
    assert gone.code == 2 and gone.stderr.splitlines()[-1] == "error: --weights c.pt: no such file"
    assert "run " not in gone.stderr


DIES = """
import os, signal
from qexp.training import loop
step = loop._step
def dies(state, *given):
    if state.position.epoch == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    step(state, *given)
loop._step = dies
"""


def test_without_a_registered_model_one_is_trained_first(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that was killed is resumed by the same command, and by no other."""
    options = ["--epochs", "3", "--patience", "3", "--batch-size", "16", *ONE, *of_pictures(pictures)]
    died = run_qexp(tmp_path, "search", *options, before=DIES)
    assert died.code == -signal.SIGKILL, died.stderr
    (folder,) = (tmp_path / "checkpoints").iterdir()
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    config = read_config(folder.name)
    dataset = load_dataset(config.data, config.seed)
    for change in ({"seed": 5}, {"train": config.train.model_copy(update={"epochs": 2})}):
        assert _stopped_in_training(config.model_copy(update=change), dataset) is None
    assert _stopped_in_training(config.model_copy(update={"threads": 7}), dataset) == folder.name
    done = run_qexp(tmp_path, "search", *options)
    assert done.code == 0 and "resuming in epoch" in done.stderr, done.stderr
    assert done.summary["fp32"] == "models:/smallnet-three-digits-fp32/1"
    assert done.summary["run_id"] == folder.name
    runs = mlflow.MlflowClient(done.uri).search_runs(["1"])
    assert sorted(run.info.run_name for run in runs) == ["search", "train-smallnet", "trial-000"]
    assert {run.info.status for run in runs} == {"FINISHED"} and not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("option", ["--sampler=random", "--fp32-layer-counts=7"])
def test_bad_search_options(option: str, in_use: Finished) -> None:
    done = run_qexp(in_use.folder, "search", option)
    assert done.code == 2 and option.split("=")[0] in done.stderr


@pytest.mark.parametrize("option", ["observers=best", "seeds_per_point=0", "objective=speed"])
def test_bad_values_of_search_options(option: str) -> None:
    name, value = option.split("=")
    with pytest.raises(InputError, match=f"search.{name} = {value}: must be "):
        parse_yaml(f"search: {{{name}: {value}}}")
