"""What a command refuses before there is a run: networks that no engine takes, and steps of too few images."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
import torch
from stores import new_store

from qexp.config import Config, DataConfig, QuantizeConfig, SearchConfig, TrainConfig
from qexp.data.datasets import Dataset
from qexp.errors import InputError, StageError
from qexp.pipeline import jobs, setup
from qexp.quantization import trial
from qexp.search.job import run_search

CONFIG = Config(model="squeezenet1_1", quantize=QuantizeConfig(engine=["fx"]))
REFUSED = r"^--engine fx: does not take --model squeezenet1_1 at --image-size 32: engine fx: no such operation; "


@pytest.fixture
def fx_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def quantize(network: object, images: object, options: QuantizeConfig, reduce_range: bool) -> None:
        if options.engine == ["fx"]:
            raise StageError("engine fx: no such operation")

    monkeypatch.setattr(trial, "quantize_model", quantize)


@pytest.fixture
def at_32_px(digits: Dataset) -> Dataset:
    black = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    return replace(digits, train=replace(digits.train, images=black.expand(len(digits.train), -1, -1, -1)))


@pytest.mark.usefixtures("fx_takes_nothing")
def test_engines_are_tried_before_the_training(at_32_px: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=f"{REFUSED}use --engine pt2e"):
        setup.try_engines(CONFIG, at_32_px)
    setup.try_engines(CONFIG, at_32_px, needed=False)
    assert "warning: --engine fx: does not take --model squeezenet1_1" in capsys.readouterr().err
    both = CONFIG.model_copy(update={"quantize": QuantizeConfig(engine=["fx", "onnx"])})
    setup.try_engines(both, at_32_px)
    said = "engines that take squeezenet1_1 at --image-size 32: onnx; not engine fx: no such operation"
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("fx_takes_nothing")
@pytest.mark.parametrize("command", [jobs.run_main, lambda config: run_search(config, None)])
def test_a_network_that_no_engine_takes_makes_no_run(
    command: Callable[[Config], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow.set_tracking_uri(new_store(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=REFUSED):
        command(CONFIG.model_copy(update={"search": SearchConfig(sample_counts=[8])}))
    client = mlflow.MlflowClient()
    assert not client.search_runs([found.experiment_id for found in client.search_experiments()])


@pytest.mark.parametrize(
    ("backend", "engines"),
    [(None, ["fx", "pt2e", "onnx"]), ("onednn", ["fx"]), ("openvino", ["onnx"]), ("onnxruntime", ["onnx"])],
)
def test_kernels_that_are_asked_for_choose_the_engine(backend: str | None, engines: list[str]) -> None:
    assert setup.engines_of(Config(quantize=QuantizeConfig(backend=backend))) == engines


def test_kernels_for_modules_are_none_for_an_onnx_file(digits: Dataset) -> None:
    config = Config(model="net.onnx", quantize=QuantizeConfig(backend="x86"))
    with pytest.raises(InputError, match=r"^--backend x86: must be auto, onnxruntime, .* with --engine onnx$"):
        setup.with_quantization_checked(config, digits)


def test_a_trial_leaves_the_network_and_tells_what_an_engine_says() -> None:
    class Odd(torch.nn.Module):
        """Batch norm, a last layer of zeros, and a branch that no tracer follows."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.last = torch.nn.BatchNorm2d(3), torch.nn.Linear(3, 2)
            torch.nn.init.zeros_(self.last.weight)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = self.norm(images)
            return self.last(x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3)))

    network, images = Odd().eval(), torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    found = trial.refusals(network, images, QuantizeConfig(), ["fx"], False)
    assert list(found) == ["fx"] and found["fx"].startswith("engine fx cannot quantize this model: ")
    assert not network.last.weight.any() and network.norm.num_batches_tracked == 0
    settled = trial.settle(network, images)
    assert settled.last.weight.any() and settled.norm.momentum == network.norm.momentum and not settled.training
    statistics = images.float().div(255).transpose(0, 1).flatten(1)
    assert torch.allclose(settled.norm.running_mean, statistics.mean(1), atol=1e-5)


@pytest.mark.parametrize(
    ("model", "images", "processes", "said"),
    [
        ("resnet18", 1, 1, r"^--data-dir \S+: one image is left to train with; resnet18 at --image-size 32 needs 2, "),
        ("smallnet", 1, 2, r"^--processes 2: must be at most 1, the number of training images$"),
        ("smallnet", 1, 1, None),
        ("resnet18", 2, 1, None),
    ],
)
def test_steps_of_too_few_images(digits: Dataset, model: str, images: int, processes: int, said: str | None) -> None:
    few = replace(digits, train=digits.train.subset(torch.arange(images)))
    config = Config(model=model, data=DataConfig(image_size=32), train=TrainConfig(processes=processes, device="cpu"))
    if said is None:
        assert setup._settled(config, few).train.optimizer == "sgd"
        return
    with pytest.raises(InputError, match=said):
        setup._settled(config, few)
