"""The command line as a user meets it: real processes, exit codes, one line of error, one line of JSON."""

import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
from conftest import REPOSITORY, Finished, run_qexp
from stores import new_store

BAD_INPUT = {
    "unknown model": ("run --model vgg17", ["--model vgg17", "vgg16"]),
    "negative learning rate": ("run --learning-rate -1", ["--learning-rate -1", "greater than 0"]),
    "no epochs": ("train --epochs 0", ["--epochs 0", "greater than or equal to 1"]),
    "epochs in words": ("train --epochs ten", ["--epochs ten", "integer"]),
    "infinite rate": ("train --learning-rate inf", ["--learning-rate inf", "finite"]),
    "bad batch size": ("run --batch-sizes 1,x", ["--batch-sizes x", "integer"]),
    "unknown engine": ("run --engine best", ["--engine best", "fx, pt2e or onnx"]),
    "one unknown engine of two": ("quantize --engine fx,best --model-uri models:/a/1", ["--engine best", "onnx"]),
    "weights in words": ("latency --profile 1:often --model-uri models:/a/1", ["--profile", "often", "number"]),
    "weights of other batch sizes": (
        "run --batch-sizes 1,8 --profile 2:1",
        ["--profile 2: must be one of the batch sizes that are timed: 1, 8"],
    ),
    "negative budget": ("run --quantize-max-top1-drop -1", ["--quantize-max-top1-drop -1", "greater than or equal"]),
    "unknown baseline": (
        "run --baselines nothing",
        ["--baselines nothing", "fp32_eager, fp32_traced, bf16 or fp32_onnx"],
    ),
    "none and a baseline": ("latency --baselines none,bf16 --model-uri models:/a/1", ["--baselines none", "bf16"]),
    "unknown observer": ("run --observer best", ["--observer best", "histogram", "minmax"]),
    "no folder given": ("run --dataset imagefolder", ["--data-dir", "must be given"]),
    "missing folder": ("run --dataset imagefolder --data-dir nowhere", ["--data-dir nowhere", "no such folder"]),
    "too many samples": ("run --calibration-samples 5000", ["--calibration-samples 5000", "1294"]),
    "missing config": ("run --config nowhere.yaml", ["--config nowhere.yaml"]),
    "no such version": ("quantize --model-uri models:/nothing/3", ["--model-uri models:/nothing/3", "not exist"]),
    "no such alias": ("latency --model-uri models:/nothing@champion", ["models:/nothing@champion", "not exist"]),
    "no model uri": ("report --model-uri nothing", ["--model-uri nothing", "models:/NAME/VERSION"]),
    "no such model to promote": ("promote nothing-int8", ["NAME nothing-int8", "no registered int8 model"]),
    "force perhaps": ("promote nothing-int8 --force=perhaps", ["--force perhaps", "true or false"]),
    "no such model to list": ("models nothing", ["NAME nothing", "there are: none"]),
    "no version to verify": ("verify nothing", ["URI nothing", "models:/NAME/VERSION"]),
    "a flag alone, then another option": (
        "search --register-best --sample-counts 8,5000",
        ["--sample-counts 5000", "1294"],
    ),
    "too many search samples": ("search --sample-counts 8,5000", ["--sample-counts 5000", "1294"]),
    "output is a file": ("run --output-dir /dev/null", ["--output-dir /dev/null", "folder"]),
    "unknown option": ("run --modle vgg16", ["--modle", "--help"]),
    "unknown command": ("runn", ["runn", "--help"]),
    "missing option": ("quantize", ["--model-uri", "--help"]),
    "image too small": ("train --model alexnet", ["--image-size 32", "alexnet"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad input")


def _check_one_line_and_code_2(done: Finished, expected: list[str]) -> None:
    assert done.code == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert all(text in lines[0] for text in expected), lines[0]
    assert done.stdout == ""


def _statuses(uri: str) -> list[str]:
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return [run.info.status for run in client.search_runs(experiments)]


@pytest.fixture(scope="module")
def store(folder: Path) -> str:
    """A store that exists, so that its first creation writes no lines."""
    return new_store(folder)


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(case: str, folder: Path, store: str) -> None:
    arguments, expected = BAD_INPUT[case]
    _check_one_line_and_code_2(run_qexp(folder, *arguments.split(), uri=store), expected)
    assert "RUNNING" not in _statuses(store)


def test_bad_file_names_key_value_and_allowed(folder: Path, store: str) -> None:
    (folder / "bad.yaml").write_text("train:\n  epoch: 3\n")
    _check_one_line_and_code_2(run_qexp(folder, "train", "--config", "bad.yaml", uri=store), ["train.epoch", "epochs"])


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "nonsense://x", "sqlite:////dev/null/mlflow.db"])
def test_unreachable_store_fails_at_once(uri: str, folder: Path) -> None:
    started = time.monotonic()
    _check_one_line_and_code_2(run_qexp(folder, "run", uri=uri), [uri, "does not answer"])
    assert time.monotonic() - started < 60  # MLflow's own retries take minutes


@pytest.mark.parametrize(
    "command", ["", "run", "train", "quantize", "latency", "search", "report", "promote", "models", "verify", "predict"]
)
def test_help_needs_neither_torch_nor_mlflow(command: str) -> None:
    code = (
        "import sys; from entrypoints.cli import app\n"
        f"try: app({[*command.split(), '--help']!r})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'mlflow', 'optuna', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--help" in done.stdout


def test_last_line_is_json_with_ids_versions_and_figures(finished: Finished) -> None:
    summary = finished.summary
    assert summary["fp32"] == "models:/smallnet-digits-fp32/1"
    assert summary["int8"] == "models:/smallnet-digits-int8/1"
    assert len(summary["run_id"]) == 32
    assert 3.5 < summary["size_ratio"] < 4.5
    assert 0 <= summary["int8_top1_percent"] <= 100
    assert finished.stdout.count("\n") == 1
