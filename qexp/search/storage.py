"""Where a study is kept: a journal file for one search at a time, or PostgreSQL for any number of workers.

PostgreSQL's advisory locks say who may do what: they belong to a connection, so a worker that is killed holds none.
"""

import fcntl
import hashlib
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from qexp.config import SearchConfig
from qexp.errors import InputError, StageError, first_line, hide_passwords
from qexp.progress import say

DRIVER = "postgresql+psycopg"
SCHEMES = ("postgresql", "postgres", DRIVER, "postgresql+psycopg2")
MISSED_HEARTBEATS = 6
STALE_LOCK_S = 10  # writing a line takes milliseconds
CONNECT_S = 10
# By the server: the locks of a machine that was switched off are free after a minute.
KEEPALIVES = {"tcp_keepalives_idle": 30, "tcp_keepalives_interval": 10, "tcp_keepalives_count": 3}
TABLES = "tables"  # these are one for all studies of a database
POLL_S = (0.02, 0.2)  # between two looks at a lock that another worker has: first and longest


@dataclass(frozen=True)
class Place:
    """A database with a connection for locks on one study; without one, a folder of journal files.

    `name` is what a message may say of it: it has no password.
    """

    name: str
    study: str | None
    url: sqlalchemy.URL | None = None
    connection: sqlalchemy.Connection | None = None

    @property
    def shared(self) -> bool:
        """Whether several workers may be at work on the study."""
        return self.connection is not None

    @contextmanager
    def exclusive(self, purpose: str, wait_word: str = "") -> Iterator[None]:
        """One worker at a time inside the block; `wait_word` is said once where that means waiting."""
        if self.connection is None:
            yield
            return
        pause = POLL_S[0]
        while not self._ask("pg_try_advisory_lock", purpose):  # waiting in the server would be deaf to Ctrl-C
            time.sleep(pause)
            pause = min(2 * pause, POLL_S[1])
            if wait_word and pause == POLL_S[1]:
                say(wait_word)
                wait_word = ""
        try:
            yield
        finally:
            self._ask("pg_advisory_unlock", purpose)

    def leave(self, unless_last: Callable[[], None]) -> bool:
        """Take this worker off the study; whether it was the last, who keeps others out until it ends.

        If it was not, `unless_last` is called, before any other worker can be the last.
        """
        if self.connection is None:
            return True
        try:
            with self.exclusive("leave"):
                self._ask("pg_advisory_unlock_shared", "present")
                last = self._ask("pg_try_advisory_lock", "present")
                if not last:
                    unless_last()
                return last
        except sqlalchemy.exc.SQLAlchemyError:  # the server has gone: nobody else is heard of
            return True

    def _ask(self, function: str, purpose: str) -> bool:
        assert self.connection is not None
        study = None if purpose == TABLES else self.study
        key = hashlib.sha256(f"qexp/{study}/{purpose}".encode()).digest()[:8]
        number = int.from_bytes(key, "big", signed=True)
        return bool(self.connection.scalar(sqlalchemy.text(f"SELECT {function}(:key)"), {"key": number}))


@contextmanager
def open_place(options: SearchConfig) -> Iterator[Place]:
    """The folder or database of these options; in a database, this worker is present until the end of the block.

    Raises:
        InputError: the URL is none of PostgreSQL, its database does not answer or is MLflow's, or a driver is missing.
        StageError: the database fails later.
    """
    if options.storage is None:
        yield Place(options.study_dir, options.study)
        return
    name = f"--storage {hide_passwords(options.storage)}"
    if options.study is None:
        raise InputError(f"{name}: several workers need the name of their study: --study NAME")
    url = _checked(options.storage, name)
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, isolation_level="AUTOCOMMIT")
    try:
        connection = engine.connect()
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise InputError(f"{name}: the database does not answer ({_said(error)})") from None
    with connection:
        place = Place(name, options.study, url, connection)
        try:
            if sqlalchemy.inspect(connection).has_table("experiments"):
                raise InputError(f"{name}: this database is MLflow's; give the search one of its own (createdb NAME)")
            for setting, value in KEEPALIVES.items():
                connection.execute(sqlalchemy.text(f"SET {setting} = {value}"))
            while not place._ask("pg_try_advisory_lock_shared", "present"):  # the last worker is about to end
                time.sleep(POLL_S[1])
            yield place
        except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError) as error:
            raise StageError(f"{name}: the database failed ({_said(error)})") from error


