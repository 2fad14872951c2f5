"""Logits beside recorded ones: what one step of the output is, and what lies beyond it."""

import torch

from qexp.measurement.agreement import compare_logits, output_step


def test_step_of_an_output_of_8_bits_is_the_distance_of_its_values() -> None:
    codes = torch.randint(-128, 128, (32, 10))
    assert abs(output_step(codes * 0.37) / 0.37 - 1) < 1e-5
    wide = torch.randn(32, 10) * 5  # on no grid
    assert abs(output_step(wide) / ((wide.max() - wide.min()).item() / 255) - 1) < 1e-6
    assert output_step(torch.zeros(2, 3)) == 1


def test_one_step_is_rounding_and_two_are_a_difference() -> None:
    codes = torch.randint(-128, 128, (32, 10)).float()
    recorded, moved = codes * 0.37, codes.clone()
    assert compare_logits(recorded, recorded).text == "equal"
    moved[3, 4] += 1
    found = compare_logits(recorded, moved * 0.37)
    assert found.within_one_step and found.text == "within one step of the output" and found.images == 32
    moved[3] += torch.where(codes[3] == codes[3].min(), 600.0, 0.0)  # the least likely class becomes the first
    found = compare_logits(recorded, moved * 0.37)
    assert not found.within_one_step and found.text == "differ by up to 600 steps of the output"
    assert found.same_class_percent < 100
    assert not compare_logits(recorded, recorded * torch.nan).within_one_step
