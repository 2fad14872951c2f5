"""Writes the exact versions of this environment: constraints.txt, and conda.yaml from it (`make lock`).

pyproject.toml says which versions people may have; these are the ones that make, CI and `mlflow run` install. To move
to newer ones: `.venv/bin/python -m pip install --upgrade NAME`, `make lock`, `make test`.
"""

import re
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TOP = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
RUN_EXTRAS = ("pt2e", "onnx", "openvino", "digits")  # what the entry points of MLproject may be asked for
CONSTRAINTS_HEAD = "# Exact versions for `pip install -c`, written by `make lock`. The ranges are in pyproject.toml.\n"
CONDA_HEAD = """\
# The environment of `mlflow run`, with the versions of constraints.txt; written by `make lock`.
# All under pip: `--env-manager uv` and `virtualenv` read nothing else.
name: qexp
dependencies:
  - python=3.11
  - pip
  - pip:
"""


def pins(requirements: Iterable[str]) -> dict[str, str]:
    """Name and version of all that these requirements need, as it is installed here; what is not is left out."""
    found: dict[str, str] = {}
    waiting, seen = list(map(Requirement, requirements)), set[tuple[str, str]]()
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        if name != PROJECT["name"]:
            found[name] = installed.version.partition("+")[0]  # without the label of a build
        for extra in ("", *one.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                inner = own_requirements(extra) if name == PROJECT["name"] else installed.requires or []
                waiting += [need for need in map(Requirement, inner) if _applies(need, extra)]
    return dict(sorted(found.items()))


def own_requirements(extra: str = "") -> list[str]:
    """Those of pyproject.toml, which may be newer than the installed package says."""
    found = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    return [str(line) for line in found]


def constraints_txt() -> str:
    """Everything that development needs, what is only for benchmarks where it is installed."""
    extras = ",".join(PROJECT["optional-dependencies"])
    lines = [f"{name}=={version}" for name, version in pins([f"{PROJECT['name']}[{extras}]"]).items()]
    return CONSTRAINTS_HEAD + "\n".join(lines) + "\n"


def conda_yaml() -> str:
    """What the entry points need, with the versions of constraints.txt."""
    names = pins([f"{PROJECT['name']}[{','.join(RUN_EXTRAS)}]"])
    locked = dict(_locked())
    return CONDA_HEAD + "".join(f'      - "{name}=={locked[name]}"\n' for name in names)


def _locked() -> Iterator[tuple[str, str]]:
    for line in (TOP / "constraints.txt").read_text().splitlines():
        if found := re.fullmatch(r"([a-z0-9-]+)==(\S+)", line):
            yield found[1], found[2]


def _applies(need: Requirement, extra: str) -> bool:
    return need.marker is None or need.marker.evaluate({"extra": extra})


if __name__ == "__main__":
    (TOP / "constraints.txt").write_text(constraints_txt())
    (TOP / "conda.yaml").write_text(conda_yaml())
