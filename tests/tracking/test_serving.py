"""Versions of every engine as MLflow serves them: real servers, real HTTP, and processes that may load no pickle."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from conftest import Finished, build_tiny, environment_for
from forked import Forked, start_python
from mlflow.pyfunc import scoring_server
from PIL import Image

from qexp.config import QuantizeConfig
from qexp.data.datasets import Dataset
from qexp.measurement.accuracy import to_float
from qexp.pipeline.predict import predict_files
from qexp.quantization import quantize_model
from qexp.tracking import registry

CHAMPION = "models:/smallnet-digits-int8@champion"
FP32 = "models:/smallnet-digits-fp32/1"
WITHOUT_PICKLE = {FP32: "true", CHAMPION: "false", "models:/tiny-pt2e/1": "false", "models:/tiny-onnx/1": "true"}
LOAD_ALL = """
import json, sys, mlflow
found = {}
for uri in sys.argv[1:]:
    try:
        mlflow.pyfunc.load_model(uri)
        found[uri] = "true"
    except mlflow.exceptions.MlflowException as error:
        assert "pickle is disallowed" in str(error), error
        found[uri] = "false"
print(json.dumps(found))
"""
Answer = tuple[int, str]
Post = Callable[..., Answer]


@pytest.fixture(scope="module")
def store(finished: Finished, tiny: Dataset, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A copy of the finished run's store, with a champion whatever the gate said, and two engines more at 8 px."""
    folder = tmp_path_factory.mktemp("served")
    uri = f"sqlite:///{folder}/mlflow.db"
    source, copy = sqlite3.connect(finished.folder / "mlflow.db"), sqlite3.connect(folder / "mlflow.db")
    source.backup(copy)
    source.close()
    copy.close()
    mlflow.set_tracking_uri(uri)
    mlflow.MlflowClient().set_registered_model_alias("smallnet-digits-int8", "champion", "1")
    experiment = mlflow.create_experiment("served", artifact_location=str(folder / "artifacts"))
    model, images = build_tiny(tiny).eval(), tiny.train.images
    for engine in ("pt2e", "onnx"):
        made = quantize_model(model, images[:32], QuantizeConfig(engine=[engine]), False)
        with mlflow.start_run(experiment_id=experiment):
            tags = {"engine": engine, "flavor": made.flavor}
            name = f"tiny-{engine}"
            version = registry.register("int8", made.module, name, model.spec, images[:8], tags, stored=made.stored)
        assert version.verified
    return uri


@contextmanager
def _serve(store: str, uri: str, folder: Path, as_fork: bool = False) -> Iterator[Post]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    process: subprocess.Popen[bytes] | Forked
    port = address.rpartition(":")[2]
    if as_fork:  # of the program that `mlflow models serve` starts
        words = ("-m", "uvicorn", "mlflow.pyfunc.scoring_server.app:app", "--host", "127.0.0.1", "--port", port)
        mlflow.set_tracking_uri(store)
        model = {scoring_server._SERVER_MODEL_PATH: mlflow.artifacts.download_artifacts(uri)}
        log = str(folder / "server.log")
        process = start_python(folder, words, _environment(store) | model, written=(log, log))
    else:
        command = ["mlflow", "models", "serve", "-m", uri, "--env-manager", "local", "-p", port]
        with (folder / "server.log").open("w") as file:
            process = subprocess.Popen(
                command, env=_environment(store), stdout=file, stderr=file, start_new_session=True
            )

    def post(body: bytes) -> Answer:
        request = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    try:
        _wait(f"{address}/ping", process, folder / "server.log")
        yield post
        assert process.poll() is None
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def _environment(store: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return environment_for(store) | {"PATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def _wait(url: str, process: "subprocess.Popen[bytes] | Forked", log: Path) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
    raise AssertionError(f"no answer in a minute: {log.read_text()}")


@pytest.fixture(scope="module")
def post(store: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Post]:
    """A server of the champion, the same for all tests: it has to live on."""
    with _serve(store, CHAMPION, tmp_path_factory.mktemp("server")) as asking:
        yield asking


def _body(images: Any, key: str = "inputs") -> bytes:
    return json.dumps({key: images.tolist() if isinstance(images, np.ndarray) else images}).encode()


def _logits(answer: Answer) -> np.ndarray:
    status, text = answer
    assert status == 200, text
    found = json.loads(text)["predictions"]
    return np.array(found["logits"] if isinstance(found, dict) else found, np.float32)


def _in_process(store: str, uri: str, images: np.ndarray) -> np.ndarray:
    mlflow.set_tracking_uri(store)
    with torch.no_grad():
        return registry.load_version(uri, "x86")(torch.from_numpy(images)).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("key", ["inputs", "instances"])
@pytest.mark.parametrize("count", [1, 64])
def test_served_logits_are_those_in_process_bit_for_bit(
    post: Post, store: str, digits: Dataset, count: int, key: str
) -> None:
    images = to_float(digits.test.images[:count]).numpy()
    found = _logits(post(_body(images, key)))
    assert found.shape == (count, 10)
    assert np.array_equal(found, _in_process(store, CHAMPION, images))  # JSON holds every float32 exactly


@pytest.mark.slow
def test_requests_at_the_same_time_get_each_their_own_logits(post: Post, store: str, digits: Dataset) -> None:
    images = to_float(digits.test.images[:24]).numpy()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda image: _logits(post(_body(image[None]))), images))
    assert all(
        np.array_equal(one, _in_process(store, CHAMPION, image[None])) for one, image in zip(found, images, strict=True)
    )


