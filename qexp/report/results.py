"""What the stages of a job have found, put together in `Evidence`.

The pipeline fills them, and the report's tables, sentences, figures and `metrics.json` are made from nothing else. They
are stored as JSON: what earlier versions have stored must still be readable, so each new field has a default.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any

from pydantic import AliasChoices, Field

from qexp.config import GateConfig
from qexp.data.duplicates import Duplicates
from qexp.foundation.quantities import Finite, Number, Percent, Points, Some, Timed
from qexp.measurement.accuracy import Accuracy, Comparison, share_interval
from qexp.measurement.agreement import LogitsAgreement
from qexp.measurement.choice import BestVersion, Candidate, choose
from qexp.measurement.cost import Cost
from qexp.measurement.gate import DROP, GateResult, Succession
from qexp.measurement.host import Host
from qexp.measurement.latency import LatencyResult, Ratio, Speedup
from qexp.measurement.sweep_models import BF16, BF16_OPENVINO, rounds, rounds_like
from qexp.measurement.threads import ThreadsRow, best_threads
from qexp.measurement.throughput import Choice, Kind, Need, ThroughputResult
from qexp.measurement.verdict import Verdict, decide_verdict
from qexp.models.contents import FileContents
from qexp.models.preprocessing import Preprocessing, Shape
from qexp.quantization.budget import BudgetResult
from qexp.quantization.result import QuantizeResult
from qexp.quantization.sensitivity import SensitivityResult
from qexp.report.hosts import KnownHost
from qexp.training.train import TrainResult

UNREGISTERED = "fp32"  # in the place of the URI of an fp32 version that is in no registry


@dataclass(frozen=True)
class DataFacts:
    """The data set of a run; `digest` is that of `Dataset`.

    `guess_percent` is the top-1 of always naming the class that is most frequent among the test images. Both it and
    `duplicates` are None in results of versions that did not measure them.
    """

    name: str
    source: str
    digest: str
    classes: tuple[str, ...]
    image_size_px: int | str  # HEIGHTxWIDTH unless it is a square
    train_images: Number
    validation_images: Number
    test_images: Some
    duplicates: Duplicates | None = None
    guess_percent: Percent | None = None
    labelled: bool = True  # False: the images have no labels, and what fp32 says stands in for them

    @property
    def guess(self) -> float:
        """Top-1 of guessing, in percent. Where it was not measured, classes are taken to be equally frequent."""
        return 100 / len(self.classes) if self.guess_percent is None else self.guess_percent


def _check(by_split: Mapping[str, Accuracy] | Mapping[str, Comparison]) -> None:
    if "test" not in by_split:
        raise ValueError("what was measured on the test images is missing")
    for found in by_split.values():
        found.check()


def _check_registered(version_uri: str, size_bytes: int) -> None:
    if version_uri and not size_bytes:
        raise ValueError("the registered file has 0 bytes")


@dataclass(frozen=True)
class Fp32Evidence:
    """The fp32 model: registered version, size of its file there, accuracy by split (train, validation, test).

    `version_uri` is empty, and the size 0, until the model is registered. `verified`: it reloads bit for bit. `train`
    is None, and `source` says where the model comes from, if it was trained elsewhere; what it is given is then in
    `preprocessing`.
    """

    model: str
    seed: int
    version_uri: str
    size_bytes: Number
    data: DataFacts
    train: TrainResult | None
    accuracy: dict[str, Accuracy]
    contents: FileContents | None = None
    verified: bool = True
    source: dict[str, str] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None

    @property
    def shape(self) -> Shape:
        """Of an image that the model takes; results of earlier versions know of squares only."""
        if self.preprocessing:
            return self.preprocessing.shape
        height, _, width = str(self.data.image_size_px).partition("x")
        return 3, int(height), int(width or height)

    def check(self) -> None:
        """Raise ValueError where something is missing without which nothing can be said, or where figures contradict
        each other: the file was changed."""
        _check(self.accuracy)
        _check_registered(self.version_uri, self.size_bytes)
        if not self.data.classes:
            raise ValueError("there are no classes")
        if self.train and not min(1, len(self.train.epochs)) <= self.train.best_epoch <= len(self.train.epochs):
            raise ValueError(f"there is no epoch {self.train.best_epoch}")


@dataclass(frozen=True)
class BudgetCost:
    """What layers that went back to fp32 cost: bytes as saved, and by batch size the time over that with all layers in
    int8. `told_apart` has the batch sizes at which the two differ beyond the noise.
    """

    all_int8_bytes: Number
    size_bytes: Number
    slowdown: dict[int, Ratio]
    told_apart: tuple[int, ...] = ()


@dataclass(frozen=True)
class InRuntime:
    """What an int8 file gives in one runtime: accuracy, and comparison with the fp32 model, by split."""

    accuracy: dict[str, Accuracy]
    comparison: dict[str, Comparison]


@dataclass(frozen=True)
class Int8Evidence:
    """A quantized model, and its comparison with the fp32 model by split.

    `version_uri`, `size_bytes` and `verified` are as in `Fp32Evidence`. `fp32_cost` counts the fp32 model; `cost` the
    int8 model, which differs where a pool was folded away. Of an ONNX file, `runtime` is the one whose figures these
    are, `runtimes` has those of the others, and `runtimes_left_out` says why one was not measured.
    """

    version_uri: str
    size_bytes: Number
    quantize: QuantizeResult
    calibration_digest: str
    fp32_cost: Cost
    cost: Cost
    accuracy: dict[str, Accuracy]
    comparison: dict[str, Comparison]
    sensitivity: SensitivityResult | None = None
    budget: BudgetResult | None = None
    budget_cost: BudgetCost | None = None
    contents: FileContents | None = None
    verified: bool = True
    runtime: str | None = None
    runtimes: dict[str, InRuntime] = field(default_factory=dict)
    runtimes_left_out: dict[str, str] = field(default_factory=dict)

    def in_runtime(self, name: str | None) -> "Int8Evidence":
        """The same version with the figures of another runtime; as it is where these are those of `name` already."""
        if name is None or name not in self.runtimes:
            return self
        others = {other: found for other, found in self.runtimes.items() if other != name}
        others[str(self.runtime)] = InRuntime(self.accuracy, self.comparison)
        found = self.runtimes[name]
        return replace(self, accuracy=found.accuracy, comparison=found.comparison, runtime=name, runtimes=others)

    def check(self) -> None:
        """As that of `Fp32Evidence`."""
        for found in (InRuntime(self.accuracy, self.comparison), *self.runtimes.values()):
            _check(found.accuracy)
            _check(found.comparison)
        _check_registered(self.version_uri, self.size_bytes)
        self.fp32_cost.check()
        self.cost.check()
        if not self.cost.macs or self.cost.macs.keys() != self.fp32_cost.macs.keys():
            raise ValueError("the multiply-accumulates of a batch size are missing")


@dataclass(frozen=True)
class Bf16Evidence:
    """A baseline in bf16: bytes of its file, accuracy on the test images, and the drop there, fp32 minus bf16, with its
    95 % interval. In OpenVINO the file is the one in fp32: it is rounded as it is compiled."""

    size_bytes: Number
    accuracy: Accuracy
    top1_drop_points: Points
    top1_drop_low_points: Finite
    top1_drop_high_points: Finite


@dataclass(frozen=True)
class LatencyEvidence:
    """The latency sweep of registered versions and the machine that it ran on.

    `names` has the names under which each int8 version was timed, by its URI: the fastest kernels first. `bf16` is
    there where that baseline was timed by a job that had the test images; `bf16_openvino` likewise, and `folded_bf16`
    by their names those in which a pool was folded away. `logits` has, by
    the URI of an int8 version that was quantized before, its logits here beside those that were recorded. `latency` is
    the sweep that decides; `other_threads` are those on other numbers of threads.
    """

    fp32_uri: str
    names: Annotated[dict[str, tuple[str, ...]], Field(validation_alias=AliasChoices("names", "contenders"))]
    latency: LatencyResult
    host: Host
    run_id: str
    bf16: Bf16Evidence | None = None
    bf16_openvino: Bf16Evidence | None = None
    logits: dict[str, LogitsAgreement] = field(default_factory=dict)
    other_threads: tuple[LatencyResult, ...] = ()
    folded_bf16: dict[str, Bf16Evidence] = field(default_factory=dict)

    def check(self) -> None:
        """As that of `Fp32Evidence`."""
        timed = {name for names in self.names.values() for name in names}
        for found in (self.latency, *self.other_threads):
            rows = found.rows
            if not (rows and all(self.names.values()) and all(row.stats.keys() >= timed for row in rows)):
                raise ValueError("the times of a model are missing")
            found.check()
        if not self.floats:
            raise ValueError("there are no times of a model that is not int8")
        for rounded in self.rounded.values():
            rounded.accuracy.check()

    @property
    def rounded(self) -> dict[str, Bf16Evidence]:
        """What is known of the floats that round, by name."""
        found = {BF16: self.bf16, BF16_OPENVINO: self.bf16_openvino}
        return {name: one for name, one in found.items() if one} | self.folded_bf16

    @property
    def floats(self) -> tuple[str, ...]:
        """The names in the table that are not int8."""
        int8 = {name for names in self.names.values() for name in names}
        return tuple(name for name in self.latency.rows[0].stats if name not in int8)

    def name_of(self, uri: str) -> str:
        """The model of the table that stands for an int8 version: with the kernels that `qexp.load` gives."""
        return self.names[uri][0]

    def best_threads(self, int8: str, floats: Sequence[str]) -> tuple[ThreadsRow, ...]:
        """The best number of threads of an int8 model and of the fastest float at each batch size; empty where one
        number was timed."""
        return best_threads((self.latency, *self.other_threads), int8, floats)

    def fair_floats(self, limits: GateConfig) -> tuple[str, ...]:
        """What int8 is compared with: every model that is not int8, bf16 only if it keeps the limits on accuracy."""

        def is_accurate(found: Bf16Evidence | None) -> bool:
            if not found or found.top1_drop_high_points > limits.max_top1_drop:
                return False
            least, _ = share_interval(found.accuracy.top1_percent, found.accuracy.images)
            return limits.min_top1 is None or least >= limits.min_top1

        known = self.rounded
        return tuple(name for name in self.floats if not rounds(name) or is_accurate(known.get(rounds_like(name))))


@dataclass(frozen=True)
class ThroughputEvidence:
    """What workers serve with an int8 version and with the fastest float of each setting, and the machine they ran on.

    `max_p99_ms` and `images_per_second` are what was asked: a limit of the time of a request, and a rate.
    """

    fp32_uri: str
    int8_uri: str
    result: ThroughputResult
    host: Host
    run_id: str
    max_p99_ms: Timed | None = None
    images_per_second: Timed | None = None

    def check(self) -> None:
        """As that of `Fp32Evidence`."""
        self.result.check()

    def best(self, kind: Kind) -> Choice | None:
        """The setting that serves most within the limit."""
        return self.result.best(kind, self.max_p99_ms)

    def needed(self, kind: Kind) -> Need | None:
        """What the rate takes within the limit; None too where no rate was asked for."""
        if self.images_per_second is None:
            return None
        return self.result.needed(kind, self.images_per_second, self.max_p99_ms)


@dataclass(frozen=True)
class Judged:
    """An int8 version, its name in the latency table, and the gate's decision on it."""

    int8: Int8Evidence
    name: str
    gate: GateResult

    @property
    def candidate(self) -> Candidate:
        """What decides whether this version is the best of several."""
        drop_is_small = any(check.limit == DROP and check.kept for check in self.gate.checks)
        drop = self.int8.comparison["test"]
        return Candidate(self.name, drop, self.int8.size_bytes, self.gate.passed, self.gate.passed or drop_is_small)


