"""Where a study is kept: in a journal file for one search at a time, or in PostgreSQL for any number of workers.

Fed by the options `study_dir`, `storage` and `heartbeat_seconds`; gives study.py Optuna's storage, and all other files
the locks that say which worker may do what. PostgreSQL's advisory locks belong to a connection, so a worker that is
killed holds none.
"""

import fcntl
import hashlib
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from qexp.config import SearchConfig
from qexp.errors import InputError, StageError, first_line
from qexp.foundation.text import hide_secrets
from qexp.progress import say
from qexp.search.journal import mend_journal

DRIVER = "postgresql+psycopg"
SCHEMES = ("postgresql", "postgres", DRIVER, "postgresql+psycopg2")
MISSED_HEARTBEATS = 6
STALE_LOCK_S = 10  # writing a line takes milliseconds
CONNECT_S = 10
# The server closes silent connections, so the locks of a machine that was switched off are free after a minute.
KEEPALIVES = {"tcp_keepalives_idle": 30, "tcp_keepalives_interval": 10, "tcp_keepalives_count": 3}
POLL_S = (0.02, 0.2)  # between two looks at a lock that another worker has: first and longest


@dataclass(frozen=True)
class Folder:
    """A folder of journal files. A search has its study alone, so there is nobody to wait for."""

    path: Path
    closing: ExitStack  # closes what is opened here
    opened: dict[str, BaseStorage] = field(default_factory=dict)
    shared = False

    def address(self, study: str) -> str:
        """The journal file of a study."""
        return str(self.path / f"{study}.journal")

    def storage(self, study: str) -> BaseStorage:
        """Optuna's storage for a study of this name, the same one each time.

        Raises:
            InputError: the file cannot be written or is no journal, or another search is at work on it.
        """
        if study not in self.opened:
            self.opened[study] = self._open(study)
        return self.opened[study]

    def _open(self, study: str) -> BaseStorage:
        if Path(study).name != study:
            raise InputError(f"--study {study}: must be a name that a file can have")
        file = self.address(study)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            busy = self.closing.enter_context(Path(file).with_suffix(".busy").open("w"))
            fcntl.flock(busy, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mend_journal(Path(file))
            # A search that is killed while it writes leaves its lock behind; the next one removes it after a while.
            backend = JournalFileBackend(file, lock_obj=JournalFileOpenLock(file, grace_period=STALE_LOCK_S))
        except BlockingIOError:
            several = "several workers need --storage postgresql://… and --study NAME"
            raise InputError(f"--study {study}: another search is at work in {file}; {several}") from None
        except OSError as error:
            raise InputError(f"--study-dir {self.path}: cannot be written ({error})") from None
        try:
            return JournalStorage(backend)
        except Exception as error:  # operations that make no sense together: whatever Optuna meets
            why = f"its operations do not belong together ({type(error).__name__}: {first_line(error)})"
            raise InputError(f"--study {study}: {file} is no journal of a study: {why}") from None

    def exclusive(self, purpose: str, wait_word: str = "") -> AbstractContextManager[None]:
        """One worker at a time inside the block: here there is only one."""
        return nullcontext()

    def leave(self, unless_last: Callable[[], None]) -> bool:
        """Take this worker off the study; whether it was the last: here it is."""
        return True


@dataclass(frozen=True)
class Database:
    """A PostgreSQL database, with a connection for the locks of one study.

    `name` is what a message may say of it: it has no password.
    """

    name: str
    study: str
    url: sqlalchemy.URL
    connection: sqlalchemy.Connection
    heartbeat_seconds: int
    closing: ExitStack  # closes what is opened here
    opened: list[BaseStorage] = field(default_factory=list)
    shared = True

    def address(self, study: str) -> str:
        """The URL without its password."""
        url = self.url.difference_update_query(["password", "connect_timeout"])
        return url._replace(drivername="postgresql", password=None).render_as_string()

    def storage(self, study: str) -> BaseStorage:
        """Optuna's storage, the same one each time.

        Raises:
            InputError: the database refuses.
        """
        if not self.opened:
            # Tables that two workers make at the same moment break one of them. They are one for all studies.
            with self._locked(_key("None/tables")), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # heartbeats are called experimental
                try:
                    storage = self._open()
                except Exception as error:  # no right to make tables, tables of another version: any library's
                    raise InputError(f"{self.name}: cannot hold a study ({_said(error)})") from None
            self.closing.callback(storage.engine.dispose)
            self.opened.append(storage)
        return self.opened[0]

    def _open(self) -> RDBStorage:
        make = partial(
            RDBStorage,
            self.url.render_as_string(hide_password=False),
            engine_kwargs={"pool_pre_ping": True},
            heartbeat_interval=self.heartbeat_seconds,
            grace_period=MISSED_HEARTBEATS * self.heartbeat_seconds,
        )
        try:
            return make()
        except sqlalchemy.exc.SQLAlchemyError:  # Optuna's dashboard, which knows none of our locks, may make the tables
            time.sleep(POLL_S[1])
            return make()

    def exclusive(self, purpose: str, wait_word: str = "") -> AbstractContextManager[None]:
        """One worker of the study at a time inside the block; `wait_word` is said once where that means waiting."""
        return self._locked(self._key(purpose), wait_word)

    def leave(self, unless_last: Callable[[], None]) -> bool:
        """Take this worker off the study; whether it was the last, who keeps others out until it ends.

        If it was not, `unless_last` is called, before any other worker can be the last.
        """
        try:
            with self.exclusive("leave"):
                self._ask("pg_advisory_unlock_shared", self._key("present"))
                last = self._ask("pg_try_advisory_lock", self._key("present"))
                if not last:
                    unless_last()
                return last
        except sqlalchemy.exc.SQLAlchemyError:  # the server is gone: nothing is known of other workers
            return True

    def enter(self) -> None:
        """Make this worker present on the study, until its connection ends or it leaves."""
        while not self._ask("pg_try_advisory_lock_shared", self._key("present")):  # the last worker is about to end
            time.sleep(POLL_S[1])

    def _key(self, purpose: str) -> int:
        return _key(f"{self.study}/{purpose}")

    @contextmanager
    def _locked(self, key: int, wait_word: str = "") -> Iterator[None]:
        pause = POLL_S[0]
        while not self._ask("pg_try_advisory_lock", key):  # waiting in the server would not end on Ctrl-C
            time.sleep(pause)
            pause = min(2 * pause, POLL_S[1])
            if wait_word and pause == POLL_S[1]:
                say(wait_word)
                wait_word = ""
        try:
            yield
        finally:
            self._ask("pg_advisory_unlock", key)

    def _ask(self, function: str, key: int) -> bool:
        return bool(self.connection.scalar(sqlalchemy.text(f"SELECT {function}(:key)"), {"key": key}))


Place = Folder | Database


@contextmanager
def open_place(options: SearchConfig) -> Iterator[Place]:
    """The folder or database of these options; in a database, this worker is present until the end of the block.

    Raises:
        InputError: the URL is none of PostgreSQL, its database does not answer or is MLflow's, or a driver is missing.
        StageError: the database fails later.
    """
    with ExitStack() as closing:
        if options.storage is None:
            yield Folder(Path(options.study_dir), closing)
            return
        name = f"--storage {hide_secrets(options.storage)}"
        if options.study is None:
            raise InputError(f"{name}: several workers need the name of their study: --study NAME")
        url = _checked(options.storage, name)
        engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, isolation_level="AUTOCOMMIT")
        try:
            connection = closing.enter_context(engine.connect())
        except sqlalchemy.exc.SQLAlchemyError as error:
            raise InputError(f"{name}: the database does not answer ({_said(error)})") from None
        try:
            if sqlalchemy.inspect(connection).has_table("experiments"):
                raise InputError(f"{name}: this database is MLflow's; give the search one of its own (createdb NAME)")
            for setting, value in KEEPALIVES.items():
                connection.execute(sqlalchemy.text(f"SET {setting} = {value}"))
            database = Database(name, options.study, url, connection, options.heartbeat_seconds, closing)
            database.enter()
            yield database
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


def _key(text: str) -> int:
    """A lock's name as PostgreSQL wants it: a number of 64 bits."""
    return int.from_bytes(hashlib.sha256(f"qexp/{text}".encode()).digest()[:8], "big", signed=True)
