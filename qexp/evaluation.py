"""Logits once, then accuracy of one model and the paired comparison of two on the same images in the same order."""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from qexp.progress import track

Z_95 = 1.959964


@dataclass(frozen=True)
class Accuracy:
    """Share of images, in percent, whose label is the best, or among the three best, of the logits."""

    top1_percent: float
    top3_percent: float
    images: int


@dataclass(frozen=True)
class Comparison:
    """int8 against fp32 on the same images. A drop is fp32 minus int8, in percentage points."""

    top1_drop_points: float
    top1_drop_low_points: float
    top1_drop_high_points: float
    top3_drop_points: float
    agreement_percent: float
    only_fp32_correct_images: int
    only_int8_correct_images: int
    images: int


def to_float(images: Tensor) -> Tensor:
    """uint8 pixels to float32 in [0, 1], the input of every classifier here."""
    return images.float().div_(255)


def predict_logits(model: Callable[[Tensor], Tensor], images: Tensor, batch_size: int = 256, label: str = "") -> Tensor:
    """Logits float32 [N, classes] of uint8 images [N, 3, H, W], in the order of the images."""
    with torch.no_grad():
        batches = images.split(batch_size)
        shown = track(batches, label or "evaluating", len(batches))
        return torch.cat([model(to_float(batch)).float() for batch in shown])


def top_k_correct(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether the label is among the k largest logits, bool [N]; with fewer than k classes it always is.

    Logits with NaN count as wrong. Among equal logits the lower class number ranks first.
    """
    ranked = logits.argsort(dim=1, descending=True, stable=True)[:, :k]
    return (ranked == labels[:, None]).any(dim=1) & ~logits.isnan().any(dim=1)


def measure_accuracy(logits: Tensor, labels: Tensor) -> Accuracy:
    """Top-1 and top-3 of logits [N, classes] against labels [N]."""
    top1, top3 = (top_k_correct(logits, labels, k).double().mean().item() * 100 for k in (1, 3))
    return Accuracy(top1, top3, len(labels))


def compare(fp32_logits: Tensor, int8_logits: Tensor, labels: Tensor) -> Comparison:
    """Both models' logits [N, classes] for the same images, compared image by image."""
    fp32, int8 = top_k_correct(fp32_logits, labels, 1), top_k_correct(int8_logits, labels, 1)
    lost, gained = int((fp32 & ~int8).sum()), int((int8 & ~fp32).sum())
    low, high = paired_drop_interval(lost, gained, len(labels))
    agreement = (fp32_logits.argmax(1) == int8_logits.argmax(1)).double().mean().item() * 100
    top3_lost = int(top_k_correct(fp32_logits, labels, 3).sum()) - int(top_k_correct(int8_logits, labels, 3).sum())
    count = len(labels)
    return Comparison(100 * (lost - gained) / count, low, high, 100 * top3_lost / count, agreement, lost, gained, count)


def guess_percent(labels: Tensor) -> float:
    """Top-1 of always naming the most frequent of these labels [N]."""
    return 100 * labels.bincount().max().item() / len(labels)


def paired_drop_interval(lost: int, gained: int, images: int) -> tuple[float, float]:
    """95 % interval, in points, of the drop between two models that saw the same images.

    Only the images that flip carry information: Wald's interval for paired proportions with 1/2 added to each cell,
    so that it keeps a width when nothing flips (Agresti and Min, Statistics in Medicine 24, 2005).
    """
    total, b, c = images + 2, lost + 0.5, gained + 0.5
    drop = (b - c) / total
    spread = Z_95 * sqrt(b + c - (b - c) ** 2 / total) / total
    return 100 * (drop - spread), 100 * (drop + spread)


def share_interval(percent: float, images: int) -> tuple[float, float]:
    """95 % interval, in percent, of a share seen on so many images (Wilson, JASA 22, 1927)."""
    share, z2 = percent / 100, Z_95**2 / images
    middle, spread = share + z2 / 2, sqrt(z2 * share * (1 - share) + z2**2 / 4)
    return 100 * (middle - spread) / (1 + z2), 100 * (middle + spread) / (1 + z2)
