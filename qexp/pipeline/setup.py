"""What comes before the first run of a command: options settled, and whatever can be refused is refused."""

from typing import NamedTuple

import torch
from torch import nn

from qexp.config import Config
from qexp.data.datasets import Dataset, calibration_count, load_dataset
from qexp.errors import InputError
from qexp.extras import check_engines
from qexp.measurement.host import Host, read_host, too_many_threads
from qexp.models.classifier import ModelSpec, outline
from qexp.pipeline.checks import check_options
from qexp.pipeline.loading import check_data, config_of_version, refuse_conflicts
from qexp.pipeline.resume import check_data_of_run
from qexp.progress import say
from qexp.quantization import KERNELS, LOADED_WITHOUT_PICKLE, check_layer_names
from qexp.tracking import registry
from qexp.tracking import runs as tracking
from qexp.tracking.store import use_store
from qexp.training import launch
from qexp.training.distributed import read_group
from qexp.training.recipe import settle_options


class Setup(NamedTuple):
    """What a command works with: its configuration, this machine, and the images."""

    config: Config
    host: Host
    dataset: Dataset


def prepare(config: Config, model_uri: str | None, given: tuple[str, ...] = (), resume: str | None = None) -> Setup:
    """What can be refused is refused here, before there is a run: store, version, names, data, folders.

    Args:
        given: sections of which options, if given, must not differ from what `model_uri` was made with.
        resume: run that is resumed: it stays in its experiment.

    Returns:
        The configuration with every `auto` settled that needs no trial; what training settles by timing is left.
    """
    check_options(config, new_model=not (model_uri or resume))
    if read_group().leads:  # processes that open a new database at once break it
        use_store()
    if model_uri:
        if given:
            refuse_conflicts(config, model_uri, given)
        config = config_of_version(config, model_uri, "fp32")
    if launch.is_worker():
        config = config.with_training({"processes": read_group().local_size})
    host = _use_threads(config)
    dataset = load_dataset(config.data, config.seed)
    if model_uri:
        check_data(model_uri, dataset)
    if read_group().leads:
        if warning := dataset.duplicates.warning(len(dataset.test)):
            say(f"warning: {warning}")
        if resume:
            check_data_of_run(resume, dataset)
        tracking.use_experiment(dataset.name, resume)
    if config.threads and not (config.train.train_threads or resume or model_uri):
        config = config.with_training({"train_threads": config.threads})
    config = config.model_copy(update={"threads": host.threads})
    return Setup(config if model_uri else _settled(config, dataset), host, dataset)


def with_quantization_checked(config: Config, dataset: Dataset) -> Config:
    """`config` with the number of calibration images that it stands for.

    Raises:
        InputError: there are not so many, `keep_fp32` names a layer that does not exist, no engine has a choice of
            kernels for `backend`, MLflow would not load what an engine makes, or an engine's extra is not installed.
    """
    check_engines(config.quantize.engine)
    if config.quantize.backend and all(len(KERNELS[engine]) == 1 for engine in config.quantize.engine):
        engines = ",".join(config.quantize.engine)
        raise InputError(f"--backend {config.quantize.backend}: must be auto with --engine {engines}, without a choice")
    refused = [engine for engine in config.quantize.engine if engine not in LOADED_WITHOUT_PICKLE]
    if refused and registry.refuses_pickle():
        allowed = f"with MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false it must be {', '.join(LOADED_WITHOUT_PICKLE)}"
        raise InputError(f"--engine {','.join(refused)}: {allowed}; MLflow loads TorchScript as it does a pickle")
    count, kept = calibration_count(config.quantize, dataset.train), config.quantize.keep_fp32
    if kept:
        network = outline(ModelSpec(config.model, dataset.classes, config.data.image_size))
        check_layer_names(nn.ModuleDict({"network": network}), kept)
    return config.model_copy(update={"quantize": config.quantize.model_copy(update={"calibration_samples": count})})


def _settled(config: Config, dataset: Dataset) -> Config:
    network = outline(ModelSpec(config.model, dataset.classes, config.data.image_size))
    return config.model_copy(update={"train": settle_options(config.train, dataset.name, network)})


def prepare_for_version(config: Config, model_uri: str) -> tuple[Config, Host]:
    """The same for a command on the registered int8 version `model_uri`, which needs no images."""
    check_options(config, new_model=False)
    use_store()
    config = config_of_version(config, model_uri, "int8")
    tracking.use_experiment(registry.find_version(model_uri, "int8").tags["dataset"])
    return config, _use_threads(config)


def _use_threads(config: Config) -> Host:
    host = read_host(config.threads)
    if warning := too_many_threads(host):
        say(f"warning: {warning}")
    torch.set_num_threads(host.threads)
    return host
