"""Which ideas for short trainings help here: variants of the recipe, judged on validation images, several seeds each.

    python benchmarks/recipe.py --data-dir data/cifar10 --epochs 8 --seeds 0,1,2 --output recipe.json

The ideas are those of Keller Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv 2404.00498, as far as
they leave the network as it is. A variant is the project's own loop with one thing changed. Variants take turns seed by
seed, so that a busy machine slows all of them. Validation images differ from seed to seed, the same for all variants.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from qexp.config import DataConfig, TrainConfig
from qexp.data.datasets import Dataset, Split, load_dataset
from qexp.measurement.host import read_host
from qexp.models.classifier import Classifier, ModelSpec, build_classifier
from qexp.models.preprocessing import squashed
from qexp.training import loop as passes
from qexp.training import recipe
from qexp.training.augmentation import augment
from qexp.training.loop import Loop
from qexp.training.recipe import make_optimizer, recipe_for
from qexp.training.train import TrainResult, train_model

EMA_DECAY = 0.99  # a step
SMALL_SIZE, SMALL_SHARE = 24, 0.4  # pixels, and the share of the epochs that see images of that size


@contextmanager
def as_shipped() -> Iterator[None]:
    """The recipe of config.yaml."""
    yield


@contextmanager
def alternating_flip() -> Iterator[None]:
    """Each image is mirrored in every other epoch, instead of by chance."""
    step = passes._step
    now: dict[str, Any] = {}

    def note(loop: Loop, train: Split, batch: Tensor, look: bool) -> None:
        now.update(batch=batch, epoch=loop.position.epoch)
        step(loop, train, batch, look)

    def alternate(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
        cropped = augment(images, padding, False, generator)
        mirrored = (now["batch"] * 2_654_435_761 // 65_536 + now["epoch"]) % 2 == 0
        return torch.where(mirrored.view(-1, 1, 1, 1), cropped.flip(3), cropped)

    with patch.object(passes, "_step", note), patch.object(passes, "augment", alternate):
        yield


@contextmanager
def decay_of_weights_only() -> Iterator[None]:
    """No weight decay on biases and batch norm."""

    def make(model: Classifier, options: TrainConfig, steps: int) -> tuple[Any, Any]:
        optimizer, schedule = make_optimizer(model, options, steps)
        for group in list(optimizer.param_groups):
            vectors = [parameter for parameter in group["params"] if parameter.dim() < 2]
            rest = {key: value for key, value in group.items() if key != "params"}
            group["params"] = [parameter for parameter in group["params"] if parameter.dim() >= 2]
            optimizer.add_param_group(rest | {"params": vectors, "weight_decay": 0.0})
        fresh = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            [group["max_lr"] for group in optimizer.param_groups],
            total_steps=schedule.total_steps,  # type: ignore[attr-defined]
            pct_start=0.25,
            cycle_momentum=False,
        )
        return optimizer, fresh

    with patch.object(passes, "make_optimizer", make):
        yield


@contextmanager
def averaged_weights() -> Iterator[None]:
    """Validate (and so choose) an exponential moving average of the weights."""
    step, validate = passes._step, passes.validate
    average: list[AveragedModel] = []

    def step_and_average(loop: Loop, train: Split, batch: Tensor, look: bool) -> None:
        step(loop, train, batch, look)
        if not average:
            average.append(AveragedModel(loop.model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY), use_buffers=True))
        average[0].update_parameters(loop.model)

    def validate_average(loop: Loop, split: Split) -> tuple[float, float, float]:
        own = {name: tensor.clone() for name, tensor in loop.model.state_dict().items()}
        loop.model.load_state_dict(average[0].module.state_dict())
        found = validate(loop, split)
        loop.model.load_state_dict(own)
        return found

    with patch.object(passes, "_step", step_and_average), patch.object(passes, "validate", validate_average):
        yield


@contextmanager
def small_images_first() -> Iterator[None]:
    """Progressive resizing: the first epochs see smaller images."""
    forward = passes._forward

    def resized(loop: Loop, module: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if loop.model.training and loop.position.epoch <= SMALL_SHARE * loop.options.epochs:
            wide = nn.functional.interpolate(images.float(), size=SMALL_SIZE, mode="area")
            images = wide.round().to(torch.uint8)
        return forward(loop, module, images, labels)

    with patch.object(passes, "_forward", resized):
        yield


@contextmanager
def first_linear_at_full_rate() -> Iterator[None]:
    """VGG at 32 px without what makes up for the 49 equal gradients of its first linear layer."""
    with patch.object(recipe, "repeated_inputs", lambda model: 1):
        yield


def peak_times(factor: float) -> Callable[[Classifier], dict[str, Any]]:
    """Another peak of the learning rate."""
    return lambda model: {"learning_rate": factor * recipe_for(model).learning_rate}


NOTHING: Callable[[Classifier], dict[str, Any]] = lambda model: {}  # noqa: E731
VARIANTS: dict[str, tuple[Callable[[], Any], Callable[[Classifier], dict[str, Any]]]] = {
    "as shipped": (as_shipped, NOTHING),
    "alternating flip": (alternating_flip, NOTHING),
    "no decay of biases and batch norm": (decay_of_weights_only, NOTHING),
    "averaged weights": (averaged_weights, NOTHING),
    "small images first": (small_images_first, NOTHING),
    "first linear layer at the full rate": (first_linear_at_full_rate, NOTHING),
    "half the peak": (as_shipped, peak_times(0.5)),
    "twice the peak": (as_shipped, peak_times(2.0)),
}


def train_variant(name: str, model_name: str, dataset: Dataset, epochs: int, seed: int) -> TrainResult:
    change, options_for = VARIANTS[name]
    torch.manual_seed(seed)
    model = build_classifier(ModelSpec(model_name, dataset.classes, squashed(32)), dataset.train.images)
    options = TrainConfig(epochs=epochs, patience=epochs, **options_for(model))
    with change(), tempfile.TemporaryDirectory() as folder:
        return train_model(model, dataset, options, seed, lambda epoch: None, Path(folder))


def summarize(scores: dict[str, list[float]], times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Mean validation top-1 of the best epoch, and the mean difference from `as shipped` with its standard error."""
    rows = []
    for name, values in scores.items():
        gains = [value - base for value, base in zip(values, scores["as shipped"], strict=True)]
        error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else None
        row = {"variant": name, "top1_percent": statistics.mean(values), "gain_points": statistics.mean(gains)}
        rows.append(row | {"standard_error_points": error, "duration_s": statistics.mean(times[name]), "top1": values})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--model", default="smallnet")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--variants", default=",".join(VARIANTS))  # the first is what the others are compared with
    parser.add_argument("--output", type=Path, default=None)
    given = parser.parse_args()
    names = given.variants.split(",")
    scores: dict[str, list[float]] = {name: [] for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    host = read_host(None)
    torch.set_num_threads(host.threads)
    for seed in map(int, given.seeds.split(",")):
        dataset = load_dataset(DataConfig(dataset="imagefolder", data_dir=given.data_dir), seed)
        for name in names:
            started = time.monotonic()
            result = train_variant(name, given.model, dataset, given.epochs, seed)
            times[name].append(time.monotonic() - started)
            scores[name].append(result.epochs[result.best_epoch - 1].validation_top1_percent)
            print(f"seed {seed}, {name}: {scores[name][-1]:.2f} % in {times[name][-1]:.0f} s", flush=True)
    rows = summarize(scores, times)
    for row in rows:
        error = row["standard_error_points"]
        change = f"{row['gain_points']:+.2f}" + ("" if error is None else f" ± {error:.2f}")
        print(f"{row['variant']:36} {row['top1_percent']:6.2f} % {change:>16} {row['duration_s']:6.0f} s")
    facts = {"model": given.model, "epochs": given.epochs, "cpu": host.cpu, "threads": host.threads}
    text = json.dumps(facts | {"libraries": host.libraries, "rows": rows})
    print(text)
    if given.output:
        given.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
