"""Evaluation on more images than memory holds: peak memory and images a second, by the number of images.

    python benchmarks/images.py --counts 2000,10000,50000 --output results/images.json

Makes JPEG files of 224 px and more (noise and shapes; a few hundred different ones, each linked many times, and each
link decoded), quantizes an untrained network, and evaluates fp32 and int8 on all of them, each number of images in a
process of its own. `decoded` is reading and decoding alone, `fp32` and `int8` evaluate what is decoded by then, and the
speed of a model alone is that on one batch in memory, over and over. Prints a Markdown table.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from qexp.config import DataConfig, QuantizeConfig
from qexp.data.datasets import calibration_subset, load_dataset
from qexp.data.images import BATCH_SIZE, Images
from qexp.measurement.accuracy import evaluation_batch, predict_logits, to_float
from qexp.measurement.host import read_host
from qexp.models.classifier import ModelSpec, build_classifier
from qexp.models.preprocessing import Preprocessing
from qexp.quantization import quantize_model
from qexp.quantization.trial import settle

SIZE_PX, RESIZE_PX, CLASSES, DIFFERENT = 224, 256, 10, 400
CALIBRATION_IMAGES = 32
SECONDS_ALONE = 10.0  # for which a model is timed on one batch


@dataclass(frozen=True)
class Row:
    """One number of images; rates in images a second."""

    images: int
    decoded_gb: float
    listing_s: float
    decoded_rate: float
    fp32_rate: float
    int8_rate: float
    fp32_alone_rate: float
    int8_alone_rate: float
    peak_memory_mb: float


def make_folder(root: Path, count: int) -> None:
    """`root/test/<class>/` with so many JPEG files in all."""
    random = np.random.RandomState(0)
    files = []
    for number in range(min(DIFFERENT, count)):
        width, height = random.randint(240, 420, 2)
        image = Image.fromarray(random.randint(0, 90, (height, width, 3), dtype=np.uint8))
        draw = ImageDraw.Draw(image)
        for _ in range(12):
            left, top = random.randint(0, 220, 2)
            box = (int(left), int(top), int(left + random.randint(8, 160)), int(top + random.randint(8, 160)))
            draw.ellipse(box, fill=tuple(random.randint(0, 256, 3).tolist()))
        files.append(root / "made" / f"{number}.jpg")
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        image.save(files[-1], quality=88)
    for label in range(CLASSES):
        (root / "data" / "test" / f"class {label}").mkdir(parents=True)
    for number in range(count):
        os.link(files[number % len(files)], root / "data" / "test" / f"class {number % CLASSES}" / f"{number:07}.jpg")


def measure(root: Path, model_name: str, engine: str, threads: int) -> Row:
    """Evaluate both models on the images of a folder; see `Row`."""
    torch.set_num_threads(threads)
    wanted = Preprocessing(SIZE_PX, SIZE_PX, RESIZE_PX)
    started = time.perf_counter()
    test = load_dataset(DataConfig(dataset="imagefolder", data_dir=str(root)), 0, wanted, needs_training=False).test
    listing_s, count = time.perf_counter() - started, len(test)
    assert isinstance(test.images, Images)
    decoded_rate = _rate(count, lambda: [None for _ in test.images.split(BATCH_SIZE)])
    sample = calibration_subset(test, CALIBRATION_IMAGES, 0)[0].pixels()
    torch.manual_seed(0)
    spec = ModelSpec(model_name, tuple(f"class {label}" for label in range(CLASSES)), wanted)
    fp32 = settle(build_classifier(spec, sample), sample)
    int8 = quantize_model(fp32, sample, QuantizeConfig(engine=[engine], observer="minmax")).module
    batch = test.images[: evaluation_batch(test.images.shape)]
    rates = []
    for model in (fp32, int8):
        rates.append(_rate(count, partial(predict_logits, model, test.images)))
        rates.append(_alone(model, batch))
    fp32_rate, fp32_alone, int8_rate, int8_alone = rates
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    gb = count * float(np.prod(wanted.shape)) / 1e9
    return Row(count, gb, listing_s, decoded_rate, fp32_rate, int8_rate, fp32_alone, int8_alone, peak)


def _rate(count: int, work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return count / (time.perf_counter() - started)


def _alone(model: Callable[[Tensor], Tensor], batch: Tensor) -> float:
    """Images a second of a model on one batch, in memory."""
    done, started = 0, time.perf_counter()
    with torch.no_grad():
        while (taken := time.perf_counter() - started) < SECONDS_ALONE:
            model(to_float(batch))
            done += len(batch)
    return done / taken


def markdown(rows: list[Row]) -> str:
    """A table with one line a row."""
    lines = [
        "| images | decoded, GB | peak memory, MB | listed, s | decoded, images/s | fp32, images/s (alone) "
        "| int8, images/s (alone) |",
        "| --: | --: | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        lines.append(
            f"| {row.images:,} | {row.decoded_gb:.2f} | {row.peak_memory_mb:,.0f} | {row.listing_s:.2f} "
            f"| {row.decoded_rate:.0f} | {row.fp32_rate:.1f} ({row.fp32_alone_rate:.1f}) "
            f"| {row.int8_rate:.1f} ({row.int8_alone_rate:.1f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--counts", default="2000,10000,50000", help="numbers of images")
    parser.add_argument("--model", default="resnet18", help="a classifier of torchvision, or smallnet")
    parser.add_argument("--engine", default="fx", help="of the int8 model: fx, pt2e or onnx")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=None,
        help="where the files and what is decoded go: 8 GB with 50,000 images, removed at the end",
    )
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)  # of the process of one count
    given = parser.parse_args()
    host = read_host(given.threads)
    if given.folder is not None:
        print(json.dumps(asdict(measure(given.folder, given.model, given.engine, host.threads))))
        return
    rows = []
    for count in map(int, given.counts.split(",")):
        with tempfile.TemporaryDirectory(dir=given.work_dir) as folder:
            make_folder(Path(folder), count)
            command = [sys.executable, __file__, "--model", given.model, "--engine", given.engine]
            command += ["--threads", str(host.threads), "--folder", str(Path(folder, "data"))]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(Row(**json.loads(done.stdout.splitlines()[-1])))
        print(markdown(rows), flush=True)
    if given.output:
        facts = {"model": given.model, "engine": given.engine, "threads": host.threads, "cpu": host.cpu}
        facts |= {"size_px": SIZE_PX, "resize_px": RESIZE_PX, "rows": [asdict(row) for row in rows]}
        given.output.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
