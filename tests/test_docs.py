"""What README and docs/ show exists: commands, options, parameters, Python names, extras, files, links.

The figures that they repeat are those of the files in results/.
"""

import ast
import importlib
import inspect
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import REPOSITORY
from markdown.extensions.toc import slugify
from mlflow.projects.utils import load_project

import qexp
from entrypoints.cli import app
from entrypoints.options import fields_of
from qexp.files import from_json
from qexp.measurement.latency import LatencyRow
from qexp.report.results import Evidence

README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").rglob("*.md"))]
RESULTS = REPOSITORY / "results"
RESULTS_PAGE = REPOSITORY / "docs" / "results.md"
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
# Options of other programs that the pages name in their text.
OTHERS = {"--env-manager", "--experiment-name"}


def _options(command: str) -> set[str]:
    """All spellings of the options of a command of qexp."""
    spelled = {word for option in COMMANDS[command].params for word in (*option.opts, *option.secondary_opts)}
    return {word for word in spelled if word.startswith("-")} | {"--help", "-h"}


def _blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCE.findall(page.read_text()) if language in languages]


def _shell() -> Iterator[tuple[str, list[str]]]:
    """Every command line that is shown, as words without the variables set before it, with the name of its page."""
    for page in PAGES:
        for line in "\n".join(_blocks(page, "bash", "sh")).replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words:
                yield page.name, words


def _inline() -> Iterator[tuple[str, str]]:
    """Everything that stands in single backticks in the text, with the name of its page."""
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text())):
            yield page.name, code


def _makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))


def test_readme_is_at_most_150_lines() -> None:
    assert len(README.read_text().splitlines()) <= 150


def test_make_targets_exist() -> None:
    shown = [(page, words[1]) for page, words in _shell() if words[0] == "make"]
    shown += [(page, code.split()[1]) for page, code in _inline() if code.startswith("make ")]
    assert {("README.md", "demo"), ("README.md", "test")} <= set(shown)
    assert [found for found in shown if found[1] not in _makefile_targets()] == []


def test_commands_take_what_is_shown() -> None:
    """Whole command lines are parsed. Those named in the text may leave words out: their options are looked up."""
    lines = [words for _, words in _shell() if words[0] == "qexp"]
    assert {words[1] for words in lines} == set(COMMANDS)
    for _, name, *words in lines:
        COMMANDS[name].make_context(name, list(words))
    named = [shlex.split(code) for _, code in _inline() if re.match(r"qexp [a-z]", code)]
    assert [words for words in named if not {w for w in words[2:] if w.startswith("-")} <= _options(words[1])] == []


def test_options_named_in_the_text_exist() -> None:
    known = {"--version"}.union(*map(_options, COMMANDS)) | OTHERS
    named = [(page, code.split()[0]) for page, code in _inline() if code.startswith("--")]
    assert named and [found for found in named if found[1] not in known] == []


def test_torchrun_starts_an_entry_point_with_options_that_exist() -> None:
    lines = [words[words.index("-m") :] for _, words in _shell() if words[0] == "torchrun"]
    assert lines
    for _, module, *words in lines:
        assert importlib.import_module(module)
        assert {word for word in words if word.startswith("--")} <= _options(module.rpartition(".")[2])


def test_mlflow_run_has_the_parameters_shown() -> None:
    project = load_project(str(REPOSITORY))
    lines = [words for _, words in _shell() if words[:2] == ["mlflow", "run"]]
    assert lines
    for line in lines:
        name = line[line.index("-e") + 1]
        given = dict(line[at + 1].split("=", 1) for at, word in enumerate(line) if word == "-P")
        assert set(given) <= set(project.get_entry_point(name).parameters), line
        command = {"main": "run"}.get(name, name)
        required = ["--model-uri", "models:/m/1"] if command in ("quantize", "latency", "report") else []
        COMMANDS[command].make_context(command, required + shlex.split(given.get("options", "")))
        assert "--env-manager" in line and "--experiment-name" in line


def test_benchmarks_have_the_options_shown() -> None:
    lines = [words for _, words in _shell() if words[0] == "python" and words[1].endswith(".py")]
    assert {words[1] for words in lines} >= {f"benchmarks/{name}.py" for name in ("peers", "serving", "picture")}
    for _, file, *words in lines:
        text = (REPOSITORY / file).read_text()
        assert [word for word in words if word.startswith("--") and f'"{word}"' not in text] == [], file


def test_extras_exist() -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        name
        for page in PAGES
        for names in re.findall(r"(?:\.|qexp)\[([\w,]+)\]'", page.read_text())
        for name in names.split(",")
    }
    table = re.findall(r"^\| `(\w+)` \|", _section("docs/getting-started.md", "What can be installed"), re.MULTILINE)
    assert set(table) == set(extras) and named <= set(extras)


def _section(page: str, heading: str) -> str:
    """The text of a page below the heading that begins so, up to the next one."""
    return re.split(rf"^## {re.escape(heading)}.*$", (REPOSITORY / page).read_text(), flags=re.MULTILINE)[1].split(
        "\n## "
    )[0]


