"""PostgreSQL of one's own: made, started, stopped, started again."""

from pathlib import Path

import psycopg2
import pytest
from postgres import start_postgres


def _answers(url: str) -> bool:
    try:
        psycopg2.connect(url).close()
    except psycopg2.OperationalError:
        return False
    return True


def test_temporary_server_takes_work_and_is_gone_afterwards(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), start_postgres(tmp_path) as url:
        with psycopg2.connect(url) as connection, connection.cursor() as cursor:
            cursor.execute("create table t (n int); insert into t values (7); select n from t")
            assert cursor.fetchall() == [(7,)]
        with pytest.raises(psycopg2.OperationalError, match="password"):
            psycopg2.connect(url.replace("postgres:", "postgres:other"))
        raise ZeroDivisionError
    assert not _answers(url)
