"""A real `mlflow server` for tests, on a free port, that can be killed and started again."""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from stores import new_store

from qexp.postgres import free_port
from qexp.server import running_server


@dataclass
class Server:
    """SQLite in its folder unless `store` names a database, artifacts in `artifacts` there."""

    folder: Path
    store: str = ""
    artifacts: Path | None = None
    options: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)
    pid: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, stack: ExitStack) -> None:
        """Start it, or start it again; it ends with `stack`."""
        log = stack.enter_context((self.folder / "server.log").open("a"))
        store = self.store or new_store(self.folder)
        artifacts = str(self.artifacts or self.folder / "artifacts")
        running = running_server(store, artifacts, self.port, ["--workers", "1", *self.options], log)
        self.pid = stack.enter_context(running)[1].pid

    def kill(self) -> None:
        """SIGKILL for it and all that it has started."""
        os.killpg(self.pid, signal.SIGKILL)


@contextmanager
def start_server(folder: Path, store: str = "", artifacts: Path | None = None, *options: str) -> Iterator[Server]:
    """A server that answers."""
    server = Server(folder, store, artifacts, options)
    with ExitStack() as stack:
        server.start(stack)
        yield server