@pytest.mark.slow
def test_a_version_of_the_other_flavor_is_served_too(store: str, tiny: Dataset, tmp_path: Path) -> None:
    """ONNX; `pt2e` has the flavor of `fx`, and loads in test_a_version_says_whether_it_loads_without_pickle."""
    uri = "models:/tiny-onnx/1"
    images = to_float(tiny.validation.images).numpy()
    with _serve(store, uri, tmp_path, as_fork=True) as asking:
        for count in (1, 60):
            found = _logits(asking(_body(images[:count])))
            assert np.array_equal(found, _in_process(store, uri, images[:count]))
        status, text = asking(_body(np.zeros((1, 3, 9, 8), np.float32)))
        assert status == 400 and "(-1, 3, 8, 8)" in text


def _full(value: object, *shape: int) -> list[Any]:
    return np.full(shape or (1, 3, 16, 16), value).tolist()


SHAPE = "does not match expected shape (-1, 3, 16, 16)"
WRONG = {  # body, what the message says
    "other size": (_body(_full(0.5, 1, 3, 15, 16)), f"Shape of input (1, 3, 15, 16) {SHAPE}"),
    "grey": (_body(_full(0.5, 2, 1, 16, 16)), f"Shape of input (2, 1, 16, 16) {SHAPE}"),
    "channels last": (_body(_full(0.5, 1, 16, 16, 3)), SHAPE),
    "no batch": (_body(_full(0.5, 3, 16, 16)), SHAPE),
    "nothing": (_body([]), "Tensor('float32', (-1, 3, 16, 16))"),
    "pixels of text": (_body(_full("red")), "could not convert string to float: 'red'"),
    "no JSON": (b"this is no JSON", "valid JSON formatted string"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_body_is_refused_with_what_is_expected_and_the_server_lives_on(case: str, post: Post) -> None:
    good = _body(_full(0.5))
    before = post(good)
    body, message = WRONG[case]
    status, text = post(body)
    assert status == 400 and message in json.loads(text)["message"], text
    assert before[0] == 200 and post(good) == before


@pytest.mark.slow
def test_values_outside_0_to_1_are_computed_with_as_in_process(post: Post, store: str) -> None:
    for value in (255, -3, True):
        images = np.full((1, 3, 16, 16), value, np.float32)
        assert np.array_equal(_logits(post(_body(_full(value)))), _in_process(store, CHAMPION, images))


@pytest.mark.slow
def test_a_version_says_whether_it_loads_without_pickle(store: str, tmp_path: Path) -> None:
    environment = _environment(store) | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    process = start_python(tmp_path, ("-c", LOAD_ALL, *WITHOUT_PICKLE), environment)
    assert process.wait() == 0, process.stderr
    assert json.loads(process.stdout) == WITHOUT_PICKLE
    mlflow.set_tracking_uri(store)
    tags = {uri: registry.find_version(uri, "fp32", "int8").tags["loads_without_pickle"] for uri in WITHOUT_PICKLE}
    assert tags == WITHOUT_PICKLE


@pytest.mark.parametrize("uri", WITHOUT_PICKLE)
def test_predictions_of_every_engine_are_the_softmax_of_its_logits(
    uri: str, store: str, digits: Dataset, tmp_path: Path
) -> None:
    size = 8 if "tiny" in uri else 16
    pixels = [Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size)) for image in digits.test.images[:5]]
    files = [str(tmp_path / f"{number}.png") for number in range(len(pixels))]
    for image, file in zip(pixels, files, strict=True):
        image.save(file)
    images = np.stack([np.asarray(image) for image in pixels]).transpose(0, 3, 1, 2)
    images = np.ascontiguousarray(images, np.float32) / 255
    logits = torch.from_numpy(_in_process(store, uri, images)).double()
    own, predictions = predict_files(uri, files, 10)
    assert own == uri.replace("@champion", "/1")
    for prediction, expected in zip(predictions, torch.softmax(logits, 1), strict=True):
        found = dict(zip(prediction.classes, prediction.probabilities, strict=True))
        assert found == pytest.approx({str(n): share for n, share in enumerate(expected.tolist())})
        assert list(prediction.probabilities) == sorted(prediction.probabilities, reverse=True)
