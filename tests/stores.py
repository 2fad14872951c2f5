"""New SQLite stores for tests: MLflow needs two seconds for the tables of one, a copy takes none."""

import atexit
import shutil
import sqlite3
import tempfile
from contextlib import closing
from functools import lru_cache
from pathlib import Path

import mlflow


def new_store(folder: Path) -> str:
    """The URI of `mlflow.db` in `folder`, which is made unless it is there."""
    file = folder / "mlflow.db"
    if not file.exists():
        shutil.copy(_tables(), file)
        with closing(sqlite3.connect(file)) as database, database:
            database.execute("update experiments set artifact_location = ?", [str(folder / "mlruns" / "0")])
    return f"sqlite:///{file}"


@lru_cache
def _tables() -> Path:
    """A store that nobody has used."""
    folder = Path(tempfile.mkdtemp(prefix="qexp-store-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    client.search_experiments()
    client.search_registered_models()
    return folder / "mlflow.db"
