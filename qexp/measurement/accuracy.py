"""Accuracy of one model, and the paired comparison of two on the same images in the same order.

Takes a model and images, feeds the gate, the report and the search. Logits are computed once and kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil, isfinite, sqrt

import torch
from scipy.special import ndtri
from torch import Tensor

from qexp.foundation.quantities import Finite, Images, NotNegative, Number, Percent, Points, Some
from qexp.foundation.tables import Shown, Table
from qexp.models.classifier import ImageBatches
from qexp.progress import track

MOST_A_BATCH, FEWEST_A_BATCH = 256, 64  # images of an evaluation
MOST_PIXELS_A_BATCH = 256 * 112 * 112
Z_95 = float(ndtri(0.975))


@dataclass(frozen=True)
class Accuracy:
    """Share of images, in percent, whose label is the best, or among the three best, of the logits.

    Tied images are those whose label shares its logit with another class at the border of the best one or three: each
    counts by expectation, as `top_k_credit` says.
    """

    top1_percent: Percent
    top3_percent: Percent
    images: Some
    top1_tied_images: Number = 0
    top3_tied_images: Number = 0

    def check(self) -> None:
        """Raise ValueError where the figures contradict each other: they were changed."""
        if not self.top1_percent <= self.top3_percent:
            raise ValueError(f"top-1 of {self.top1_percent:g} % is more than top-3 of {self.top3_percent:g} %")
        if max(self.top1_tied_images, self.top3_tied_images) > self.images:
            raise ValueError(f"more images are tied than the {self.images} that there are")

    @property
    def top1_correct(self) -> int | float:
        """Images that count as right, a fraction where labels tie."""
        return _count(self.top1_percent * self.images / 100)

    @property
    def top3_correct(self) -> int | float:
        return _count(self.top3_percent * self.images / 100)


@dataclass(frozen=True)
class Comparison:
    """int8 against fp32 on the same images. A drop is fp32 minus int8, in percentage points.

    Images that only one of them gets right are a fraction where labels tie: sums of what one has above the other.
    """

    top1_drop_points: Points
    top1_drop_low_points: Finite
    top1_drop_high_points: Finite
    top3_drop_points: Points
    agreement_percent: Percent
    only_fp32_correct_images: Number | Images
    only_int8_correct_images: Number | Images
    images: Some
    # Mean divergence of int8's class probabilities from fp32's; None: not known. It has the last bits of the logits.
    kl_nats: NotNegative | None = field(default=None, compare=False)

    def check(self) -> None:
        """Raise ValueError where the figures contradict each other: they were changed."""
        if self.only_fp32_correct_images + self.only_int8_correct_images > self.images:
            raise ValueError(f"more images are right with one model alone than the {self.images} that there are")
        if not self.top1_drop_low_points <= self.top1_drop_high_points:
            raise ValueError("the interval of the drop ends below where it begins")


@dataclass(frozen=True)
class ComparedModels(Shown):
    """The accuracy of an fp32 and an int8 model on the same images, and how they differ image by image."""

    fp32: Accuracy
    int8: Accuracy
    difference: Comparison

    def tables(self) -> tuple[Table, ...]:
        both = {"fp32": self.fp32, "int8": self.int8}
        rows = tuple((name, _top1(found), f"{found.top3_percent:.2f}") for name, found in both.items())
        accuracy = Table(f"Accuracy on {self.fp32.images} images", ("model", "top-1 %", "top-3 %"), rows)
        found = self.difference
        drop = f"{found.top1_drop_points:.2f} ({found.top1_drop_low_points:.2f} to {found.top1_drop_high_points:.2f})"
        differences = (
            ("top-1 drop, points", drop),
            ("top-3 drop, points", f"{found.top3_drop_points:.2f}"),
            ("both name the same class, %", f"{found.agreement_percent:.2f}"),
            ("only fp32 is right, images", f"{found.only_fp32_correct_images:g}"),
            ("only int8 is right, images", f"{found.only_int8_correct_images:g}"),
        )
        return accuracy, Table("int8 against fp32, with a 95 % interval", ("", "value"), differences)


def _top1(found: Accuracy) -> str:
    low, high = share_interval(found.top1_percent, found.images)
    return f"{found.top1_percent:.2f} ({low:.2f} to {high:.2f})"


def compare_models(fp32_logits: Tensor, int8_logits: Tensor, labels: Tensor) -> ComparedModels:
    """Both models' logits [N, classes] for the same images: the accuracy of each, and `compare`."""
    fp32, int8 = (measure_accuracy(logits, labels) for logits in (fp32_logits, int8_logits))
    return ComparedModels(fp32, int8, compare(fp32_logits, int8_logits, labels))


