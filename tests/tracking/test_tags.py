"""Tags of versions that somebody has changed: one line from whatever reads them, and a list that leaves them out."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.entities.model_registry import ModelVersion, ModelVersionTag
from stores import new_store
from strategies import SEEDED, nasty_texts, trees

import qexp
from qexp.config import Config, to_yaml
from qexp.errors import InputError
from qexp.foundation.text import printable
from qexp.pipeline.jobs import run_latency, run_quantize, run_report
from qexp.pipeline.loading import fp32_from_registry, load_weights
from qexp.pipeline.predict import predict_files
from qexp.pipeline.promote import run_promote
from qexp.pipeline.verify import RECORDED, run_verify
from qexp.tracking import description, registry, store
from qexp.tracking.catalog import as_table, list_models
from qexp.tracking.class_names import ClassNames
from qexp.tracking.tags import LONGEST_VALUE, TAGS, Tags, tags_of

FP32, INT8 = "birds-fp32", "birds-int8"
NUMBERS = ("nan", "inf", "-inf", "1e400", "-1e3", "1e10", "x", "", "0x10", "1 2")
WHOLE = ("nan", "-1", "0", "1.5", "1e400", "9" * 5000, "9999999999", "x", "", "²", " 4")
RUN = ("", "x", "0" * 31, "G" * 32, "../" * 11, "0" * 33)
URI = ("", "x", "models:/a", "models:/a/b", "models:/a/1/2", "models:/a@champion", "runs:/0/m", "models:/a/" + "9" * 10)
TRUTH = ("", "True", "yes", "1", "nan")
BAD: dict[str, tuple[str, ...]] = {
    "kind": (),  # another word is a version that is not ours
    "verified": TRUTH,
    "classes": ("{", "{}", "[]", '["a", 1]', '"ab"', "null", "1", "", "[" * 50_000, "9" * 5000, '[["a"]]'),
    "image_size": ("abc", "99999999", "16x", "16x0", *WHOLE),
    "preprocessing": ("{", "[]", "{}", '{"height_px": 0, "width_px": 16}', '{"height_px": "16", "width_px": 16}'),
    "artifact_sha256": ("", "x", "0" * 63, "0" * 65, "Z" * 64),
    "loads_without_pickle": TRUTH,
    "trained": ("", "here", "ELSEWHERE"),
    "flavor": ("", "sklearn", "pyfunc"),
    "backend": ("", "cuda", "x86,onednn"),
    "runtime": ("", "tensorrt", "openvino,onnxruntime"),
    "engine": ("", "tensorrt", "fx,onnx", "FX"),
    "folded": TRUTH,
    "fp32_uri": URI,
    "weights_uri": ("", "x", "/etc/passwd", "file:///etc/passwd", "https://e.org/x", f"runs:/{'0' * 32}/../../x"),
    "weights_sha256": ("", "x", "0" * 63, "Z" * 64),
    "dataset": ("", " ", "a\nb", "a\x1b[31m", "a" * 251),
    "data_digest": ("", "x", "xyz" * 8),
    **dict.fromkeys(
        ("train_run_id", "quantize_run_id", "latency_run_id", "report_run_id", "promotion_run_id", "throughput_run_id"),
        RUN,
    ),
    "champion_kept": URI,
    "champion_compared": TRUTH,
    "threads": ("100000", *WHOLE),
    "calibration_samples": WHOLE,
    "p50_batch_size": WHOLE,
    "p50_threads": ("100000", *WHOLE),
    **{name: NUMBERS for name, tag in TAGS.items() if tag.allowed.startswith("a number")},
}
RUN_ID = "0123456789abcdef" * 2
GOOD = {
    "verified": "true", "classes": '["cat", "dog"]', "image_size": "16", "artifact_sha256": "ab" * 32,
    "loads_without_pickle": "true", "flavor": "pytorch", "backend": "onednn", "engine": "fx",
    "runtime": "openvino", "folded": "true",
    "fp32_uri": f"models:/{FP32}/1", "weights_uri": f"runs:/{RUN_ID}/weights/model.safetensors", "dataset": "birds",
    "weights_sha256": "ab" * 32,
    "data_digest": "0123456789abcdef", "champion_kept": "none", "champion_compared": "false", "threads": "2",
    "calibration_samples": "64", "p50_batch_size": "1", "p50_threads": "2", "test_top1_percent": "93.25",
    "promotion_reason": "", "cpu": "Imagined CPU", "trained": "elsewhere",
    "preprocessing": '{"height_px": 16, "width_px": 16}',
}  # fmt: skip
GOOD |= {name: RUN_ID for name in TAGS if name.endswith("run_id")}
GOOD |= {name: "1.5" for name, tag in TAGS.items() if tag.allowed.startswith("a number") and name not in GOOD}


def _version(tags: dict[str, str]) -> ModelVersion:
    return ModelVersion(INT8, "1", 0, tags=[ModelVersionTag(*pair) for pair in tags.items()])


def _as_json(tree: object) -> str:
    return json.dumps(tree, default=str)


def _line(uri: str, name: str, value: str) -> str:
    shown = value if len(value) <= LONGEST_VALUE else value[:LONGEST_VALUE] + "…"
    return f"{uri}: its tag {name} is {shown}: must be {TAGS[name].allowed}"


def test_every_tag_has_values_here_that_it_refuses() -> None:
    assert set(BAD) == set(TAGS)
    tags = tags_of(_version(GOOD | {"kind": "int8"})).check()
    assert (
        tags.classes == ClassNames(2, ("cat", "dog"))
        and tags.image_size == (16, 16)
        and tags.verified is True
        and tags.threads == 2
    )
    assert tags.champion_compared is False and tags.test_top1_percent == 93.25
    assert tags_of(_version({})).backend is None and not [name for name in TAGS if Tags.known(tags, name) is None]


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_value_is_one_line_and_is_left_out_of_lists(name: str) -> None:
    for value in BAD[name]:
        tags, told = tags_of(_version(GOOD | {"kind": "int8", name: value})), list[str]()
        with pytest.raises(InputError) as refused:
            tags.read(TAGS[name])
        assert str(refused.value) == _line(f"models:/{INT8}/1", name, value)
        assert tags.known(name, told.append) is None and told == [str(refused.value)]
        if TAGS[name].figure:
            tags.check()
        else:
            with pytest.raises(InputError, match=re.escape(str(refused.value))):
                tags.check()
        text = description.of_version(_version({"kind": "int8", "classes": GOOD["classes"], name: value}))
        assert "To load it:" in text and (not value.strip() or len(value) < 3 or value not in text)


@SEEDED
@given(st.sampled_from(list(TAGS)), nasty_texts() | trees(leaves=4).map(_as_json))
def test_any_text_of_a_tag_is_a_value_or_one_line(name: str, text: str) -> None:
    """And the page of the version is made from the other tags."""
    version = _version(GOOD | {"kind": "int8", name: text})
    try:
        tags_of(version).read(TAGS[name])
    except InputError as error:
        line = printable(str(error))
        assert f"its tag {name} is" in line and line.endswith(printable(TAGS[name].allowed))
    assert "To load it:" in description.of_version(version)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> mlflow.MlflowClient:
    """An fp32 version and an int8 version without files: what has wrong tags is refused before they are asked for."""
    folder = tmp_path_factory.mktemp("tags")
    mlflow.set_tracking_uri(new_store(folder))
    client = mlflow.MlflowClient()
    experiment = client.create_experiment("tags", artifact_location=str(folder / "runs"))
    with mlflow.start_run(experiment_id=experiment) as run:
        mlflow.log_text(to_yaml(Config()), "config.yaml")
    own = {name: run.info.run_id for name in TAGS if name.endswith("run_id")}
    for name, kind in ((FP32, "fp32"), (INT8, "int8")):
        client.create_registered_model(name)
        client.create_model_version(name, (folder / "gone").as_uri(), tags=GOOD | own | {"kind": kind})
    return client


@pytest.fixture(autouse=True)
def _the_store_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes half of the time."""
    monkeypatch.setattr(store, "ask_store", lambda: None)