@dataclass(frozen=True)
class Evidence:
    """Everything that answers the question: can this classifier ship as int8 on this CPU?

    `versions` are the int8 versions, the chosen one first. `champion` says whether that one has the alias.
    `failed_engines` says of each engine that could not quantize the model why. `succession` is the decision against
    the previous champion, `before_uri`, where there was another one; `now_uri` is what has become champion since.
    `floats` are the models that int8 is compared with: all that are not int8, bf16 only if it is accurate enough.
    `hosts` is what is known of the version chosen on each kind of machine that has timed it. `throughput` is what
    workers serve with it, where that was measured.
    """

    fp32: Fp32Evidence
    versions: tuple[Judged, ...]
    measured: LatencyEvidence
    champion: bool
    floats: tuple[str, ...] = ()
    failed_engines: dict[str, str] = field(default_factory=dict)
    succession: Succession | None = None
    before_uri: str | None = None
    now_uri: str | None = None
    hosts: tuple[KnownHost, ...] = ()
    throughput: ThroughputEvidence | None = None

    @cached_property
    def verdict(self) -> Verdict:
        """The one answer that everything shows."""
        return decide_verdict(self.gate, self.over_floats(self.name), self._int8_to_ship, self._float_to_ship)

    @property
    def registered(self) -> bool:
        """Whether the models are in a registry."""
        return self.fp32.version_uri != UNREGISTERED

    @property
    def champion_stays(self) -> bool:
        """Whether the version chosen does not take the place of the champion that it was held against."""
        return self.succession is not None and not self.succession.replaces

    @property
    def better(self) -> Judged | None:
        """A version timed beside the one that was asked for, which `qexp run` would have chosen instead."""
        if not self.gate.passed or self.choice.name == self.name:
            return None
        return next(judged for judged in self.versions if judged.name == self.choice.name)

    @cached_property
    def choice(self) -> BestVersion:
        """Which version is the best, and why each other one is not."""
        return choose([judged.candidate for judged in self.versions], self.latency)

    @property
    def _int8_to_ship(self) -> str:
        if self.champion_stays and self.succession and self.succession.compared:
            return str(self.now_uri or self.before_uri)
        return (self.better.int8 if self.better else self.int8).version_uri

    @property
    def _float_to_ship(self) -> str:
        """The fastest over all batch sizes, as a reader can find it: only fp32 is registered."""
        best = self.latency.winner(self.floats)
        uri = self.fp32.version_uri
        return uri if best == self.latency.baseline else f"{best}, made from {uri}"

    @property
    def folded(self) -> Judged | None:
        """The best of the versions in which a pool is folded away; None where there is none."""
        return next((one for one in self.versions if one.int8.quantize.folded), None)

    @property
    def folded_cost(self) -> Cost | None:
        """What the model costs with a pool folded away, in float as in int8."""
        return self.folded.int8.cost if self.folded else None

    def over_floats(self, name: str) -> Ratio:
        """The fastest float's time at each batch size over that of an int8 model: the weighted geometric mean."""
        return self.latency.mean_ratio(self.floats, name)

    @property
    def speedups_over_floats(self) -> tuple[Speedup, ...]:
        """Of the version chosen over the fastest float, at each batch size that counts."""
        return self.latency.speedups(self.name, self.floats)

    @property
    def decision(self) -> dict[str, Any]:
        """Verdict, gate and succession, as a summary line shows them."""
        verdict = {"verdict": self.verdict.word, "verdict_reason": self.verdict.reason, "ship": self.verdict.ship}
        found: dict[str, Any] = {"gate": self.gate.word, "gate_reason": self.gate.summary, "champion": self.champion}
        if self.choice.not_chosen:
            found["not_chosen"] = self.choice.not_chosen
        return verdict | found | ({"against_champion": self.succession.summary} if self.succession else {})

    @property
    def int8(self) -> Int8Evidence:
        """The version chosen."""
        return self.versions[0].int8

    @property
    def gate(self) -> GateResult:
        """The gate's decision on the version chosen."""
        return self.versions[0].gate

    @property
    def name(self) -> str:
        """The version chosen, as the latency table calls it."""
        return self.versions[0].name

    @property
    def latency(self) -> LatencyResult:
        """All models' times."""
        return self.measured.latency

    @property
    def speedups(self) -> list[float]:
        """Of the version chosen over the registered fp32 version, at each batch size that counts."""
        return [row.speedups[self.name].median for row in self.latency.counted]

    @property
    def size_ratio(self) -> float:
        """fp32 bytes over int8 bytes, of the files as stored."""
        return self.fp32.size_bytes / self.int8.size_bytes

    @property
    def images_seen_before(self) -> dict[str, int]:
        """How many test images equal images of training, as a summary line shows it; empty where nobody has counted."""
        found = self.fp32.data.duplicates
        return {"test_images_also_in_training": found.test_images_seen} if found else {}

    @property
    def headline(self) -> dict[str, float]:
        """The figures that a summary line shows. A speed-up without a name is that over the fastest float."""
        over_floats = [found.ratio.median for found in self.speedups_over_floats]
        return {
            "fp32_top1_percent": self.fp32.accuracy["test"].top1_percent,
            "int8_top1_percent": self.int8.accuracy["test"].top1_percent,
            "top1_drop_points": self.int8.comparison["test"].top1_drop_points,
            "fp32_size_mb": self.fp32.size_bytes / 1e6,
            "int8_size_mb": self.int8.size_bytes / 1e6,
            "size_ratio": self.size_ratio,
            "mean_speedup": self.over_floats(self.name).median,
            "smallest_speedup": min(over_floats),
            "largest_speedup": max(over_floats),
            "smallest_speedup_over_fp32": min(self.speedups),
            "largest_speedup_over_fp32": max(self.speedups),
        }
