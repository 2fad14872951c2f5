"""The alias that follows a stage which a command has run alone: of `qexp quantize` and of `qexp promote`.

It is the last thing that such a stage does, when its result is in MLflow: `Job.stage` calls it, or `qexp sync` where
the store was away. A job of several stages moves its aliases itself, after its report.
"""

from dataclasses import replace
from typing import TypeVar

from qexp.report.promotion import Promotion
from qexp.report.results import Int8Evidence
from qexp.tracking import registry
from qexp.tracking import runs as tracking
from qexp.tracking.aliases import move_champion, only_mover, succeed
from qexp.tracking.store import split_uri

T = TypeVar("T")


def settle(found: T) -> T:
    """Move the alias that a stage's result asks for; the result, which says so where that came too late."""
    if isinstance(found, Int8Evidence):
        registry.make_challenger(registry.from_entity(registry.find_version(found.version_uri, "int8")))
    if isinstance(found, Promotion):
        return _promoted(found)  # type: ignore[return-value]
    return found


def _promoted(found: Promotion) -> Promotion:
    """No alias moves without a word on why: the decision is logged by now."""
    tags = registry.look_up(found.uri).tags
    if tags.get("promotion_run_id") != found.measured.run_id:  # a later promotion has decided on this version
        return found
    if found.force:
        with only_mover(split_uri(found.uri)[0]) as still_alone:
            still_alone()
            move_champion(found.uri)
    elif found.word == "passed" and not succeed(found.uri, found.champion_uri):
        found = replace(found, overtaken=True)
        registry.tag_version(found.uri, {"promotion": found.word, "promotion_reason": found.summary})
        tracking.set_tag("qexp.promotion", found.word)
    return found
