"""The fastest precision, thread count, memory layout and way to wait for a network that is trained on this CPU, found
by timing a few steps.

No value of these is the fastest for all networks. bf16 is 2.9 times as fast for SmallNet and 3.6 times as slow for
efficientnet_b0 on the same CPU; two threads beside another busy process can be slower than one, since every parallel
region waits for its slowest thread; threads that spin while they wait are faster where nothing else runs (waiting.py).
So each option that is `auto` is timed, on a copy of the network, and waiting unless the user has set it.
"""

import copy
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from qexp.config import TrainConfig
from qexp.data.datasets import Split
from qexp.errors import InputError
from qexp.files import replacing
from qexp.foundation.quantities import NotNegative, Some
from qexp.foundation.waiting import DEFAULT, PASSIVE, may_choose_waiting, wait, waiting, waiting_as
from qexp.measurement.accuracy import to_float
from qexp.models.classifier import Classifier
from qexp.progress import say
from qexp.training.bf16 import padding_seen_in_fp32
from qexp.training.distributed import read_group, threads_each

FILE = "execution.json"  # in the folder of the training

FIRST_IMAGES, MOST_IMAGES = 8, 64  # images a timed step: of the first one, and of the others at most
STEP_SHARE = 200  # of the images of a whole training, a step has one in so many at most: the trials take a tenth of it
LONGEST_STEP_S = 1.0  # of the choice that the others are compared with; slow networks get fewer images
ROUNDS = 3  # timed steps of each of two choices, in turns; fewer where two of them say the same
HOPELESS = 2.0  # times as slow in the first round: no more rounds
# How many times faster a choice must be than the one it replaces: by more than the noise of so few steps, so that
# repeated trials agree. (bf16 gains more in training: its batches are larger, and each step converts all weights once.)
# Waiting changes no bit, so that it need not be the same each time.
GAIN, WAITING_GAIN = 1.1, 1.05


@dataclass(frozen=True)
class Execution:
    """How the steps are computed; `threads` are those of one process, `waiting` is how they do (waiting.py)."""

    bf16: bool
    threads: int
    channels_last: bool
    waiting: str = PASSIVE


@dataclass(frozen=True)
class Trial:
    """One way to compute the steps, with the median pace of its timed forward and backward passes."""

    bf16: bool
    threads: Some
    channels_last: bool
    images_per_second: NotNegative
    waiting: str = PASSIVE  # as it was before it was chosen


@dataclass(frozen=True)
class Settled:
    """What `auto` stands for in the options of these names, how threads wait, and the trials by which it was found."""

    bf16: bool
    train_threads: int
    channels_last: bool
    trials: tuple[Trial, ...] = ()
    waiting: str = PASSIVE

    def options(self) -> dict[str, bool | int]:
        """The options by name."""
        return {"bf16": self.bf16, "train_threads": self.train_threads, "channels_last": self.channels_last}


def settle_execution(options: TrainConfig, device: str, model: nn.Module, train: Split, folder: Path) -> Settled:
    """What the training in `folder` computes its steps with: options that are given as they are, the others as it has
    begun, or else as a few steps of the network are fastest here. On a GPU nothing is timed. How threads wait is no
    option: it is given where an environment variable of OpenMP has set it.

    Of several processes only the leader calls it. Called again it gives the same: what was timed is kept in `folder`.

    Raises:
        StageError: the folder cannot be written.
    """
    file = folder / FILE
    if file.is_file():
        try:
            begun = TypeAdapter(Settled).validate_json(file.read_text())
        except ValidationError:
            raise InputError(f"{file}: damaged; remove it, and what it held is timed anew") from None
        given = {name: getattr(options, name) for name in begun.options()}
        given |= {"waiting": None if may_choose_waiting() else waiting()}
        return replace(begun, **{name: value for name, value in given.items() if value is not None})
    total = options.train_threads or torch.get_num_threads()
    if device == "cuda":
        bf16 = has_bf16(device) if options.bf16 is None else options.bf16
        return Settled(bf16, total, options.channels_last is not False)
    group = read_group()
    threads = threads_each(total, group)
    found, trials = fastest_execution(options, model, train, threads, has_bf16(device))
    total = total if found.threads == threads else found.threads * group.local_size
    settled = Settled(found.bf16, total, found.channels_last, trials, found.waiting)
    if trials:
        with replacing(file) as temporary:
            temporary.write_bytes(TypeAdapter(Settled).dump_json(settled))
        paces = ", ".join(f"{_describe(trial)} {trial.images_per_second:.0f}" for trial in trials)
        say(f"training in {_describe(found)}; images/s of a few steps: {paces}")
    return settled


def _describe(execution: "Execution | Trial") -> str:
    words = ["bf16" if execution.bf16 else "fp32", f"{execution.threads} threads"]
    words += [] if execution.channels_last else ["contiguous"]
    return " ".join(words + (["spinning"] if execution.waiting == DEFAULT else []))


