"""Packages that only some need, as extras of the distribution: a missing one is one line that says what to install."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

from qexp.errors import InputError

# What each extra installs, by the names to import; pyproject.toml has the distributions and their versions.
EXTRAS = {
    "pt2e": ("torchao",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "digits": ("sklearn",),
    "postgres": ("psycopg",),
    "timm": ("timm",),
}
OF_ENGINE = {"pt2e": "pt2e", "onnx": "onnx"}  # an engine's extra; what fx needs is always there


@contextmanager
def extra(name: str, purpose: str) -> Iterator[None]:
    """For imports of what the extra `name` installs.

    Raises:
        InputError: it is not installed; the message names `purpose`, the package and the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS[name]:
            raise
        raise _missing(name, purpose, package) from None


@contextmanager
def without_package(name: str) -> Iterator[None]:
    """Importing `name` fails inside the block as if it were not installed, unless it has been imported before."""
    blocked = name not in sys.modules
    if blocked:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if blocked:
            del sys.modules[name]


def check_engines(engines: Sequence[str]) -> None:
    """Raise InputError where an engine needs a package that is not installed. Nothing is imported for that."""
    for engine in engines:
        if engine in OF_ENGINE:
            for package in EXTRAS[OF_ENGINE[engine]]:
                check_package(OF_ENGINE[engine], f"engine {engine}", package)


def check_package(name: str, purpose: str, package: str) -> None:
    """Raise InputError where `package` of the extra `name` is not installed. Nothing is imported for that."""
    if not _is_there(package):
        raise _missing(name, purpose, package)


def why_missing(engines: Iterable[str]) -> dict[str, str]:
    """Of these engines, those that are not installed, each with the message that says so."""
    found = {}
    for engine in engines:
        try:
            check_engines([engine])
        except InputError as error:
            found[engine] = str(error)
    return found


def is_installed(engine: str) -> bool:
    """Whether all that an engine needs is installed. Nothing is imported for that."""
    return engine not in OF_ENGINE or all(map(_is_there, EXTRAS[OF_ENGINE[engine]]))


def has_openvino() -> bool:
    """Whether OpenVINO is installed. It is not imported for that."""
    return _is_there("openvino")


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # of a finder that refuses it
        return False


def _missing(name: str, purpose: str, package: str) -> InputError:
    return InputError(f"{purpose} needs {package}: {how_to_install(name)}")


def how_to_install(name: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'qexp[{name}]'"
