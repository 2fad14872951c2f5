"""What comes before the first trial of a worker: options checked, study found or made, and all that trials share.

Fed by the options and by the stages of pipeline/, for the model; gives job.py the study and trials.py its `Bench`.
"""

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qexp.config import HOW_TO_TRAIN, Config, given_otherwise
from qexp.data.datasets import Dataset, dataset_name
from qexp.errors import InputError
from qexp.measurement.accuracy import measure_accuracy
from qexp.measurement.host import Host
from qexp.models.classifier import ModelSpec, outline
from qexp.models.external import source_facts
from qexp.models.names import is_onnx_file, short_name
from qexp.models.preprocessing import as_options, preprocessing_of
from qexp.pipeline import loading
from qexp.pipeline.job import Job, runs_below
from qexp.pipeline.jobs import sensitivity_stage, take_stage, train_stage
from qexp.pipeline.quantize import BUDGET_IMAGES, layer_order, warn_of_reduced_range
from qexp.pipeline.setup import (
    Setup,
    check_data_of_run,
    prepare,
    try_engines,
    with_quantization_checked,
)
from qexp.pipeline.take import own_preprocessing_of, take
from qexp.progress import say
from qexp.search.storage import Place
from qexp.search.study import Study, find_study, make_study, search_space
from qexp.search.trials import Bench, time_against_fp32
from qexp.tracking import registry, search_runs
from qexp.tracking import runs as tracking
from qexp.tracking.job_folder import FOLDER, check_unlocked, job_folder, locked, remove_if_empty
from qexp.tracking.results import Fp32
from qexp.tracking.store import uri_of
from qexp.tracking.tags import tags_of
from qexp.training.checkpoint import load_checkpoint

# Options of quantization that the space varies, or that no trial looks at: they make no other study.
OF_NO_TRIAL = {
    "calibration_samples", "observer", "engine", "per_channel", "sensitivity_images", "max_top1_drop", "max_tries"
}  # fmt: skip
RUNS_OF_SETUP = ("train", "sensitivity")  # stages below the parent that come before the first trial


@dataclass(frozen=True)
class Ready:
    """What is known before there is a run; without `model_uri` a model has to be trained, and there is no study yet."""

    config: Config
    host: Host
    dataset: Dataset
    model_uri: str | None
    study: Study | None
    parent_run_id: str | None
    taken: Any = None  # the model that comes with weights and is no version yet


def look_up(config: Config, place: Place, model_uri: str | None) -> Ready:
    """Look for the study, the fp32 version and the parent run, and refuse what does not fit.

    The version: the one given, that of the study, or the newest of this model and data set.

    Raises:
        InputError: the study is made for something else or its run is in another store; as `prepare`.
    """
    name = config.search.study
    study = find_study(place, name, config, {}) if name else None
    parent = _parent_of(study)  # a study in another store is refused first: its model is not in this one
    if study and not model_uri and isinstance(made_for := study.note("made_for"), dict):
        model_uri = made_for.get("model_uri")
    if config.trained_elsewhere and not model_uri:  # whose versions have the preprocessing in full
        wanted = preprocessing_of(config.data, config.preprocess, own_preprocessing_of(config))
        config = config.with_preprocessing(wanted.height_px, wanted.width_px, as_options(wanted))
    model_uri = model_uri or _newest(config)
    config, host, dataset = prepare(config, model_uri, given=("data", "preprocess"))
    config = _with_engine_of(config, model_uri)
    with_quantization_checked(config, dataset)
    _check_space(config, dataset, model_uri)
    if not model_uri and not config.trained_elsewhere:
        try_engines(config, dataset)
    if model_uri:
        facts = _facts(config, host, model_uri)
        study = find_study(place, name or _own_name(facts), config, facts)
        parent = _parent_of(study)
    else:
        parent = None if config.trained_elsewhere else _stopped_in_training(config, dataset)
    if parent:
        tracking.use_experiment(dataset.name, parent)
    taken = take(config, dataset) if config.trained_elsewhere and not model_uri else None
    return Ready(config, host, dataset, model_uri, study, parent, taken)


