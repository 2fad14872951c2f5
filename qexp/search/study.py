"""A study of Optuna: what it is made for, what it remembers for all workers, and what its trials have found.

It has a fixed number of places (`slot`), one for each trial that is to be completed: a point of the grid, or nothing
yet, where a sampler chooses. queue.py fills them and hands them out.
"""

import itertools
import warnings
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from qexp.config import Config
from qexp.errors import InputError
from qexp.files import from_json
from qexp.report.results import SearchPoint
from qexp.search.storage import Place

MOST_DEATHS = 3  # workers that one trial may take with it
Params = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """A study in its place; `space` has the choices by parameter."""

    optuna: optuna.Study
    place: Place
    space: dict[str, list[Any]]
    slots: int
    sampler: str
    seed: int

    @property
    def name(self) -> str:
        return self.optuna.study_name

    def note(self, key: str) -> Any:
        """What the study remembers under a key; None: nothing yet."""
        return self.optuna.user_attrs.get(key)

    def remember(self, key: str, value: Any) -> None:
        """Keep a value (of JSON's types) for all workers."""
        self.optuna.set_user_attr(key, value)


def search_space(config: Config) -> dict[str, list[Any]]:
    """The choices of each parameter of a trial."""
    search, quantize = config.search, config.quantize
    return {
        "calibration_samples": list(search.sample_counts),
        "observer": list(search.observers or [quantize.observer]),
        "engine": list(quantize.engine),
        "weight_scale": list(search.weight_scales or ["channel" if quantize.per_channel else "layer"]),
        "fp32_layers": list(search.fp32_layer_counts),
    }


def grid_of(space: dict[str, list[Any]]) -> list[Params]:
    """Every point of a space."""
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]


def find_study(storage: BaseStorage, place: Place, name: str, config: Config, facts: dict[str, Any]) -> Study | None:
    """The study of this name if there is one, for a search with `facts` (an empty dict: not known yet).

    Raises:
        InputError: it holds trials of something else; the message names what.
    """
    _be_quiet()
    try:
        found = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        return None
    made_for = found.user_attrs.get("made_for")
    if made_for is None and not found.get_trials(deepcopy=False):  # its maker was killed before it wrote that down
        optuna.delete_study(study_name=name, storage=storage)
        return None
    theirs = made_for if isinstance(made_for, dict) else {}
    for key, value in facts.items():
        if theirs.get(key) != value:
            was = f"was made for {key} {theirs[key]}" if key in theirs else f"holds trials with another {key}"
            raise InputError(f"--study {name}: {was}, not {value}; give it another name, or the same options")
    return _in_place(found, place, config)


def make_study(storage: BaseStorage, place: Place, name: str, config: Config, facts: dict[str, Any]) -> Study:
    """A new study, made for `facts`."""
    _be_quiet()
    directions: list[Any] = ["maximize"] if config.search.objective == "top1" else ["maximize", "minimize"]
    study = _in_place(optuna.create_study(study_name=name, storage=storage, directions=directions), place, config)
    study.remember("made_for", facts)
    return study


def _in_place(study: optuna.Study, place: Place, config: Config) -> Study:
    space = search_space(config)
    slots = len(grid_of(space)) if config.search.sampler == "grid" else config.search.trials
    return Study(study, place, space, slots, config.search.sampler, config.seed)


def _be_quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for words in (".* is experimental", "Heartbeat of storage is supposed to be used"):  # at each call
        warnings.filterwarnings("ignore", words)


def known_point(study: Study, params: Params) -> SearchPoint | None:
    """What a trial with these parameters has found before: samplers ask again for what they liked."""
    if study.sampler == "grid":
        return None
    for trial in study.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        if trial.params == params:
            return from_json(SearchPoint, trial.user_attrs["point"])
    return None


def points_of(study: Study) -> list[SearchPoint]:
    """What the completed trials have found."""
    trials = study.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [from_json(SearchPoint, trial.user_attrs["point"]) for trial in trials]


def failures(study: Study) -> list[str]:
    """The reasons of the trials that failed for good."""
    by_slot = trials_by_slot(study.optuna.get_trials(deepcopy=False))
    errors = [
        trial.user_attrs["error"] for trials in by_slot.values() for trial in trials if "error" in trial.user_attrs
    ]
    lost = [trials for trials in by_slot.values() if deaths_of(trials) >= MOST_DEATHS]
    return errors + [f"its worker died {MOST_DEATHS} times" for _ in lost]


def trials_by_slot(trials: list[FrozenTrial]) -> dict[int, list[FrozenTrial]]:
    """Trials by the place that they were made for."""
    found: dict[int, list[FrozenTrial]] = {}
    for trial in trials:
        found.setdefault(trial.user_attrs["slot"], []).append(trial)
    return found


def deaths_of(trials: list[FrozenTrial]) -> int:
    """How many of these trials ended with their worker, which nobody had stopped."""
    return sum(trial.state == TrialState.FAIL and not {"error", "stopped"} & set(trial.user_attrs) for trial in trials)
