"""Random crop and flip of whole batches of uint8 images, without a loop over images."""

import torch
from torch import Tensor


def augment(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Random crop after reflecting `padding` pixels at each border, and random flip, of a uint8 batch [N, C, H, W].

    Works on the images' device; `generator` is the CPU's, so that the same seed gives the same crops everywhere.
    The whole batch is one gather: each image gets its own row and column numbers, reflected where they leave it.
    """
    count, channels, height, width = images.shape
    device = images.device
    shift = torch.randint(-padding, padding + 1, (2, count, 1), generator=generator).to(device, non_blocking=True)
    rows = _reflect(shift[0] + torch.arange(height, device=device), height)
    columns = _reflect(shift[1] + torch.arange(width, device=device), width)
    if flip:
        flipped = torch.rand(count, 1, generator=generator).to(device, non_blocking=True) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
    pixels = (rows[:, :, None] * width + columns[:, None, :]).view(count, 1, -1)
    return images.flatten(2).gather(2, pixels.expand(-1, channels, -1)).view_as(images)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Mirror positions outside 0..size-1 back inside, without repeating the border pixel."""
    folded = index.abs() % (2 * size - 2) if size > 1 else index * 0
    return torch.where(folded < size, folded, 2 * size - 2 - folded)