def _with_engine_of(config: Config, model_uri: str | None) -> Config:
    """`config` with the engines that were named, or else fx; for an ONNX file onnx: no other one takes it."""
    named = config.quantize.engine
    if model_uri:
        is_onnx = tags_of(registry.find_version(model_uri, "fp32")).flavor == "onnx"
    else:
        is_onnx = is_onnx_file(config.model)
    if not is_onnx:
        return config if named else config.with_engines("fx")
    if most := max(config.search.fp32_layer_counts):
        raise InputError(f"--fp32-layer-counts {most}: must be 0: the layers of an ONNX file cannot be ranked")
    if others := [engine for engine in named or () if engine != "onnx"]:
        raise InputError(f"--engine {','.join(others)}: must be onnx: {model_uri or config.model} is an ONNX file")
    return config.with_engines("onnx")


def _parent_of(study: Study | None) -> str | None:
    return search_runs.find_parent(study.note("run_id"), study.name) if study else None


def _stopped_in_training(config: Config, dataset: Dataset) -> str | None:
    """The run of a search that was stopped while it trained the model that this one needs; its checkpoint is here."""
    for folder in sorted(Path(FOLDER).glob(f"*/train-{short_name(config.model)}")):
        run_id = folder.parent.name
        with suppress(InputError):  # of another store, at work, of other images, damaged: this search trains anew
            check_unlocked(run_id)
            run = tracking.find_run(run_id)
            same = _of_training(tracking.read_config(run_id)) == _of_training(config)
            if tracking.stage_of(run) == "search" and run.info.status != "FINISHED" and same:
                check_data_of_run(run_id, dataset)
                load_checkpoint(folder)
                say(f"the training of search {run_id} was stopped, and is resumed")
                return run_id
    return None


def _of_training(config: Config) -> tuple[Any, ...]:
    """What two trainings must have in common to be one."""
    data, options = config.data.model_dump(exclude={"data_dir"}), config.train.model_dump(exclude=set(HOW_TO_TRAIN))
    return config.model, config.seed, data, options


def _newest(config: Config) -> str | None:
    """The newest version of this model and data set that contradicts no option but those of training, if there is one;
    says so, and which options do not count then."""
    name = f"{short_name(config.model)}-{dataset_name(config.data)}-fp32"
    for number in registry.version_numbers(name):
        uri = f"models:/{name}/{number}"
        asked = [key for key, *_ in given_otherwise(config, loading.config_of_version(config, uri, "fp32"))]
        unused = [key.removeprefix("train.").replace("_", "-") for key in asked if key.startswith("train.")]
        if any(key.startswith(("data.", "preprocess.")) or key.endswith((".model", ".seed")) for key in asked):
            continue
        if not _has_weights_of(config, uri):
            continue
        without = f", without {', '.join(f'--{name}' for name in unused)}: it is trained already" if unused else ""
        say(f"searching with {uri}, the newest version{without}; choose another with --model-uri")
        return uri
    return None


def _has_weights_of(config: Config, uri: str) -> bool:
    """Whether a version was made from the file of weights that was given, and from the same code."""
    if not config.trained_elsewhere or config.model.startswith("models:/"):
        return True
    tags = registry.find_version(uri, "fp32").tags
    try:
        return all(tags.get(name) == value for name, value in source_facts(config).items() if name.endswith("sha256"))
    except OSError:  # the file is not there, as is said where it is read
        return False


def set_up(ready: Ready, place: Place, run_id: str) -> tuple[Study, Bench]:
    """In the parent run: what the first worker makes and others find: model, study, order of layers, p50 of fp32."""
    config, host, dataset = ready.config, ready.host, ready.dataset
    warn_of_reduced_range(host)
    if ready.parent_run_id is None:
        tracking.log_setup(config, host)
        tracking.log_datasets(dataset, ("train", "validation"))
    uri = ready.model_uri or _train(ready, run_id)
    fp32 = loading.fp32_from_registry(uri, dataset, splits=("validation",))
    study = ready.study
    if study is None:
        facts = _facts(config, host, uri)
        study = make_study(place, config.search.study or _own_name(facts), config, facts)
    if study.note("run_id") != run_id:
        study.remember("run_id", run_id)
        study.remember("concluded", None)  # a new parent run lacks what was logged to the one before
    order, p50_ms = _layer_order(study, ready, fp32, run_id), None
    if config.search.objective == "top1+latency":
        p50_ms = study.note("fp32_p50_ms")
        if p50_ms is None:
            p50_ms = time_against_fp32(fp32.model, None, config.search.latency_batch_size).stats["fp32"].p50_ms
            study.remember("fp32_p50_ms", p50_ms)
    top1 = measure_accuracy(fp32.logits["validation"], dataset.validation.labels).top1_percent
    version = fp32.version
    return study, Bench(config, host, dataset, fp32.model, version.uri, version.size_bytes, top1, order, p50_ms)


