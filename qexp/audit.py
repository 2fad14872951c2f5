"""A registered version loaded in a bare process, measured again, and held against what its tags say."""

import subprocess
import sys
import tempfile
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qexp import registered, registry, tracking
from qexp.aliases import ModelVersion
from qexp.config import Config
from qexp.data import Dataset, load_dataset
from qexp.errors import InputError, StageError
from qexp.evaluation import Accuracy, measure_accuracy
from qexp.host import Host, read_host
from qexp.integrity import checked_copy
from qexp.progress import say

# Runs with nothing of qexp imported: what a user's process sees. Batches are those of the evaluation: same sums.
BARE_PROCESS = """
import sys
import mlflow, numpy
folder, images, logits = sys.argv[1:]
model, images, found = mlflow.pyfunc.load_model(folder), numpy.load(images, mmap_mode="r"), []
for start in range(0, len(images), 256):
    given = model.predict(images[start : start + 256].astype(numpy.float32) / numpy.float32(255))
    found.append(next(iter(given.values())) if isinstance(given, dict) else given)
assert "qexp" not in sys.modules
numpy.save(logits, numpy.concatenate(found))
"""
OTHER_CPU_SHARE = 0.002  # of the images: int8 kernels of other instructions round otherwise, which moves near ties


def run_verify(config: Config, uri: str) -> dict[str, Any]:
    """Load the version `uri` in a bare process, measure its accuracy on the test images again, and compare.

    Raises:
        InputError: the version does not exist or is not ours, or the data are not those that it was made with.
        StageError: its files are gone or others, it does not load, or its accuracy is another.
    """
    tracking.use_store()
    try:
        found = registry.look_up(uri)
    except InputError as error:
        raise InputError(str(error).replace("--model-uri", "URI", 1)) from None
    if "kind" not in found.tags:
        raise InputError(f"URI {uri}: must be a version that qexp registered")
    uri = f"models:/{found.name}/{found.version}"
    config = registered.config_of_version(config, uri, found.tags["kind"])
    host = read_host(config.threads or int(found.tags.get("threads", 0)) or None)
    dataset = load_dataset(config.data, config.seed)
    registered.check_data(uri, dataset, found.tags["kind"])
    with checked_copy(found) as copy:
        say(f"{uri}: {len(dataset.test)} test images in a bare process, {host.threads} threads")
        accuracy = _measure_bare(uri, copy, dataset, host)
    allowed = _allowed(found, host, len(dataset.test))
    recorded = _compare(found, accuracy, allowed)
    measured = {"top1_percent": accuracy.top1_percent, "top3_percent": accuracy.top3_percent}
    facts = {"test_images": accuracy.images, "same_cpu_features": allowed == 0}
    return {"command": "verify", "uri": uri, "verified": True, **measured, **recorded, **facts}


def _measure_bare(uri: str, copy: Path, dataset: Dataset, host: Host) -> Accuracy:
    with tempfile.TemporaryDirectory() as folder:
        images, logits = Path(folder, "images.npy"), Path(folder, "logits.npy")
        np.save(images, dataset.test.images.numpy())
        command = [sys.executable, "-W", "ignore", "-c", BARE_PROCESS, str(copy), str(images), str(logits)]
        environment = registry.child_environment(host.threads)
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise StageError(f"{uri}: does not load and run in a bare process: {lines[-1]}")
        return measure_accuracy(torch.from_numpy(np.load(logits)), dataset.test.labels)


def _allowed(found: ModelVersion, host: Host, images: int) -> int:
    """By how many test images the count may differ: none on a CPU with the same instructions."""
    made_on, here = found.tags.get("cpu_features", ""), ",".join(host.features)
    if made_on == here:
        return 0
    allowed = ceil(OTHER_CPU_SHARE * images)
    say(
        f"this CPU ({host.cpu}: {here or 'instructions unknown'}) is not like the one that was recorded "
        f"({found.tags.get('cpu')}: {made_on or 'instructions unknown'}): {allowed} images may differ"
    )
    return allowed


def _compare(found: ModelVersion, accuracy: Accuracy, allowed: int) -> dict[str, float]:
    """What was recorded; StageError if something else was measured."""
    recorded = {}
    for name, percent in (("top1", accuracy.top1_percent), ("top3", accuracy.top3_percent)):
        before = recorded[f"recorded_{name}_percent"] = float(found.tags[f"test_{name}_percent"])
        now = round(percent * accuracy.images / 100)
        then = int(found.tags.get(f"test_{name}_correct") or round(before * accuracy.images / 100))
        if abs(now - then) > allowed:
            raise StageError(
                f"models:/{found.name}/{found.version}: {name} is {percent:.2f} % now ({now} of {accuracy.images} test "
                f"images) and was {before:.2f} % when it was registered ({then}): {abs(now - then)} images differ, "
                f"allowed {'none' if allowed == 0 else allowed}"
            )
    return recorded