def to_float(images: Tensor) -> Tensor:
    """uint8 pixels to float32 in [0, 1], the input of every classifier here; images that are float stay as they are."""
    return images.float().contiguous() if images.is_floating_point() else images.float().div_(255)


def evaluation_batch(shape: Sequence[int]) -> int:
    """Images a batch of an evaluation, for images of this shape: fewer where they are large, so that the activations
    take no more memory."""
    return max(FEWEST_A_BATCH, min(MOST_A_BATCH, MOST_PIXELS_A_BATCH // (shape[-2] * shape[-1])))


def predict_logits(
    model: Callable[[Tensor], Tensor], images: ImageBatches, batch_size: int | None = None, label: str = ""
) -> Tensor:
    """Logits float32 [N, classes] of images [N, C, H, W], uint8 or float in [0, 1], in their order."""
    size = batch_size or evaluation_batch(images.shape)
    with torch.no_grad():
        shown = track(images.split(size), label or "evaluating", ceil(len(images) / size))
        return torch.cat([model(to_float(batch)).float() for batch in shown])


def top_k_credit(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Probability that the label is among the k largest logits if ties are broken by chance, float64 [N].

    With g logits larger than the label's and e equal to it, itself included: (k - g) / e, between 0 and 1. With fewer
    than k classes it is 1. Logits with NaN count as wrong.
    """
    own = logits.gather(1, labels[:, None])
    larger, equal = (logits > own).sum(1), (logits == own).sum(1)
    return ((k - larger) / equal.double()).clamp(0, 1).where(~logits.isnan().any(1), 0.0)


def measure_accuracy(logits: Tensor, labels: Tensor) -> Accuracy:
    """Top-1 and top-3 of logits [N, classes] against labels [N]."""
    credits = [top_k_credit(logits, labels, k) for k in (1, 3)]
    top1, top3 = (100 * credit.mean().item() for credit in credits)
    tied = [int(((credit > 0) & (credit < 1)).sum()) for credit in credits]
    return Accuracy(top1, top3, len(labels), *tied)


def compare(fp32_logits: Tensor, int8_logits: Tensor, labels: Tensor) -> Comparison:
    """Both models' logits [N, classes] for the same images, compared image by image."""
    ahead, ahead_top3 = (top_k_credit(fp32_logits, labels, k) - top_k_credit(int8_logits, labels, k) for k in (1, 3))
    lost, gained = (_count(one.clamp(min=0).sum().item()) for one in (ahead, -ahead))
    low, high = paired_drop_interval(lost, gained, len(labels))
    agreement, count = same_class_percent(fp32_logits, int8_logits), len(labels)
    top3_drop = 100 * ahead_top3.sum().item() / count
    divergence = _divergence_nats(fp32_logits, int8_logits)
    return Comparison(100 * (lost - gained) / count, low, high, top3_drop, agreement, lost, gained, count, divergence)


def same_class_percent(first: Tensor, second: Tensor) -> float:
    """Share of the images for which two models' logits [N, classes] name the same class, ties by expectation."""
    return 100 * _agreement(first, second).mean().item()


def guess_percent(labels: Tensor) -> float:
    """Top-1 of always naming the most frequent of these labels [N]."""
    return 100 * labels.bincount().max().item() / len(labels)


def _agreement(first: Tensor, second: Tensor) -> Tensor:
    """Probability that both name the same class if each breaks its ties by chance, float64 [N]; 0 with NaN."""
    best = [logits == logits.amax(1, keepdim=True) for logits in (first, second)]
    pairs = (best[0].sum(1) * best[1].sum(1)).clamp(min=1)
    return (best[0] & best[1]).sum(1) / pairs.double()


def _divergence_nats(fp32_logits: Tensor, int8_logits: Tensor) -> float | None:
    """Mean Kullback-Leibler divergence of int8's probabilities from fp32's; None with logits that are not finite."""
    ours, theirs = (logits.double().log_softmax(1) for logits in (fp32_logits, int8_logits))
    found = (ours.exp() * (ours - theirs)).sum(1).mean().item()
    return max(0.0, found) if isfinite(found) else None


def _count(images: float) -> int | float:
    """A sum of credits, whole where it is but for rounding."""
    return round(images) if abs(images - round(images)) < 1e-6 else round(images, 6)


def paired_drop_interval(lost: float, gained: float, images: int) -> tuple[float, float]:
    """95 % interval, in points, of the drop between two models that saw the same images.

    Only the images that flip carry information: Wald's interval for paired proportions with 1/2 added to each cell,
    so that it keeps a width when nothing flips (Agresti and Min, Statistics in Medicine 24, 2005). Parts of images,
    where labels tie, vary less than whole ones, for which they are taken here.
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
