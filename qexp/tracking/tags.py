"""The tags of a registered version, each read by its type and range. Whoever may write to the registry can change them.

Every reader takes its values from here: `tags_of(version).threads`. A tag that is missing or wrong is one line, which
names the version, the tag, its value and what is allowed. Without torch, for commands that only look something up.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar, cast, overload

from mlflow.entities.model_registry import ModelVersion
from pydantic import TypeAdapter

from qexp.errors import InputError
from qexp.models.names import RUNTIMES
from qexp.models.preprocessing import Preprocessing
from qexp.tracking import class_names
from qexp.tracking.store import uri_of

T = TypeVar("T")
MADE_BY, OWN = "registered_by", "qexp.register"  # tag of the versions of one's own models, and its value
LONGEST_VALUE = 80  # characters of a wrong value that a line shows
MOST_PIXELS = 65_536  # of a side; what a model takes, its own file says
MOST_THREADS = 1024


class Tag(Generic[T]):
    """A tag by its name in `Tags`: how its text is read, and what is allowed, in words.

    `parse` raises ValueError for what is not allowed. `figure`: it counts for those commands only that show or compare
    it; all others are checked wherever the version is used. `of_all`: no command does without it.
    """

    def __init__(self, parse: Callable[[str], T], allowed: str, figure: bool = False, of_all: bool = False) -> None:
        self.parse, self.allowed = parse, allowed
        self.figure, self.of_all, self.optional = figure, of_all, False

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, tags: None, owner: type) -> "Tag[T]": ...
    @overload
    def __get__(self, tags: "Tags", owner: type) -> T: ...
    def __get__(self, tags: "Tags | None", owner: type) -> "Tag[T] | T":
        return self if tags is None else tags.read(self)


def _optional(tag: Tag[T]) -> Tag[T | None]:
    """The same, None where it is missing."""
    tag.optional = True
    return cast("Tag[T | None]", tag)


def _whole(low: int, high: int, **more: bool) -> Tag[int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,18}", text, re.ASCII) or not low <= int(text) <= high:
            raise ValueError
        return int(text)

    return Tag(parse, f"a whole number from {low} to {high}", **more)


def _number(low: float, high: float) -> Tag[float]:
    def parse(text: str) -> float:
        value = float(text)
        if not (math.isfinite(value) and low <= value <= high):
            raise ValueError
        return value

    return Tag(parse, f"a number from {low:g} to {high:g}", figure=True)


def _matching(pattern: str, allowed: str, **more: bool) -> Tag[str]:
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text, re.ASCII):
            raise ValueError
        return text

    return Tag(parse, allowed, **more)


def _one_of(*words: str, **more: bool) -> Tag[str]:
    return _matching("|".join(words), f"{', '.join(words[:-1])} or {words[-1]}", **more)


def _text(longest: int) -> Tag[str]:
    def parse(text: str) -> str:
        if not text.strip() or len(text) > longest or not text.isprintable():
            raise ValueError
        return text

    return Tag(parse, f"printable text of at most {longest} characters")


def _truth() -> Tag[bool]:
    def parse(text: str) -> bool:
        return {"true": True, "false": False}[text]

    return Tag(parse, "true or false")


def _run() -> Tag[str]:
    return _matching("[0-9a-f]{32}", "the id of a run, 32 hexadecimal digits")


def _version(*words: str) -> Tag[str]:
    return _matching("|".join([r"models:/[^/@]+/\d{1,9}", *words]), " or ".join(["models:/NAME/NUMBER", *words]))


def _sides(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d{1,6}(x\d{1,6})?", text, re.ASCII):
        raise ValueError
    sides = [int(side) for side in text.split("x")]
    if not all(1 <= side <= MOST_PIXELS for side in sides):
        raise ValueError
    return sides[0], sides[-1]


def _preprocessing(text: str) -> Preprocessing:
    found: Preprocessing = TypeAdapter(Preprocessing).validate_json(text, strict=True)
    if not all(1 <= side <= MOST_PIXELS for side in (found.height_px, found.width_px)):
        raise ValueError
    return found


class Tags:
    """The tags of one version, read when they are asked for.

    Raises:
        InputError: one that is asked for is missing, or its value is not allowed.
    """

    kind = _one_of("fp32", "int8", of_all=True)
    verified = _truth()
    classes = Tag(class_names.parse_tag, "a JSON list of names, one or more", of_all=True)
    image_size = Tag(_sides, f"pixels, 1 to {MOST_PIXELS}, or HEIGHTxWIDTH", of_all=True)
    preprocessing = _optional(Tag(_preprocessing, "the JSON of a preprocessing"))
    trained = _optional(_one_of("elsewhere"))
    artifact_sha256 = _matching("[0-9a-f]{64}", "64 hexadecimal digits", of_all=True)
    loads_without_pickle = _optional(_truth())
    flavor = _optional(_one_of("pytorch", "onnx"))
    backend = _optional(_one_of("x86", "onednn", "fbgemm", "qnnpack"))
    runtime = _optional(_one_of(*RUNTIMES))
    engine = _one_of("fx", "pt2e", "onnx")
    folded = _optional(_truth())
    fp32_uri = _version()
    weights_uri = _matching(
        r"runs:/[0-9a-f]{32}(/(?!\.\.?(/|$))[\w.-]+)+", "runs:/RUN_ID/PATH, the file of the weights"
    )
    weights_sha256 = _optional(_matching("[0-9a-f]{64}", "64 hexadecimal digits"))
    dataset = _text(250)
    data_digest = _matching("[0-9a-f]{8,64}", "8 to 64 hexadecimal digits")
    train_run_id = _run()
    quantize_run_id = _run()
    latency_run_id = _optional(_run())
    throughput_run_id = _optional(_run())
    report_run_id = _optional(_run())
    promotion_run_id = _optional(_run())
    champion_kept = _optional(_version("none"))
    champion_compared = _optional(_truth())
    threads = _whole(1, MOST_THREADS, figure=True)
    calibration_samples = _whole(1, 10**9, figure=True)
    test_top1_correct = _number(0, 1e9)
    test_top3_correct = _number(0, 1e9)
    test_top1_percent = _number(0, 100)
    test_top3_percent = _number(0, 100)
    top1_drop_points = _number(-100, 100)
    top1_drop_low_points = _number(-100, 100)
    top1_drop_high_points = _number(-100, 100)
    size_mb = _number(0, 1e9)
    p50_ms = _number(0, 1e9)
    p50_batch_size = _whole(1, 10**9, figure=True)
    p50_threads = _whole(1, MOST_THREADS, figure=True)
    mean_speedup = _number(0, 1e6)
    smallest_speedup = _number(0, 1e6)

    def __init__(self, found: ModelVersion) -> None:
        self.uri = uri_of(found)
        self.texts: Mapping[str, str] = found.tags

    @property
    def input(self) -> Preprocessing:
        """The image that the model is given; versions of before squash it to a square."""
        return self.preprocessing or Preprocessing(*self.image_size)

    def read(self, tag: Tag[T]) -> T:
        """The value of a tag."""
        name = tag.name
        if name not in self.texts:
            if tag.optional:
                return None  # type: ignore[return-value]  # as the class of those that may be missing says
            raise self.missing(name)
        text = str(self.texts[name])
        try:
            return tag.parse(text)
        except (ValueError, KeyError, RecursionError):
            raise self.wrong(name, f"must be {tag.allowed}") from None

    def check(self) -> "Tags":
        """The same tags, once those that no command does without have been read, and those that are no figures."""
        for tag in TAGS.values():
            if tag.of_all or (tag.name in self.texts and not tag.figure):
                self.read(tag)
        return self

    def known(self, name: str, warn: Callable[[str], None] = lambda line: None) -> Any:
        """The value of a tag for a list or a page that leaves out what it does not know: None where the tag is missing,
        or wrong, of which `warn` is told."""
        try:
            return self.read(TAGS[name]) if name in self.texts else None
        except InputError as error:
            return warn(str(error))

    def missing(self, name: str) -> InputError:
        """That a tag is not there, as an error."""
        if self.texts.get(MADE_BY) == OWN:
            return InputError(
                f"{self.uri}: was registered with {OWN}, without the training run and the data that this command "
                "needs; use qexp.quantize, qexp.compare and qexp.benchmark in Python"
            )
        return InputError(f"{self.uri}: has no tag {name}, which qexp gives to every version")

    def wrong(self, name: str, why: str) -> InputError:
        """That the value of a tag cannot be used, as an error."""
        text = str(self.texts[name])
        short = text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"
        return InputError(f"{self.uri}: its tag {name} is {short}: {why}")

    @contextmanager
    def followed(self, name: str) -> Iterator[Any]:
        """The value of a tag, while what it names is looked for; an InputError then says which tag has named it."""
        value = self.read(TAGS[name])
        try:
            yield value
        except InputError as error:
            raise self.wrong(name, str(error)) from None


TAGS: dict[str, Tag[Any]] = {name: tag for name, tag in vars(Tags).items() if isinstance(tag, Tag)}


def tags_of(found: ModelVersion) -> Tags:
    """The tags of a version of the registry."""
    return Tags(found)
