"""The queue of a study: workers take trials from it, show that they are alive, and end them.

The places (`slot`) are filled under a lock, from what the trials say: one whose trial was cut off (killed worker,
Ctrl-C) gets another trial with the same parameters. So no point is done twice, whoever comes and goes.
"""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from qexp.files import to_json
from qexp.progress import say
from qexp.report.results import SearchPoint
from qexp.search.study import MOST_DEATHS, Params, Study, deaths_of, grid_of, trials_by_slot

LARGEST_POPULATION = 50  # Optuna's own size of a generation
OPEN = (TrialState.WAITING, TrialState.RUNNING)


def take_trial(study: Study, on_cut_off: Callable[[FrozenTrial], None]) -> optuna.Trial | None:
    """The next trial of the queue, None when none waits.

    Args:
        on_cut_off: told of each trial that ended with its worker, before its place is given to another one.
    """
    with study.place.exclusive("queue"):
        trials = _fill(study, _without_orphans(study), on_cut_off)
        waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
        if not waiting:
            return None
        # From the place, not the worker: another worker, or this one the next time, must not draw the same again.
        study.optuna.sampler = _sampler(study, waiting[0].user_attrs["slot"])
        trial = study.optuna.ask()
        if study.place.shared:
            _beat(study, trial)
        trial.set_user_attr("worker", worker_name())
    return trial


def worker_name() -> str:
    """Machine and process."""
    return f"{socket.gethostname()}:{os.getpid()}"


def open_trials(study: Study) -> int:
    """How many trials wait or run, with whoever."""
    return len(study.optuna.get_trials(deepcopy=False, states=OPEN))


def suggest(study: Study, trial: optuna.Trial) -> Params:
    """The parameters of a trial: those of its place in the grid, or what the sampler chooses."""
    return {name: trial.suggest_categorical(name, choices) for name, choices in study.space.items()}


@contextmanager
def alive(study: Study, trial: optuna.Trial) -> Iterator[None]:
    """Send heartbeats of a trial inside the block, so that no other worker takes it for cut off."""
    if not study.place.shared:
        yield
        return
    done = threading.Event()
    storage: Any = study.optuna._storage

    def beat() -> None:
        while not done.wait(storage.get_heartbeat_interval()):
            try:
                _beat(study, trial)
            except Exception as error:  # of the database: the main thread will meet it, or it is over by then
                say(f"trial {trial.number}: heartbeat failed ({type(error).__name__})")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def finish(study: Study, trial: optuna.Trial, point: SearchPoint) -> bool:
    """Complete a trial; False where it was taken from this worker, whose heartbeats were missing."""
    values = [point.top1_percent] + ([] if point.cost is None else [float(point.cost)])
    return _end(study, trial, {"point": to_json(point)}, values)


def fail(study: Study, trial: optuna.Trial, reason: str) -> bool:
    """End a trial as failed for good, as `finish`."""
    return _end(study, trial, {"error": reason})


def give_back(study: Study, trial: optuna.Trial) -> bool:
    """End a trial that this worker has been stopped in: its place is open again."""
    return _end(study, trial, {"stopped": True})


def _end(study: Study, trial: optuna.Trial, facts: dict[str, Any], values: list[float] | None = None) -> bool:
    try:
        for key, value in facts.items():
            trial.set_user_attr(key, value)
        study.optuna.tell(trial, values, state=None if values else TrialState.FAIL)
    except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
        if not study.optuna._storage.get_trial(trial._trial_id).state.is_finished():
            raise
        return False
    return True


def _beat(study: Study, trial: optuna.Trial) -> None:
    storage: Any = study.optuna._storage
    storage.record_heartbeat(trial._trial_id)


def _sampler(study: Study, slot: int) -> BaseSampler:
    seed = (study.seed + slot) % 2**32
    if study.sampler == "tpe":
        return TPESampler(seed=seed)
    if study.sampler == "nsga2":  # a generation that is larger than the study would be chance alone
        return NSGAIISampler(seed=seed, population_size=min(LARGEST_POPULATION, max(2, study.slots // 4)))
    return RandomSampler(seed=seed)  # has nothing to choose: the places of a grid have all parameters


def _without_orphans(study: Study) -> list[FrozenTrial]:
    """All trials, after failing those whose worker is gone.

    With a journal there is no other worker than this one, which is between two trials.
    """
    if study.place.shared:
        optuna.storages.fail_stale_trials(study.optuna)
    trials = study.optuna.get_trials(deepcopy=False)  # takes its time in a database
    orphans = [
        trial
        for trial in trials
        # A trial without a worker was cut off in `take_trial`, where nobody else is now.
        if trial.state == TrialState.RUNNING and not (study.place.shared and "worker" in trial.user_attrs)
    ]
    for trial in orphans:
        study.optuna.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    return study.optuna.get_trials(deepcopy=False) if orphans else trials


def _fill(study: Study, trials: list[FrozenTrial], on_cut_off: Callable[[FrozenTrial], None]) -> list[FrozenTrial]:
    """All trials, after adding one to each place that has none which waits, runs, or is done."""
    by_slot, grid, added = trials_by_slot(trials), grid_of(study.space), False
    for slot in range(study.slots):
        tries = by_slot.get(slot, [])
        if any(t.state in (*OPEN, TrialState.COMPLETE) or "error" in t.user_attrs for t in tries):
            continue
        if tries:
            on_cut_off(tries[-1])
        if deaths_of(tries) < MOST_DEATHS:
            params = tries[-1].params if tries else (grid[slot] if study.sampler == "grid" else {})
            again = {"retry_of": tries[-1].number} if tries else {}
            known: dict[str, Any] = {name: CategoricalDistribution(study.space[name]) for name in params}
            waiting = optuna.create_trial(  # with its parameters, instead of `enqueue_trial`: suggesting writes nothing
                state=TrialState.WAITING, params=params, distributions=known, user_attrs={"slot": slot, **again}
            )
            study.optuna.add_trial(waiting)
            added = True
    return study.optuna.get_trials(deepcopy=False) if added else trials
