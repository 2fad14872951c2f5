"""The project's files agree with each other: dependencies, entry points, options, imports."""

import ast
import inspect
import runpy
import shlex
import sys
from importlib import import_module

import pytest
from conftest import REPOSITORY
from mlflow.projects.utils import load_project

from entrypoints.cli import COMMANDS
from entrypoints.options import COMMON, fields_of

ENTRY_POINTS = ("main", "train", "quantize", "latency", "search", "report")
# The first is below all packages, with the files beside them.
LAYERS = tuple("foundation models measurement data quantization training report tracking pipeline search".split())
ONLY_IN = {
    "mlflow": ("tracking/",),
    "optuna": ("search/",),
    "sqlalchemy": ("search/", "tracking/"),
    "matplotlib": ("report/figures.py",),
    "torchinfo": ("measurement/cost.py",),
    "subprocess": (
        "foundation/processes.py",
        "tracking/commit.py",
    ),  # for git; Python processes are started at one place
    "multiprocessing": ("measurement/child.py", "measurement/load.py"),  # forks, which end with what they measure
    "typer": (),
}


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_mlproject_passes_on_what_people_use_and_takes_the_rest_as_options(name: str) -> None:
    entry = load_project(str(REPOSITORY)).get_entry_point(name)
    command = getattr(import_module(f"entrypoints.{name}"), name)
    options = inspect.signature(command).parameters
    assert 3 < len(entry.parameters) <= 15
    assert list(entry.parameters) == [*(option for option in COMMON if option in options), "options"]
    words = shlex.split(entry.command)
    assert words[:3] == ["python", "-m", f"entrypoints.{name}"]
    pairs = dict(zip(words[3::2], words[4::2], strict=True))
    assert pairs == {f"--{option.replace('_', '-')}": f"{{{option}}}" for option in entry.parameters}
    required = {option for option, parameter in options.items() if parameter.default is inspect.Parameter.empty}
    assert {option for option, parameter in entry.parameters.items() if parameter.default is None} == required


def test_what_repeats_the_options_is_generated() -> None:
    for file, make in runpy.run_path(str(REPOSITORY / ".ci" / "generate.py"))["FILES"].items():
        assert (REPOSITORY / file).read_text() == make(), f"{file} is stale: run `make generate`"


def test_table_of_options_has_each_option_of_each_command() -> None:
    lines = (REPOSITORY / "docs/reference/options.md").read_text().splitlines()
    rows = {line.split("`")[1]: line for line in lines if line.startswith("| `--")}
    for name in fields_of(("", "data", "preprocess", "train", "quantize", "latency", "throughput", "gate", "search")):
        row = rows.pop(f"--{name.replace('_', '-')}")
        commands = {word.strip() for word in row.rstrip("| ").rpartition("|")[2].split(",")}
        assert commands == {key for key, made in COMMANDS.items() if name in inspect.signature(made).parameters}
    assert not rows


def test_option_names_are_unique_across_sections() -> None:
    sections = ("", "data", "preprocess", "train", "quantize", "latency", "throughput", "gate", "search")
    assert sum(len(fields_of((section,))) for section in sections) == len(fields_of(sections))


def _modules() -> list[tuple[str, set[str]]]:
    """Each file of the library, below qexp/, and the modules that it imports."""
    found = []
    for file in sorted((REPOSITORY / "qexp").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
        found.append((file.relative_to(REPOSITORY / "qexp").as_posix(), names))
    return found


def test_each_package_imports_only_packages_before_it() -> None:
    for file, imports in _modules():
        own = file.split("/")[0] if "/" in file else LAYERS[0]
        if file in ("__init__.py", "api.py"):  # the public functions, above everything
            continue
        packages = {name.split(".")[1] for name in imports if name.startswith("qexp.")} & set(LAYERS)
        above = {package for package in packages if LAYERS.index(package) > LAYERS.index(own)}
        assert not above, f"{file} imports {above}"


def test_libraries_are_imported_where_they_belong() -> None:
    for file, imports in _modules():
        for library, places in ONLY_IN.items():
            assert file.startswith(places or "none") or not any(name.split(".")[0] == library for name in imports), file


def test_no_module_shadows_the_standard_library() -> None:
    names = {file.stem for file in (REPOSITORY / "entrypoints").glob("*.py")}
    assert not names & set(sys.stdlib_module_names)
