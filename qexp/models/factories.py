"""`--model package.module:factory`: a network from code of the user's own, imported from the current folder too.

That folder counts for this import alone, in the main process and in the processes of a training: the others that qexp
starts run with Python's option -P, and import nothing from it. What they time or verify is the stored program.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from qexp.errors import InputError, first_line
from qexp.foundation.processes import OWN_CODE
from qexp.models.stored import importing_torchvision

IMAGENET_CLASSES = 1000


class NotImportable(InputError):
    """The module of a factory is not found from here."""


def build_from_factory(text: str, classes: int | None) -> nn.Module:
    """The network that `package.module:factory` gives: of `factory(num_classes=classes)` where it takes that, else of
    `factory()`, and so where `classes` is None, unless it must be given. A module that is there already under this
    name is taken as it is.

    Raises:
        NotImportable: there is no such module.
        InputError: it fails, has no such attribute, or gives something else than an nn.Module.
    """
    with current_folder():
        factory = _import(text)
        if isinstance(factory, nn.Module):
            return factory
        if not callable(factory):
            raise InputError(f"--model {text}: must be a function that returns an nn.Module, and is {_kind(factory)}")
        try:
            network = _call(factory, classes)
        except (Exception, SystemExit) as error:
            raise InputError(f"--model {text}: the call failed ({type(error).__name__}: {first_line(error)})") from None
    if not isinstance(network, nn.Module):
        raise InputError(f"--model {text}: must return an nn.Module, and returns {_kind(network)}")
    return network


def source_file(text: str) -> Path | None:
    """The file of the module of a factory that has been called; None where it has none."""
    module = sys.modules.get(text.partition(":")[0])
    name = getattr(module, "__file__", None)
    return Path(name) if name else None


def _call(factory: Callable[..., Any], classes: int | None) -> Any:
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # of a function in C
        return factory()
    if "num_classes" in parameters:
        by_itself = parameters["num_classes"].default is not inspect.Parameter.empty
        return factory() if classes is None and by_itself else factory(num_classes=classes or IMAGENET_CLASSES)
    if classes is None or not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return factory()
    try:  # as torchvision's own functions, which hand it on
        return factory(num_classes=classes)
    except TypeError:
        return factory()


def _import(text: str) -> Any:
    name, _, attributes = text.partition(":")
    try:
        found: Any = importing_torchvision(lambda: importlib.import_module(name))
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise NotImportable(f"--model {text}: no module {error.name} {_looked_in()}") from None
        raise InputError(f"--model {text}: importing {name} failed ({first_line(error)})") from None
    except (Exception, SystemExit) as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"--model {text}: importing {name} failed ({why})") from None
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            where = source_file(text) or "which has no file"
            raise InputError(f"--model {text}: {name} ({where}) has no attribute {attribute}")
        found = getattr(found, attribute)
    return found


def _looked_in() -> str:
    if sys.flags.safe_path:
        return "among what is installed (the current folder is left out: -P or PYTHONSAFEPATH)"
    return f"in the current folder, {os.getcwd()}, or among what is installed"


@contextmanager
def current_folder() -> Iterator[None]:
    """While the block lasts, modules of the current folder can be imported: before installed packages, but after
    Python's own modules, so that a file of the name random.py is not taken for one of them."""
    folder = os.environ.get(OWN_CODE) or ("" if sys.flags.safe_path else os.getcwd())
    if not folder:
        yield
        return
    at = next((index for index, entry in enumerate(sys.path) if entry.endswith("-packages")), len(sys.path))
    sys.path.insert(at, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(folder)


def _kind(found: object) -> str:
    return f"a {type(found).__name__}" if found is not None else "None"
