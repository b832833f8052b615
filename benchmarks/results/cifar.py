"""ResNet-20 on JPEG images that it was not trained on: LoRA on conv1 and conv2 beside full fine-tuning, the last layer and peft."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weft
from weft.models.plain_vision import load_plain

__all__ = ["load_images", "measure"]

SEEDS, EPOCHS, BATCH, RANK = (0, 1, 2), 4, 64, 6
RATES = {"last layer": 1e-2, "full fine-tuning": 1e-3, "peft": 1e-2, "weft": 1e-2}
"""The best of two or three by each method, on 500 of the training images with another seed."""

TARGETS = ["conv1", "conv2"]
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_images(shared: Path, part: str) -> tuple[Tensor, Tensor]:
    """Normalised images (N, 3, 32, 32) and labels (N,)."""
    arrays = np.load(shared / "data/cifar10_jpeg/cifar10_jpeg.npz")
    images = torch.from_numpy(arrays[f"{part}_images"]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    return (images - mean) / std, torch.from_numpy(arrays[f"{part}_labels"].astype("int64"))


@torch.no_grad()
def accuracy(model: Callable[..., Any], images: Tensor, labels: Tensor) -> float:
    """Share of right answers, in evaluation mode."""
    right = sum(
        int((model(x).logits.argmax(1) == y).sum()) for x, y in zip(images.split(250), labels.split(250), strict=True)
    )
    return right / len(labels)


def train(model: nn.Module, images: Tensor, labels: Tensor, seed: int, rate: float) -> None:
    """AdamW with a cosine; BatchNorm's statistics stay, mirrored images half of the time."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps = EPOCHS * (len(labels) // BATCH)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    model.eval()
    for _ in range(EPOCHS):
        order = torch.randperm(len(labels), generator=generator)
        for rows in order.split(BATCH)[: len(labels) // BATCH]:
            x = images[rows]
            flip = torch.rand(len(rows), generator=generator) < 0.5
            x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
            loss = F.cross_entropy(model(x).logits, labels[rows])
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def prepared(method: str, base: nn.Module, seed: int) -> tuple[nn.Module, int]:
    """A copy of the base of which this method trains something, and how many numbers."""
    model = copy.deepcopy(base)
    if method == "weft":
        weft.attach(model, {"jpeg": weft.LoraSpec(rank=RANK, targets=TARGETS)}, seed=seed)
    elif method == "peft":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(method == "full fine-tuning" or name.startswith("linear"))
    return model, sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def measure(shared: Path, folder: Path) -> dict[str, Any]:
    """Accuracy of every method, three seeds, and the share of full fine-tuning's gain that it wins."""
    images, labels = load_images(shared, "train")
    test = load_images(shared, "test")
    base = load_plain(shared / "models/resnet20_cifar10")
    before = accuracy(base, *test)
    found: dict[str, list[float]] = {method: [] for method in RATES}
    numbers: dict[str, int] = {}
    for seed in SEEDS:
        for method, rate in RATES.items():
            model, numbers[method] = prepared(method, base, seed)
            train(model, images, labels, seed, rate)
            found[method].append(accuracy(model, *test))
    means = {method: statistics.mean(values) for method, values in found.items()}
    gain = means["full fine-tuning"] - before
    rows: list[list[Any]] = [["frozen", before, "", "0%", "0%"]]
    for method, values in found.items():
        won = f"{(means[method] - before) / gain:.0%}" if gain else ""
        share = f"{numbers[method] / numbers['full fine-tuning']:.1%}"
        rows.append([method, means[method], ", ".join(f"{value:.3f}" for value in values), share, won])
    return {
        "title": "ResNet-20 on JPEG images, LoRA on conv1 and conv2",
        "settings": f"5,000 training images, {EPOCHS} epochs of batches of {BATCH}, rank {RANK}, seeds {SEEDS}; 1,000 test images; learning "
        f"rates {', '.join(f'{rate:g} ({method})' for method, rate in RATES.items())}, chosen on 500 of the training images, but for peft, which has weft's; BatchNorm's statistics stay",
        "columns": ["trained", "accuracy (mean)", "by seed", "parameters, of full", "won of full's gain"],
        "rows": rows,
        "summary": f"accuracy {before:.3f} -> {means['weft']:.3f}, full fine-tuning {means['full fine-tuning']:.3f}",
    }
