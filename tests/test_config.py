"""Configuration: precedence, what is refused and how it is explained, and the repository's config.yaml."""

import os
import re
import time
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from strategies import SEEDED, nasty_texts, trees

from qexp.config import (
    PLACES,
    QUICK,
    QUICK_WORDS,
    Config,
    DataConfig,
    GateConfig,
    LatencyConfig,
    PreprocessConfig,
    SearchConfig,
    TrainConfig,
    about_quick,
    flat_params,
    given_otherwise,
    load_config,
    parse_options,
    parse_yaml,
    to_yaml,
)
from qexp.errors import InputError
from qexp.foundation import yaml_file
from qexp.measurement.latency import FEWEST_LOADS, FEWEST_ROUNDS
from qexp.pipeline.checks import check_profile

CHANGED = Config(
    model="vgg16",
    seed=7,
    threads=3,
    output_dir="out",
    data=DataConfig(dataset="imagefolder", data_dir="pets", image_size=64),
    preprocess=PreprocessConfig(resize=72, mean=[0.5], std=[0.25, 0.5, 1.0], input_range="-1,1"),
    train=TrainConfig(epochs=2, learning_rate=5e-4, flip=False, bf16=True),
    latency=LatencyConfig(batch_sizes=[4, 2], profile={2: 3.0, 4: 0.5}),
    gate=GateConfig(max_top1_drop=-0.5, models={"vgg16-pets-int8": {"max_top1_drop": 0.25}}),
    search=SearchConfig(observers=["minmax", "histogram"], study="mine"),
)


OPTIONS = [
    (section if isinstance(field.default, BaseModel) else "", key)
    for section, field in Config.model_fields.items()
    for key in (type(field.default).model_fields if isinstance(field.default, BaseModel) else [section])
]


def _write(folder: Path, text: str) -> str:
    file = folder / "options.yaml"
    file.write_text(text)
    return str(file)


def _refusal(folder: Path, text: str) -> str:
    with pytest.raises(InputError) as refused:
        load_config(_write(folder, text))
    return str(refused.value)


def test_file_wins_over_defaults_and_overrides_win_over_both(tmp_path: Path) -> None:
    file = _write(tmp_path, "seed: 5\ntrain:\n  epochs: 3\n  patience: 2\n")
    config = load_config(file, {"train": {"epochs": "9"}, "": {"model": "resnet18"}})
    assert (config.train.epochs, config.model) == (9, "resnet18")
    assert (config.train.patience, config.seed) == (2, 5)
    assert (config.train.momentum, config.latency) == (0.9, LatencyConfig())


def test_override_wins_although_it_equals_the_default(tmp_path: Path) -> None:
    file = _write(tmp_path, "train:\n  epochs: 3\n")
    assert load_config(file, {"train": {"epochs": "20"}}).train.epochs == 20


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("1:3,128:1", {1: 3.0, 128: 1.0}),
        ("8", {8: 1.0}),
        ("1,8:0.5", {1: 1.0, 8: 0.5}),
    ],
)
def test_weights_of_batch_sizes_on_the_command_line_and_in_a_file(
    tmp_path: Path, text: str, weights: dict[int, float]
) -> None:
    assert load_config(_write(tmp_path, ""), {"latency": {"profile": text}}).latency.profile == weights
    in_file = f"latency: {{profile: {{{', '.join(f'{size}: {weight}' for size, weight in weights.items())}}}}}"
    assert load_config(_write(tmp_path, in_file)).latency.profile == weights


@pytest.mark.parametrize("text", ["x", "1:x", "0:1", "1:0", "1:-2", "1:2:3", "1.5:1", ",", "1:inf", "1:1,1:2", "8, 8"])
def test_weights_that_are_none_are_refused(tmp_path: Path, text: str) -> None:
    """In one line with the text, or of a size that is none with the size."""
    size = {"x": "x", "0:1": "0", "1.5:1": "1.5"}.get(text, text)
    with pytest.raises(InputError, match=rf"^--profile {re.escape(size)}: must be "):
        load_config(_write(tmp_path, ""), {"latency": {"profile": text}})


