"""The MLflow model registry: versions with signature, example, pinned requirements, lineage; verification; aliases."""

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import torch
from mlflow.entities.model_registry import ModelVersion
from mlflow.environment_variables import MLFLOW_ALLOW_PICKLE_DESERIALIZATION
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from torch import Tensor

from qexp.errors import InputError, StageError, first_line
from qexp.foundation.extras import has_openvino, how_to_install
from qexp.measurement.host import check_bf16, read_host
from qexp.models.classifier import ModelSpec
from qexp.models.contents import FileContents, read_contents
from qexp.models.names import BY_OPENVINO, ONNXRUNTIME, OPENVINO, OPENVINO_BF16, RUNTIMES, parse_version_uri
from qexp.models.stored import SUFFIXES, as_other_modules, model_file
from qexp.progress import quiet, say
from qexp.tracking import class_names, description
from qexp.tracking.aliases import CHALLENGER, set_alias
from qexp.tracking.clean_process import BareProcess, reloads_equal
from qexp.tracking.flavors import FORMATS, log_version
from qexp.tracking.integrity import checked_copy, copied, digest_of
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
from qexp.tracking.tags import MADE_BY as MADE_BY
from qexp.tracking.tags import OWN as OWN
from qexp.tracking.tags import Tags, tags_of

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
        if found and "kind" in found.tags:
            with checked_copy(found) as copy:
                return replace(from_entity(found), contents=read_contents(model_file(copy)))
        without_pickle = FORMATS[kind] != "pickle" or flavor == "onnx"
        with BareProcess(flavor, child_environment(torch.get_num_threads()), without_pickle) as bare:
            if found is None:
                if once:
                    discard_unregistered(run_id)
                info = log_version(kind, model if stored is None else stored, name, spec, flavor)
                found = mlflow.MlflowClient().get_model_version(name, str(info.registered_model_version))
            number, uri = str(found.version), uri_of(found)
            with checked_copy(found) if "artifact_sha256" in found.tags else copied(uri) as copy:
                tag_version(uri, {"artifact_sha256": digest_of(copy)})  # before anything of it is opened
                verified = reloads_equal(uri, copy, model, sample, bare)
                contents = read_contents(model_file(copy))
        size_bytes, names = _stored_bytes(uri), class_names.as_tag(spec.classes)
        facts = {"classes": names, "image_size": spec.preprocessing.size_text, "size_mb": size_bytes / 1e6}
        facts |= {"preprocessing": json.dumps(asdict(spec.preprocessing))}
        facts |= {"verified": verified, "loads_without_pickle": verified and without_pickle}
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
    if refuses_pickle() and tags_of(found).loads_without_pickle is False:
        why = "MLflow loads TorchScript as it does a pickle; take a version of engine onnx, or set it to true"
        raise StageError(f"{uri_of(found)} does not load with {MLFLOW_ALLOW_PICKLE_DESERIALIZATION.name}=false: {why}")


def child_environment(threads: int) -> dict[str, str]:
    """The environment of a child process that reads the same store with so many threads."""
    own = {
        "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
        "MLFLOW_REGISTRY_URI": mlflow.get_registry_uri(),
        "OMP_NUM_THREADS": str(threads),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # loading int8 weights warns, once a process, of a deprecation
    }
    return dict(os.environ) | own


def find_version(uri: str, *kinds: str, option: str = "--model-uri") -> ModelVersion:
    """The version that `uri` names, which was given as `option`: models:/NAME/VERSION, /latest or models:/NAME@ALIAS.

    Raises:
        InputError: the URI has another form, does not exist, is not a version of `kinds` that qexp registered, or has a
            tag whose value is not allowed.
    """
    found = look_up(uri, option)
    if found.tags.get("kind") not in kinds or "classes" not in found.tags:
        raise InputError(f"{option} {uri}: must be a version of kind {' or '.join(kinds)} that qexp registered")
    tags_of(found).check()
    return found


def source_of(found: ModelVersion) -> ModelVersion:
    """The fp32 version that an int8 version was made from; InputError if it is not there under that name."""
    with tags_of(found).followed("fp32_uri") as uri:
        return find_version(uri, "fp32", option="version")


def exists(uri: str) -> bool:
    """Whether there is such a version."""
    try:
        look_up(uri)
    except InputError:
        return False
    return True


def look_up(uri: str, option: str = "--model-uri") -> ModelVersion:
    """The version that `uri` names, of whatever kind; InputError if it does not exist."""
    parts = parse_version_uri(uri, option)
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
    verified, size_bytes = bool(tags_of(found).known("verified")), _stored_bytes(uri_of(found))
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
    """Load a registered model; an int8 one with the kernels `backend`, or those of its tag, set for the whole process;
    an ONNX file in the runtime `backend`, or that of its tag.

    Raises:
        InputError: the URI has another form or does not exist, the version is not as qexp has registered it, or it does
            not run in that runtime.
        StageError: its files are gone or others, do not load, or MLflow was told to load nothing like them.
    """
    return open_version(find_version(uri, "fp32", "int8", option="uri"), backend)