def test_python_examples_use_names_and_parameters_that_exist() -> None:
    shown = [(page, text) for page in PAGES for text in _blocks(page, "python")]
    assert shown
    for page, text in shown:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                assert all(importlib.import_module(alias.name) for alias in node.names)
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), page
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "qexp":
                assert hasattr(qexp, node.attr), f"{page}: qexp.{node.attr}"
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("qexp."):
                function = ast.unparse(node.func).split(".")[1]
                parameters = inspect.signature(getattr(qexp, function)).parameters
                sections = ("", "data", "preprocess", "gate") if function == "check" else ()
                known = set(parameters) | (
                    set(fields_of(("quantize", "latency", *sections))) if "options" in parameters else set()
                )
                assert {word.arg for word in node.keywords if word.arg} <= known, f"{page}: {ast.unparse(node)}"


def test_functions_named_in_the_text_exist() -> None:
    """But for those of mlflow.md, which are tags of runs."""
    named = [(page, match[1]) for page, code in _inline() if (match := re.fullmatch(r"qexp\.(\w+)(\(.*\))?", code))]
    named = [found for found in named if found[0] != "mlflow.md"]
    assert [found for found in named if not hasattr(qexp, found[1])] == []


def test_files_and_folders_named_in_the_text_exist() -> None:
    tops = "qexp|entrypoints|benchmarks|results|docs|tests|.ci"
    named = {code for _, code in _inline() if re.fullmatch(rf"({tops})/[\w./-]*", code)}
    assert named and [name for name in named if not (REPOSITORY / name).exists()] == []