def test_weights_of_a_batch_size_that_is_not_timed_are_refused() -> None:
    check_profile(LatencyConfig(batch_sizes=[1, 8], profile={8: 2.0}))
    with pytest.raises(InputError, match=r"^--profile 2: must be one of the batch sizes that are timed: 1, 8$"):
        check_profile(LatencyConfig(batch_sizes=[1, 8], profile={2: 1.0}))


def test_one_number_of_threads_or_several(tmp_path: Path) -> None:
    for text, threads in (("2", [2]), ("[2, 1, 2]", [1, 2]), ("auto", None)):
        assert load_config(_write(tmp_path, f"latency: {{threads: {text}}}")).latency.threads == threads
    assert load_config(overrides={"latency": {"threads": ["4", "2"]}}).latency.threads == [2, 4]


def test_overrides_are_text_that_becomes_values(tmp_path: Path) -> None:
    given = {"train": {"bf16": "false", "learning_rate": "5e-4"}, "latency": {"batch_sizes": ["1", "8"]}}
    config = load_config(_write(tmp_path, ""), given)
    assert config.train.bf16 is False
    assert config.train.learning_rate == 0.0005
    assert config.latency.batch_sizes == [1, 8]


def test_without_a_path_the_current_folder_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config() == Config()
    (tmp_path / "config.yaml").write_text("seed: 11\n")
    assert load_config().seed == 11


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trian:\n  epochs: 3\n", ["trian", "unknown key", "model, weights, seed, threads", "train, quantize"]),
        ("train:\n  epoch: 3\n", ["train.epoch:", "unknown key", "epochs, batch_size"]),
        ("train:\n  epochs: true\n", ["train.epochs", "True", "must be a valid integer"]),
        ("train:\n  epochs: ten\n", ["train.epochs", "ten", "must be a valid integer"]),
        ("train:\n  epochs: 2.5\n", ["train.epochs", "2.5", "must be a valid integer"]),
        ("train:\n  epochs: '3'\n", ["train.epochs", "3", "must be a valid integer"]),
        ("train:\n  epochs: -1\n", ["train.epochs", "-1", "must be greater than or equal to 0"]),
        ("train:\n  epochs:\n", ["train.epochs", "None", "must be a valid integer"]),
        ("train:\n  flip: 1\n", ["train.flip", "1", "must be a valid boolean"]),
        ("train:\n  learning_rate: .nan\n", ["train.learning_rate", "nan", "must be a finite number"]),
        ("train:\n  learning_rate: nan\n", ["train.learning_rate", "nan", "must be a valid number"]),
        ("train:\n  learning_rate: 0\n", ["train.learning_rate", "0", "must be greater than 0"]),
        ("gate: {models: {a-int8: {speed: 2}}}\n", ["gate.models.a-int8.speed", "unknown key", "max_top1_drop"]),
        ("gate: {models: {a-int8: {min_top1: 101}}}\n", ["gate.models.a-int8.min_top1", "101", "less than or equal"]),
        ("gate: {models: {a-fp32: {min_top1: 1}}}\n", ["gate.models.a-fp32", "ends with -int8"]),
        ("gate: {models: {a-int8: 3}}\n", ["gate.models.a-int8", "3", "must be"]),
        ("gate: {models: [a]}\n", ["gate.models", "must be a valid dictionary"]),
        ("gate:\n  max_top1_drop: .inf\n", ["gate.max_top1_drop", "inf", "must be a finite number"]),
        ("gate:\n  min_speedup: -.inf\n", ["gate.min_speedup", "-inf", "must be"]),
        ("data:\n  validation_share: 0.5\n", ["data.validation_share", "0.5", "must be less than 0.5"]),
        ("data:\n  dataset: mnist\n", ["data.dataset", "mnist", "digits", "cifar10", "imagefolder"]),
        ("latency:\n  batch_sizes: [1, 0]\n", ["latency.batch_sizes", "0", "must be greater than 0"]),
        ("latency:\n  batch_sizes: []\n", ["latency.batch_sizes", "[]", "at least 1 item"]),
        ("latency:\n  batch_sizes: 8\n", ["latency.batch_sizes", "8", "must be a valid list"]),
        ("train: 5\n", ["train", "5", "must be"]),
        ("seed: -1\n", ["seed", "-1", "must be greater than or equal to 0"]),
        ("seed: 4294967296\n", ["seed", "4294967296", "must be less than 4294967296"]),
        ("threads: 0\n", ["threads", "0", "must be greater than or equal to 1"]),
    ],
)
def test_refused_line_of_a_file(tmp_path: Path, text: str, words: list[str]) -> None:
    message = _refusal(tmp_path, text)
    assert [word for word in [*words, "options.yaml"] if word not in message] == []
    assert "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"train": {"epochs": "ten"}}, ["--epochs ten:", "must be a valid integer"]),
        ({"train": {"epochs": "true"}}, ["--epochs true:", "must be a valid integer"]),
        ({"train": {"batch_size": "1"}}, ["--batch-size 1:", "must be greater than or equal to 2"]),
        ({"train": {"learning_rate": "nan"}}, ["--learning-rate nan:", "must be a finite number"]),
        ({"train": {"weight_decay": "inf"}}, ["--weight-decay inf:", "must be a finite number"]),
        ({"train": {"bf16": "perhaps"}}, ["--bf16 perhaps:", "must be a valid boolean"]),
        ({"data": {"dataset": "mnist"}}, ["--dataset mnist:", "digits", "cifar10", "imagefolder"]),
        ({"latency": {"batch_sizes": ["1", "x"]}}, ["--batch-sizes x:", "must be a valid integer"]),
        ({"": {"seed": "-1"}}, ["--seed -1:", "must be greater than or equal to 0"]),
    ],
)
def test_refused_override_names_the_option(tmp_path: Path, overrides: dict, words: list[str]) -> None:
    with pytest.raises(InputError) as refused:
        load_config(_write(tmp_path, ""), overrides)
    assert [word for word in words if word not in str(refused.value)] == []


