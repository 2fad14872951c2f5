"""`qexp hosts`: what is known of a version on several kinds of machine, of which one is made up by its facts."""

import json
import math
from dataclasses import replace

import mlflow
import pytest
import torch
from conftest import Finished, run_qexp
from torch import Tensor

from qexp.config import Config
from qexp.errors import InputError
from qexp.measurement.agreement import LogitsAgreement
from qexp.measurement.host import Host
from qexp.pipeline.hosts import run_hosts
from qexp.report.hosts import KnownHost, KnownHosts
from qexp.report.page import render_markdown
from qexp.report.results import Evidence, LatencyEvidence
from qexp.tracking import runs as tracking
from qexp.tracking import sweeps

NAME = "smallnet-digits-int8"
# A machine with another CPU, where one logit of each image is three steps off.
OTHER_MACHINE = """
from dataclasses import replace
from qexp.measurement.agreement import output_step
from qexp.pipeline import hosts, setup
read, predict = setup.read_host, hosts.predict_logits
setup.read_host = lambda threads: replace(read(threads), cpu="Other CPU", features=("AVX2",), physical_cores=16)
def moved(model, images):
    logits = predict(model, images)
    logits[:, 0] += 3 * output_step(logits)
    return logits
hosts.predict_logits = moved
"""


def test_a_sweep_on_another_machine_adds_to_what_is_known(in_use: Finished) -> None:
    mlflow.set_tracking_uri(in_use.uri)
    uri = in_use.summary["int8"]
    few = [*"--batch-sizes 1 --min-repeats 2 --loads 2 --min-seconds 0 --warmup 1 --max-busy-percent 100".split()]
    few += ["--threads", "1,2", "--baselines", "none"]
    done = run_qexp(in_use.folder, "latency", "--model-uri", uri, *few, before=OTHER_MACHINE)
    assert done.code == 0, done.stderr
    assert done.summary["logits"] == "differ by up to 3 steps of the output"
    assert f"warning: {uri}: the logits for 32 recorded images: differ by up to 3 steps" in done.stderr

    best = done.summary["best_threads_by_batch_size"]
    assert set(best) == {"1"} and {best["1"]["int8_threads"], best["1"]["float_threads"]} <= {1, 2}

    other, second, own = run_hosts(Config(), uri)["hosts"][:3]
    assert {other["threads"], second["threads"]} == {1, 2} and other["cpu"] == second["cpu"] != own["cpu"]
    assert json.loads(json.dumps(other)) == other
    assert (other["cpu"], other["instructions"], other["cores"]) == ("Other CPU", ["AVX2"], 16)
    assert other["run_id"] == done.summary["run_id"] != own["run_id"]
    assert other["logits_largest_difference_steps"] == pytest.approx(3, abs=0.01) and other["logits_images"] == 32
    assert own["logits"] == "recorded on this CPU"
    found = tracking.read_result(LatencyEvidence, other["run_id"], "latency")
    assert {found.latency.threads, *(one.threads for one in found.other_threads)} == {1, 2}
    floats, name = found.fair_floats(Config().gate), found.name_of(uri)
    assert other["mean_speedup"] == found.latency.mean_ratio(floats, name).median
    assert [one["batch_size"] for one in other["speedups"]] == [1] and other["mean_speedup_low"] <= other[
        "mean_speedup"
    ]
    assert other["gate"] in ("not measured well enough", "failed") and other["gate_reasons"]
    strict = Config.model_validate({"gate": {"min_size_ratio": 99}})
    assert {one["gate"] for one in run_hosts(strict, NAME)["hosts"]} == {"failed"}

    tags = mlflow.MlflowClient().get_model_version(*uri.removeprefix("models:/").split("/"))
    assert tags.tags["logits_differ"] == "differ by up to 3 steps of the output on Other CPU (AVX2)"
    assert (
        "beside those that were recorded: differ by up to 3 steps of the output on Other CPU (AVX2)" in tags.description
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vgg16", "NAME vgg16: no registered int8 model; there are: smallnet-digits-int8"),
        ("models:/vgg16-int8/1", "NAME models:/vgg16-int8/1: does not exist"),
        ("models:/smallnet-digits-fp32/1", "must be a version of kind int8"),
        ("models:/smallnet", "NAME models:/smallnet: must be"),
    ],
)
def test_names_that_stand_for_nothing(name: str, said: str, finished: Finished) -> None:
    mlflow.set_tracking_uri(finished.uri)
    with pytest.raises(InputError) as refused:
        run_hosts(Config(), name)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_version_that_nobody_has_timed_is_one_line(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow.set_tracking_uri(finished.uri)
    monkeypatch.setattr("qexp.pipeline.hosts.sweeps_of", lambda found: [])
    with pytest.raises(InputError, match=rf"^NAME {NAME}: was timed on no machine yet; `qexp latency --model-uri mode"):
        run_hosts(Config(), NAME)


def _known(evidence: Evidence) -> KnownHost:
    measured, name = evidence.measured, evidence.name
    speedups = measured.latency.speedups(name, evidence.floats)
    ratio = evidence.over_floats(name)
    host, gate = replace(measured.host, physical_cores=2), evidence.gate
    about = {"sweeps": 1, "date": "2026-11-27", "run_id": "0" * 32}
    uri = evidence.int8.version_uri
    return KnownHost(uri, host, 2, name, ratio, speedups, gate, "ship int8", None, True, **about)  # type: ignore[arg-type]


def test_report_and_table_say_where_logits_differ(evidence: Evidence) -> None:
    own = _known(evidence)
    amx = Host("Other | CPU", 64, 16, 128.0, ("AMX-int8",), "Linux", "3.11", {}, 32, 16.0)
    other = replace(own, host=amx, logits=LogitsAgreement(32, 96.875, 0.6, 0.2), recorded_here=False, sweeps=3)
    text = render_markdown(replace(evidence, hosts=(own, other)))
    section = text.split("## Several kinds of machine")[1].split("\n## ")[0]
    (row,) = [line for line in section.splitlines() if line.startswith("| Other")]
    assert "| Other \\| CPU | AMX-int8 | 32 | 2 |" in row and "differ by up to 3 steps of the output" in row
    assert f"{own.over_floats.median:.2f}x ({own.over_floats.low:.2f} to {own.over_floats.high:.2f})" in row
    assert "the same class for 96.88 % of them" in section and "`qexp verify`" in section
    own_alone = replace(evidence, hosts=(own, replace(own, threads=1)))
    assert "## Several kinds of machine" not in render_markdown(own_alone)
    shown = str(KnownHosts(NAME, (own, other)))
    assert shown.startswith(f"{NAME} by kind of machine") and "the newest of 3 sweeps" in shown
    assert f"{own.version_uri} on Other | CPU: the logits for 32 test images differ by up to 3 steps" in shown


@pytest.mark.parametrize(
    ("images", "logits", "words"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 4), None),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, 4), "no images of 3x8x8"),
        (torch.zeros(2, 3, 8, 8), torch.zeros(2, 4), "no images of 3x8x8"),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, 4), "no images of 3x8x8"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(3, 4), "no 4 finite logits for each image"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2), "no 4 finite logits for each image"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.full((2, 4), math.nan), "no 4 finite logits for each image"),
    ],
)
def test_recorded_logits_that_were_changed_are_not_compared(images: Tensor, logits: Tensor, words: str | None) -> None:
    recorded = {"images": images, "logits": logits}
    if words is None:
        return sweeps.check_recorded(recorded, (3, 8, 8), 4)
    with pytest.raises(ValueError, match=words):
        sweeps.check_recorded(recorded, (3, 8, 8), 4)
