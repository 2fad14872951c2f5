"""Text of others: no secrets, nothing that a terminal obeys, nothing that Markdown or a browser takes for markup."""

import logging
import warnings

import markdown
import pytest
from nasty import Page, nasty

from entrypoints.ending import _fit_to_show
from entrypoints.table import show
from qexp import progress
from qexp.errors import first_line
from qexp.foundation.tables import Table
from qexp.foundation.text import as_html, as_markdown, as_text, hide_secrets, opaque, printable
from qexp.tracking.catalog import as_table

SECRETS = (  # each with s3cr3t in it
    "postgresql://me:s3cr3t@host:5432/db", "a http://u:p:s3cr3t:q@h/ b", "http://u:s3cr3t p4ss@h/x",
    "x://u:p@s3cr3t@h", "cannot parse 'postgresql://me:my s3cr3t @w0rd@host:port/db'", "postgresql://u:12/s3cr3t@h/d",
    "redis://:s3cr3t@h", "postgresql://me@corp:s3cr3t@host/db", "http://h/?token=s3cr3t",
    "http://h/x?a=1&api_key=s3cr3t: no answer (x)", "http://h/?apikey=s3cr3t&x=1",
    "postgresql://h/d?user=u&password=my s3cr3t: no answer", "AWS_SECRET_ACCESS_KEY=s3cr3t",
    "http://h/o?X-Amz-Signature=s3cr3t&X-Amz-Date=1", "http://h/o?X-Amz-Security-Token=s3cr3t",
    "Authorization: Basic s3cr3t", "{'Authorization': 'Bearer s3cr3t'}", '{"password": "my s3cr3t"}',
    "curl -H 'Private-Token: s3cr3t'", "bearer s3cr3t", "https://s3cr3t-0123456789abcdef@github.com/x",
    "(access_key_id='s3cr3t')", "https://h/?sig=s3cr3t&se=1",
)  # fmt: skip
NO_SECRETS = (
    "models:/name@champion at http://127.0.0.1:5000", "http://127.0.0.1:5000 has models:/name@champion", "sqlite:///m.db",
    "http://h:5000: no answer, ask me@h.org", "http://[::1]:5000/x@y", "unexpected token: foo", "postgresql://u@h/db",
    "401: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to a user that it knows", "http://h:80, or a@b",
)  # fmt: skip


@pytest.mark.parametrize("text", SECRETS)
def test_no_secret_is_shown(text: str) -> None:
    for shown in (hide_secrets(text), printable(text), first_line(ValueError(text)), as_text(opaque(text))):
        assert "s3cr3t" not in shown and "***" in shown
        assert hide_secrets(shown) == shown
    assert "s3cr3t" not in str(_fit_to_show({"a": [{"b": text}]}))


@pytest.mark.parametrize("text", NO_SECRETS)
def test_what_is_no_secret_stays(text: str) -> None:
    assert hide_secrets(text) == text


def test_secrets_of_the_environment_are_hidden_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:pass word/1@h:80/?token=tok en1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    shown = hide_secrets("no answer of me:pass word/1 with tok en1, wJalrXUtnFEMI, me")
    assert shown == "no answer of me:*** with ***, ***, me"


def test_a_terminal_obeys_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable("a\x1b[31mb\r\n  c\td\udcff\u202e 犬 a\u200cb") == r"a\x1b[31mb c d\udcff\u202e 犬 a" + "\u200cb"
    names = nasty(120)
    for name in names:
        progress.say(name)
        assert len(printable(name).splitlines()) == 1
    said = capsys.readouterr().err.splitlines()
    assert said == [printable(name) for name in names] and all(len(line.splitlines()) == 1 for line in said)
    for name in names:
        uri = f"models:/{name}/1"
        summary = {"command": "quantize", "engine": name, "int8": uri, "verdict": name, "reasons": [name]}
        show(summary | {"fp32_top1_percent": 1.0, "int8_top1_percent": 1.0, "top1_drop_points": 0.0, "size_ratio": 4.0})
        lines = [line.strip() for line in capsys.readouterr().out.split("\n")]
        assert "".join(map(chr, range(32))).isprintable() is False and all(printable(line) == line for line in lines)
        assert f"int8  {printable(uri)}".strip() in lines and f"Verdict: {printable(name)}".strip() in lines
    table = Table(names[0], ("model", names[1]), tuple((name, "1") for name in names), (names[-1],)).text()
    assert len(table.split("\n")) == len(names) + 5 and all(printable(line) == line for line in table.split("\n"))
    empty: dict[str, object] = dict.fromkeys(
        (
            "engine",
            "folded",
            "test_top1_percent",
            "size_mb",
            "smallest_speedup",
            "gate",
            "promotion",
            "p50_ms",
            "top1_drop_points",
        )
    )
    lineage = dict.fromkeys(("fp32_uri", "data_digest", "calibration_digest", "git_commit"))
    rows = [
        empty | {"name": name, "version": 1, "aliases": [name], "kind": name, "lineage": lineage | {"cpu": name}}
        | dict.fromkeys(("p50_batch_size", "p50_threads", "top1_drop_low_points", "top1_drop_high_points"))
        for name in names
    ]  # fmt: skip
    lines = as_table(rows).split("\n")
    assert len(lines) == len(names) + 1 and all(printable(line) == line for line in lines)


def test_logs_and_warnings_of_libraries_are_one_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    make = logging.getLogRecordFactory()
    try:
        progress.clean_logs()
        record = logging.getLogger("mlflow").makeRecord("x", 30, "f", 1, "no %s\nat %s", ("a\x1bb", "h?token=x"), None)
        assert record.getMessage() == r"no a\x1bb at h?token=***"
        assert r"a\x1bb c" in warnings.formatwarning("a\x1bb\nc", UserWarning, "f", 1)
    finally:
        logging.setLogRecordFactory(make)


def test_values_are_no_markup_wherever_they_stand() -> None:
    """In paragraphs, code spans, table cells, links, headings, lists and fences, of Markdown and of the page."""
    for name in nasty(200, seed=1):
        shown = printable(name).strip()  # at the end of a cell, no Markdown shows a blank
        value = opaque(shown)
        text = (
            f"# a {value} b\n\nA {value} b `{value}` **{value}** [{value}](x#y).\n\n- a {value}\n- b\n\n"
            f"| a | b |\n| :-- | :-- |\n| {value} | `{value}` |\n\n```python\n{value}\n```\n"
        )
        options = ["tables", "sane_lists", "fenced_code"]
        page = Page(as_html(markdown.markdown(text, extensions=options)))
        other = Page(markdown.markdown(as_markdown(text), extensions=options))
        for found in (page, other):
            assert found.tags <= {"h1", "p", "code", "strong", "a", "ul", "li", "table", "thead", "tbody", "tr", "th",
                                  "td", "pre"}  # fmt: skip
            assert {"h1", "code", "a", "ul", "table", "pre"} <= found.tags
            assert found.attributes <= {"href", "style", "class"} and found.addresses == ["x#y"] and not found.open
        assert page.text.count(shown) >= 8, name
        # A code span of Markdown has no escape for its own mark.
        quoted = shown.replace("`", "'")
        assert f"a {shown} b" in other.text and " ".join(quoted.split()) in " ".join(other.text.split())
        assert as_text(value) == shown
