"""`qexp promote`: what is rejected leaves the alias where it is, what is forced is recorded, what passes moves it."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
from conftest import Finished, latency_row, run_qexp
from mlflow.exceptions import MlflowException

from qexp.config import Config, GateConfig, LatencyConfig
from qexp.errors import InputError, StageError
from qexp.measurement.gate import Succession
from qexp.pipeline import job, promote, settle
from qexp.pipeline.loading import evidence_of_version
from qexp.pipeline.promote import run_promote
from qexp.pipeline.sync import sync_run
from qexp.report import sentences
from qexp.report.promotion import CANDIDATE, Promotion
from qexp.report.results import Evidence
from qexp.tracking import aliases, registry
from qexp.tracking.aliases import CHAMPION, succeed
from qexp.tracking.store import uri_of

NAME = "smallnet-digits-int8"
TIMES = LatencyConfig(
    batch_sizes=[1], baselines=["fp32_traced"], loads=3, min_repeats=6, min_seconds=0, warmup=1, max_busy_percent=100
)
LOOSE = GateConfig(max_top1_drop=100, min_size_ratio=0, min_speedup=0)


@pytest.fixture(scope="module")
def client(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> mlflow.MlflowClient:
    """Of a copy of the database, with a second version that is the first again: the finished run stays as it is."""
    folder = tmp_path_factory.mktemp("promotion")
    shutil.copy(finished.folder / "mlflow.db", folder / "mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    client = mlflow.MlflowClient()
    first = client.get_model_version(NAME, "1")
    client.create_model_version(NAME, first.source, first.run_id, tags=first.tags)
    return client


def _champions(client: mlflow.MlflowClient) -> list[str]:
    names = (NAME, "smallnet-digits-fp32")
    return [str(client.get_model_version_by_alias(name, "champion").version) for name in names]


def _tags(client: mlflow.MlflowClient, number: str) -> dict[str, str]:
    return client.get_model_version(NAME, number).tags


@pytest.fixture
def not_timed(evidence: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    """For what the times do not decide: both versions have been found to be as fast."""
    rows = (latency_row(1, {"fp32": 2.0, "fp32_traced": 2.0, CANDIDATE: 1.0, CHAMPION: 1.0}),)
    monkeypatch.setattr(promote, "time_models", lambda *given: replace(evidence.latency, rows=rows))


@pytest.mark.slow
@pytest.mark.usefixtures("not_timed")
def test_rejected_then_forced_then_the_champion_stays(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    own = GateConfig(models={NAME: {"min_size_ratio": 99.0, "min_top1": 100.0}}).models
    with pytest.raises(StageError) as rejected:
        run_promote(Config(latency=TIMES, gate=LOOSE.model_copy(update={"models": own})), NAME, "2")
    words = (
        f"models:/{NAME}/2 is not promoted: rejected: size ratio",
        ") is not at least 99; int8 top-1",
        "too low by",
    )
    assert all(word in str(rejected.value) for word in words)
    assert str(rejected.value).endswith(f"; the champion is still models:/{NAME}/1")
    assert _champions(client) == ["1", "1"]
    tags = _tags(client, "2")
    assert tags["promotion"] == "rejected" and "is not at least 99" in tags["promotion_reason"]
    assert tags["gate"] == "passed" and "forced_by" not in tags  # that of its own job stays
    run = client.get_run(tags["promotion_run_id"])
    assert run.info.run_name == f"promote-{NAME}" and run.info.status == "FINISHED"

    times = "--batch-sizes 1 --min-repeats 6 --min-seconds 0 --warmup 1 --baselines none --min-size-ratio 99".split()
    done = run_qexp(tmp_path, "promote", NAME, "--force", "--version", "2", *times, uri=mlflow.get_tracking_uri())
    assert done.code == 0, done.stderr
    assert done.summary["decision"] == "forced" and done.summary["champion_before"] == f"models:/{NAME}/1"
    assert _champions(client) == ["2", "1"]
    tags = _tags(client, "2")
    assert "is not at least 99" in tags["forced_reason"] and tags["forced_by"] and tags["forced_at"].startswith("20")
    assert not evidence_of_version(Config(gate=LOOSE), f"models:/{NAME}/2").champion_stays  # beside itself

    # The first version is the second: as good, but in nothing better.
    found = run_promote(Config(latency=TIMES, gate=LOOSE), NAME, "1")
    assert found["decision"] == "champion stays" and found["top1_below_champion_points"] == 0
    (reason,) = found["reasons"]
    assert reason.startswith(f"beside models:/{NAME}/2: ") and "as fast (" in reason
    assert _champions(client) == ["2", "1"] and _tags(client, "1")["promotion"] == "champion stays"
    tags = _tags(client, "1")
    assert tags["champion_kept"] == f"models:/{NAME}/2" and tags["champion_kept_reason"] == reason
    again = evidence_of_version(Config(gate=LOOSE), f"models:/{NAME}/1")
    assert again.gate.passed and again.champion_stays and again.verdict.ship == f"models:/{NAME}/2"
    said = sentences.verdict(again)
    assert f"Take `models:/{NAME}/2`, which stays champion" in said
    assert said.endswith(f"{reason.removeprefix(f'beside models:/{NAME}/2: ')}.")


@pytest.mark.slow
def test_a_smaller_one_that_is_as_good_takes_the_place(
    client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By margins that a hundred images and six rounds on a busy machine can show to be kept."""
    margins = LOOSE.model_copy(update={"champion_top1_margin": 100.0, "champion_slowdown_percent": 10_000.0})
    before = _champions(client)
    client.set_registered_model_alias(NAME, "champion", "2")
    own = registry._stored_bytes
    twice = lambda uri: own(uri) * (2 if uri == f"models:/{NAME}/2" else 1)  # noqa: E731  # the champion's file
    monkeypatch.setattr(registry, "_stored_bytes", twice)
    client.set_model_version_tag(NAME, "1", "gate", "failed")  # as if the machine had been busy
    found = run_promote(Config(latency=TIMES, gate=margins), NAME, "1")
    assert found["decision"] == "passed" and _champions(client) == ["1", "1"]
    assert any("better: " in reason and "0.500 of its size" in reason for reason in found["reasons"])
    tags = _tags(client, "1")
    assert tags["champion_kept"] == "none" and tags["gate"] == "passed"
    assert tags["latency_run_id"] == tags["promotion_run_id"]  # what was decided on
    client.set_registered_model_alias(NAME, "champion", before[0])


