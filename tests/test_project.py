"""The project's files agree with each other: dependencies, entry points, options, README, import table."""

import ast
import inspect
import re
import shlex
import sys
import tomllib
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from mlflow.projects.utils import load_project

from entrypoints.cli import app
from entrypoints.options import fields_of, type_name

ENTRY_POINTS = ("main", "train", "quantize", "latency", "search", "report")
# Who may import whom among our modules (design table). Every module may import errors and progress.
ALLOWED = {
    "options": set(),
    "config": {"options"},
    "errors": set(),
    "progress": set(),
    "vision": set(),
    "host": set(),
    "imagefolder": {"host"},
    "data": {"config", "imagefolder", "vision"},
    "models": {"files", "vision"},
    "augmentation": set(),
    "files": set(),
    "postgres": set(),
    "server": {"postgres"},
    "environment": set(),
    "interrupts": set(),
    "checkpoint": {"files"},
    "distributed": set(),
    "recipe": {"config", "models"},
    "fastest": {"config", "data", "distributed", "evaluation", "files"},
    "loop": {
        "augmentation",
        "checkpoint",
        "config",
        "data",
        "distributed",
        "evaluation",
        "interrupts",
        "models",
        "recipe",
    },
    "bf16": {"models"},
    "training": {
        "bf16",
        "checkpoint",
        "config",
        "data",
        "distributed",
        "environment",
        "fastest",
        "host",
        "interrupts",
        "loop",
        "models",
        "recipe",
    },
    "launch": {"config", "environment"},
    "quantization": {"config", "evaluation", "quantization"},
    "evaluation": set(),
    "cost": set(),
    "latency": {"config"},
    "contenders": {"models", "quantization", "registry", "store", "tracking"},
    "gate": {"config", "evaluation", "latency"},
    "evidence": {"cost", "evaluation", "gate", "host", "latency", "quantization", "training"},
    "speed": {"evidence", "latency"},
    "claims": {"evidence", "quantization", "speed"},
    "search.conclusion": {"evidence"},
    "advice": {"claims", "evidence", "latency", "quantization", "speed"},
    "plots": {"evidence", "speed"},
    "search.figures": {"evidence", "plots"},
    "report": {"advice", "claims", "evaluation", "evidence", "latency", "plots", "speed"},
    "metrics": {"evaluation", "latency", "training"},
    "store": {"checkpoint", "environment", "files", "models", "store"},
    "commit": set(),
    "tracking": {"config", "data", "evidence", "host", "store"},
    "bare_process": {"evaluation", "store"},
    "prediction": {"config", "evaluation", "host", "imagefolder", "registry", "store"},
    "registry": {"bare_process", "environment", "models", "quantization", "store"},
    "trained": {"checkpoint", "evidence", "files", "models"},
    "search.storage": {"config"},
    "search.study": {"config", "evidence", "search.storage"},
    "search.queue": {"evidence", "search.study"},
    "search.runs": {"evidence", "store", "tracking"},
    "search.findings": {"evidence", "metrics", "search.figures", "tracking"},
    "sweep": {"config", "contenders", "evidence", "latency"},
}
SEARCH = ("search.trials", "search.joining", "search.worker", "search")  # each may import those before it
ABOVE = {
    "stages",
    "quantizing",
    "deciding",
    "registered",
    "resumed",
    "prepare",
    "pipeline",
    "verification",
    "promotion",
    "sync",
    *SEARCH,
}  # these may import everything that is not above themselves
STAGES = ("stages", "quantizing", "deciding")  # each may import those before it
ONLY_IN = {
    "mlflow": {"store", "tracking", "registry", "search.runs"},
    "optuna": {"search.storage", "search.study", "search.queue", "search.worker"},
    "matplotlib": {"plots"},
    "sqlalchemy": {"search.storage"},
    "torchinfo": {"cost"},
    "typer": set(),
}


def _requirements() -> list[str]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]


def test_conda_environment_has_the_dependencies_of_pyproject() -> None:
    environment = yaml.safe_load((REPOSITORY / "conda.yaml").read_text())
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert sorted(pip) == sorted(_requirements())