def _train(ready: Ready, run_id: str) -> str:
    """Train a model below the parent run, or take one that has weights, where no other search may do so meanwhile; the
    URI of its version."""
    with locked(job_folder(run_id), run_id):
        job = Job(ready.host, run_id, runs_below(run_id))
        setup = Setup(ready.config, ready.host, ready.dataset)
        fp32 = train_stage(job, setup) if ready.taken is None else take_stage(job, setup, ready.taken)
    remove_if_empty(run_id)
    return fp32.version.uri


def _layer_order(study: Study, ready: Ready, fp32: Fp32, run_id: str) -> tuple[str, ...]:
    """Most sensitive first, the same for all workers; empty where no layer is to stay fp32."""
    if max(study.space["fp32_layers"]) == 0:
        return ()
    if (known := study.note("layers_most_sensitive_first")) is not None:
        return tuple(known)
    search_runs.end_left_open(run_id, RUNS_OF_SETUP)
    options = ready.config.quantize
    wanted = {"sensitivity_images": options.sensitivity_images or BUDGET_IMAGES}
    config = ready.config.model_copy(update={"quantize": options.model_copy(update=wanted)})
    found = sensitivity_stage(Job(ready.host, run_id), Setup(config, ready.host, ready.dataset), fp32)
    assert found is not None
    order = layer_order(fp32.model, found)
    study.remember("layers_most_sensitive_first", list(order))
    return order


def _check_space(config: Config, dataset: Dataset, model_uri: str | None) -> None:
    if not len(dataset.validation):
        why = f"a search looks at validation images, a share of DIR/train with labels, and {dataset.source} has none"
        raise InputError(f"--data-dir: {why}")
    for count in config.search.sample_counts:
        if count > len(dataset.calibration_images):
            allowed = f"must be at most {len(dataset.calibration_images)}, the number of images to calibrate with"
            raise InputError(f"--sample-counts {count}: {allowed}")
    most = max(config.search.fp32_layer_counts)
    if most:
        if config.trained_elsewhere and model_uri:  # which its name alone may not build
            network = loading.load_weights(registry.find_version(model_uri, "fp32"))
        else:
            preprocessing = preprocessing_of(config.data, config.preprocess)
            network = outline(ModelSpec(config.model, dataset.classes, preprocessing))
        layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in network.modules())
        if most >= layers:
            raise InputError(f"--fp32-layer-counts {most}: must be less than {layers}, the layers of {config.model}")


def _facts(config: Config, host: Host, model_uri: str) -> dict[str, Any]:
    """What all workers of a study must agree on."""
    found = registry.find_version(model_uri, "fp32")
    search = config.search
    facts: dict[str, Any] = {
        "model_uri": uri_of(found),
        "train_run_id": tags_of(found).train_run_id,  # another database counts its versions from 1 too
        "data_digest": tags_of(found).data_digest,
        "seed": config.seed,
        "objective": search.objective,
        "seeds_per_point": search.seeds_per_point,
        "sampler": search.sampler,
        "reduce_range": not host.has_int8_dot_product,
    }
    facts |= search_space(config) | config.quantize.model_dump(mode="json", exclude=OF_NO_TRIAL)
    facts |= {"trials": search.trials} if search.sampler != "grid" else {}
    facts |= {"heartbeat_seconds": search.heartbeat_seconds} if search.storage else {}
    if search.objective == "top1+latency":  # times of different machines cannot be compared
        facts |= {"latency_batch_size": search.latency_batch_size, "cpu": host.cpu, "threads": host.threads}
    return facts


def _own_name(facts: dict[str, Any]) -> str:
    digest = hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()[:8]
    return f"{facts['model_uri'].removeprefix('models:/').replace('/', '-v')}-{digest}"