def _readers(uri: str, image: str) -> dict[str, Callable[[], object]]:
    """Everything that takes a version, by what it reads beyond what all need."""
    number = uri.split("/")[-1]
    return {
        "verify": lambda: run_verify(Config(), uri),
        "predict": lambda: predict_files(uri, [image], 1),
        "load": lambda: qexp.load(uri),
        "latency": lambda: run_latency(Config(), uri),
        "report": lambda: run_report(Config(), uri),
        "promote": lambda: run_promote(Config(), INT8, number),
    }


@pytest.mark.parametrize("name", BAD)
def test_every_reader_says_so_before_it_begins(name: str, client: mlflow.MlflowClient, tmp_path: Path) -> None:
    """All for the tag that most read first; for each of the others two of them in turn, since all look at once."""
    (image := tmp_path / "image.png").write_bytes(b"")
    uri, (value, *_) = f"models:/{INT8}/1", BAD[name] or ("int4",)
    kept = client.get_model_version(INT8, "1").tags[name]
    client.set_model_version_tag(INT8, "1", name, value)
    try:
        readers, turn = _readers(uri, str(image)), list(BAD).index(name)
        if name != "classes":
            readers = {one: readers[one] for place, one in enumerate(readers) if place % 3 == turn % 3}
        if TAGS[name].figure:  # for those that compare or show it
            readers = {"verify": _readers(uri, "")["verify"]} if name in RECORDED else {}
        for command, reader in readers.items():
            with pytest.raises(InputError) as refused:
                reader()
            said = str(refused.value)
            if name != "kind":
                assert said == _line(uri, name, value), command
            assert len(said.splitlines()) <= 1 + value.count("\n") and not client.search_runs(["0"])
        (row,) = list_models(INT8)
        shown = row | row["lineage"]
        assert shown.get(name) in (None, False) and as_table([row])
    finally:
        client.set_model_version_tag(INT8, "1", name, kept)


