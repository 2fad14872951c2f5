"""What gets installed: one top-level package, a console command, and versions that all files agree on."""

import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCK = runpy.run_path(str(REPOSITORY / ".ci" / "lock.py"))
PROJECT = LOCK["PROJECT"]
OPTIONAL = PROJECT["optional-dependencies"]


def _locked() -> dict[str, str]:
    return dict(LOCK["_locked"]())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy: setuptools leaves a folder `build` beside what it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("qexp", "entrypoints"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, folder)
    command = [sys.executable, *"-m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir out .".split()]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (file,) = (folder / "out").glob("qexp-*.whl")
    return zipfile.ZipFile(file)


@pytest.mark.slow
def test_the_wheel_adds_one_top_level_name(wheel: zipfile.ZipFile) -> None:
    """PyPI has another package `entrypoints`, which papermill and altair import."""
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"qexp"}
    (entries,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "qexp = qexp.entrypoints.cli:main_program" in wheel.read(entries).decode()


@pytest.mark.slow
def test_from_the_folder_above_a_checkout_the_package_is_found(tmp_path: Path) -> None:
    checkout = tmp_path / "qexp"  # which would be a namespace package, without anything in it
    checkout.mkdir()
    for name in ("qexp", "entrypoints"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, checkout / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, checkout)
    build = "from setuptools.build_meta import build_editable as build; build('../out')"
    subprocess.run([sys.executable, "-c", build], cwd=checkout, check=True, capture_output=True)
    (file,) = (tmp_path / "out").glob("qexp-*.whl")
    zipfile.ZipFile(file).extractall(tmp_path / "site")
    program = f"import sys, site; sys.path = [folder for folder in sys.path if folder != {str(REPOSITORY)!r}]; "
    program += "site.addsitedir('site'); import qexp, qexp.entrypoints.cli as cli; print(qexp.load, cli.__file__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("<function load") and str(checkout) in done.stdout


@pytest.mark.slow
def test_the_wheel_has_every_module(wheel: zipfile.ZipFile) -> None:
    modules = {f"qexp/{file.relative_to(REPOSITORY / 'qexp')}" for file in (REPOSITORY / "qexp").rglob("*.py")}
    modules |= {f"qexp/entrypoints/{file.name}" for file in (REPOSITORY / "entrypoints").glob("*.py")}
    assert {name for name in wheel.namelist() if name.endswith(".py")} == modules
    assert "qexp/py.typed" in wheel.namelist()


@pytest.mark.slow
def test_the_commands_of_the_wheel_import_only_the_package(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    program = "import sys; sys.argv = ['qexp', '--help']; from qexp.entrypoints.cli import main_program; main_program()"
    command = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {program}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "quantize" in done.stdout, done.stderr


def test_constraints_meet_the_ranges_of_every_dependency() -> None:
    locked = _locked()
    extras = [line for name, lines in OPTIONAL.items() if name != "bench" for line in lines]
    for need in map(Requirement, [*PROJECT["dependencies"], *extras]):
        if need.name != "qexp":
            version = locked[canonicalize_name(need.name)]
            assert need.specifier.contains(version), f"{need}: {version} is locked; run `make lock`"


def test_conda_environment_has_the_versions_of_the_constraints() -> None:
    environment = yaml.safe_load((REPOSITORY / "conda.yaml").read_text())
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    pinned = dict(line.split("==") for line in pip)
    assert pinned.items() <= _locked().items(), "conda.yaml is stale: run `make lock`"
    needed = [*PROJECT["dependencies"], *(line for extra in LOCK["RUN_EXTRAS"] for line in OPTIONAL[extra])]
    assert {canonicalize_name(Requirement(line).name) for line in needed} - {"qexp"} <= set(pinned)


def test_every_dependency_has_a_lower_bound() -> None:
    needed = [*PROJECT["dependencies"], *(line for lines in OPTIONAL.values() for line in lines)]
    for need in map(Requirement, needed):
        unbounded = need.name == "qexp" or need.extras  # of extras, the package itself has the bound
        assert unbounded or any(one.operator == ">=" for one in need.specifier), need


def test_each_extra_of_the_code_is_one_of_the_distribution() -> None:
    from qexp.foundation.extras import EXTRAS

    for extra, packages in EXTRAS.items():
        distributions = {canonicalize_name(Requirement(line).name) for line in OPTIONAL[extra]}
        assert {"scikit-learn" if name == "sklearn" else name for name in packages} <= distributions


def test_the_locked_versions_name_no_host_of_packages() -> None:
    for name in ("constraints.txt", "conda.yaml"):
        assert "://" not in (REPOSITORY / name).read_text(), name
