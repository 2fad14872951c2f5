"""Training speed: this project's loop against the loop that most people write, images a second, interleaved.

    python benchmarks/training.py --models vgg16,smallnet --rounds 5

The other loop: a Dataset of PIL images, torchvision's RandomCrop, RandomHorizontalFlip, ToTensor and Normalize per
image, a DataLoader with two workers, fp32, default memory layout, SGD as torch gives it, glibc's malloc as it comes.
Both train the same network on the same random images, in turns of a few seconds in one process, so that a busy machine
slows both. The share of a step that goes to data handling (indexing, crop, flip, conversion) is measured in the same
turns.
Prints a table, then one line of JSON; `--output FILE` writes the JSON there too.
"""

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from qexp.config import TrainConfig
from qexp.data.datasets import Dataset, Split
from qexp.measurement.accuracy import to_float
from qexp.measurement.host import read_host, reuse_freed_memory
from qexp.models.classifier import Classifier, ModelSpec, build_classifier
from qexp.models.preprocessing import squashed
from qexp.models.vision import torchvision
from qexp.training import loop as passes
from qexp.training.augmentation import augment
from qexp.training.distributed import Group
from qexp.training.interrupts import StopRequest
from qexp.training.loop import Loop
from qexp.training.recipe import settle_options

CLASSES = tuple("abcdefghij")
IMAGE_SIZE, BATCH_SIZE, WARM_UP_STEPS = 32, 128, 2


@dataclass(frozen=True)
class Row:
    """Medians over the rounds; `speedup` is the median of the rounds' ratios."""

    model: str
    ours_images_per_s: float
    usual_images_per_s: float
    speedup: float
    speedup_lowest: float
    speedup_highest: float
    data_share_percent: float
    rounds: int


def random_images(count: int) -> Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(0, len(CLASSES), (count,), generator=generator))


def build(model: str, split: Split) -> Classifier:
    torch.manual_seed(0)
    return build_classifier(ModelSpec(model, CLASSES, squashed(IMAGE_SIZE)), split.images)


class PilImages(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """What torchvision.datasets.CIFAR10 gives: PIL images, each transformed when it is asked for."""

    def __init__(self, split: Split) -> None:
        transforms = torchvision.transforms
        self.images = [Image.fromarray(np.asarray(image.permute(1, 2, 0))) for image in split.images]
        self.labels = split.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(IMAGE_SIZE, padding=4, padding_mode="reflect"),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def usual_loop(model: str, split: Split) -> Callable[[int], None]:
    """A function that makes so many steps of the loop that most people write."""
    network = build(model, split).network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, nesterov=True)
    loader = torch.utils.data.DataLoader(
        PilImages(split), BATCH_SIZE, shuffle=True, num_workers=2, persistent_workers=True, drop_last=True
    )

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from loader

    batches = endless()

    def run(steps: int) -> None:
        for _ in range(steps):
            images, labels = next(batches)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(images), labels, label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            loss.item()

    return run


def our_loop(model: str, split: Split) -> tuple[Loop, Callable[[int], None]]:
    """The loop of training/loop.py, and a function that makes so many of its steps."""
    classifier = build(model, split)
    classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    classifier.train()
    dataset = Dataset("random", "random", CLASSES, split, split, split, "")
    options = settle_options(
        TrainConfig(device="cpu", learning_rate=1e-3, batch_size=BATCH_SIZE, epochs=10_000), "random", classifier
    )
    loop = passes.prepare(classifier, classifier, dataset, options, 0, Group(), StopRequest())

    def run(steps: int) -> None:
        for _ in range(steps):
            passes._step(loop, split, torch.randint(0, len(split), (BATCH_SIZE,)), look=True)

    return loop, run


def handle_data(loop: Loop, split: Split, steps: int) -> None:
    """What `_step` does to images before the network sees them."""
    for _ in range(steps):
        batch = torch.randint(0, len(split), (BATCH_SIZE,))
        images = augment(split.images[batch], loop.options.crop_padding, bool(loop.options.flip), loop.generator)
        to_float(images).contiguous(memory_format=torch.channels_last)
        split.labels[batch]


def seconds(run: Callable[[int], None], steps: int) -> float:
    """Wall time a step."""
    started = time.perf_counter()
    run(steps)
    return (time.perf_counter() - started) / steps


def default_malloc() -> None:
    """glibc's own behaviour once it has adapted: blocks above 32 MiB are mappings that are given back when freed."""
    libc = ctypes.CDLL(None)
    for parameter, value in ((-4, 65_536), (-3, 32 << 20), (-1, 64 << 20)):  # M_MMAP_MAX, M_MMAP_THRESHOLD, M_TRIM_…
        libc.mallopt(parameter, value)
    libc.malloc_trim(0)


def compare(model: str, rounds: int, steps: int) -> Row:
    """Both loops in turns, the first round untimed."""
    split = random_images(2048)
    usual = usual_loop(model, split)
    loop, ours = our_loop(model, split)
    times: list[tuple[float, float, float]] = []
    for number in range(rounds + 1):
        default_malloc()
        usual_s = seconds(usual, steps)
        reuse_freed_memory()
        ours(WARM_UP_STEPS)  # the heap has been given back
        ours_s = seconds(ours, steps)
        data_s = seconds(lambda n: handle_data(loop, split, n), steps)
        if number:
            times.append((ours_s, usual_s, data_s))
    ratios = [usual_s / ours_s for ours_s, usual_s, _ in times]
    return Row(
        model=model,
        ours_images_per_s=BATCH_SIZE / statistics.median(row[0] for row in times),
        usual_images_per_s=BATCH_SIZE / statistics.median(row[1] for row in times),
        speedup=statistics.median(ratios),
        speedup_lowest=min(ratios),
        speedup_highest=max(ratios),
        data_share_percent=100 * statistics.median(data_s / ours_s for ours_s, _, data_s in times),
        rounds=rounds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default="vgg16,smallnet")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--output", type=Path, default=None)
    given = parser.parse_args()
    host = read_host(given.threads)
    torch.set_num_threads(host.threads)
    rows = [compare(model, given.rounds, 8 if model == "vgg16" else 40) for model in given.models.split(",")]
    print(f"{'model':12} {'ours':>9} {'usual':>9} {'speed-up (lowest to highest)':>30} {'data handling':>14}")
    for row in rows:
        ratios = f"{row.speedup:.2f}x ({row.speedup_lowest:.2f} to {row.speedup_highest:.2f})"
        pace = f"{row.ours_images_per_s:7.0f}/s {row.usual_images_per_s:7.0f}/s"
        print(f"{row.model:12} {pace} {ratios:>30} {row.data_share_percent:12.2f} %")
    text = json.dumps({"host": asdict(host), "batch_size": BATCH_SIZE, "rows": [asdict(row) for row in rows]})
    print(text)
    if given.output:
        given.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
