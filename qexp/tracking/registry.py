"""The MLflow model registry: versions with signature, example, pinned requirements, lineage; verification; aliases."""

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlflow
import torch
from mlflow.entities.model_registry import ModelVersion
from mlflow.environment_variables import MLFLOW_ALLOW_PICKLE_DESERIALIZATION
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from torch import Tensor

from qexp.environment import as_the_user_set
from qexp.errors import InputError, StageError, first_line
from qexp.models.classifier import ModelSpec
from qexp.models.contents import FileContents
from qexp.models.stored import SUFFIXES
from qexp.progress import say
from qexp.tracking import description
from qexp.tracking.aliases import CHALLENGER, set_alias
from qexp.tracking.clean_process import reloads_equal
from qexp.tracking.flavors import FORMATS, log_version, quiet
from qexp.tracking.integrity import stored_facts
from qexp.tracking.leftovers import discard_unregistered, version_of_run, version_or_nothing
from qexp.tracking.store import (
    again,
    all_pages,
    is_missing,
    logged_model_of,
    registry_name,
    split_uri,
    uri_of,
)

URI = re.compile(r"models:/(?P<name>[^/@]+)(/(?P<version>\d{1,9}|latest)|@(?P<alias>[^/@]+))")
MADE_BY, OWN = "registered_by", "qexp.register"  # tag of the versions of one's own models, and its value
Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Registered:
    """A model version of the registry; `size_bytes` is the model's file there, without MLflow's metadata.

    `contents` is what is in that file, known where the version has just been registered.
    """

    name: str
    version: str
    model_id: str
    run_id: str
    size_bytes: int
    verified: bool
    contents: FileContents | None = None

    @property
    def owner(self) -> tuple[str, str]:
        """Where its metrics belong: the ids of its run and of its logged model."""
        return self.run_id, self.model_id

    @property
    def uri(self) -> str:
        """`models:/NAME/VERSION`."""
        return f"models:/{self.name}/{self.version}"


def register(
    kind: str,
    model: Predict,
    name: str,
    spec: ModelSpec,
    sample: Tensor,
    tags: dict[str, Any],
    stored: Any = None,
    once: bool = False,
) -> Registered:
    """Log a model in the active run, register it, and verify it in a clean subprocess. No alias moves.

    Args:
        kind: "fp32", saved as an exported program (pt2), or "int8", as what `stored` is.
        model: what gives the logits that the reloaded version must give.
        sample: uint8 [N, 3, H, W]; the images on which it must give the same bits.
        tags: lineage, as tags of the version; `flavor` is MLflow's, pytorch unless it says something else.
        stored: what MLflow stores (a module, an ONNX model); None: `model` itself.
        once: the run has this one model. A version that it has registered before is the one; what it lacks is added.

    Raises:
        StageError: the model cannot be stored, for instance on a full disk. Nothing of it is left in the store,
            whatever ends this; only a kill, or a store that is away, leaves a version without the tag `kind`, which
            the next try completes.
    """
    flavor = tags.get("flavor", "pytorch")
    with version_or_nothing():
        active = mlflow.active_run()
        assert active is not None
        run_id = str(active.info.run_id)
        found = version_of_run(run_id, name) if once else None
        if found is None:
            if once:
                discard_unregistered(run_id)
            info = log_version(kind, model if stored is None else stored, name, spec, flavor)
            found = mlflow.MlflowClient().get_model_version(name, str(info.registered_model_version))
        number, uri = str(found.version), uri_of(found)
        if once and "kind" in found.tags:
            return replace(from_entity(found), contents=stored_facts(uri)[1])
        without_pickle = FORMATS[kind] != "pickle" or flavor == "onnx"
        environment = child_environment(torch.get_num_threads())
        verified = reloads_equal(uri, model, sample, environment, without_pickle)
        size_bytes, (digest, contents) = _stored_bytes(uri), stored_facts(uri)
        facts = {"classes": json.dumps(spec.classes), "image_size": spec.image_size, "size_mb": size_bytes / 1e6}
        facts |= {"verified": verified, "loads_without_pickle": verified and without_pickle}
        facts |= {"artifact_sha256": digest}
        if "train_run_id" in tags:  # a stage of a job: its configuration is there
            facts |= {"config_uri": f"runs:/{run_id}/config.yaml"}
        tag_version(uri, facts | tags | {"kind": kind})  # kind comes last: with it, the version is complete
        _describe_model(name, kind, tags.get("dataset"))
    return Registered(name, number, logged_model_of(found), run_id, size_bytes, verified, contents)