def test_a_missing_tag_is_named(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    uri, tags = f"models:/{INT8}/1", client.get_model_version(INT8, "1").tags
    needed = {
        "artifact_sha256": ("verify", "predict", "load", "latency", "report", "promote"),
        "image_size": ("verify", "predict", "load"),
        "engine": ("latency",),
        "fp32_uri": ("latency", "report", "promote"),
        "train_run_id": ("verify", "latency", "report"),
        "dataset": ("latency", "report"),
        "threads": ("verify",),
        "test_top3_correct": ("verify",),
    }
    for name, commands in needed.items():
        client.delete_model_version_tag(INT8, "1", name)
        for command in commands:
            with pytest.raises(InputError, match=f"^{uri}: has no tag {name}, which qexp gives to every version$"):
                _readers(uri, "image.png")[command]()
        client.set_model_version_tag(INT8, "1", name, tags[name])


def test_a_tag_that_names_what_is_not_there_is_said(client: mlflow.MlflowClient) -> None:
    """Whoever gave the version has not named the other."""
    uri, gone = f"models:/{INT8}/1", "f" * 32
    readers, tags = _readers(uri, ""), client.get_model_version(INT8, "1").tags
    wrong = {
        "fp32_uri": (f"models:/{FP32}/7", ("latency", "report", "promote")),
        "train_run_id": (gone, ("verify", "latency", "report")),
    }
    for name, (value, commands) in wrong.items():
        client.set_model_version_tag(INT8, "1", name, value)
        for command in commands:
            with pytest.raises(InputError, match=f"^{uri}: its tag {name} is {value}: ") as refused:
                readers[command]()
            assert "--model-uri" not in str(refused.value)
        client.set_model_version_tag(INT8, "1", name, tags[name])


def test_an_fp32_version_is_read_the_same_way(client: mlflow.MlflowClient) -> None:
    uri, tags = f"models:/{FP32}/1", client.get_model_version(FP32, "1").tags
    for name, value in (("weights_uri", "/etc/passwd"), ("classes", "[]"), ("artifact_sha256", "0")):
        client.set_model_version_tag(FP32, "1", name, value)
        for read in (
            lambda: run_quantize(Config(), uri),
            lambda: load_weights(registry.find_version(uri, "fp32")),
            lambda: fp32_from_registry(uri, None),  # type: ignore[arg-type]
            lambda: run_latency(Config(), f"models:/{INT8}/1"),
        ):
            with pytest.raises(InputError, match=re.escape(_line(uri, name, value))):
                read()
        client.set_model_version_tag(FP32, "1", name, tags[name])
