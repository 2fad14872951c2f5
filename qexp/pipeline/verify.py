"""A registered version loaded in a clean subprocess, measured again, and held against what its tags say."""

from math import ceil
from typing import Any

from torch import Tensor

from qexp.config import Config
from qexp.data.datasets import Dataset, load_dataset
from qexp.errors import StageError
from qexp.foundation.extras import check_package
from qexp.measurement.accuracy import Accuracy, measure_accuracy, predict_logits
from qexp.measurement.host import Host, read_host
from qexp.models.names import BY_OPENVINO, OPENVINO
from qexp.models.preprocessing import preprocessing_of
from qexp.pipeline.loading import check_data, config_of_version, load_weights
from qexp.progress import say
from qexp.tracking import registry
from qexp.tracking.clean_process import bare_logits
from qexp.tracking.integrity import checked_copy
from qexp.tracking.store import ModelVersion, uri_of, use_store
from qexp.tracking.tags import TAGS, tags_of

OTHER_CPU_SHARE = 0.002  # of the images: int8 kernels of other instructions round otherwise, which moves near ties
RECORDED = ("threads", "test_top1_percent", "test_top1_correct", "test_top3_percent", "test_top3_correct")


def run_verify(config: Config, uri: str) -> dict[str, Any]:
    """Load the version `uri` in a clean subprocess, measure its accuracy on the test images again, and compare. Of
    images without labels that is its agreement with fp32.

    Raises:
        InputError: the version does not exist or is not ours, or the data are not those that it was made with.
        StageError: its files are gone or others, it does not load, or its accuracy is another.
    """
    use_store()
    found = registry.find_version(uri, "fp32", "int8", option="URI")
    uri, tags = uri_of(found), tags_of(found)
    config = config_of_version(config, uri, tags.kind)
    registry.refuse_pickled(found)
    for name in RECORDED:  # what is wrong is said before anything is computed
        tags.read(TAGS[name])
    if tags.runtime in BY_OPENVINO:
        check_package(OPENVINO, f"{uri}, whose accuracy was measured in OpenVINO,", OPENVINO)
    runtime = registry.backend_of(found) if tags.runtime else None
    host = read_host(config.threads or tags.threads)
    wanted = preprocessing_of(config.data, config.preprocess)
    dataset = load_dataset(config.data, config.seed, wanted, needs_training=False)
    check_data(uri, dataset, tags.kind)
    with checked_copy(found) as copy:
        say(f"{uri}: {len(dataset.test)} test images in a clean subprocess, {host.threads} threads")
        try:
            environment = registry.child_environment(host.threads)
            logits = bare_logits(str(copy), tags.flavor or "pytorch", dataset.test.images, environment, runtime)
        except StageError as error:
            raise StageError(f"{uri}: {error}") from None
    accuracy = measure_accuracy(logits, _labels(found, dataset))
    allowed = _allowed(found, host, len(dataset.test))
    recorded = _compare(found, accuracy, allowed)
    measured = {"top1_percent": accuracy.top1_percent, "top3_percent": accuracy.top3_percent}
    facts = {"test_images": accuracy.images, "same_cpu_features": allowed == 0}
    return {"command": "verify", "uri": uri, "verified": True, **measured, **recorded, **facts}


def _labels(found: ModelVersion, dataset: Dataset) -> Tensor:
    """Of the test images; where they have none, the answers of the fp32 version, so that accuracy is agreement with it,
    as it was when the version was registered."""
    if dataset.test.is_labelled:
        return dataset.test.labels
    model = load_weights(found if tags_of(found).kind == "fp32" else registry.source_of(found))
    return predict_logits(model, dataset.test.images, label="fp32 on test images").argmax(1)


def _allowed(found: ModelVersion, host: Host, images: int) -> int:
    """By how many test images the count may differ: none on a CPU with the same instructions."""
    made_on, here = found.tags.get("cpu_features", ""), ",".join(host.features)
    if made_on == here:
        return 0
    allowed = ceil(OTHER_CPU_SHARE * images)
    say(
        f"this CPU ({host.cpu}: {here or 'instructions unknown'}) differs from the recorded one "
        f"({found.tags.get('cpu')}: {made_on or 'instructions unknown'}): {allowed} images may differ"
    )
    return allowed


def _compare(found: ModelVersion, accuracy: Accuracy, allowed: int) -> dict[str, float]:
    """What was recorded; StageError if something else was measured."""
    recorded = {}
    figures = (
        ("top1", accuracy.top1_percent, accuracy.top1_correct, accuracy.top1_tied_images),
        ("top3", accuracy.top3_percent, accuracy.top3_correct, accuracy.top3_tied_images),
    )
    for name, percent, now, tied in figures:
        before = recorded[f"recorded_{name}_percent"] = tags_of(found).read(TAGS[f"test_{name}_percent"])
        then = tags_of(found).read(TAGS[f"test_{name}_correct"])
        # Versions without this tag counted each tied image as right or wrong, by the numbers of the classes.
        most = allowed if f"test_{name}_tied" in found.tags else allowed + tied
        if abs(now - then) > most + 1e-6:
            raise StageError(
                f"{uri_of(found)}: {name} is {percent:.2f} % now ({now:g} of {accuracy.images} test images) and was "
                f"{before:.2f} % when it was registered ({then:g}): {abs(now - then):g} images differ, "
                f"allowed {'none' if most == 0 else most}"
            )
    return recorded