def has_bf16(device: str) -> bool:
    """Whether the device computes in bf16."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


Step = Callable[[Execution, int], float]  # wall time in seconds of a step with so many images


def fastest_execution(
    options: TrainConfig, model: nn.Module, train: Split, threads: int, has_bf16: bool
) -> tuple[Execution, tuple[Trial, ...]]:
    """The fastest way to compute the steps among those that `options` leave open, and what was timed to find it.

    Args:
        model: on the CPU; left as it is, as are the random states.
        train: images to time with.
        threads: CPU threads that the process may use; `options.train_threads` must be None or this.
        has_bf16: whether the CPU computes in bf16.
    """
    free = may_choose_waiting()
    start = Execution(bool(options.bf16), threads, options.channels_last is not False, PASSIVE if free else waiting())
    if not (
        (options.bf16 is None and has_bf16)
        or options.channels_last is None
        or (threads > 1 and (options.train_threads is None or free))
    ):
        return start, ()
    say("timing a few training steps, to choose number format, threads, memory layout and how threads wait")
    before = torch.get_num_threads()
    network = copy.deepcopy(model)
    as_trained = padding_seen_in_fp32(network, has_bf16) if isinstance(network, Classifier) else nullcontext()
    with torch.random.fork_rng(devices=[]), as_trained, waiting_as(start.waiting):
        try:
            step = _step_of(network, train)
            fair = max(FIRST_IMAGES, options.epochs * len(train) // STEP_SHARE)
            images = _images(step, start, min(options.batch_size, len(train), fair))
            return choose(step, start, images, options, has_bf16, free)
        finally:
            torch.set_num_threads(before)


def choose(
    step: Step, start: Execution, images: int, options: TrainConfig, has_bf16: bool, may_spin: bool
) -> tuple[Execution, tuple[Trial, ...]]:
    """Change one choice at a time and keep the change where it is faster by enough: threads first, and how they wait,
    since what other processes take from this one decides the most.

    Args:
        may_spin: whether it is open if threads spin while they wait.
    """
    times: dict[Execution, list[float]] = {}
    best = start

    def keep_if_faster(challenger: Execution, gain: float) -> bool:
        nonlocal best
        faster = _is_faster(step, best, challenger, gain, images, times)
        best = challenger if faster else best
        return faster

    # Spinning threads may be fastest in another number than sleeping ones.
    may_spin = may_spin and best.threads > 1
    spins = may_spin and keep_if_faster(replace(best, waiting=DEFAULT), WAITING_GAIN)
    while options.train_threads is None and best.threads > 1:
        fewer = replace(best, threads=best.threads // 2)
        if fewer.threads == 1:  # which waits for no other
            fewer = replace(fewer, waiting=start.waiting)
        if not keep_if_faster(fewer, GAIN):
            break
    if may_spin and not spins and 1 < best.threads < start.threads:
        keep_if_faster(replace(best, waiting=DEFAULT), WAITING_GAIN)
    if options.bf16 is None and has_bf16:
        keep_if_faster(replace(best, bf16=True), GAIN)
    if options.channels_last is None:
        keep_if_faster(replace(best, channels_last=False), GAIN)
    return best, tuple(
        Trial(one.bf16, one.threads, one.channels_last, images / statistics.median(found), one.waiting)
        for one, found in times.items()
    )


def _is_faster(
    step: Step,
    best: Execution,
    challenger: Execution,
    gain: float,
    images: int,
    times: dict[Execution, list[float]],
) -> bool:
    """Whether the challenger is more than `gain` times as fast in most of the rounds in which both take turns."""
    rounds: list[bool] = []
    most = ROUNDS // 2 + 1
    made = {replace(one, waiting=PASSIVE) for one in times}
    for execution in (best, challenger):
        if (kind := replace(execution, waiting=PASSIVE)) not in made:
            step(execution, images)  # kernels are made at the first step of their kind
            made.add(kind)
    for _ in range(ROUNDS):
        best_s, challenger_s = step(best, images), step(challenger, images)
        times.setdefault(best, []).append(best_s)
        times.setdefault(challenger, []).append(challenger_s)
        rounds.append(best_s / challenger_s > gain)
        hopeless = len(rounds) == 1 and challenger_s > HOPELESS * best_s
        if hopeless or max(rounds.count(True), rounds.count(False)) == most:
            break
    return rounds.count(True) >= most


def _images(step: Step, start: Execution, most: int) -> int:
    """Images a timed step, `most` at most, so that one takes no longer than LONGEST_STEP_S."""
    few = min(FIRST_IMAGES, most)
    step(start, few)
    fitting = int(few * LONGEST_STEP_S / step(start, few))
    return max(few, min(fitting, MOST_IMAGES, most))


def _step_of(model: nn.Module, train: Split) -> Step:
    """Forward and backward pass of `model`, which is changed."""
    model.train()

    def step(execution: Execution, images: int) -> float:
        layout = torch.channels_last if execution.channels_last else torch.contiguous_format
        torch.set_num_threads(execution.threads)
        wait(execution.waiting)
        model.to(memory_format=layout)  # type: ignore[call-overload]
        started = time.perf_counter()
        batch = to_float(train.images[:images]).contiguous(memory_format=layout)
        with torch.autocast("cpu", torch.bfloat16, enabled=execution.bf16):
            logits = model(batch).float()
        nn.functional.cross_entropy(logits, train.labels[:images]).backward()
        ended = time.perf_counter()
        model.zero_grad()
        return ended - started

    return step