def make_challenger(version: Registered) -> None:
    """Give a version the alias `challenger`, if it reloads bit for bit."""
    if version.verified:
        set_alias(CHALLENGER, version.uri)


def refuses_pickle() -> bool:
    """Whether MLflow was told, by its environment variable, to load nothing that a pickle may be in."""
    return not MLFLOW_ALLOW_PICKLE_DESERIALIZATION.get()


def refuse_pickled(found: ModelVersion) -> None:
    """Raise StageError where MLflow was told to load nothing like this version."""
    if refuses_pickle() and found.tags.get("loads_without_pickle") == "false":
        why = "MLflow loads TorchScript as it does a pickle; take a version of engine onnx, or set it to true"
        raise StageError(f"{uri_of(found)} does not load with {MLFLOW_ALLOW_PICKLE_DESERIALIZATION.name}=false: {why}")


def child_environment(threads: int) -> dict[str, str]:
    """The environment of a child process that reads the same store with so many threads, waiting as the user's do."""
    own = {
        "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
        "MLFLOW_REGISTRY_URI": mlflow.get_registry_uri(),
        "OMP_NUM_THREADS": str(threads),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # loading int8 weights warns, once a process, of a deprecation
    }
    return as_the_user_set(dict(os.environ)) | own


def find_version(uri: str, *kinds: str, option: str = "--model-uri") -> ModelVersion:
    """The version that `uri` names, which was given as `option`: models:/NAME/VERSION, /latest or models:/NAME@ALIAS.

    Raises:
        InputError: the URI has another form, does not exist, or is not a version of `kinds` that qexp registered.
    """
    found = look_up(uri, option)
    if found.tags.get("kind") not in kinds or "classes" not in found.tags:
        raise InputError(f"{option} {uri}: must be a version of kind {' or '.join(kinds)} that qexp registered")
    return found


def tag_of(found: ModelVersion, name: str) -> str:
    """A tag that every version of ours has; InputError if it is gone, or the version is of a model of one's own."""
    if name not in found.tags:
        if found.tags.get(MADE_BY) == OWN:
            raise InputError(
                f"{uri_of(found)}: was registered with {OWN}, without the training run and the data that this command "
                "needs; use qexp.quantize, qexp.compare and qexp.benchmark in Python"
            )
        raise InputError(f"{uri_of(found)}: has no tag {name}, which qexp gives to every version")
    return str(found.tags[name])


def number_of(found: ModelVersion, name: str) -> float:
    """The same for a number; InputError if it is none."""
    text = tag_of(found, name)
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{uri_of(found)}: its tag {name} is {text}, which is no number") from None


def exists(uri: str) -> bool:
    """Whether there is such a version."""
    try:
        look_up(uri)
    except InputError:
        return False
    return True


def look_up(uri: str, option: str = "--model-uri") -> ModelVersion:
    """The version that `uri` names, of whatever kind; InputError if it does not exist."""
    parts = URI.fullmatch(uri)
    if parts is None:
        raise InputError(f"{option} {uri}: must be models:/NAME/VERSION, models:/NAME/latest or models:/NAME@ALIAS")
    client = mlflow.MlflowClient()
    try:
        if parts["alias"]:
            return client.get_model_version_by_alias(parts["name"], parts["alias"])
        number = newest_version(parts["name"]) if parts["version"] == "latest" else parts["version"]
        return client.get_model_version(parts["name"], number)
    except MlflowException as error:
        if not is_missing(error):
            raise
        raise InputError(f"{option} {uri}: does not exist in {registry_name()} ({first_line(error)})") from None


