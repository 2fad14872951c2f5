"""How a network trains fastest: what is chosen from given times, what stays untouched, what is kept."""

import json
from pathlib import Path

import pytest
import torch
from conftest import EXECUTION, build_tiny

from qexp.config import TrainConfig
from qexp.data.datasets import Dataset
from qexp.foundation.waiting import DEFAULT as SPIN
from qexp.foundation.waiting import PASSIVE, VARIABLES, waiting
from qexp.training import execution as fastest
from qexp.training.execution import FILE, Execution, Settled, Trial, choose, settle_execution

DEFAULT = Execution(bf16=False, threads=4, channels_last=True)


@pytest.fixture(autouse=True)
def _user_has_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def _chosen(seconds: dict[Execution, float], may_spin: bool = True, **given: object) -> Execution:
    """What is chosen where a step takes so many seconds, 1 where nothing is said."""
    step = lambda execution, images: seconds.get(execution, 1.0)  # noqa: E731
    return choose(step, DEFAULT, 64, TrainConfig(**given), True, may_spin)[0]  # type: ignore[arg-type]


def _with(**changed: object) -> Execution:
    return Execution(**{"bf16": False, "threads": 4, "channels_last": True, **changed})  # type: ignore[arg-type]


def test_nothing_changes_that_is_not_clearly_faster() -> None:
    """A tie, or as much as noise may be: repeated trials choose the same."""
    assert _chosen({}) == DEFAULT
    assert _chosen({_with(threads=2): 0.95, _with(bf16=True): 0.95, _with(channels_last=False): 0.95}) == DEFAULT


@pytest.mark.parametrize(
    "best",
    [
        _with(bf16=True),
        _with(channels_last=False),
        _with(threads=2),
        _with(threads=1),
        _with(threads=1, bf16=True),
        _with(threads=2, bf16=True, channels_last=False),
    ],
)
def test_the_fastest_is_chosen(best: Execution) -> None:
    """Each change that leads to it is faster by half."""
    threads = [_with(threads=n) for n in (2, 1) if n >= best.threads]
    steps = [*threads, _with(threads=best.threads, bf16=True), best]
    if not best.bf16:
        steps = [*threads, best]
    assert _chosen({one: 0.5**n for n, one in enumerate(steps, 1)}) == best


def test_spinning_is_chosen_in_the_number_of_threads_where_it_is_faster() -> None:
    """By little: it changes no bit. Alone on the machine with all threads, beside other processes with fewer."""
    assert _chosen({_with(waiting=SPIN): 0.97}) == DEFAULT
    assert _chosen({_with(waiting=SPIN): 0.9}) == _with(waiting=SPIN)
    alone = {_with(threads=2): 0.8, _with(threads=1): 0.7, _with(waiting=SPIN): 0.5}
    assert _chosen(alone) == _with(waiting=SPIN)
    both = _with(threads=2, waiting=SPIN)
    assert _chosen(alone | {both: 0.45}) == both and _chosen(alone | {both: 0.48}) == _with(waiting=SPIN)
    assert _chosen(alone | {_with(waiting=SPIN): 9.0}) == _with(threads=1)
    assert _chosen({_with(waiting=SPIN): 9.0, _with(threads=2): 0.5, both: 0.4}) == both
    assert _chosen(alone, may_spin=False) == _with(threads=1)
    everything_else = {"bf16": False, "train_threads": 4, "channels_last": True}
    assert _chosen(alone, **everything_else) == _with(waiting=SPIN)


def test_given_options_are_not_tried() -> None:
    fast = {_with(threads=2): 0.1, _with(bf16=True): 0.1, _with(channels_last=False): 0.1}
    assert _chosen(fast, bf16=False, train_threads=4, channels_last=True) == DEFAULT
    assert _chosen(fast, bf16=False, train_threads=4) == _with(channels_last=False)
    assert _chosen(fast, train_threads=4, channels_last=True) == _with(bf16=True)


def test_a_hopeless_choice_is_timed_once() -> None:
    timed: list[Execution] = []

    def step(execution: Execution, images: int) -> float:
        timed.append(execution)
        return 9.0 if execution.bf16 else 1.0

    best, trials = choose(step, DEFAULT, 64, TrainConfig(train_threads=4, channels_last=True), True, False)
    assert best == DEFAULT and timed.count(_with(bf16=True)) == 2  # the first makes its kernels
    assert trials == (Trial(False, 4, True, 64.0), Trial(True, 4, True, 64 / 9))


def test_most_of_three_rounds_decide_and_a_third_is_made_where_two_differ() -> None:
    def chosen(*bf16_s: float) -> tuple[bool, int]:
        times = iter([1.0, *bf16_s])  # the first makes its kernels
        step = lambda execution, images: next(times) if execution.bf16 else 1.0  # noqa: E731
        options = TrainConfig(train_threads=4, channels_last=True)
        return choose(step, DEFAULT, 64, options, True, False)[0].bf16, len(bf16_s) - len(list(times))

    assert chosen(0.5, 0.5, 0.5) == (True, 2) and chosen(1.5, 1.5, 0.1) == (False, 2)
    assert chosen(0.5, 1.5, 0.5) == (True, 3) and chosen(1.5, 0.5, 1.5) == (False, 3)