def test_the_tree_of_readme_is_that_of_the_repository() -> None:
    (tree,) = _blocks(README, "")
    inside = {"": REPOSITORY, "  ": REPOSITORY / "qexp"}
    shown = [inside[indent] / name for indent, name in re.findall(r"^( *)([\w./]+) ", tree, re.MULTILINE)]
    assert [path for path in shown if not path.exists()] == []
    packages = {file.parent for file in (REPOSITORY / "qexp").glob("*/__init__.py") if not file.parent.is_symlink()}
    assert packages <= set(shown)


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {slugify(heading.replace("`", ""), "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
            if target.startswith("http"):
                continue
            file, _, anchor = target.partition("#")
            path = (page.parent / file).resolve() if file else page
            assert path.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in _anchors(path), f"{page.name}: {target}"


def test_the_site_builds_and_fetches_nothing_from_the_network(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the extra docs is not installed")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=REPOSITORY,
        check=True,
    )
    fetched = re.compile(r'<(?:script|img|iframe|link rel="(?:stylesheet|preconnect)")[^>]*(?:src|href)="(https?:)?//')
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 15 and [page.name for page in pages if fetched.search(page.read_text())] == []


# The figures that README and docs/results.md repeat.


def _missing(cells: list[str], page: Path = RESULTS_PAGE) -> list[str]:
    text = page.read_text()
    return [cell for cell in cells if f"| {cell} |" not in text]


def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


@pytest.mark.parametrize("name", ["vgg16-cifar10", "smallnet-cifar10"])
def test_figures_of_the_real_runs(name: str) -> None:
    found = from_json(Evidence, (RESULTS / name / "metrics.json").read_text())
    drop, (first, *_, last) = found.int8.comparison["test"], found.latency.rows
    accuracy = [model.accuracy["test"] for model in (found.fp32, found.int8)]
    low, high = min(found.speedups), max(found.speedups)
    both = [
        f"{drop.top1_drop_points:.2f} ({drop.top1_drop_low_points:+.2f} to {drop.top1_drop_high_points:+.2f})",
        f"{found.fp32.size_bytes / 1e6:.2f}",
        f"{found.int8.size_bytes / 1e6:.2f} ({found.size_ratio:.2f}x smaller)",
        *(f"{row.stats['fp32'].p50_ms:.2f}" for row in (first, last)),
        *(
            f"{row.stats[found.name].p50_ms:.2f} ({row.speedups[found.name].median:.2f}x faster)"
            for row in (first, last)
        ),
    ]
    top = [f"{one.top1_percent:.2f} / {one.top3_percent:.2f}" for one in accuracy]
    assert _missing([*both, *top, f"{low:.2f}x to {high:.2f}x"]) == []
    assert _missing([*both, *(f"{one.top1_percent:.2f} %" for one in accuracy)], README) == []


def test_ratios_to_the_best_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    results = importlib.import_module("peer_results")
    found = from_json(tuple[results.Peers, ...], (RESULTS / "peers.json").read_text())
    others = {"vgg16": ("fx", "onnx_openvino", "fx_folded", "onnx_folded")}
    rows = []
    for peers in found:
        over = [results.fastest_float(row) for row in peers.rows]
        rows.append(
            [
                f"`{peers.chosen}`",
                *(_ratio(row, peers.chosen, name) for row, name in zip(peers.rows, over, strict=True)),
            ]
        )
        network = peers.model.removeprefix("models:/").split("-")[0]
        for model in (peers.chosen, *others.get(network, ())):
            rows.append([f"`{model}`", *(_ratio(row, model, results.best_peer(row)) for row in peers.rows)])
    assert len(rows) == 2 * len(found) + 4 and _missing([" | ".join(row) for row in rows]) == []


def _ratio(row: LatencyRow, model: str, over: str) -> str:
    """In brackets where the noise does not let tell."""
    text = f"{row.ratio(model, over).median:.2f}"
    return text if row.compared(over, model) else f"({text})"


def test_table_of_compiled_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    floats = importlib.import_module("floats")
    found = from_json(floats.Floats, (RESULTS / "floats.json").read_text())  # type: ignore[name-defined]
    assert {row.network for row in found.rows} == set(floats.NETWORKS)
    assert all(line in RESULTS_PAGE.read_text() for line in floats.markdown(found.rows).splitlines())


def test_table_of_many_images() -> None:
    rows = _read("images.json")["rows"]
    cells = [
        f"{row['images']:,} | {row['decoded_gb']:.2f} | {row['peak_memory_mb']:,.0f} | {row['decoded_rate']:.0f} "
        f"| {row['fp32_rate']:.0f} ({row['fp32_alone_rate']:.0f}) "
        f"| {row['int8_rate']:.0f} ({row['int8_alone_rate']:.0f})"
        for row in rows
    ]
    assert len(rows) == 3 and _missing(cells, REPOSITORY / "docs" / "how-to" / "images.md") == []
    assert max(row["peak_memory_mb"] for row in rows) < 3000


def test_table_of_serving() -> None:
    rows = []
    for row in _read("serving.json")["rows"]:
        fp32, int8 = row["fp32"], row["int8"]
        ratio, low, high = row["speedup_p50"]
        rows.append(
            f"{row['batch_size']} | {row['clients']} | {fp32['p50_ms']:,.2f}, {fp32['p99_ms']:,.2f} "
            f"| {int8['p50_ms']:,.2f}, {int8['p99_ms']:,.2f} | {fp32['images_per_s']:.0f}, {int8['images_per_s']:.0f} "
            f"| {ratio:.2f}x ({low:.2f} to {high:.2f})"
        )
    assert rows and _missing(rows) == []


def test_table_of_training_speed() -> None:
    names = {"vgg16": "VGG16", "smallnet": "SmallNet"}
    rows = [
        f"{names[row['model']]} | {row['ours_images_per_s']:,.0f} images/s | {row['usual_images_per_s']:,.0f} images/s "
        f"| {row['speedup']:.2f}x ({row['speedup_lowest']:.2f} to {row['speedup_highest']:.2f}) "
        f"| {row['data_share_percent']:.2f} %"
        for row in _read("training-speed.json")["rows"]
    ]
    assert rows and _missing(rows) == []


def test_table_of_execution() -> None:
    found: dict[tuple[str, bool], dict[str, Any]] = {}
    for row in _read("execution.json")["rows"]:
        found.setdefault((row["model"], row["busy"]), {})[row["case"]] = row
    rows = []
    for (model, busy), cases in found.items():
        paces = " | ".join(f"{cases[case]['images_per_second']:,.0f}" for case in ("auto", "before", "before, fp32"))
        chosen = "; ".join(dict.fromkeys(cases["auto"]["chosen"]))
        rows.append(f"{model} | {'busy' if busy else 'alone'} | {paces} | {chosen}")
    assert rows and _missing(rows) == []


def test_table_of_classifiers() -> None:
    rows = []
    for row in _read("classifiers.json")["rows"]:
        model = row["model"] + (f", `--batch-size {row['batch_size']}`" if row["batch_size"] != 128 else "")
        goal = row["epochs_to_goal"] or f"none in {row['epochs']}"
        rows.append(
            f"{model} | {row['optimizer']}, {row['peak_learning_rate']:g} | {goal} "
            f"| {row['best_validation_top1_percent']:.2f} % | {row['test_top1_percent']:.2f} %"
        )
    assert rows and _missing(rows) == []


def test_table_of_the_engines() -> None:
    rows = _read("engines.json")["rows"]
    names = list(dict.fromkeys(row["network"] for row in rows))
    cells = {name: " | ".join(f"{row['sqnr_db']:.1f} dB" for row in rows if row["network"] == name) for name in names}
    layers = {row["network"]: row["int8_layers"] for row in rows if not row["refused"]}
    size = {row["network"]: row["image_size"] for row in rows}
    assert rows and _missing([f"{name} | {size[name]} | {layers[name]} | {cells[name]}" for name in names]) == []


def test_table_of_the_recipe() -> None:
    small = next(found for found in _read("recipe.json") if found["model"] == "smallnet")
    first, *others = small["rows"]
    cells = [f"{first['top1_percent']:.2f} % | | {first['duration_s']:.0f} s"]
    cells += [
        f"{row['top1_percent']:.2f} % | {row['gain_points']:+.2f} ± {row['standard_error_points']:.2f} "
        f"| {row['duration_s']:.0f} s"
        for row in others
    ]
    assert _missing(cells) == []