def backend_of(found: ModelVersion) -> str | None:
    """The kernels or the runtime that a version is loaded with, by its tags: those that won when it was measured. ONNX
    Runtime takes the place of OpenVINO where that is not installed, and fp32 that of bf16 where the CPU has none, which
    is said."""
    tags = tags_of(found)
    if tags.runtime in BY_OPENVINO and not has_openvino():
        say(f"{tags.uri}: OpenVINO, the faster runtime, is not installed ({how_to_install(OPENVINO)}): in ONNX Runtime")
        return ONNXRUNTIME
    if tags.runtime == OPENVINO_BF16 and not (host := read_host(1)).has_bf16:
        say(f"{tags.uri}: {host.cpu} has no bf16 instructions: what is not int8 is computed in fp32")
        return OPENVINO
    return tags.runtime or tags.backend


def open_version(found: ModelVersion, backend: str | None = None) -> Predict:
    """The same for a version that has been looked up. Nothing of it is opened before its files have been compared with
    what was registered, and that copy of them is what is loaded.

    Raises:
        InputError: a tag is missing or wrong, or an extra is needed that is not installed.
        StageError: as `load_version`.
    """
    tags = tags_of(found)
    if backend in RUNTIMES and tags.flavor != "onnx":
        raise InputError(f"runtime={backend!r}: {tags.uri} is no ONNX file; torch runs it")
    if backend == OPENVINO_BF16:
        check_bf16(f"runtime={backend!r}")
    refuse_pickled(found)
    with checked_copy(found) as copy:
        try:
            _check_shape(tags, copy)
            return load_files(copy, backend or backend_of(found))
        except InputError:
            raise
        except Exception as error:  # files of another version of a library, a format that MLflow was told to refuse
            raise StageError(f"{tags.uri}: cannot be loaded ({first_line(error)})") from error


def class_names_of(found: ModelVersion) -> tuple[str, ...]:
    """The names of a version's classes, in the order of its logits."""
    classes = tags_of(found).classes
    if classes.names is not None:
        return classes.names
    with checked_copy(found) as copy:
        return classes.read(copy)


def _check_shape(tags: Tags, copy: Path) -> None:
    """Raise InputError unless a version's tags have as many names, and images as large, as its model."""
    signature = Model.load(str(copy)).signature
    if signature is None or signature.outputs is None:
        return
    shape, outputs = tuple(signature.inputs.inputs[0].shape[1:]), signature.outputs.inputs[0].shape[-1]
    if tags.classes.count != outputs:
        raise tags.wrong("classes", f"must be {outputs} names, as the model has outputs")
    if tags.input.shape != shape:
        name = "preprocessing" if tags.preprocessing else "image_size"
        raise tags.wrong(name, f"must be of images {list(shape)}, as the model was registered")


def load_files(folder: Path, backend: str | None) -> Predict:
    """The model in a checked copy of a version's files, with the kernels `backend` (None: as they are) or in that
    runtime (None: ONNX Runtime), loaded by MLflow, which opens no pickle where it was told so."""
    place = str(folder)
    if "onnx" in Model.load(place).flavors:
        if backend in BY_OPENVINO:
            from qexp.models.openvino_file import OpenvinoClassifier

            return OpenvinoClassifier.of_file(model_file(folder), bf16=backend == OPENVINO_BF16)
        from qexp.models.onnx_file import OnnxClassifier

        return OnnxClassifier(mlflow.onnx.load_model(place))
    if backend:
        torch.backends.quantized.engine = backend
    with warnings.catch_warnings(), quiet("mlflow"):
        warnings.simplefilter("ignore")
        return as_other_modules(mlflow.pytorch.load_model(place))


def _stored_bytes(uri: str) -> int:
    """Size of the model's file (model.pt2, model.pth or model.onnx) as the registry stores it."""
    files = [
        file for folder in ("/data", "") for file in mlflow.artifacts.list_artifacts(artifact_uri=f"{uri}{folder}")
    ]
    return sum(file.file_size or 0 for file in files if file.path.endswith(SUFFIXES))


def describe_kernels(uri: str, measured: str) -> None:
    """Say in the description of an int8 version which kernels or runtime were the faster ones, and by how much."""
    found = look_up(uri)
    text = description.with_kernels(found.description or "", measured)
    mlflow.MlflowClient().update_model_version(found.name, found.version, text)


def _describe_model(name: str, kind: str, dataset: str | None) -> None:
    """Say on a registered model's page what its versions are, where nobody has said so."""
    client = mlflow.MlflowClient()
    if client.get_registered_model(name).description:
        return
    client.update_registered_model(name, description.of_model(kind, dataset))