def test_short_trainings_are_timed_with_few_images(tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step has a 200th of the images of all epochs at most."""
    found = list[int]()
    monkeypatch.setattr(fastest, "choose", lambda step, start, images, *given: (found.append(images), (start, ()))[1])
    monkeypatch.setattr(fastest, "_step_of", lambda *given: lambda execution, images: 0.001 * images)
    for epochs in (1, 20, 1000):
        fastest.fastest_execution(TrainConfig(epochs=epochs), build_tiny(tiny), tiny.train, 2, True)
    assert len(tiny.train) == 160 and found == [8, 16, 64]


def test_slow_networks_are_timed_with_few_images() -> None:
    assert fastest._images(lambda execution, images: 0.001 * images, DEFAULT, 128) == 64
    assert fastest._images(lambda execution, images: 0.05 * images, DEFAULT, 128) == 20
    assert fastest._images(lambda execution, images: 9.0 * images, DEFAULT, 128) == 8
    assert fastest._images(lambda execution, images: 0.001 * images, DEFAULT, 32) == 32


def test_trials_change_neither_weights_nor_random_states(tiny: Dataset, tmp_path: Path) -> None:
    model = build_tiny(tiny)
    model.network.add_module("drop", torch.nn.Dropout(0.5))  # draws random numbers
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, threads, waited = torch.get_rng_state(), torch.get_num_threads(), waiting()
    settled = settle_execution(TrainConfig(), "cpu", model, tiny.train, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads and waiting() == waited
    assert all(parameter.grad is None and parameter.is_contiguous() for parameter in model.parameters())
    assert settled.trials[0].channels_last and not settled.trials[0].bf16
    assert all(trial.images_per_second > 0 for trial in settled.trials)


def test_the_choice_is_kept_and_given_options_win(tiny: Dataset, tmp_path: Path) -> None:
    kept = Settled(bf16=True, train_threads=3, channels_last=False, trials=(Trial(True, 3, False, 9.0),))
    (tmp_path / FILE).write_text(json.dumps(vars(kept) | {"trials": [vars(kept.trials[0])]}))
    model = build_tiny(tiny)
    assert settle_execution(TrainConfig(), "cpu", model, tiny.train, tmp_path) == kept
    given = settle_execution(TrainConfig(bf16=False), "cpu", model, tiny.train, tmp_path)
    assert given.options() == {"bf16": False, "train_threads": 3, "channels_last": False}


def test_how_threads_wait_is_kept_unless_the_user_says_so(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, file = build_tiny(tiny), tmp_path / FILE
    trial = {"bf16": False, "threads": 2, "channels_last": True, "images_per_second": 9.0}
    before = {"bf16": False, "train_threads": 2, "channels_last": True, "trials": [trial]}  # without `waiting`
    for text, expected in ((before, PASSIVE), (before | {"waiting": SPIN}, SPIN)):
        file.write_text(json.dumps(text))
        settled = settle_execution(TrainConfig(), "cpu", model, tiny.train, tmp_path)
        assert settled.waiting == expected and settled.trials[0].waiting == PASSIVE
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert settle_execution(TrainConfig(), "cpu", model, tiny.train, tmp_path).waiting == "active"


def test_waiting_is_timed_where_all_options_are_given(tiny: Dataset, tmp_path: Path) -> None:
    options, file = TrainConfig(**EXECUTION | {"train_threads": 2}), tmp_path / FILE
    settled = settle_execution(options, "cpu", build_tiny(tiny), tiny.train, tmp_path)
    assert [(one.threads, one.waiting) for one in settled.trials] == [(2, PASSIVE), (2, SPIN)]
    assert json.loads(file.read_text())["waiting"] == settled.waiting


def test_nothing_is_timed_where_all_is_given(tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(fastest, "choose")
    settled = settle_execution(TrainConfig(**EXECUTION), "cpu", build_tiny(tiny), tiny.train, tmp_path)
    assert settled.options() == EXECUTION and settled.trials == () and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("processes", "each"), [(1, 4), (2, 2)])
def test_processes_of_a_machine_share_the_threads(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, each: int
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    asked: list[int] = []

    def note(options: TrainConfig, model: object, train: object, threads: int, has_bf16: bool) -> object:
        asked.append(threads)
        return Execution(False, threads // 2, True), (Trial(False, threads // 2, True, 1.0),)

    monkeypatch.setattr(fastest, "fastest_execution", note)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    settled = settle_execution(TrainConfig(), "cpu", build_tiny(tiny), tiny.train, tmp_path)
    assert asked == [each] and settled.train_threads == 2
