"""A study of Optuna: the space that it searches, what it was made for, what it remembers, what its trials have found.

setup.py finds or makes it in a place of storage.py; queue.py hands out its trials; job.py reads what was found.
"""

import itertools
import warnings
from dataclasses import dataclass
from typing import Any, get_args

import optuna
from optuna.trial import FrozenTrial, TrialState

from qexp.config import Config, Engine, SearchConfig
from qexp.errors import InputError, first_line
from qexp.files import from_json
from qexp.search.results import SearchPoint
from qexp.search.storage import Place

Params = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """A study in its place; `space` has the choices by parameter."""

    optuna: optuna.Study
    place: Place
    space: dict[str, list[Any]]
    options: SearchConfig
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

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Its trials by number, all or those in these states."""
        return self.optuna.get_trials(deepcopy=False, states=states or None)


def search_space(config: Config) -> dict[str, list[Any]]:
    """The choices of each parameter of a trial."""
    search, quantize = config.search, config.quantize
    return {
        "calibration_samples": list(search.sample_counts),
        "observer": list(search.observers or [quantize.observer]),
        "engine": [
            name for name in get_args(Engine) if name in (quantize.engine or ["fx"])
        ],  # the order given has no meaning here
        "weight_scale": list(search.weight_scales or ["channel" if quantize.per_channel else "layer"]),
        "fp32_layers": list(search.fp32_layer_counts),
    }


def grid_of(space: dict[str, list[Any]]) -> list[Params]:
    """Every point of a space."""
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]


def find_study(place: Place, name: str, config: Config, facts: dict[str, Any]) -> Study | None:
    """The study of this name if there is one, for a search with `facts` (an empty dict: not known yet).

    Raises:
        InputError: it holds trials of something else; the message names what.
    """
    _silence_optuna()
    storage = place.storage(name)
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
        if _in_any_order(theirs.get(key)) != _in_any_order(value):
            was = f"was made for {key} {theirs[key]}" if key in theirs else f"holds trials with another {key}"
            raise InputError(f"--study {name}: {was}, not {value}; give it another name, or the same options")
    space = {name: theirs.get(name, choices) for name, choices in search_space(config).items()}
    return Study(found, place, space, config.search, config.seed)


def _in_any_order(value: Any) -> Any:
    """Of a list, what is in it: earlier versions made studies for lists as they were given."""
    return sorted(value, key=repr) if isinstance(value, list) else value


def make_study(place: Place, name: str, config: Config, facts: dict[str, Any]) -> Study:
    """A new study, made for `facts`."""
    _silence_optuna()
    directions: list[Any] = ["maximize"] if config.search.objective == "top1" else ["maximize", "minimize"]
    made = optuna.create_study(study_name=name, storage=place.storage(name), directions=directions)
    study = Study(made, place, search_space(config), config.search, config.seed)
    study.remember("made_for", facts)
    return study


def _silence_optuna() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for words in (".* is experimental", "Heartbeat of storage is supposed to be used"):  # at each call
        warnings.filterwarnings("ignore", words)


def known_point(study: Study, params: Params) -> SearchPoint | None:
    """What a trial with these parameters has found before: samplers ask again for what they liked."""
    if study.options.sampler == "grid":
        return None
    return next((_point(trial) for trial in study.trials(TrialState.COMPLETE) if trial.params == params), None)


def points_of(study: Study) -> list[SearchPoint]:
    """What the completed trials have found."""
    return [_point(trial) for trial in study.trials(TrialState.COMPLETE)]


def _point(trial: FrozenTrial) -> SearchPoint:
    try:
        return from_json(SearchPoint, trial.user_attrs["point"])
    except (KeyError, ValueError) as error:  # of another program, or changed by hand
        why = f"trial {trial.number} of the study holds no result of a search ({first_line(error)})"
        raise InputError(f"--study: {why}; give it another name") from None