def test_every_dependency_is_bounded_on_both_sides() -> None:
    assert all(">=" in line and "<" in line for line in _requirements())


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_mlproject_mirrors_the_options(name: str) -> None:
    entry = load_project(str(REPOSITORY)).get_entry_point(name)
    command = getattr(import_module(f"entrypoints.{name}"), name)
    options = inspect.signature(command).parameters
    assert set(entry.parameters) == set(options)
    words = shlex.split(entry.command)
    assert words[:3] == ["python", "-m", f"entrypoints.{name}"]
    pairs = dict(zip(words[3::2], words[4::2], strict=True))
    assert pairs == {f"--{option.replace('_', '-')}": f"{{{option}}}" for option in options}
    for option, parameter in entry.parameters.items():
        field = fields_of((option,)).get(option)
        number = field is not None and type_name(field[1]) in ("int", "float")
        assert parameter.type == ("float" if number else "string"), option
        required = options[option].default is inspect.Parameter.empty
        assert parameter.default == (None if required else "auto"), option


def test_option_names_are_unique_across_sections() -> None:
    sections = ("", "data", "train", "quantize", "latency", "gate", "search")
    assert sum(len(fields_of((section,))) for section in sections) == len(fields_of(sections))


def _imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = node.module in ("qexp", "qexp.search")
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if whole else {node.module}
    return found


def _named(parts: Sequence[str]) -> str:
    """A module of qexp as the table calls it: one of the package `search` with that in front."""
    return ".".join(parts[: 2 if parts[0] == "search" else 1])


def _module_name(file: Path) -> str:
    return _named(
        [part for part in file.relative_to(REPOSITORY / "qexp").with_suffix("").parts if part != "__init__"] or [""]
    )


@pytest.mark.parametrize("file", sorted((REPOSITORY / "qexp").rglob("*.py")), ids=lambda file: file.name)
def test_imports_follow_the_table(file: Path) -> None:
    module = _module_name(file)
    imports = _imports(file)
    ours = {_named(name.split(".")[1:]) for name in imports if name.startswith("qexp.")} - {"errors", "progress"}
    if module in ALLOWED:
        assert ours <= ALLOWED[module], module
    elif module:
        assert module in ABOVE
    if module in STAGES:
        assert not ours & ABOVE - set(STAGES[: STAGES.index(module)])
    if module == "registered":
        assert ours & ABOVE <= set(STAGES)
    if module == "pipeline":
        assert not ours & set(SEARCH)
    if module in SEARCH:
        assert not ours & set(SEARCH[SEARCH.index(module) :])
    for package, places in ONLY_IN.items():
        assert module in places or not any(name.split(".")[0] == package for name in imports), (module, package)


def test_no_file_or_function_is_long() -> None:
    for file in [*(REPOSITORY / "qexp").rglob("*.py"), *(REPOSITORY / "entrypoints").glob("*.py")]:
        text = file.read_text()
        assert len(text.splitlines()) <= 300, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 45, (file, node.name)


def test_no_module_shadows_the_standard_library() -> None:
    names = {file.stem for file in (REPOSITORY / "entrypoints").glob("*.py")}
    assert not names & set(sys.stdlib_module_names)


def _readme_commands() -> list[str]:
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    return [line.split("  #")[0].strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_readme_shows_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    shown = {word for line in _readme_commands() if line.startswith("make ") for word in line.split()[1:]}
    assert {"demo", "test"} <= shown <= targets


def test_readme_qexp_commands_have_options_that_exist() -> None:
    commands = {command.name: command.callback for command in app.registered_commands}
    lines = [shlex.split(line) for line in _readme_commands() if line.startswith("qexp ")]
    assert {line[1] for line in lines} == set(commands)
    for line in lines:
        options = {f"--{name.replace('_', '-')}" for name in inspect.signature(commands[line[1]]).parameters}
        assert {word for word in line if word.startswith("--")} <= options | {"--help"}, line


def test_readme_mlflow_run_commands_have_parameters_that_exist() -> None:
    project = load_project(str(REPOSITORY))
    lines = [shlex.split(line) for line in _readme_commands() if line.startswith("mlflow run")]
    assert lines
    for line in lines:
        entry = project.get_entry_point(line[line.index("-e") + 1])
        given = {line[at + 1].split("=")[0] for at, word in enumerate(line) if word == "-P"}
        assert given <= set(entry.parameters), line
        assert "--env-manager" in line
