"""A script in plain torch: it trains a classifier on DIR/train/<class>/, saves it as FILE.pt, a state dict, and as
FILE.onnx, and counts its right answers on DIR/test/<class>/. qexp only helps to import a torchvision that was not built
for the torch beside it.

    python examples/train.py resnet18 DIR FILE [EPOCHS]     # or vit_tiny, or own: the network in my_nets.py

What its images are stands in `to_input`, and is what `qexp check` has to be told: `--preprocess imagenet --resize 64
--crop 64`.
"""

import sys

try:
    import torchvision
except RuntimeError:  # a torchvision built for CUDA beside a torch without it
    from qexp.models.vision import torchvision
import my_nets
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NETWORKS = {  # for so many classes, and the height and width of their images
    "resnet18": (lambda classes: torchvision.models.resnet18(num_classes=classes), 64),
    "vit_tiny": (lambda classes: timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=classes), 32),
    "own": (my_nets.build, 32),
}


def main(name: str, folder: str, file: str, epochs: int = 5) -> int:
    """Train on the CPU and write both files; the number of test images that are right is returned."""
    torch.manual_seed(0)
    build, size = NETWORKS[name]
    to_input = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
    to_input.append(transforms.Normalize(MEAN, STD))
    augmented = transforms.Compose([transforms.RandomHorizontalFlip(), *to_input])
    train = datasets.ImageFolder(f"{folder}/train", augmented)
    test = datasets.ImageFolder(f"{folder}/test", transforms.Compose(to_input))
    network, batches = build(len(train.classes)), DataLoader(train, batch_size=64, shuffle=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * len(batches))
    for _ in range(epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
            schedule.step()
    network.eval()
    torch.save(network.state_dict(), f"{file}.pt")
    two = torch.zeros(2, 3, size, size)
    torch.onnx.export(network, (two,), f"{file}.onnx", dynamic_shapes=({0: "batch"},), external_data=False)
    with torch.no_grad():
        right = sum(int((network(x).argmax(1) == y).sum()) for x, y in DataLoader(test, 64))
    print(f"{right} of {len(test)} test images are right")
    return right


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