@pytest.mark.parametrize("text", ["train: [1,\n", "a: b: c\n", "\tseed: 1\n", "seed: 1\x00\n"])
def test_text_that_is_not_yaml(tmp_path: Path, text: str) -> None:
    message = _refusal(tmp_path, text)
    assert "options.yaml: not YAML" in message
    assert "\n" not in message


@pytest.mark.parametrize(("text", "kind"), [("- seed\n", "list"), ("seed\n", "str"), ("5\n", "int")])
def test_yaml_that_is_not_a_mapping(tmp_path: Path, text: str, kind: str) -> None:
    message = _refusal(tmp_path, text)
    assert "options.yaml" in message and "`key: value`" in message and message.endswith(f"not {kind}")


MOST = yaml_file.MOST_BYTES
TOO_MUCH = {
    "brackets": ("[" * 20_000, "nested more than 8 levels"),
    "indented": ("- " * 20_000, "nested more than 8 levels"),
    "a mapping in itself": ("gate: &g {models: *g}", "alias (*g)"),
    "nested aliases": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "alias (*a)"),
    "an integer of 5,000 digits": ("seed: " + "9" * 5000, "5000 characters"),
    "a hexadecimal one": ("seed: 0x" + "f" * 5000, "5002 characters"),
    "keys": ("".join(f"k{number}: 1\n" for number in range(20_000)), "more than 10,000 values"),
    "comments": ("# nothing\n" * (MOST // 10 + 1), "more than 256 KiB"),
    "a key twice": ("seed: 1\ntrain: {epochs: 2}\nseed: 3\n", "key seed twice, again in line 3"),
    "a date that is none": ("seed: 2020-13-45", "not YAML: a value that is none"),
    "a number of another base": ("seed: " + ":".join("1" * 3000) + ".5", "not YAML: a value that is none"),
    "an object": ("seed: !!python/object/apply:os.system [ls]", "not YAML: could not determine a constructor"),
    "two documents": ("seed: 1\n---\nseed: 2\n", "not YAML: expected a single document"),
    "no UTF-8": ("model: \udcff", "is not UTF-8 at byte 7"),
    "a key of another type": ("2020-01-01: 1", "Keys should be strings"),
    "more than anybody means": ("train: {batch_size: 100000000000}", "less than or equal to 1000000000"),
    "a name with the end of a line": ('search: {study: "a\\nb"}', "must be text that can be printed"),
    "a path with a NUL": ('data: {data_dir: "a\\0b"}', "must be a path in UTF-8"),
}


@pytest.mark.parametrize("case", TOO_MUCH)
def test_what_no_configuration_needs_is_refused_at_once(case: str, tmp_path: Path) -> None:
    text, said = TOO_MUCH[case]
    file = tmp_path / "options.yaml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    started = time.monotonic()
    with pytest.raises(InputError) as refused:
        load_config(str(file))
    assert time.monotonic() - started < 5
    assert said in str(refused.value) and str(file) in str(refused.value)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 600


@pytest.mark.parametrize(
    "name", ["pipe", "/dev/zero", "/dev/null", "/dev/stdin", "folder", "~/nothing", "a\0b", "a" * 5000]
)
def test_only_regular_files_are_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("folder").mkdir()
    with pytest.raises(InputError, match=r"^--config .*: cannot be read \(.*\); give a YAML file") as refused:
        load_config(name)
    assert str(refused.value).isprintable()


@SEEDED
@given(st.dictionaries(st.sampled_from(list(Config.model_fields)) | nasty_texts(), trees(), max_size=5))
def test_any_values_are_a_configuration_or_one_line(tree: dict[str, object]) -> None:
    _config_or_one_line(yaml.dump(tree, allow_unicode=True))


@SEEDED
@given(st.sampled_from(OPTIONS), trees(leaves=6))
def test_any_value_of_an_option_is_taken_or_refused_in_one_line(option: tuple[str, str], value: object) -> None:
    section, key = option
    _config_or_one_line(yaml.dump({section: {key: value}} if section else {key: value}))


@SEEDED
@given(st.lists(st.sampled_from([*"[]{}:,-?&*!|>%@#\"'\n \t~=<.0", "a", "train:\n  ", "epochs: ", "!!", "---\n"])))
def test_any_text_is_a_configuration_or_one_line(parts: list[str]) -> None:
    _config_or_one_line("".join(parts))


@SEEDED
@given(st.sampled_from(OPTIONS), nasty_texts())
def test_any_text_of_an_option_is_taken_or_refused_in_one_line(option: tuple[str, str], text: str) -> None:
    section, key = option
    try:
        parse_options({section: {key: text}})
        parse_options({section: {key: text.split(",")}})
    except InputError as error:
        assert len(str(error).splitlines()) == 1


def _config_or_one_line(text: str) -> None:
    try:
        config = parse_yaml(text)
    except InputError as error:
        assert str(error).isprintable() and len(str(error)) < 1000
    else:
        assert parse_yaml(to_yaml(config)) == config


@pytest.mark.parametrize(
    ("section", "key"), [*(("data", place) for place in PLACES), ("", "output_dir"), ("search", "study_dir")]
)
def test_the_home_folder_stands_for_a_tilde_wherever_a_path_comes_from(
    section: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    line = f"{key}: ~/x y\n"
    for config in (
        load_config(_write(tmp_path, f"{section}:\n  {line}" if section else line)),
        load_config(_write(tmp_path, ""), {section: {key: "~/x y"}}),
    ):
        assert getattr(getattr(config, section) if section else config, key) == "/home/me/x y"


@pytest.mark.parametrize(
    ("section", "key", "one", "other"),
    [
        ("search", "observers", "minmax,histogram", "histogram,minmax,minmax"),
        ("search", "weight_scales", "layer,channel", "channel,layer"),
        ("search", "sample_counts", "8,4", "4,8"),
        ("search", "fp32_layer_counts", "2,0", "0,2"),
        ("quantize", "keep_fp32", "b,a.0", "a.0, b"),
        ("latency", "baselines", "bf16,fp32_eager", "fp32_eager,bf16"),
        ("latency", "batch_sizes", "8,1", "1,8"),
        ("latency", "profile", "8:1,1:3", "1:3,8:1"),
    ],
)
def test_lists_whose_order_has_no_meaning_are_the_same_in_any(
    section: str, key: str, one: str, other: str, tmp_path: Path
) -> None:
    empty = _write(tmp_path, "")
    first, second = (load_config(empty, {section: {key: given.split(",")}}) for given in (one, other))
    assert to_yaml(first) == to_yaml(second) != to_yaml(Config())


def test_engines_of_a_study_are_the_same_in_any_order(tmp_path: Path) -> None:
    from qexp.search.study import search_space

    empty = _write(tmp_path, "")
    spaces = [
        search_space(load_config(empty, {"quantize": {"engine": given}})) for given in (["fx", "onnx"], ["onnx", "fx"])
    ]
    assert repr(spaces[0]) == repr(spaces[1])


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "picture.yaml").write_bytes(b"\x89PNG\xff\xfe")
    for name in ("absent.yaml", "picture.yaml", "."):
        with pytest.raises(InputError, match="cannot be read") as refused:
            load_config(str(tmp_path / name))
        assert str(tmp_path / name).removesuffix("/.") in str(refused.value)
        assert "--config" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "value"), [("5e-4", 5e-4), ("5E-4", 5e-4), ("1e1", 10.0), (".5e1", 5.0), ("5.e-1", 0.5), ("+1e-1", 0.1)]
)
def test_exponents_are_numbers(text: str, value: float) -> None:
    assert parse_yaml(f"train:\n  weight_decay: {text}\n").train.weight_decay == value


