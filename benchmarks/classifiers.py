"""Which classifiers the default recipe trains on the digits: validation and test top-1, one row a network and seed.

    python benchmarks/classifiers.py --seeds 0,1 --output results/classifiers.json

Each training is that of `qexp train --model NAME`: the options' defaults, with precision, threads and layout given, so
that a run can be repeated bit for bit. With --until 90 it ends as soon as the validation top-1 is that high, which says
after how many epochs; the others of its epochs are then not known. Rows are written as they come, and what the file
holds already is not trained again. Prints a Markdown table at the end.
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter

from qexp.config import DataConfig, TrainConfig
from qexp.data.datasets import load_dataset
from qexp.errors import StageError
from qexp.measurement.accuracy import measure_accuracy, predict_logits
from qexp.measurement.host import read_host
from qexp.models.classifier import ModelSpec, build_classifier
from qexp.models.preprocessing import squashed
from qexp.training.recipe import settle_options
from qexp.training.train import EpochResult, train_model

# Those of tests/test_classifiers.py that take 32 px, and the two that the reports are about.
MODELS = (
    "smallnet", "vgg16", "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0",
    "squeezenet1_1", "shufflenet_v2_x1_0", "densenet121", "googlenet", "regnet_y_400mf", "convnext_tiny",
)  # fmt: skip
GOAL_PERCENT = 90.0


@dataclass(frozen=True)
class Row:
    """One training. `epochs_to_goal` is the first epoch with a validation top-1 of 90 %; None: there was none.
    `test_top1_percent` is that of the best weights so far. `error` says why it stopped early, if it failed."""

    model: str
    seed: int
    image_size: int
    optimizer: str
    peak_learning_rate: float
    bf16: bool
    batch_size: int
    epochs: int
    epochs_to_goal: int | None
    first_validation_loss: float | None
    best_validation_top1_percent: float
    test_top1_percent: float | None
    skipped_steps: int | None
    duration_s: float
    error: str = ""


class _ReachedError(Exception):
    """The validation top-1 that ends the training has come."""


def train(model_name: str, seed: int, options: TrainConfig, image_size: int, until: float | None) -> Row:
    """Train one classifier; see `Row`."""
    dataset = load_dataset(DataConfig(image_size=image_size), seed)
    torch.manual_seed(seed)
    model = build_classifier(ModelSpec(model_name, dataset.classes, squashed(image_size)), dataset.train.images)
    settled = settle_options(options, dataset.name, model)
    epochs: list[EpochResult] = []

    def note(epoch: EpochResult) -> None:
        epochs.append(epoch)
        if until is not None and epoch.validation_top1_percent >= until:
            raise _ReachedError

    started, error = time.monotonic(), ""
    skipped: int | None = None  # not known of a training that ends early
    with tempfile.TemporaryDirectory() as folder:
        try:
            skipped = train_model(model, dataset, options, seed, note, Path(folder)).skipped_steps
        except _ReachedError:
            pass
        except StageError as failed:
            error = str(failed)
    duration_s = time.monotonic() - started
    test = None if error else measure_accuracy(predict_logits(model, dataset.test.images), dataset.test.labels)
    reached = [epoch.epoch for epoch in epochs if epoch.validation_top1_percent >= GOAL_PERCENT]
    return Row(
        model=model_name,
        seed=seed,
        image_size=image_size,
        optimizer=settled.optimizer or "",
        peak_learning_rate=settled.learning_rate or 0.0,
        bf16=bool(options.bf16),
        batch_size=options.batch_size,
        epochs=len(epochs),
        epochs_to_goal=reached[0] if reached else None,
        first_validation_loss=epochs[0].validation_loss if epochs else None,
        best_validation_top1_percent=max((epoch.validation_top1_percent for epoch in epochs), default=0.0),
        test_top1_percent=test.top1_percent if test else None,
        skipped_steps=skipped,
        duration_s=duration_s,
        error=error,
    )


def markdown(rows: list[Row]) -> str:
    """A table with one line a row."""
    lines = [
        "| classifier | optimizer, peak | precision | seed | epochs | first epoch with 90 % | best validation | test |",
        "| :-- | :-- | :-- | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        test = "-" if row.test_top1_percent is None else f"{row.test_top1_percent:.2f} %"
        lines.append(
            f"| {row.model} | {row.optimizer}, {row.peak_learning_rate:g} | {'bf16' if row.bf16 else 'fp32'} "
            f"| {row.seed} | {row.epochs} | {row.epochs_to_goal or 'none'} "
            f"| {row.best_validation_top1_percent:.2f} % | {row.error or test} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--until", type=float, default=None, help="validation top-1 in percent that ends a training")
    parser.add_argument("--output", type=Path, default=None)
    given = parser.parse_args()
    host = read_host(given.threads)
    torch.set_num_threads(given.threads)
    options = TrainConfig(
        epochs=given.epochs, batch_size=given.batch_size, bf16=given.bf16, channels_last=True,
        train_threads=given.threads,
    )  # fmt: skip
    rows: list[Row] = []
    if given.output and given.output.is_file():
        rows = TypeAdapter(list[Row]).validate_python(json.loads(given.output.read_text())["rows"])
    done = {(row.model, row.seed, row.image_size, row.bf16, row.batch_size) for row in rows}
    for name in given.models.split(","):
        for seed in map(int, given.seeds.split(",")):
            if (name, seed, given.image_size, given.bf16, given.batch_size) in done:
                continue
            rows.append(train(name, seed, options, given.image_size, given.until))
            print(rows[-1], flush=True)
            if given.output:
                found = {"host": asdict(host), "rows": [asdict(row) for row in rows]}
                given.output.write_text(json.dumps(found, indent=1) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