@pytest.mark.usefixtures("not_timed")
def test_a_champion_of_other_data_stays(client: mlflow.MlflowClient) -> None:
    number = _champions(client)[0]
    digest = _tags(client, number)["data_digest"]
    client.set_model_version_tag(NAME, number, "data_digest", "0" * 16)
    found = run_promote(Config(latency=TIMES, gate=LOOSE), NAME, "1" if number == "2" else "2")
    client.set_model_version_tag(NAME, number, "data_digest", digest)
    said = f"it was made with other data or another image size (digest {'0' * 16}, not {digest})"
    assert found["decision"] == "champion stays" and found["reasons"] == [f"beside models:/{NAME}/{number}: {said}"]


@pytest.mark.usefixtures("not_timed")
def test_a_champion_that_moves_while_one_is_compared_with_it(
    client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _champions(client)
    monkeypatch.setattr(settle, "succeed", lambda uri, champion: False)
    monkeypatch.setattr(promote, "decide_succession", lambda *given: Succession(True, ("better: size",)))
    number = "1" if before[0] == "2" else "2"
    with pytest.raises(StageError, match=f"/{number} is not promoted: another version has become champion meanwhile"):
        run_promote(Config(latency=TIMES, gate=LOOSE), NAME, number)
    assert _champions(client) == before and _tags(client, number)["promotion"] == "rejected"
    assert not Path("checkpoints").exists()  # nothing is left to upload


def test_another_champion_is_not_replaced_unseen(client: mlflow.MlflowClient) -> None:
    """Of jobs that end at the same time, each must have been compared with the one before."""
    first, second = (client.get_model_version(NAME, number) for number in "12")
    before = _champions(client)
    client.set_registered_model_alias(NAME, "champion", "1")
    assert not succeed(uri_of(second), None) and not succeed(uri_of(second), f"models:/{NAME}/9")
    assert _champions(client)[0] == "1" and succeed(uri_of(first), None)  # it has the alias already
    assert succeed(uri_of(second), uri_of(first)) and _champions(client) == ["2", "1"]
    client.set_registered_model_alias(NAME, "champion", before[0])


def test_of_two_that_end_at_once_one_replaces_the_champion(
    client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both have been compared with the first version, and look who is champion at the same moment."""
    before, first = _champions(client), client.get_model_version(NAME, "1")
    made = [client.create_model_version(NAME, first.source, first.run_id, tags=first.tags) for _ in range(2)]
    client.set_registered_model_alias(NAME, "champion", "1")
    look, both = aliases.version_with, threading.Barrier(2)

    def look_together(alias: str, name: str) -> Any:
        found = look(alias, name)
        with suppress(threading.BrokenBarrierError):
            both.wait(1)  # for the other, which may not be let in
        return found

    monkeypatch.setattr(aliases, "version_with", look_together)
    with ThreadPoolExecutor(2) as threads:
        replaced = list(threads.map(lambda one: succeed(uri_of(one), uri_of(first)), made))
    assert sorted(replaced) == [False, True]
    assert _champions(client)[0] == str(made[replaced.index(True)].version)
    assert client.get_registered_model(NAME).tags == {} and "another process moves" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(aliases, "ABANDONED_S", 0.1)
    client.set_registered_model_tag(NAME, f"{aliases.MOVES}of-one-that-was-killed", "true")
    assert succeed(uri_of(first), uri_of(made[replaced.index(True)])) and _champions(client)[0] == "1"
    assert client.get_registered_model(NAME).tags == {} and "that-was-killed there for 0.1 s" in capsys.readouterr().err
    client.set_registered_model_alias(NAME, "champion", before[0])
    for one in made:
        client.delete_model_version(NAME, one.version)


@pytest.fixture
def passed(client: mlflow.MlflowClient, evidence: Evidence, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the second version, which is found to be better than the first, the champion, without any measuring."""
    monkeypatch.chdir(tmp_path)
    client.set_registered_model_alias(NAME, "champion", "1")
    fp32, uri = "models:/smallnet-digits-fp32/1", f"models:/{NAME}/2"
    latency = replace(evidence.latency, rows=(latency_row(1, {"fp32": 2.0, CANDIDATE: 1.0}),))
    measured = replace(evidence.measured, fp32_uri=fp32, names={uri: (CANDIDATE,)}, latency=latency)
    drop, better = evidence.int8.comparison["test"], Succession(True, ("better: size",))
    found = Promotion(uri, f"models:/{NAME}/1", evidence.gate, better, drop, drop, measured, ("fp32",))
    monkeypatch.setattr(promote, "compare_with_champion", lambda *given: found)


def _fail(*given: object) -> Any:
    raise MlflowException("no answer")


def _lost(place: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a promotion whose store goes away when `name` is called."""
    with monkeypatch.context() as patched, pytest.raises(StageError, match="`qexp sync checkpoints/"):
        patched.setattr(place, name, _fail)
        run_promote(Config(latency=TIMES, gate=LOOSE), NAME, "2")
    (folder,) = Path("checkpoints").iterdir()
    return folder


@pytest.mark.parametrize("lost_in", ["upload", "settle"])
def test_sync_after_a_promotion_that_lost_its_store_moves_the_alias_once(
    lost_in: str, passed: None, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _lost(job, lost_in, monkeypatch)
    assert _champions(client)[0] == "1"
    done = sync_run(folder)
    assert done["decision"] == "passed" and done["int8"] == f"models:/{NAME}/2" and done["status"] == "FINISHED"
    assert "next" not in done and _champions(client)[0] == "2" and not folder.exists()
    tags = _tags(client, "2")
    assert tags["promotion"] == "passed" and tags["promotion_run_id"] == folder.name
    client.set_registered_model_alias(NAME, "champion", "1")  # by somebody else
    assert sync_run(folder) == {"command": "sync", "run_id": folder.name, "status": "FINISHED"}
    assert _champions(client)[0] == "1" and _tags(client, "2") == tags


def test_sync_takes_back_nothing_that_was_decided_later(
    passed: None, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _lost(job, "upload", monkeypatch)
    later = {"promotion": "forced", "promotion_at": "2999-01-01T00:00:00+00:00", "promotion_run_id": "0" * 32}
    before = _tags(client, "2")
    for name, value in later.items():
        client.set_model_version_tag(NAME, "2", name, value)
    sync_run(folder)
    assert _champions(client)[0] == "1" and _tags(client, "2").items() >= later.items()
    for name in later:
        client.set_model_version_tag(NAME, "2", name, before[name])


def test_sync_of_a_promotion_that_was_overtaken_and_of_one_without_a_result(
    passed: None, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _lost(job, "upload", monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(settle, "succeed", lambda uri, champion: False)
        done = sync_run(folder)
    assert done["decision"] == "rejected" and done["reasons"] == ["another version has become champion meanwhile"]
    assert _champions(client)[0] == "1" and _tags(client, "2")["promotion"] == "rejected"
    folder = _lost(promote, "compare_with_champion", monkeypatch)
    assert sync_run(folder)["next"] == f"qexp promote {NAME} --version 2"


def test_a_challenger_of_somebody_else_is_bad_input(client: mlflow.MlflowClient) -> None:
    first = client.get_model_version(NAME, "1")
    number = client.create_model_version(NAME, first.source).version
    client.set_registered_model_alias(NAME, "challenger", number)
    with pytest.raises(InputError, match=f"^NAME models:/{NAME}@challenger: must be a version of kind int8"):
        run_promote(Config(), NAME)
    client.delete_model_version(NAME, number)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("nothing",), "NAME nothing: no registered int8 model; there are: smallnet-digits-int8"),
        (("smallnet-digits-fp32",), "NAME smallnet-digits-fp32: no registered int8 model"),
        ((NAME, "9"), "--version 9: does not exist"),
        ((NAME, "9" * 20), "--version 9+: must be a version number"),
        ((NAME, "newest"), "--version newest: must be a version number"),
    ],
)
def test_what_is_no_int8_version(given: Any, message: str, client: mlflow.MlflowClient) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        run_promote(Config(), *given)