def _checked(text: str, name: str) -> sqlalchemy.URL:
    allowed = "must be postgresql://USER@HOST:PORT/DATABASE; one search alone has its journal file in --study-dir"
    try:
        url = sqlalchemy.make_url(text)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise InputError(f"{name}: {allowed}") from None
    if url.drivername not in SCHEMES:
        raise InputError(f"{name}: {allowed}")
    if "+" not in url.drivername:
        url = url.set(drivername=DRIVER)
    try:
        url.get_dialect().import_dbapi()
    except ImportError as error:
        raise InputError(f"{name}: {first_line(error)}: pip install 'qexp[postgres]'") from None
    timeout = {} if "connect_timeout" in url.query else {"connect_timeout": str(CONNECT_S)}
    return url.update_query_dict(timeout)


def _said(error: BaseException) -> str:
    return first_line(getattr(error, "orig", None) or error.__cause__ or error)


@contextmanager
def storages_of(place: Place, heartbeat_seconds: int) -> Iterator[Callable[[str], BaseStorage]]:
    """What gives Optuna's storage for a study of a name, the same one each time, until the end of the block."""
    found: dict[str, BaseStorage] = {}
    with ExitStack() as opened:

        def open_storage(study: str) -> BaseStorage:
            if study not in found:
                found[study] = opened.enter_context(_storage(place, study, heartbeat_seconds))
            return found[study]

        yield open_storage


@contextmanager
def _storage(place: Place, study: str, heartbeat_seconds: int) -> Iterator[BaseStorage]:
    """Optuna's storage for a study of this name.

    Raises:
        InputError: the journal file cannot be written or another search is at work on it; the database refuses.
    """
    if place.url is None:
        with _journal(Path(place.name), study) as storage:
            yield storage
        return
    # Tables that two workers make at the same moment break one of them.
    with place.exclusive(TABLES), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # heartbeats are called experimental
        try:
            storage = _made(place.url, heartbeat_seconds)
        except Exception as error:  # no right to make tables, tables of another version: any library's
            raise InputError(f"{place.name}: cannot hold a study ({_said(error)})") from None
    try:
        yield storage
    finally:
        storage.engine.dispose()


def _made(url: sqlalchemy.URL, heartbeat_seconds: int) -> RDBStorage:
    make = partial(
        RDBStorage,
        url.render_as_string(hide_password=False),
        engine_kwargs={"pool_pre_ping": True},
        heartbeat_interval=heartbeat_seconds,
        grace_period=MISSED_HEARTBEATS * heartbeat_seconds,
    )
    try:
        return make()
    except sqlalchemy.exc.SQLAlchemyError:  # Optuna's dashboard, which knows none of our locks, may make the tables
        time.sleep(POLL_S[1])
        return make()


@contextmanager
def _journal(folder: Path, study: str) -> Iterator[BaseStorage]:
    if Path(study).name != study:
        raise InputError(f"--study {study}: must be a name that a file can have")
    file = folder / f"{study}.journal"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        busy = file.with_suffix(".busy").open("w")
        # A search killed while it wrote leaves its lock behind; the next one takes it over after the grace period.
        backend = JournalFileBackend(str(file), lock_obj=JournalFileOpenLock(str(file), grace_period=STALE_LOCK_S))
    except OSError as error:
        raise InputError(f"--study-dir {folder}: cannot be written ({error})") from None
    with busy:
        try:
            fcntl.flock(busy, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            several = "several workers need --storage postgresql://… and --study NAME"
            raise InputError(f"--study {study}: another search is at work in {file}; {several}") from None
        yield JournalStorage(backend)
