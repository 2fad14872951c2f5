"""Logits of a version on this CPU beside those that were recorded where it was quantized.

Takes two tensors for the same images, feeds what is known of a version on each kind of machine.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qexp.foundation.quantities import NotNegative, Percent, Some, Timed
from qexp.measurement.accuracy import same_class_percent

LEVELS = 256  # of a tensor of 8 bits
SLACK = 1.01  # a difference of one step is larger than the step by what floats round


@dataclass(frozen=True)
class LogitsAgreement:
    """How far logits are from the recorded ones.

    `step` is one step of the output: the distance of two neighbouring values of logits of 8 bits. Where a model gives
    logits that are not of 8 bits, it is what it would be if they were.
    """

    images: Some
    same_class_percent: Percent
    largest_difference: NotNegative
    step: Timed

    @property
    def largest_difference_steps(self) -> float:
        """The largest difference of two logits, in steps of the output."""
        return self.largest_difference / self.step

    @property
    def within_one_step(self) -> bool:
        """Whether no logit is further from the recorded one than rounding explains."""
        return self.largest_difference_steps <= SLACK

    @property
    def text(self) -> str:
        """In words."""
        if not self.largest_difference:
            return "equal"
        by = f"by up to {self.largest_difference_steps:.3g} steps of the output"
        return "within one step of the output" if self.within_one_step else f"differ {by}"


def compare_logits(recorded: Tensor, found: Tensor) -> LogitsAgreement:
    """Logits [N, classes] as they were recorded, and as they are here."""
    difference = (recorded.double() - found.double()).abs().nan_to_num(nan=torch.inf)
    # Of logits that are not finite here nothing more can be said; JSON has no infinity.
    largest = min(difference.max().item(), 1e12)
    return LogitsAgreement(len(recorded), same_class_percent(recorded, found), largest, output_step(recorded))


def output_step(logits: Tensor) -> float:
    """One step of the output, from logits [N, classes] alone: the least distance of two values if they lie on a grid of
    at most 256 values, or else the 255th part of their range."""
    values = logits.double().flatten().unique()
    span = (values[-1] - values[0]).item()
    if span <= 0:
        return 1.0
    gaps = values.diff()
    gaps = gaps[gaps > 1e-6 * span]  # the same value, rounded in two ways
    multiples = gaps / gaps.min()
    on_a_grid = bool(((multiples - multiples.round()).abs() < 0.05).all()) and span / gaps.min().item() < LEVELS
    return gaps.min().item() if on_a_grid else span / (LEVELS - 1)
