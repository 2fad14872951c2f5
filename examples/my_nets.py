"""A network of one's own, for `--model my_nets:build`: residual sums, and one ReLU that all of its blocks share."""

from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions and what came in."""

    def __init__(self, channels: int, relu: nn.ReLU) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.relu = relu

    def forward(self, images: Tensor) -> Tensor:
        return self.relu(self.second(self.relu(self.first(images))) + images)


def build(num_classes: int = 10) -> nn.Module:
    """The network with fresh weights; qexp gives the number of classes of the data."""
    relu = nn.ReLU()
    blocks = [Block(32, relu) for _ in range(3)]
    start = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), relu
    return nn.Sequential(*start, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_classes))
