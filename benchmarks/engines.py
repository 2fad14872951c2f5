"""Which engines take which of torchvision's classifiers: one small variant of each family, engine by engine.

    python benchmarks/engines.py --output results/engines.json

Each network has random weights, batch norm with the statistics of 64 images, and ten classes; it is quantized with the
options' defaults but for observer minmax. The signal-to-noise ratio is the variance of the fp32 logits of other images
over the mean square of what int8 changes. It says whether an engine computes the network, not what a trained one would
lose: layers of random weights, one after the other, make errors larger. Rows are written as they come, and what the
file holds already is not done again. Prints a Markdown table at the end.
"""

import argparse
import json
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from qexp.config import QuantizeConfig
from qexp.errors import StageError
from qexp.measurement.accuracy import predict_logits
from qexp.measurement.host import read_host
from qexp.models.classifier import ModelSpec, build_classifier
from qexp.models.preprocessing import squashed
from qexp.quantization import KERNELS, quantize_model
from qexp.quantization.trial import settle

# One variant of each family, at a size that all of its layers can use.
NETWORKS = {
    "alexnet": 64, "convnext_tiny": 64, "densenet121": 64, "efficientnet_b0": 64, "efficientnet_v2_s": 64,
    "googlenet": 64, "inception_v3": 96, "maxvit_t": 224, "mnasnet0_5": 64, "mobilenet_v2": 64,
    "mobilenet_v3_small": 64, "regnet_x_400mf": 64, "regnet_y_400mf": 64, "resnet18": 64, "resnet50": 64,
    "resnext50_32x4d": 64, "shufflenet_v2_x0_5": 64, "squeezenet1_1": 64, "swin_t": 64, "swin_v2_t": 64, "vgg11": 32,
    "vgg11_bn": 32, "vit_b_32": 224, "wide_resnet50_2": 64,
}  # fmt: skip
CLASSES = tuple("abcdefghij")
STATISTICS, CALIBRATION, COMPARED = 64, 16, 32  # images


@dataclass(frozen=True)
class Row:
    """One network with one engine. `refused` is the reason, empty where the engine takes the network; `sqnr_db` is
    None then, and where int8 and fp32 are equal."""

    network: str
    image_size: int
    engine: str
    int8_layers: int
    float_layers: int
    sqnr_db: float | None
    duration_s: float
    refused: str = ""


def patches(count: int, size: int, seed: int) -> Tensor:
    """Coloured patches with noise, uint8 [count, 3, size, size]: unlike plain noise, each gives other logits."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    smooth = nn.functional.interpolate(coarse, (size, size), mode="bicubic")
    noise = torch.randn(smooth.shape, generator=generator)
    return (255 * (smooth + 0.1 * noise)).clamp(0, 255).to(torch.uint8)


def untrained(name: str, size: int) -> nn.Module:
    """The network with settled batch norm."""
    torch.manual_seed(0)
    images = patches(STATISTICS, size, seed=0)
    return settle(build_classifier(ModelSpec(name, CLASSES, squashed(size)), images), images)


def quantize(name: str, size: int, engine: str, network: nn.Module) -> Row:
    """Quantize a network with one engine; see `Row`."""
    options = QuantizeConfig(engine=[engine], observer="minmax")
    images = patches(COMPARED, size, seed=2)
    started = time.monotonic()
    try:
        made = quantize_model(network, patches(CALIBRATION, size, seed=1), options, reduce_range=False)
    except StageError as error:
        return Row(name, size, engine, 0, 0, None, time.monotonic() - started, str(error))
    duration_s = time.monotonic() - started
    expected, found = predict_logits(network, images), predict_logits(made.module, images)
    changed = (found - expected).square().mean()
    decibels = 10 * (expected.var() / changed).log10().item() if changed else None
    return Row(name, size, engine, len(made.int8_layers), len(made.float_layers), decibels, duration_s)


def markdown(rows: list[Row]) -> str:
    """A table with one line a network."""
    engines = list(dict.fromkeys(row.engine for row in rows))
    lines = [
        f"| network | image size | layers | {' | '.join(f'`{engine}`' for engine in engines)} |",
        "| :-- | --: | --: |" + " --: |" * len(engines),
    ]
    for name in dict.fromkeys(row.network for row in rows):
        found = {row.engine: row for row in rows if row.network == name}
        layers = max(row.int8_layers + row.float_layers for row in found.values())
        size = next(iter(found.values())).image_size
        cells = [_cell(found[engine]) if engine in found else "-" for engine in engines]
        lines.append(f"| {name} | {size} | {layers} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Row) -> str:
    if row.refused:
        return f"refused: {row.refused}"
    kept = f", {row.float_layers} in fp32" if row.float_layers else ""
    return ("equal" if row.sqnr_db is None else f"{row.sqnr_db:.1f} dB") + kept


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--networks", default=",".join(NETWORKS), help="torchvision's names, separated by commas")
    parser.add_argument("--engines", default=",".join(KERNELS))
    parser.add_argument("--image-size", type=int, default=None, help="instead of the family's own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=None)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    host = read_host(given.threads)
    torch.set_num_threads(given.threads)
    rows: list[Row] = []
    if given.output and given.output.is_file():
        rows = TypeAdapter(list[Row]).validate_python(json.loads(given.output.read_text())["rows"])
    done = {(row.network, row.image_size, row.engine) for row in rows}
    for name in given.networks.split(","):
        size = given.image_size or NETWORKS.get(name, 224)
        left = [engine for engine in given.engines.split(",") if (name, size, engine) not in done]
        network = untrained(name, size) if left else None
        for engine in left:
            assert network is not None
            rows.append(quantize(name, size, engine, network))
            print(rows[-1], flush=True)
            if given.output:
                found = {"host": asdict(host), "rows": [asdict(row) for row in rows]}
                given.output.write_text(json.dumps(found, indent=1) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
