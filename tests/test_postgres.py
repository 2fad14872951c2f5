"""PostgreSQL of one's own: made, started, stopped, started again."""

from pathlib import Path

import psycopg
import pytest
from postgres import start_postgres


def _answers(url: str) -> bool:
    try:
        psycopg.connect(url).close()
    except psycopg.OperationalError:
        return False
    return True


def test_temporary_server_takes_work_and_is_gone_afterwards(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), start_postgres(tmp_path) as url:
        with psycopg.connect(url) as connection, connection.cursor() as cursor:
            cursor.execute("create table t as select 7 as n")
            cursor.execute("select n from t")
            assert cursor.fetchall() == [(7,)]
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(url.replace("postgres:", "postgres:other"))
        raise ZeroDivisionError
    assert not _answers(url)
