"""The command line as a user meets it: real processes, exit codes, one line of error, one line of JSON."""

import json
import os
import pty
import re
import resource
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import mlflow
import pytest
from conftest import REPOSITORY, Finished, environment_for, run_qexp, start_qexp
from forked import start_python
from mlflow.projects.utils import load_project
from shadows import write_shadows
from stores import new_store
from typer.testing import CliRunner

from entrypoints.cli import COMMANDS, app
from entrypoints.ending import finish
from entrypoints.options import COMMON, choices, fields_of
from entrypoints.program import _with_options_unpacked, _with_plain_flags, run_app
from entrypoints.table import show
from qexp import __version__
from qexp.errors import InputError
from qexp.foundation.tables import Table
from qexp.models.names import MADE_FROM, RUNTIMES

BAD_INPUT = {
    "unknown model": ("run --model vgg17", ["--model vgg17", "vgg16"]),
    "negative learning rate": ("run --learning-rate -1", ["--learning-rate -1", "greater than 0"]),
    "check without images": ("check x.pt --model vgg16 --data nowhere", ["--data nowhere", "no such folder"]),
    "check of a Python file": ("check my_nets.py --data .", ["--model my_nets.py", "my_nets:FUNCTION"]),
    "check of an architecture": ("check vgg16 --data .", ["--weights", "MODEL vgg16 is an architecture alone"]),
    "no epochs": ("train --epochs 0", ["--epochs 0", "needs --weights"]),
    "epochs in words": ("train --epochs ten", ["--epochs ten", "integer"]),
    "infinite rate": ("train --learning-rate inf", ["--learning-rate inf", "finite"]),
    "bad batch size": ("run --batch-sizes 1,x", ["--batch-sizes x", "integer"]),
    "unknown engine": ("run --engine best", ["--engine best", "fx, pt2e or onnx"]),
    "one unknown engine of two": ("quantize --engine fx,best --model-uri models:/a/1", ["--engine best", "onnx"]),
    "weights in words": (
        "latency --profile 1:often --model-uri models:/a/1",
        ["--profile 1:often: must be batch sizes", "weights above 0"],
    ),
    "weights of other batch sizes": (
        "run --batch-sizes 1,8 --profile 2:1",
        ["--profile 2: must be one of the batch sizes that are timed: 1, 8"],
    ),
    "negative budget": ("run --quantize-max-top1-drop -1", ["--quantize-max-top1-drop -1", "greater than or equal"]),
    "unknown baseline": (
        "run --baselines nothing",
        [
            "--baselines nothing",
            "fp32_eager, fp32_traced, bf16, fp32_onnx, fp32_openvino, bf16_openvino, fp32_compiled or bf16_compiled",
        ],
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
    "no number of threads": (
        "latency --threads 1,0 --model-uri models:/a/1",
        ["--threads 0: must be greater than 0"],
    ),
    "threads told twice": (
        "latency --threads 1,2 --latency-threads 2 --model-uri models:/a/1",
        ["--latency-threads 2: leave it or --threads 1,2 out"],
    ),
    "several threads for a training": ("train --threads 1,2", ["--threads 1,2", "integer"]),
    "a version to promote": ("promote models:/a-int8/1", ["NAME models:/a-int8/1", "give a-int8 and --version"]),
    "no such model on any machine": ("hosts nothing", ["NAME nothing", "no registered int8 model"]),
    "no version on any machine": ("hosts models:/nothing", ["NAME models:/nothing", "models:/NAME/VERSION"]),
    "no time for a request": (
        "throughput --max-p99-ms 0 --model-uri models:/a/1",
        ["--max-p99-ms 0", "greater than or equal"],
    ),
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


def test_help_needs_neither_torch_nor_mlflow() -> None:
    """One process shows that of all commands, and has imported neither at the end."""
    code = (
        "import sys; from entrypoints.cli import COMMANDS, app\n"
        "for command in ['', *COMMANDS]:\n"
        "    try: app([*command.split(), '--help'])\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'mlflow', 'optuna', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: ") == len(COMMANDS) + 1 == done.stdout.count("-h, --help")


def _process(
    module: str, *words: str, folder: Path, **variables: str
) -> tuple[subprocess.CompletedProcess[str], float]:
    """A program of entrypoints/ to its end, with no store but the default one, and the seconds of CPU that it took."""
    environment = {name: value for name, value in environment_for("").items() if name != "MLFLOW_TRACKING_URI"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", f"entrypoints.{module}", *words],
        cwd=folder, env=environment | variables, capture_output=True, text=True,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("run", "--model", "vgg61"), "--model vgg61: unknown; did you mean vgg"),
        (("search", "--data-dir", "/nowhere"), "--data-dir /nowhere: no such folder"),
        (("train", "--dataset", "cifar10", "--data-dir", "nowhere"), "--data-dir nowhere: no such folder"),
        (("promote", "a-int8", "--data-dir", "/nowhere"), "--data-dir /nowhere: no such folder"),
        (("run", "--epochs", "ten"), "--epochs ten: must be a valid integer"),
        (("latency", "--model-uri", "models:/a"), "--model-uri models:/a: must be models:/NAME/VERSION"),
        (("verify", "a/1"), "URI a/1: must be models:/NAME/VERSION"),
        (("train", "--resume", "last"), "--resume last: no such run"),
        (("train", "--data-dir=~/nowhere"), f"--data-dir {Path.home()}/nowhere: no such folder"),
        (("run", "--bf16", "perhaps"), "--bf16 perhaps: must be true or false"),
    ],
)
def test_what_is_wrong_is_refused_at_once_and_leaves_nothing(
    words: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    done, cpu_s = _process("cli", *words, folder=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {expected}") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    # Of another torchvision than that of the list of names, an unknown one is looked up there.
    assert cpu_s < 2 or ("vgg61" in words and version("torchvision").partition("+")[0] != MADE_FROM)


def test_under_mlflow_run_a_relative_path_is_told_where_it_was_looked_for(tmp_path: Path) -> None:
    store = {"MLFLOW_RUN_ID": "0" * 32, "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}
    done, _ = _process("train", "--dataset", "imagefolder", "--data-dir", "pictures", folder=tmp_path, **store)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"--data-dir pictures: no such folder in {tmp_path}" in done.stderr and '"$PWD/pictures"' in done.stderr
    assert list(tmp_path.iterdir()) == []  # no database either, to which the reason would go


@pytest.mark.parametrize("columns", [80, 120])
def test_help_has_every_name_whole_and_the_common_options_first(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for command in COMMANDS:
        app([command, "-h"], standalone_mode=False)
        shown = capsys.readouterr().out
        app([command, "--help"], standalone_mode=False)
        assert capsys.readouterr().out == shown
        widest = max(map(len, shown.splitlines()))
        assert widest <= columns and (command != "search" or widest > columns - 10), "at the terminal's width"
        first = shown.partition("Common options:")[2].partition("\n\n")[0]
        for name in fields_of(("", "data", "preprocess", "train", "quantize", "latency", "gate", "search")):
            word = f"--{name.replace('_', '-')}"
            found = re.search(rf"^  {word}(?![\w-])", shown, re.MULTILINE)
            assert command != "search" or found, word
            assert bool(re.search(rf"^  {word}(?![\w-])", first, re.MULTILINE)) == bool(found and name in COMMON)


def test_the_two_limits_of_a_drop_are_told_apart_in_help() -> None:
    shown = " ".join(CliRunner().invoke(app, ["run", "-h"], env={"COLUMNS": "200"}).output.split())
    assert "--max-top1-drop float limit of the verdict" in shown
    assert "--quantize-max-top1-drop float budget of quantization" in shown


def test_the_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"qexp {__version__}\n"


def _in_a_shell(command: str, folder: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """A line of bash in which `qexp` is the command; the exit code is that of the first program of a pipe."""
    line = f'{command.replace("qexp", f"{shlex.quote(sys.executable)} -m entrypoints.cli")}; exit "${{PIPESTATUS[0]}}"'
    environment = environment_for("") | variables
    return subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True)


def test_without_words_there_is_help(tmp_path: Path) -> None:
    done = _in_a_shell("qexp", tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("Usage: qexp [OPTIONS] COMMAND")


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("qexp >&-", 0, ""),
        ("qexp run --epochs ten >&- 2>&- <&-", 2, ""),
        ("qexp run --epochs ten 2>/dev/full", 2, ""),
        ("qexp >/dev/full", 1, "error: standard output cannot be written (No space left on device)"),
        ("qexp | true", 141, ""),
    ],
)
def test_streams_may_be_closed_full_or_read_by_nobody(command: str, code: int, said: str, tmp_path: Path) -> None:
    done = _in_a_shell(command, tmp_path)
    assert done.returncode == code and done.stdout == "" and done.stderr.startswith(said)
    assert done.stderr.count("\n") == bool(said), done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_database_does_not_get_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    done = _in_a_shell("qexp models >&- 2>&-", tmp_path, MLFLOW_TRACKING_URI=new_store(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)


def test_what_an_encoding_lacks_is_escaped(tmp_path: Path) -> None:
    done = _in_a_shell("qexp run --model ü", tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and done.stderr.startswith("error: --model \\xfc: unknown")


def test_of_what_was_not_registered_a_terminal_shows_no_version(capsys: pytest.CaptureFixture[str]) -> None:
    show({"command": "check", "run_id": "", "fp32": "fp32", "int8": "int8-fx", "report": "", "gate": "passed"})
    assert capsys.readouterr().out.split() == ["gate", "passed"]


@pytest.mark.parametrize("as_json", [False, True])
def test_the_table_of_a_list_goes_beside_the_line_into_a_pipe(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *given: None)
    table = Table("Machines", ("CPU", "gate"), (("Zen", "passed"),))
    finish(lambda: {"command": "hosts", "hosts": ["Zen"], "table": table}, as_json)
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"command": "hosts", "hosts": ["Zen"]}
    assert (table.text() in shown.err) is not as_json


@pytest.mark.parametrize("kind", [RecursionError, MemoryError, EOFError, ValueError])
def test_an_error_that_nobody_has_foreseen_is_one_line_with_a_log(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(given: object) -> None:
        raise kind("no use of postgresql://me:secret@host/x\nat all")

    monkeypatch.setattr("qexp.tracking.catalog.list_models", fail)
    monkeypatch.setenv("QEXP_LOG_DIR", str(tmp_path))
    monkeypatch.setattr(signal, "signal", lambda *given: None)  # a command sets its own
    with pytest.raises(SystemExit) as ended:
        run_app(app, ["models"], name="qexp")
    (log,) = tmp_path.iterdir()
    line = capsys.readouterr().err
    assert ended.value.code == 1 and line.count("\n") == 1
    assert line.startswith(f"error: {kind.__name__}: no use of postgresql://me:***@host/x (") and str(log) in line
    kept = log.read_text()
    assert "Traceback (most recent call last)" in kept and "in fail" in kept and "secret" not in kept


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", set(COMMANDS)),
        ("pro", {"promote"}),
        ("run --quantize-m", {"--quantize-max-top1-drop"}),
        ("run --dataset ", {"digits", "cifar10", "imagefolder"}),
        ("run --engine fx,", {"fx,pt2e", "fx,onnx"}),
        ("train --model resnet1", {"resnet101", "resnet152", "resnet18"}),
    ],
)
def test_completion_of_commands_options_and_values(words: str, expected: set[str], tmp_path: Path) -> None:
    asked = {"COMP_WORDS": f"qexp {words}", "COMP_CWORD": str(words.count(" ") + 1)}
    done, cpu_s = _process("cli", folder=tmp_path, _QEXP_COMPLETE="complete_bash", **asked)
    assert set(done.stdout.split()) == expected, done.stderr
    assert cpu_s < 1


def test_choices_are_those_that_the_configuration_allows() -> None:
    fields = fields_of(("", "quantize", "latency", "search"))
    found = {name: choices(name, field) for name, (_, field, _) in fields.items()}
    assert found["engine"] == ("fx", "pt2e", "onnx") and found["backend"] == ("x86", "onednn", *RUNTIMES)
    assert found["observers"] == found["observer"] and "minmax" in found["observer"]
    assert {"smallnet", "vgg16"} <= set(found["model"]) and found["seed"] == ()


@pytest.mark.parametrize(
    ("words", "plain"),
    [
        ("run --flip", "run --flip"),
        ("run --flip true --fold-pool false --bf16 auto", "run --flip --no-fold-pool"),
        ("run --flip=False --quick --epochs 3", "run --no-flip --quick --epochs 3"),
        ("run --no-flip --allow-float yes", "run --no-flip --allow-float"),
        ("promote --force a-int8 --quick true", "promote --force a-int8 --quick"),
        ("promote a-int8 --force false", "promote a-int8"),
        ("models --json a-int8", "models --json a-int8"),
    ],
)
def test_flags_stand_alone_or_are_told(words: str, plain: str) -> None:
    assert " ".join(_with_plain_flags(words.split())) == plain


@pytest.mark.parametrize("words", ["run --flip perhaps", "promote a --force=perhaps", "run --quick=2"])
def test_flags_are_told_no_other_word(words: str) -> None:
    with pytest.raises(InputError, match=r"^--\w+ \w+: must be true or false$"):
        list(_with_plain_flags(words.split()))


def test_options_hold_what_mlproject_has_no_parameter_for() -> None:
    given = ["--model", "vgg16", "--options", "--observer minmax --study 'my study' --flip", "--seed_of_x", "a_b"]
    words = ["--model", "vgg16", "--observer", "minmax", "--study", "my study", "--flip", "--seed-of-x", "a_b"]
    assert list(_with_options_unpacked(given)) == words
    assert list(_with_options_unpacked(["--options", "auto", "--epochs", "3"])) == ["--epochs", "3"]


def test_words_come_through_mlflow_as_they_were_given() -> None:
    given = {"model": "vgg16", "options": "--study 'it''s $HOME; `x`' --epochs 3", "learning_rate": "0.5"}
    entry = load_project(str(REPOSITORY)).get_entry_point("search")
    python, _, module, *words = shlex.split(entry.compute_command(given, None))
    assert (python, module) == ("python", "entrypoints.search")
    unpacked = list(_with_options_unpacked(words))
    assert unpacked[unpacked.index("--study") + 1] == "its $HOME; `x`"
    assert unpacked[unpacked.index("--model") + 1] == "vgg16"
    assert unpacked[-4:] == ["--epochs", "3", "--learning-rate", "0.5"], "also what MLproject does not declare"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--observer best", "--observer best: must be"),
        ("--study 'mine", "--options --study 'mine: no closing quotation; quote it as for a shell"),
        ("--modle vgg16", "No such option: --modle"),
        ("--flip ; touch file", "--flip ;: must be true or false"),
    ],
)
def test_bad_options_of_mlproject_are_one_line_and_exit_code_2(options: str, expected: str, tmp_path: Path) -> None:
    done, _ = _process("search", "--model", "auto", "--options", options, folder=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and expected in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "reason"), [("--epochs ten", "--epochs ten: must be a valid integer"), ("--modle vgg16", "--modle")]
)
def test_the_run_that_mlflow_has_started_keeps_the_reason(words: str, reason: str, folder: Path, store: str) -> None:
    client = mlflow.MlflowClient(store)
    run_id = client.create_run("0").info.run_id
    process = start_qexp(folder, "train", *words.split(), uri=store, variables={"MLFLOW_RUN_ID": run_id})
    assert process.wait() == 2
    run = client.get_run(run_id)
    assert run.info.status == "FAILED" and reason in run.data.tags["qexp.error"]
    assert process.stderr == f"error: {run.data.tags['qexp.error']}\n"


