"""The queue of a study: its workers (trials.py) take trials from it, show that they are alive, and end the trials.

It is filled once: with each point of the grid, or with as many empty trials as were asked for, in which a sampler
chooses. A trial that was cut off (its worker was killed, or stopped by Ctrl-C) is replaced by one with the same
parameters. Workers take trials under a lock, and what is missing is worked out from the trials themselves, so it does
not matter at which moment a worker is killed: each point is measured once.

Optuna's own loop cannot promise that, which is why this one uses `ask` and `tell` (Optuna 5.0, from its source):

- `Study.optimize` makes a new trial when the queue is empty; here a worker waits for the trials of others, since it
  does them again if their workers die. A trial that Ctrl-C or SIGTERM has stopped is not repeated.
- `GridSampler` may give a point that is being measured to a second worker, as its documentation says.
- `RetryHeartbeatStaleTrialCallback` runs after the trial was failed: a kill between the two loses the point.
- A trial whose worker is killed between `ask` and the first heartbeat stays RUNNING forever, and one error of the
  database ends the heartbeats of a trial. A journal file has no heartbeats.
- A sampler with a seed draws the same again after a restart, and in each worker.
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
from qexp.search.results import SearchPoint
from qexp.search.study import Params, Study, grid_of

MOST_DEATHS = 3  # workers that may die during trials of one point
LARGEST_POPULATION = 50  # Optuna's own size of a generation
OPEN = (TrialState.WAITING, TrialState.RUNNING)


def take_trial(study: Study, on_death: Callable[[FrozenTrial, bool], None]) -> optuna.Trial | None:
    """The next trial of the queue, None when none waits.

    Args:
        on_death: told of each trial that ended with its worker, and whether it is done again; more than once of one
            that is not.
    """
    with study.place.exclusive("queue"):
        trials = _with_queue_filled(study, _without_orphans(study), on_death)
        waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
        if not waiting:
            return None
        # The seed belongs to the point, not to the worker, which would draw the same again after a restart.
        study.optuna.sampler = _sampler(study, _tries(waiting[0], trials)[-1].number)
        trial = study.optuna.ask()  # the first one that waits
        if study.place.shared:
            _beat(study, trial)
        trial.set_user_attr("worker", worker_name())
    return trial


def _without_orphans(study: Study) -> list[FrozenTrial]:
    """All trials, after failing those whose worker is gone.

    With a journal there is no other worker than this one, which is between two trials.
    """
    if study.place.shared:
        optuna.storages.fail_stale_trials(study.optuna)
    trials = study.trials()  # takes its time in a database
    orphans = [
        trial
        for trial in trials
        # A trial without a worker was cut off in `take_trial`, where nobody else is now.
        if trial.state == TrialState.RUNNING and not (study.place.shared and "worker" in trial.user_attrs)
    ]
    for trial in orphans:
        study.optuna.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    return study.trials() if orphans else trials


def _with_queue_filled(
    study: Study, trials: list[FrozenTrial], on_death: Callable[[FrozenTrial, bool], None]
) -> list[FrozenTrial]:
    """All trials, after adding those of the grid that are not there yet, and one for each that was cut off."""
    grid = study.options.sampler == "grid"
    wanted: list[Params] = grid_of(study.space) if grid else [{} for _ in range(study.options.trials)]
    missing = wanted[sum("retry_of" not in trial.user_attrs for trial in trials) :]
    for params in missing:
        _add_waiting(study, params)
    replaced = {trial.user_attrs.get("retry_of") for trial in trials}
    cut_off = [trial for trial in trials if _is_cut_off(trial) and trial.number not in replaced]
    added = bool(missing)
    for trial in cut_off:
        again = _deaths(_tries(trial, trials)) < MOST_DEATHS
        if "stopped" not in trial.user_attrs:
            on_death(trial, again)
        if again:
            _add_waiting(study, trial.params, retry_of=trial.number)
            added = True
    return study.trials() if added else trials


def _add_waiting(study: Study, params: Params, **facts: Any) -> None:
    known: dict[str, Any] = {name: CategoricalDistribution(study.space[name]) for name in params}
    study.optuna.add_trial(  # with its parameters, instead of `enqueue_trial`: suggesting them then writes nothing
        optuna.create_trial(state=TrialState.WAITING, params=params, distributions=known, user_attrs=facts)
    )


def _is_cut_off(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and "error" not in trial.user_attrs


def _tries(trial: FrozenTrial, trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """A trial, the one that it is a retry of, and so on to the first."""
    found = [trial]
    while (before := found[-1].user_attrs.get("retry_of")) is not None:
        found.append(trials[before])
    return found


def _deaths(tries: list[FrozenTrial]) -> int:
    """How many of these trials ended with their worker, which nobody had stopped."""
    return sum(_is_cut_off(trial) and "stopped" not in trial.user_attrs for trial in tries)


def _sampler(study: Study, point: int) -> BaseSampler:
    seed = (study.seed + point) % 2**32
    if study.options.sampler == "tpe":
        return TPESampler(seed=seed)
    if study.options.sampler == "nsga2":  # a generation that is larger than the study would be chance alone
        return NSGAIISampler(seed=seed, population_size=min(LARGEST_POPULATION, max(2, study.options.trials // 4)))
    return RandomSampler(seed=seed)  # has nothing to choose: the trials of a grid have all parameters


def worker_name() -> str:
    """Machine and process."""
    return f"{socket.gethostname()}:{os.getpid()}"


def suggest(study: Study, trial: optuna.Trial) -> Params:
    """The parameters of a trial: those that it was made with, or what the sampler chooses."""
    return {name: trial.suggest_categorical(name, choices) for name, choices in study.space.items()}


@contextmanager
def alive(study: Study, trial: optuna.Trial) -> Iterator[None]:
    """Send heartbeats of a trial inside the block, so that no other worker takes it for cut off."""
    done = threading.Event()

    def beat() -> None:
        while study.place.shared and not done.wait(study.options.heartbeat_seconds):
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


def _beat(study: Study, trial: optuna.Trial) -> None:
    storage: Any = study.optuna._storage
    storage.record_heartbeat(trial._trial_id)


def finish(study: Study, trial: optuna.Trial, point: SearchPoint) -> bool:
    """Complete a trial; False where it was taken from this worker, whose heartbeats were missing."""
    values = [point.top1_percent] + ([] if point.cost is None else [float(point.cost)])
    return _end(study, trial, {"point": to_json(point)}, values)


def fail(study: Study, trial: optuna.Trial, reason: str) -> bool:
    """End a trial as failed for good, as `finish`."""
    return _end(study, trial, {"error": reason})


def give_back(study: Study, trial: optuna.Trial) -> bool:
    """End a trial in which this worker has been stopped, so that its point is done again."""
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


def open_trials(study: Study) -> int:
    """How many trials wait or run, with whoever."""
    return len(study.trials(*OPEN))


def failures(study: Study) -> list[str]:
    """The reasons of the points that failed for good, when no trial is open."""
    trials = study.trials()
    errors = [trial.user_attrs["error"] for trial in trials if "error" in trial.user_attrs]
    lost = [trial for trial in trials if _is_cut_off(trial) and _deaths(_tries(trial, trials)) >= MOST_DEATHS]
    return errors + [f"its worker died {MOST_DEATHS} times" for _ in lost]
