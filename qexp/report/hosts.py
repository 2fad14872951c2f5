"""What is known of int8 versions on each kind of machine: one `KnownHost` a version, CPU and number of threads.

Made by the pipeline from the sweeps in the tracking store; shown by `qexp hosts` and by a section of the report.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qexp.foundation.tables import Shown, Table
from qexp.measurement.agreement import LogitsAgreement
from qexp.measurement.gate import GateResult
from qexp.measurement.host import Host
from qexp.measurement.latency import Ratio, Speedup

NOT_COMPARED, RECORDED_HERE = "not compared", "recorded on this CPU"


@dataclass(frozen=True)
class KnownHost:
    """An int8 version on one kind of machine, by the newest of its `sweeps` there, which `date` and `run_id` name.

    `model` is the name of the version there, with the kernels that were fastest. `over_floats` is the time of the
    fastest float over its own, the weighted geometric mean over the batch sizes, and `speedups` are the same at each of
    them. `gate` holds these times, and the accuracy measured where the version was quantized, against the limits.
    `logits` is None where they were not compared with the recorded ones; `recorded_here`: this is the kind of machine
    on which these were recorded.
    """

    version_uri: str
    host: Host
    threads: int
    model: str
    over_floats: Ratio
    speedups: tuple[Speedup, ...]
    gate: GateResult
    verdict: str
    logits: LogitsAgreement | None
    recorded_here: bool
    sweeps: int
    date: str
    run_id: str

    @property
    def cores(self) -> int:
        """Physical cores; results of earlier versions know logical CPUs alone."""
        return self.host.physical_cores or self.host.cores

    @property
    def instructions(self) -> str:
        """That matter for int8 and bf16."""
        return ", ".join(self.host.features) or "unknown"

    @property
    def logits_text(self) -> str:
        """How the logits compare with the recorded ones, in words."""
        if self.logits:
            return self.logits.text
        return RECORDED_HERE if self.recorded_here else NOT_COMPARED

    @property
    def differs(self) -> bool:
        """Whether its logits are not those that were recorded."""
        return self.logits is not None and not self.logits.within_one_step

    @property
    def summary(self) -> dict[str, Any]:
        """As JSON holds it."""
        found, over = self.logits, self.over_floats
        at = [
            {"batch_size": one.batch_size, "over": one.over, "speedup": one.ratio.median, **_ends("speedup", one.ratio)}
            for one in self.speedups
        ]
        return {
            "int8": self.version_uri,
            "cpu": self.host.cpu,
            "instructions": list(self.host.features),
            "cores": self.cores,
            "logical_cpus": self.host.cores,
            "cpu_quota": self.host.cpu_quota,
            "threads": self.threads,
            "model": self.model,
            "mean_speedup": over.median,
            **_ends("mean_speedup", over),
            "speedups": at,
            "logits": self.logits_text,
            "logits_images": found and found.images,
            "logits_largest_difference_steps": found and found.largest_difference_steps,
            "logits_same_class_percent": found and found.same_class_percent,
            "gate": self.gate.word,
            "gate_reasons": list(self.gate.reasons),
            "verdict": self.verdict,
            "sweeps": self.sweeps,
            "date": self.date,
            "run_id": self.run_id,
        }


def _ends(name: str, ratio: Ratio) -> dict[str, float]:
    return {f"{name}_low": ratio.low, f"{name}_high": ratio.high}


@dataclass(frozen=True)
class KnownHosts(Shown):
    """Of `name`, a registered model or one of its versions: the newest version first, and of each the newest sweep."""

    name: str
    hosts: tuple[KnownHost, ...]

    def tables(self) -> tuple[Table, ...]:
        title = f"{self.name} by kind of machine, with 95 % intervals"
        rows = tuple((one.version_uri.rpartition("/")[2], *cells(one)) for one in self.hosts)
        return (Table(title, ("version", *COLUMNS), rows, notes(self.hosts)),)


COLUMNS = (
    "CPU", "instructions", "cores", "threads", "over the fastest float", "at single batch sizes", "logits", "gate",
    "measured",
)  # fmt: skip


def cells(one: KnownHost) -> tuple[str, ...]:
    """A kind of machine as a row, below COLUMNS."""
    slowest, fastest = (find(one.speedups, key=lambda found: found.ratio.median) for find in (min, max))
    at = dict.fromkeys(f"{found.ratio.median:.2f}x at {found.batch_size}" for found in (slowest, fastest))
    sweeps = "" if one.sweeps == 1 else f", the newest of {one.sweeps} sweeps"
    return (
        one.host.cpu,
        one.instructions,
        str(one.cores),
        str(one.threads),
        f"{one.over_floats.median:.2f}x ({one.over_floats.low:.2f} to {one.over_floats.high:.2f})",
        " to ".join(at),
        one.logits_text,
        one.gate.word,
        f"{one.date}{sweeps}",
    )


def several_kinds(hosts: Sequence[KnownHost]) -> bool:
    """Whether more than one kind of machine is known, and not only several numbers of threads of one."""
    return len({(one.host.cpu, one.host.features, one.cores, one.host.cpu_quota) for one in hosts}) > 1


def notes(hosts: Sequence[KnownHost]) -> tuple[str, ...]:
    """Sentences below the table: what a reader must not miss."""
    said = [
        f"{one.version_uri} on {one.host.cpu}: the logits for {one.logits.images} test images {one.logits.text} from "
        f"those recorded, and name the same class for {one.logits.same_class_percent:.4g} % of them. Its accuracy was "
        "measured on another CPU: run `qexp verify` on this one before you ship there."
        for one in hosts
        if one.logits and one.differs
    ]
    unsure = [one for one in hosts if not one.logits and not one.recorded_here]
    said += [
        f"{one.version_uri} on {one.host.cpu}: the logits were not compared with recorded ones; "
        f"`qexp latency --model-uri {one.version_uri}` on that machine does so, if the version has any."
        for one in unsure
    ]
    return tuple(said)
