"""Rows about images: a training step through convolutions, and whether the loader keeps up with it."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import measures
from benchmarks.subjects import randomise

__all__ = ["ROWS", "rows"]

Row = dict[str, Any]
TARGETS = ["conv1", "conv2"]


def conv_step(rounds: int, width: int, rows: int, side: int = 32, rank: int = 8, device: str = "cpu") -> Row:
    """Time of a training step of a CNN over the frozen base's with activation gradients."""
    torch.manual_seed(0)
    base = _network(width).to(device)
    models = {"base": _reached(base), "weft": _with_weft(base, rank), "peft": _with_peft(base, rank)}
    images = torch.randn(rows, 3, side, side, device=device)
    labels = torch.randint(0, 10, (rows,), device=device)
    times = measures.interleaved({name: _step(model, images, labels) for name, model in models.items()}, rounds, device)
    found = {name: measures.ratios(times, name) for name in ("weft", "peft")}
    return {
        "row": f"training step of convolutions: ResNet-20 × {width}, {rows} images {side} × {side}, rank {rank}",
        "bar": CONV_BAR,
        **{name: statistics.median(values) for name, values in found.items()},
        "spread": {name: [min(values), max(values)] for name, values in found.items()},
        "floor": _flops(models["weft"], images, labels) / _flops(models["base"], images, labels),
    }


def loading(rounds: int, side: int, width: int, count: int = 128, rank: int = 8) -> Row:
    """Processor time to prepare an image over that of its training step: all images decoded once before, then augmented and made tensors.

    Under peft's name: each image opened, decoded and resized in each epoch, as a plain data set does it.
    """
    import numpy as np
    from PIL import Image

    from weft.data.examples import load_examples
    from weft.data.pictures import ImageCollator, encode_images
    from weft.data.transforms import ImageTransform
    from weft.train.vision import ByTransform

    with tempfile.TemporaryDirectory() as place:
        large = side if side <= 32 else side + side // 4
        for index in range(count):
            folder = Path(place) / f"class-{index % 2}"
            folder.mkdir(exist_ok=True)
            coarse = np.random.default_rng(index).integers(0, 256, (large // 8, large // 8, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((large, large), Image.Resampling.BICUBIC).save(
                folder / f"{index:04}.jpg", quality=90
            )
        transform = ImageTransform(side)
        begin = time.process_time()
        encoded = encode_images(load_examples(place))
        first = (time.process_time() - begin) / count
        collate = ImageCollator(ByTransform(transform), ("flip", "shift"))
        files = sorted(Path(place).rglob("*.jpg"))

        def ours() -> None:
            collate([{**encoded[index], "seed": index} for index in range(count)])

        def plain() -> None:
            torch.stack([transform(Image.open(file).convert("RGB")) for file in files])

        model = _with_weft(_network(width), rank)
        images, labels = torch.randn(16, 3, side, side), torch.randint(0, 10, (16,))
        times = measures.interleaved({"weft": ours, "peft": plain, "step": _step(model, images, labels)}, rounds)
    found = {
        name: [16 * mine / (count * step) for mine, step in zip(times[name], times["step"], strict=True)]
        for name in ("weft", "peft")
    }
    return {
        "row": f"loading of images over their training step: {side} × {side}, ResNet-20 × {width} (peft: decoded in each epoch)",
        "bar": LOAD_BAR,
        **{name: statistics.median(values) for name, values in found.items()},
        "spread": {name: [min(values), max(values)] for name, values in found.items()},
        "milliseconds": {
            "first": round(1e3 * first, 3),
            "later": round(1e3 * statistics.median(times["weft"]) / count, 3),
        },
    }


CONV_BAR, LOAD_BAR = 1.45, 0.1
"""A step: a thin convolution costs as much as one of 16 channels, and the base alone is two products a layer. Loading: a tenth of the step is no limit."""


def _network(width: int) -> nn.Module:
    from weft.models.plain_vision import CifarResNet

    return CifarResNet(blocks=3, width=width).eval().requires_grad_(False)


def _reached(base: nn.Module) -> nn.Module:
    """The limit: the frozen base whose backward reaches the first convolution's output."""
    model = copy.deepcopy(base)
    model.get_submodule("conv1").register_forward_hook(lambda module, args, out: out.requires_grad_(True))
    return model


def _with_weft(base: nn.Module, rank: int) -> nn.Module:
    import weft

    model = copy.deepcopy(base)
    weft.attach(model, {"bench": weft.LoraSpec(rank=rank, targets=TARGETS)})
    return randomise(model)


def _with_peft(base: nn.Module, rank: int) -> nn.Module:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)
        return randomise(peft.get_peft_model(copy.deepcopy(base), config))


def _step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Forward, loss and backward; gradients are dropped."""

    def run() -> None:
        F.cross_entropy(model(images).logits, labels).backward()
        for parameter in model.parameters():
            parameter.grad = None

    return run


def _flops(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        _step(model, images, labels)()
    return int(counter.get_total_flops())


ROWS: dict[str, Callable[..., Row]] = {"conv_step": conv_step, "loading": loading}
"""By name, as `benchmarks.rows` calls them."""


def rows(cuda: bool) -> list[tuple[str, dict[str, Any]]]:
    """All of them."""
    found: list[tuple[str, dict[str, Any]]] = [
        ("conv_step", {"width": 64, "rows": 16}),
        ("conv_step", {"width": 16, "rows": 64}),
        ("loading", {"side": 32, "width": 16}),
        ("loading", {"side": 224, "width": 16, "count": 48}),
    ]
    return [*found, *([("conv_step", {"width": 64, "rows": 256, "device": "cuda"})] if cuda else [])]
