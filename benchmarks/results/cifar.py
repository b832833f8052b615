"""ResNet-20 on JPEG images that it was not trained on: LoRA on conv1 and conv2, with any PyTorch loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import weft

__all__ = ["ResNet20", "load_images", "measure"]

SEEDS, EPOCHS, BATCH, RATE, RANK = (0, 1, 2), 4, 64, 3e-3, 8
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two convolutions and a shortcut without parameters (He et al. 2015, arXiv:1512.03385, option A)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.widen = width // 4 if stride != 1 or width_in != width else 0

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, width, H / stride, W / stride)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.widen:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.widen, self.widen))
        return F.relu(out + x)


class ResNet20(nn.Module):
    """The CIFAR network of 20 layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        for index, (before, width, stride) in enumerate(widths, 1):
            blocks = [Block(before, width, stride), Block(width, width, 1), Block(width, width, 1)]
            setattr(self, f"layer{index}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) -> (N, 10)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(out.mean((2, 3)))


def load_images(shared: Path, part: str) -> tuple[Tensor, Tensor]:
    """Normalised images (N, 3, 32, 32) and labels (N,)."""
    arrays = np.load(shared / "data/cifar10_jpeg/cifar10_jpeg.npz")
    images = torch.from_numpy(arrays[f"{part}_images"]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    return (images - mean) / std, torch.from_numpy(arrays[f"{part}_labels"].astype("int64"))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right answers, in evaluation mode."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(250), labels.split(250), strict=True))
    return right / len(labels)


def train(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> None:
    """AdamW with a cosine; BatchNorm stays as it was, mirrored images half of the time."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps = EPOCHS * (len(labels) // BATCH)
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    model.eval()
    for _ in range(EPOCHS):
        order = torch.randperm(len(labels), generator=generator)
        for rows in order.split(BATCH)[: len(labels) // BATCH]:
            x = images[rows]
            flip = torch.rand(len(rows), generator=generator) < 0.5
            x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
            loss = F.cross_entropy(model(x), labels[rows])
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def measure(shared: Path, folder: Path) -> dict[str, Any]:
    """Accuracy before and after, three seeds."""
    images, labels = load_images(shared, "train")
    test_images, test_labels = load_images(shared, "test")
    model = ResNet20()
    model.load_state_dict(load_file(shared / "models/resnet20_cifar10/model.safetensors"))
    before = accuracy(model, test_images, test_labels)
    found, trained = [], 0
    for seed in SEEDS:
        with weft.attach(model, {"jpeg": weft.LoraSpec(rank=RANK, targets=["conv1", "conv2"])}, seed=seed) as bank:
            trained = sum(parameter.numel() for _, parameter in bank.named_parameters("jpeg"))
            train(model, images, labels, seed)
            found.append(accuracy(model, test_images, test_labels))
    total = sum(parameter.numel() for parameter in model.parameters())
    mean = sum(found) / len(found)
    return {
        "title": "ResNet-20 on JPEG images, LoRA on conv1 and conv2",
        "settings": f"5,000 training images, {EPOCHS} epochs, rank {RANK}, learning rate {RATE:g}, seeds {SEEDS}; 1,000 test images; "
        f"{trained:,} of {total:,} parameters trained ({trained / total:.1%})",
        "columns": ["accuracy", "frozen", "with the adapter (mean)", "by seed"],
        "rows": [["test", before, mean, ", ".join(f"{value:.3f}" for value in found)]],
        "summary": f"accuracy {before:.3f} -> {mean:.3f}",
    }
