"""A plain script that knows nothing of qexp: it fine-tunes a ResNet-18 on DIR/train/<class>/ and saves its state dict.

    python train_resnet18.py DIR best.pt [EPOCHS]

Then `--model resnet18 --weights best.pt --image-size 64` with the mean and deviation below is this classifier.
"""

import sys

try:
    import torchvision
except RuntimeError:  # a torchvision built for CUDA beside a torch without it
    from qexp.models.vision import torchvision
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main(folder: str, file: str, epochs: int = 5) -> None:
    """Train on the CPU and write `file`."""
    torch.manual_seed(0)
    steps = [transforms.Resize((64, 64)), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    images = datasets.ImageFolder(f"{folder}/train", transforms.Compose([*steps, transforms.Normalize(MEAN, STD)]))
    batches = DataLoader(images, batch_size=64, shuffle=True)
    network = torchvision.models.resnet18(num_classes=len(images.classes))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * len(batches))
    for epoch in range(epochs):
        right = 0
        for given, labels in batches:
            logits = network(given)
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, labels).backward()
            optimizer.step()
            schedule.step()
            right += int((logits.argmax(1) == labels).sum())
        print(f"epoch {epoch + 1}: {right / len(images):.1%} of the training images")
    torch.save(network.state_dict(), file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
