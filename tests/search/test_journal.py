"""The journal of a study after a kill, a full disk or a power cut, and files that are none."""

import json
from contextlib import ExitStack
from pathlib import Path

import optuna
import pytest

from qexp.errors import InputError
from qexp.search.journal import mend_journal
from qexp.search.storage import Folder

TRIALS = 3


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """With three completed trials."""
    file = tmp_path / "mine.journal"
    with ExitStack() as closing:
        storage = Folder(tmp_path, closing).storage("mine")
        study = optuna.create_study(study_name="mine", storage=storage)
        for _ in range(TRIALS):
            study.tell(study.ask(), 1.0)
    assert len(file.read_bytes().splitlines()) == 1 + 2 * TRIALS
    return file


def _completed(file: Path, more: int = 0) -> int:
    """How many trials have been completed, after `more` more, where the study exists."""
    with ExitStack() as closing:
        storage = Folder(file.parent, closing).storage(file.stem)
        if not storage.get_all_studies():
            return 0
        study = optuna.load_study(study_name="mine", storage=storage)
        for _ in range(more):
            study.tell(study.ask(), 1.0)
        return sum(trial.state.is_finished() for trial in study.trials)


def _half(lines: list[bytes], number: int) -> bytes:
    return lines[number][: len(lines[number]) // 2]


DAMAGES = {  # by name: the lines of the journal as they are then, and how many of them count
    "half of the last line": (lambda lines: [*lines[:-1], _half(lines, -1)], 6),
    "a last line without its end": (lambda lines: [*lines[:-1], lines[-1].rstrip()], 6),
    "zeros at the end": (lambda lines: [*lines, bytes(4096)], 7),
    "zeros in place of the last lines": (lambda lines: [*lines[:4], bytes(700)], 4),
    "a block of zeros in the middle": (lambda lines: [*lines[:3], bytes(512), *lines[5:]], 3),
    "half a line, to which others were appended": (lambda lines: [*lines[:4], _half(lines, 4), *lines[5:]], 4),
    "bytes that are no text": (lambda lines: [*lines[:5], b"\xff\xfe\x80\n", *lines[6:]], 5),
    "an empty line": (lambda lines: [*lines[:5], b"\n", *lines[5:]], 5),
    "JSON that is no operation": (lambda lines: [*lines[:5], b'{"op_code":"4","worker_id":"a"}\n'], 5),
    "half of the first line": (lambda lines: [_half(lines, 0)], 0),
    "nothing but zeros": (lambda lines: [bytes(4096)], 0),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_study_goes_on_after_its_last_whole_line(
    name: str, journal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, whole = DAMAGES[name]
    lines = journal.read_bytes().splitlines(keepends=True)
    damaged = b"".join(damage(lines))
    journal.write_bytes(damaged)
    completed = max(0, whole - 1) // 2
    assert _completed(journal) == completed
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"{journal}: line {whole + 1} is damaged")
    kept = b"".join(lines[:whole])
    assert journal.read_bytes() == kept
    assert (journal.parent / "mine.journal.damaged").read_bytes() == damaged[len(kept) :]
    if whole:
        assert _completed(journal, more=2) == completed + 2 == _completed(journal)
    assert not capsys.readouterr().err


def test_a_journal_that_ends_anywhere_is_whole_again(journal: Path) -> None:
    written = journal.read_bytes()
    for end in range(0, len(written), 23):
        journal.write_bytes(written[:end])
        mend_journal(journal)
        assert journal.read_bytes() == written[: written.rfind(b"\n", 0, end) + 1]


@pytest.mark.parametrize(
    "content", [b"my notes on this study\n", b"\x89PNG\r\n\x1a\n\0\0", b"[]\n", b"{}\n", b"SQLite format 3\0"]
)
def test_a_file_that_is_no_journal_is_refused_and_stays(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "mine.journal"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"mine\.journal: must be the journal file of a study"):
        _completed(file)
    assert file.read_bytes() == content and not list(tmp_path.glob("*.damaged"))


def test_what_is_no_file_and_operations_of_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.journal").mkdir()
    with pytest.raises(InputError, match="must be the journal file of a study"):
        _completed(tmp_path / "folder.journal")
    file = tmp_path / "mine.journal"
    file.write_text(json.dumps({"op_code": 6, "worker_id": "a"}, separators=(",", ":")) + "\n")
    with pytest.raises(InputError, match="do not belong together"):
        _completed(file)