def test_a_terminal_gets_the_table_and_the_verdict(finished: Finished, tmp_path: Path) -> None:
    """On one of 80 columns; a list imports nothing of the folder, and no torch."""
    ours, theirs = pty.openpty()
    terminal, variables = os.ttyname(theirs), {"COLUMNS": "80", "TERM": "dumb"}
    environment, int8 = environment_for(finished.uri) | variables, finished.summary["int8"]
    words = ("-m", "entrypoints.cli", "report", "--model-uri", int8)
    process = start_python(tmp_path, words, environment, written=(terminal, "err"))
    assert process.wait() == 0, process.stderr
    shown = os.read(ours, 65536).decode().replace("\r\n", "\n")
    assert "{" not in shown and int8 in shown
    assert f"{finished.summary['int8_top1_percent']:.2f} %" in shown
    assert f"Verdict: {finished.summary['verdict']}" in shown.splitlines()
    write_shadows(tmp_path)
    command = [sys.executable, "-X", "importtime", "-m", "entrypoints.cli", "models", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=theirs, stderr=subprocess.PIPE, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "mlflow" in imported and "torch" not in imported, done.stderr
    assert os.read(ours, 65536).startswith(b'{"command": "models"')
    os.close(ours)
    os.close(theirs)


def test_last_line_is_json_with_ids_versions_and_figures(finished: Finished) -> None:
    summary = finished.summary
    assert summary["fp32"] == "models:/smallnet-digits-fp32/1"
    assert summary["int8"] == "models:/smallnet-digits-int8/1"
    assert len(summary["run_id"]) == 32
    assert 3.5 < summary["size_ratio"] < 4.5
    assert 0 <= summary["int8_top1_percent"] <= 100
    assert finished.stdout.count("\n") == 1
