"""How a network trains fastest: what is chosen from given times, what stays untouched, what is kept."""

import json
from pathlib import Path

import pytest
import torch
from conftest import EXECUTION, build_tiny

from qexp.config import TrainConfig
from qexp.data.datasets import Dataset
from qexp.training import execution as fastest
from qexp.training.execution import FILE, Execution, Settled, Trial, choose, settle_execution

DEFAULT = Execution(bf16=False, threads=4, channels_last=True)


def _chosen(seconds: dict[Execution, float], **given: object) -> Execution:
    """What is chosen where a step takes so many seconds, 1 where nothing is said."""
    step = lambda execution, images: seconds.get(execution, 1.0)  # noqa: E731
    return choose(step, DEFAULT, 64, TrainConfig(**given), True)[0]  # type: ignore[arg-type]


def _with(**changed: object) -> Execution:
    return Execution(**{"bf16": False, "threads": 4, "channels_last": True, **changed})  # type: ignore[arg-type]


def test_nothing_changes_that_is_not_clearly_faster() -> None:
    """A tie, or as much as noise may be: repeated trials choose the same."""
    assert _chosen({}) == DEFAULT
    assert _chosen({_with(threads=2): 0.95, _with(bf16=True): 0.85, _with(channels_last=False): 0.95}) == DEFAULT


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

    best, trials = choose(step, DEFAULT, 64, TrainConfig(train_threads=4, channels_last=True), True)
    assert best == DEFAULT and timed.count(_with(bf16=True)) == 2  # the first makes its kernels
    assert trials == (Trial(False, 4, True, 64.0), Trial(True, 4, True, 64 / 9))


def test_slow_networks_are_timed_with_few_images() -> None:
    assert fastest._images(lambda execution, images: 0.001 * images, DEFAULT, 128) == 64
    assert fastest._images(lambda execution, images: 0.05 * images, DEFAULT, 128) == 20
    assert fastest._images(lambda execution, images: 9.0 * images, DEFAULT, 128) == 8
    assert fastest._images(lambda execution, images: 0.001 * images, DEFAULT, 32) == 32


def test_trials_change_neither_weights_nor_random_states(tiny: Dataset, tmp_path: Path) -> None:
    model = build_tiny(tiny)
    model.network.add_module("drop", torch.nn.Dropout(0.5))  # draws random numbers
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    settled = settle_execution(TrainConfig(), "cpu", model, tiny.train, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
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