def test_names_that_begin_like_a_number_stay_text() -> None:
    assert parse_yaml("search:\n  study: 5e-4-again\n").search.study == "5e-4-again"


@pytest.mark.parametrize("text", ["", "# nothing\n", "train:\n", "train:\n  epochs: auto\n", "threads: auto\n", "{}"])
def test_auto_and_nothing_mean_not_given(tmp_path: Path, text: str) -> None:
    assert load_config(_write(tmp_path, text)) == Config()


def test_auto_in_a_file_does_not_hide_an_override(tmp_path: Path) -> None:
    file = _write(tmp_path, "train:\n  learning_rate: auto\n")
    assert load_config(file, {"train": {"learning_rate": "0.1"}}).train.learning_rate == 0.1


def test_limits_of_one_model_win_over_the_gate_and_the_command_line_over_both(tmp_path: Path) -> None:
    text = "gate: {min_top1: 1.0, models: {a-int8: {min_top1: 60.0, min_speedup: 3.0, max_top1_drop: auto}}}\n"
    file = _write(tmp_path, text)
    own = load_config(file).gate.of("a-int8")
    assert (own.min_top1, own.min_speedup, own.max_top1_drop) == (60, 3, GateConfig().max_top1_drop)
    given = load_config(file, {"gate": {"min_top1": "2"}}).gate
    assert given.min_top1 == given.of("a-int8").min_top1 == 2 and given.of("a-int8").min_speedup == 3