def newest_version(name: str) -> str:
    """The highest version number of a registered model, "0" when there is none."""
    return str(max(version_numbers(name), default=0))


def version_numbers(name: str) -> list[int]:
    """Of a registered model, the newest first; a version that is being made is none yet."""
    quote = '"' if "'" in name else "'"
    versions = all_pages(partial(mlflow.MlflowClient().search_model_versions, f"name = {quote}{name}{quote}"))
    return sorted((int(version.version) for version in versions if "kind" in version.tags), reverse=True)


def from_entity(found: ModelVersion) -> Registered:
    """A version of the registry as the stages use it."""
    verified, size_bytes = found.tags.get("verified") == "true", _stored_bytes(uri_of(found))
    return Registered(found.name, str(found.version), logged_model_of(found), found.run_id or "", size_bytes, verified)


def tag_version(uri: str, tags: dict[str, Any]) -> None:
    """Set tags on a version, truth values as `true` and `false`, and write its description anew from its tags."""
    name, number = split_uri(uri)
    client = mlflow.MlflowClient()
    for key, value in tags.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        again(partial(client.set_model_version_tag, name, number, key, text))
    found = client.get_model_version(name, number)
    if "classes" in found.tags:
        client.update_model_version(name, number, description.of_version(found))


@contextmanager
def others_left_alone(uri: str) -> Iterator[None]:
    """What the block writes about a version that was there before is left out where its owner lets others only read."""
    try:
        yield
    except MlflowException as error:
        if error.error_code != "PERMISSION_DENIED":
            raise
        say(f"{uri} may only be read: its tags stay as they are")


def load_version(uri: str, backend: str | None = None) -> Predict:
    """Load a registered model; an int8 one with the kernels `backend`, or those of its tag, set for the whole process.

    Raises:
        InputError: the URI has another form or does not exist.
        StageError: MLflow was told to load nothing like it.
    """
    found = look_up(uri, "uri")
    refuse_pickled(found)
    return load_files(uri_of(found), backend or found.tags.get("backend"))


def load_files(place: str, backend: str | None) -> Predict:
    """The model in a version's files, with the kernels `backend` (None: as they are), loaded by MLflow, which opens no
    pickle where it was told so.

    Args:
        place: models:/NAME/VERSION or a folder; MLflow finds no file below an alias.
    """
    if "onnx" in Model.load(place).flavors:
        from qexp.models.onnx_file import OnnxClassifier

        return OnnxClassifier(mlflow.onnx.load_model(place))
    if backend:
        torch.backends.quantized.engine = backend
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        return mlflow.pytorch.load_model(place)


def _stored_bytes(uri: str) -> int:
    """Size of the model's file (model.pt2, model.pth or model.onnx) as the registry stores it."""
    files = [
        file for folder in ("/data", "") for file in mlflow.artifacts.list_artifacts(artifact_uri=f"{uri}{folder}")
    ]
    return sum(file.file_size or 0 for file in files if file.path.endswith(SUFFIXES))


def describe_kernels(uri: str, measured: str) -> None:
    """Say in the description of an int8 version which kernels were the faster ones, and by how much."""
    found = look_up(uri)
    text = description.with_kernels(found.description or "", measured)
    mlflow.MlflowClient().update_model_version(found.name, found.version, text)


def _describe_model(name: str, kind: str, dataset: str | None) -> None:
    """Say on a registered model's page what its versions are, where nobody has said so."""
    client = mlflow.MlflowClient()
    if client.get_registered_model(name).description:
        return
    client.update_registered_model(name, description.of_model(kind, dataset))
