"""What comes before the first run of a command: options settled, and whatever can be refused is refused."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from qexp.config import Config
from qexp.data.datasets import Dataset, calibration_count, load_dataset
from qexp.errors import InputError
from qexp.foundation.extras import check_engines, check_package, is_installed
from qexp.foundation.waiting import PASSIVE, wait
from qexp.measurement.host import Host, check_bf16, read_host, too_many_threads
from qexp.models.classifier import ModelSpec, needs_two_images, outline
from qexp.models.names import BY_OPENVINO, OPENVINO, OPENVINO_BF16, is_onnx_file, short_name
from qexp.models.preprocessing import as_options, preprocessing_of
from qexp.pipeline.checks import check_options
from qexp.pipeline.loading import check_data, config_of_version, refuse_conflicts
from qexp.pipeline.resume import check_data_of_run
from qexp.pipeline.take import own_preprocessing_of
from qexp.pipeline.train import fresh_classifier
from qexp.progress import say
from qexp.quantization import KERNELS, LOADED_WITHOUT_PICKLE, check_layer_names
from qexp.quantization.trial import IMAGES, refusals
from qexp.tracking import registry
from qexp.tracking import runs as tracking
from qexp.tracking.limits import check_names
from qexp.tracking.store import use_store
from qexp.tracking.tags import tags_of
from qexp.training import launch
from qexp.training.distributed import read_group
from qexp.training.recipe import settle_options


class Setup(NamedTuple):
    """What a command works with: its configuration, this machine, and the images."""

    config: Config
    host: Host
    dataset: Dataset


def prepare(
    config: Config,
    model_uri: str | None,
    given: tuple[str, ...] = (),
    resume: str | None = None,
    store: bool = True,
    named: bool = True,
) -> Setup:
    """What can be refused is refused here, before there is a run: store, version, names, data, folders.

    Args:
        given: sections of which options, if given, must not differ from what `model_uri` was made with.
        resume: run that is resumed: it stays in its experiment.
        store: whether anything is to be logged.
        named: whether the model is the name of one, and not of a module that is given.

    Returns:
        The configuration with every `auto` settled that needs no trial; what training settles by timing is left.
    """
    check_options(config, not (model_uri or resume), named)
    if store and read_group().leads:  # processes that open a new database at once break it
        use_store()
    if model_uri:
        if given:
            refuse_conflicts(config, model_uri, given)
        config = config_of_version(config, model_uri, "fp32")
    if launch.is_worker():
        config = config.with_training({"processes": read_group().local_size})
    host = _use_threads(config)
    wanted = preprocessing_of(config.data, config.preprocess)
    if config.trained_elsewhere and not model_uri and not resume:
        own = own_preprocessing_of(config) if named else None
        wanted = preprocessing_of(config.data, config.preprocess, own)
        config = config.with_preprocessing(wanted.height_px, wanted.width_px, as_options(wanted))
    dataset = load_dataset(config.data, config.seed, wanted, needs_training=not (model_uri or config.trained_elsewhere))
    if model_uri:
        check_data(model_uri, dataset)
    else:
        check_names(f"{short_name(config.model)}-{dataset.name}-int8", dataset.classes)
    if read_group().leads:
        # Of images that are decoded as needed, those of a training alone are compared: it needs all of them.
        counted = dataset.in_memory or not (model_uri or config.trained_elsewhere)
        if counted and (warning := dataset.duplicates.warning(len(dataset.test))):
            say(f"warning: {warning}")
        if resume:
            check_data_of_run(resume, dataset)
        if store:
            tracking.use_experiment(dataset.name, resume)
    if config.threads and not (config.train.train_threads or resume or model_uri):
        config = config.with_training({"train_threads": config.threads})
    config = config.model_copy(update={"threads": host.threads})
    settled = model_uri or config.trained_elsewhere
    return Setup(config if settled else _settled(config, dataset), host, dataset)


def engines_of(config: Config, onnx_file: bool = False) -> list[str]:
    """The engines to quantize with: those of `config`, or else all that are installed, that MLflow would load, and that
    have the kernels or the runtime asked for.

    Args:
        onnx_file: the network is one, which only engine `onnx` takes.
    """
    if config.quantize.engine:
        return list(config.quantize.engine)
    if onnx_file:
        return ["onnx"]
    loaded = LOADED_WITHOUT_PICKLE if registry.refuses_pickle() else tuple(KERNELS)
    installed, backend = [engine for engine in loaded if is_installed(engine)], config.quantize.backend
    # Where none has them, `_check_backend` says so.
    return [engine for engine in installed if backend in (None, *KERNELS[engine])] or installed


def with_quantization_checked(config: Config, dataset: Dataset) -> Config:
    """`config` with the number of calibration images that it stands for.

    Raises:
        InputError: there are not so many, `keep_fp32` names a layer that does not exist, no engine has the
            kernels or the runtime `backend`, MLflow would not load what an engine makes, or an extra is not installed.
    """
    engines = engines_of(config, is_onnx_file(config.model))
    check_engines(engines)
    _check_backend(config.quantize.backend, engines)
    refused = [engine for engine in engines if engine not in LOADED_WITHOUT_PICKLE]
    if refused and registry.refuses_pickle():
        allowed = f"with MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false it must be {', '.join(LOADED_WITHOUT_PICKLE)}"
        raise InputError(f"--engine {','.join(refused)}: {allowed}; MLflow loads TorchScript as it does a pickle")
    if config.quantize.max_top1_drop is not None and not len(dataset.validation):
        needs = f"needs validation images, a share of DIR/train, and {dataset.source} has none"
        raise InputError(f"--quantize-max-top1-drop {config.quantize.max_top1_drop:g}: {needs}")
    count, kept = calibration_count(config.quantize, dataset.calibration_images), config.quantize.keep_fp32
    if kept and not config.trained_elsewhere:  # of other models, once they are there: `check_kept`
        network = outline(ModelSpec(config.model, dataset.classes, preprocessing_of(config.data, config.preprocess)))
        check_layer_names(nn.ModuleDict({"network": network}), kept)
    return config.model_copy(update={"quantize": config.quantize.model_copy(update={"calibration_samples": count})})


def _check_backend(backend: str | None, engines: Sequence[str]) -> None:
    choice = [one for engine in engines for one in KERNELS[engine] if one]
    if backend and backend not in choice:
        allowed, why = ", ".join(["auto", *choice]), "" if choice else ", without a choice"
        raise InputError(f"--backend {backend}: must be {allowed} with --engine {','.join(engines)}{why}")
    if backend in BY_OPENVINO:
        check_package(OPENVINO, f"--backend {backend}", OPENVINO)
    if backend == OPENVINO_BF16:
        check_bf16(f"--backend {backend}")


def check_kept(config: Config, model: nn.Module) -> None:
    """Raise InputError where a model that was trained elsewhere has no layer of a name in `keep_fp32`."""
    if config.trained_elsewhere:
        check_layer_names(model, config.quantize.keep_fp32 or ())


def try_engines(config: Config, dataset: Dataset, needed: bool = True) -> None:
    """Try the engines of `config` on the untrained network, and say which take it.

    SmallNet is not tried: the tests hold every engine to it.

    Args:
        needed: whether the command quantizes; `qexp train` only warns.

    Raises:
        InputError: none of them takes it; the message says which other engine does.
    """
    if config.model == "smallnet":
        return
    engines, at = engines_of(config), f"at --image-size {config.data.image_size}"
    say(f"trying {', '.join(engines)} on {config.model} before its training")
    refused = _refusals(config, dataset, engines)
    because = "; ".join(refused.values())
    if len(refused) < len(engines):
        takes = ", ".join(engine for engine in engines if engine not in refused)
        return say(f"engines that take {config.model} {at}: {takes}" + (f"; not {because}" if refused else ""))
    others = [engine for engine in KERNELS if engine not in engines and is_installed(engine)]
    also = _refusals(config, dataset, others)
    use = next((f"use --engine {engine}" for engine in others if engine not in also), "use another --model")
    said = f"--engine {','.join(engines)}: does not take --model {config.model} {at}: {because}; {use}"
    if needed:
        raise InputError(said)
    say(f"warning: {said}")


def _refusals(config: Config, dataset: Dataset, engines: Sequence[str]) -> dict[str, str]:
    network = fresh_classifier(config, dataset)
    reduce_range = not read_host(None).has_int8_dot_product
    return refusals(network, dataset.train.images[:IMAGES], config.quantize, engines, reduce_range)


def _settled(config: Config, dataset: Dataset) -> Config:
    network = outline(ModelSpec(config.model, dataset.classes, preprocessing_of(config.data, config.preprocess)))
    _check_steps(config, dataset, network)
    return config.model_copy(update={"train": settle_options(config.train, dataset.name, network)})


def _check_steps(config: Config, dataset: Dataset, network: nn.Module) -> None:
    """Raise InputError where a training step has fewer images than the network and the processes need. `network` is
    as `outline` gives it."""
    images, options = len(dataset.train), config.train
    if images < options.processes:
        raise InputError(f"--processes {options.processes}: must be at most {images}, the number of training images")
    if images == 1 and needs_two_images(network, preprocessing_of(config.data, config.preprocess).shape):
        at = f"{config.model} at --image-size {config.data.image_size}"
        needs = f"{at} needs 2, for its batch norm on maps of one pixel"
        raise InputError(f"--data-dir {dataset.source}: one image is left to train with; {needs}")


def prepare_for_version(config: Config, model_uri: str) -> tuple[Config, Host]:
    """The same for a command on the registered int8 version `model_uri`, which needs no images."""
    check_options(config, new_model=False)
    use_store()
    config = config_of_version(config, model_uri, "int8")
    tracking.use_experiment(tags_of(registry.find_version(model_uri, "int8")).dataset)
    return config, _use_threads(config)


def _use_threads(config: Config) -> Host:
    host = read_host(config.threads)
    most = max([host.threads, *(config.latency.threads or ())])
    if warning := too_many_threads(replace(host, threads=most)):
        say(f"warning: {warning}")
    torch.set_num_threads(host.threads)
    wait(PASSIVE)
    return host