def test_quick_takes_the_place_of_defaults_and_what_is_given_wins(tmp_path: Path) -> None:
    quick = {"": {"quick": "true"}}
    config = load_config(str(REPOSITORY / "config.yaml"), quick)  # which has every default
    for section, values in QUICK.items():
        assert {key: getattr(getattr(config, section), key) for key in values} == values
    assert config.latency.loads >= FEWEST_LOADS and config.latency.min_repeats >= FEWEST_ROUNDS
    assert config.latency.fits_batch_sizes and str(config.train.epochs) in Config.model_fields["quick"].description
    given = load_config(None, quick | {"train": {"epochs": "20"}, "latency": {"batch_sizes": ["1", "2"]}})
    assert (given.train.epochs, given.latency.batch_sizes, given.latency.loads) == (20, [1, 2], 3)
    file = _write(tmp_path, "quick: true\ntrain: {epochs: 7}\nlatency: {profile: {2: 1}}\n")
    assert load_config(file).train.epochs == 7
    assert load_config(file).latency.batch_sizes == [1, 2, 8, 32]
    assert load_config(file, {"": {"quick": "false"}}).latency.batch_sizes == LatencyConfig().batch_sizes


def test_quick_says_what_it_does_to_a_command() -> None:
    words, options = about_quick(), {name for section in QUICK.values() for name in section}
    assert set(QUICK_WORDS) - {"engine"} <= options and all(text in words for text in QUICK_WORDS.values())
    for sizes in (QUICK["latency"]["batch_sizes"], [QUICK["throughput"]["load_seconds"]]):
        assert ", ".join(map(str, sizes)) in words
    assert about_quick({"epochs", "momentum"}) == "less of everything that is not given: 4 epochs"


