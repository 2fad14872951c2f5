"""The addresses of MLflow's tracking store and registry: what they may be, and whether anything is there.

They come from the environment, or from MLflow's defaults. store.py asks here first: MLflow itself tries a database for
minutes, with warnings, and makes one wherever a relative path leads.
"""

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mlflow
import sqlalchemy

from qexp.errors import InputError, first_line
from qexp.foundation.environment import under_mlflow_run
from qexp.foundation.text import hide_secrets

CONNECT_S = 10
MISREAD = re.compile("%[0-9a-fA-F]{2}")  # in the name of a folder: MLflow decodes it once too often
LOCKED = "database is locked"  # SQLite's words, after five seconds
SQLITE = "sqlite:///"
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
OTHERS = ("file", "http", "https", "databricks", "databricks-uc", "uc")  # that MLflow knows
SUPPORTED = "sqlite:///FILE, http(s)://HOST:PORT or a database such as postgresql://USER@HOST/NAME"
IN_A_PROJECT = (
    "mlflow run works in the project's folder, so give the whole path: "
    'MLFLOW_TRACKING_URI="sqlite:///$PWD/mlflow.db" mlflow run …'
)


@dataclass(frozen=True)
class Address:
    """Where tracking store or registry are. `what` is one of these words, `variable` the name of what says so."""

    what: str
    variable: str
    uri: str

    @property
    def scheme(self) -> str:
        """Without a driver; `file` where it is a path."""
        scheme = urlsplit(self.uri).scheme.partition("+")[0]
        return scheme or ("databricks" if self.uri == "databricks" else "file")

    @property
    def file(self) -> Path | None:
        """The file of a SQLite database, as SQLAlchemy decodes its path; None: it is something else."""
        if self.scheme != "sqlite":
            return None
        database = sqlalchemy.make_url(self.uri).database or ""
        return None if database.startswith("file:") else Path(database)

    def refusal(self, reason: str) -> InputError:
        """That nothing answers there, why, and what to set."""
        if self.scheme == "file":
            reason = "MLflow no longer takes its earlier store of files"
            if not mlflow.is_tracking_uri_set():
                reason += f", and chooses it where {self.variable} is not set and a folder mlruns holds one"
        text = f"{self.variable} {hide_secrets(self.uri)}: the {self.what} does not answer ({reason})"
        if LOCKED in reason:
            return InputError(f"{text}; another process is writing to it: wait for that one, or end it")
        if self.scheme in ("http", "https"):
            return InputError(f"{text}; start it, or set {self.variable} to another, such as sqlite:///mlflow.db")
        return InputError(f"{text}; set {self.variable}=sqlite:///mlflow.db")


def addresses() -> list[Address]:
    """Of the tracking store and, where it is another one, of the registry."""
    tracking = Address("tracking store", "MLFLOW_TRACKING_URI", mlflow.get_tracking_uri())
    registry = Address("registry", "MLFLOW_REGISTRY_URI", mlflow.get_registry_uri())
    return [tracking] if registry.uri == tracking.uri else [tracking, registry]


def use_plain_paths() -> list[Address]:
    """All addresses, those of SQLite's files without escapes from here on. MLflow writes its default so, and makes the
    folder of the path as it is written: `Jane%20Doe` beside `Jane Doe`."""
    for address, use in zip(addresses(), (mlflow.set_tracking_uri, mlflow.set_registry_uri), strict=False):
        plain = unquote(address.uri)
        if address.uri.startswith(SQLITE) and "?" not in plain and unquote(plain) == plain:
            use(plain)
    return addresses()


def folders(of: list[Address]) -> Iterator[Path]:
    """The folders of SQLite's files."""
    return (address.file.absolute().parent for address in of if address.file)


def check(address: Address) -> None:
    """What can be said of an address without asking anybody; the folder of SQLite's file is made.

    Raises:
        InputError: it is none of MLflow's, or a folder has a name that MLflow reads as another one.
    """
    uri, variable = address.uri, address.variable
    if uri != (bare := uri.strip(" \t\r\n'\"")):
        raise InputError(f"{variable} {uri!r}: begins or ends with a blank or a quote; set {variable}={bare}")
    try:
        file = address.file
    except sqlalchemy.exc.ArgumentError:
        raise address.refusal(f"must be {SUPPORTED}") from None
    if address.scheme not in (*DATABASES, *OTHERS):
        raise address.refusal(f"must be {SUPPORTED}")
    if address.scheme == "file":  # which versions before 3.12 would still take
        raise address.refusal("")
    if address.scheme in DATABASES and (found := MISREAD.search(os.getcwd())):  # artifacts go below it
        raise InputError(f"{os.getcwd()}: {_misread(found[0])}; rename it, or give the command in another one")
    if file is not None:
        if found := MISREAD.search(str(file)) or re.search(r"\?", str(file)):
            better = f"rename it, or set {variable} to a file elsewhere, such as sqlite:////home/me/mlflow.db"
            raise InputError(f"{variable} {uri}: {_misread(found[0])}; {better}")
        _check_file(address, file)


def _misread(part: str) -> str:
    return f"MLflow takes {part} in the name of a folder for something else, and would make another folder"


def _check_file(address: Address, file: Path) -> None:
    if str(file) in (".", ":memory:"):
        raise address.refusal("it names no file, so what is logged would be lost")
    if under_mlflow_run() and not file.is_absolute() and not file.exists():
        raise InputError(f"{address.variable} {address.uri}: no such file in {os.getcwd()}; {IN_A_PROJECT}")
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise address.refusal("it is no regular file")
    except FileNotFoundError:
        try:
            file.absolute().parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise address.refusal(f"{error.filename}: {error.strerror}") from None
    except OSError as error:
        raise address.refusal(f"{file}: {error.strerror}") from None


def connect(address: Address) -> None:
    """Ask a database once, and nobody else; a file of SQLite that is not there is made, empty.

    Raises:
        InputError: it does not answer.
    """
    if address.scheme not in DATABASES:
        return
    try:
        url = sqlalchemy.make_url(address.uri)
        waits = address.scheme in ("postgresql", "mysql") and "connect_timeout" not in url.query
        engine = sqlalchemy.create_engine(
            url, poolclass=sqlalchemy.NullPool, connect_args={"connect_timeout": CONNECT_S} if waits else {}
        )
        with engine.connect() as connection:
            question = "select count(*) from sqlite_master" if address.scheme == "sqlite" else "select 1"
            connection.execute(sqlalchemy.text(question))
    except Exception as error:  # no driver, no server, no right, a damaged file: any library's
        raise address.refusal(first_line(getattr(error, "orig", None) or error)) from None