def test_what_quick_has_changed_was_not_given() -> None:
    quick = load_config(None, {"": {"quick": "true"}, "train": {"momentum": "0.5"}})
    assert [name for name, _, _ in given_otherwise(quick, Config())] == ["train.momentum"]


def test_batch_sizes_are_chosen_on_the_command_line_even_if_they_are_the_default(tmp_path: Path) -> None:
    assert Config().latency.fits_batch_sizes
    sizes = list(map(str, LatencyConfig().batch_sizes))
    assert not load_config(_write(tmp_path, ""), {"latency": {"batch_sizes": sizes}}).latency.fits_batch_sizes
    assert not load_config(_write(tmp_path, "latency: {batch_sizes: [1, 8]}")).latency.fits_batch_sizes
    both = {"latency": {"batch_sizes": ["1"], "fit_batch_sizes": "true"}}
    assert load_config(_write(tmp_path, ""), both).latency.fits_batch_sizes


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().seed = 1


def test_repository_file_equals_the_defaults() -> None:
    assert load_config(str(REPOSITORY / "config.yaml")) == Config()


def _options(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, str]:
    """Description of every option by `section.key`."""
    found: dict[str, str] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.default, BaseModel):
            found |= _options(type(field.default), f"{name}.")
        else:
            found[prefix + name] = field.description or ""
    return found


def test_repository_file_has_every_option_with_its_help_as_comment() -> None:
    comments, section = {}, ""
    for line in (REPOSITORY / "config.yaml").read_text().splitlines():
        if heading := re.fullmatch(r"(\w+):", line):
            section = f"{heading[1]}."
        elif option := re.fullmatch(r"( *)(\w+): [^#]*(?:# (.*))?", line):
            comments[(section if option[1] else "") + option[2]] = option[3]
    assert comments == _options()


@pytest.mark.parametrize("config", [Config(), CHANGED], ids=["defaults", "changed"])
def test_yaml_round_trip(tmp_path: Path, config: Config) -> None:
    assert parse_yaml(to_yaml(config)) == config
    assert load_config(_write(tmp_path, to_yaml(config))) == config


def test_written_yaml_is_read_alike_by_a_plain_reader() -> None:
    assert yaml.safe_load(to_yaml(CHANGED))["train"]["learning_rate"] == 5e-4


def test_flat_params_have_a_section_each() -> None:
    params = flat_params(CHANGED)
    assert {name.removeprefix("config.") for name in params} == set(_options())
    assert all("." in name for name in params)
    assert params["config.seed"] == 7
    assert params["train.learning_rate"] == 5e-4
    assert params["quantize.observer"] == "histogram"
    assert flat_params(Config())["train.learning_rate"] == "auto"
