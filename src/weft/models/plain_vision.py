"""Vision models that are plain PyTorch: a folder with weights and no ``config.json``, recognised by names and shapes.

A model here looks like one of transformers from outside: ``model(pixel_values).logits``, ``.config``, ``get_features``. To
add an architecture, write a function from shapes to a model (or None) and register it. Knows no data and no adapters.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.errors import BaseError, some_names

__all__ = ["ARCHITECTURES", "CifarResNet", "ImageLogits", "PlainConfig", "is_plain", "load_plain"]

SETTINGS = "preprocessor_config.json"
Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class PlainConfig:
    """What is known of a plain model, under the names that transformers uses.

    Attributes:
        id2label: names of the classes; ``LABEL_0`` … where nobody said them.
        hidden_size: length of `get_features`'s vectors.
        image_size: side that it was trained on; image_mean, image_std: of its input.
    """

    model_type: str
    num_labels: int
    hidden_size: int
    image_size: int
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    id2label: dict[int, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; names of the classes change no number and are left out."""
        return {name: value for name, value in asdict(self).items() if name != "id2label"}


@dataclass
class ImageLogits:
    """(N, classes) logits, as transformers' outputs name them."""

    logits: Tensor


class _Block(nn.Module):
    """Two convolutions and a shortcut without parameters (He et al. 2015, arXiv:1512.03385, option A)."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.extra = stride, width - before

    def forward(self, x: Tensor) -> Tensor:
        """(N, before, H, W) -> (N, width, H / stride, W / stride)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.extra:
            left = self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, left, self.extra - left))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """The CIFAR networks of 6n + 2 layers: 20, 32, 44, 56 … (He et al. 2015, arXiv:1512.03385, section 4.2).

    Args:
        blocks: in each of the three stages.
        width: channels of the first stage; the others have twice and four times as many.
        classes: length of the logits.
    """

    main_input_name = "pixel_values"

    def __init__(self, blocks: int = 3, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        widths = ((width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2))
        for index, (before, after, stride) in enumerate(widths, 1):
            rest = (_Block(after, after, 1) for _ in range(blocks - 1))
            setattr(self, f"layer{index}", nn.Sequential(_Block(before, after, stride), *rest))
        self.linear = nn.Linear(4 * width, classes)
        names = {index: f"LABEL_{index}" for index in range(classes)}
        self.config = PlainConfig("cifar_resnet", classes, 4 * width, 32, id2label=names)

    def get_features(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, hidden_size), before the classifier."""
        out = F.relu(self.bn1(self.conv1(pixel_values)))
        for index in (1, 2, 3):
            out = self.get_submodule(f"layer{index}")(out)
        return out.mean((2, 3))

    def forward(self, pixel_values: Tensor) -> ImageLogits:
        """(N, 3, H, W) -> (N, classes)."""
        return ImageLogits(self.linear(self.get_features(pixel_values)))


def _cifar_resnet(shapes: Shapes) -> nn.Module | None:
    stem, head = shapes.get("conv1.weight", ()), shapes.get("linear.weight", ())
    if len(stem) != 4 or stem[1:] != (3, 3, 3) or len(head) != 2 or head[1] != 4 * stem[0]:
        return None
    blocks = len({name.split(".")[1] for name in shapes if name.startswith("layer1.")})
    return CifarResNet(blocks, stem[0], head[0]) if blocks else None


ARCHITECTURES: dict[str, Callable[[Shapes], nn.Module | None]] = {"cifar_resnet": _cifar_resnet}
"""By name: a function from the shapes of a file's tensors to a model of these shapes, or None if it isn't one."""


def is_plain(base: object) -> bool:
    """Whether this is a folder with weights and no ``config.json``."""
    if not isinstance(base, str | os.PathLike):
        return False
    folder = Path(base).expanduser()
    adapter = (folder / "adapter_config.json").exists() or (folder / "adapter").is_dir()
    return (folder / "model.safetensors").is_file() and not (folder / "config.json").exists() and not adapter


def load_plain(
    base: str | os.PathLike[str], *, labels: Sequence[str] | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """Load a plain vision model: frozen, in eval mode.

    Args:
        base: a folder with ``model.safetensors``; size, mean and std of its input may stand in a
            ``preprocessor_config.json`` beside (``size``, ``image_mean``, ``image_std``), else they are ImageNet's.
        labels: names of the classes; as many as the head has, it stays; another number, it is drawn anew.

    Raises:
        BaseError: the file is damaged, or of no known architecture; names what it holds.
    """
    from weft.formats.tensor_files import read_tensors

    folder = Path(base).expanduser()
    path = folder / "model.safetensors"
    tensors = {
        name: tensor for name, tensor in read_tensors(path).tensors.items() if not name.endswith("num_batches_tracked")
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    model = next((made for make in ARCHITECTURES.values() if (made := make(shapes)) is not None), None)
    if model is None:
        raise BaseError(
            f"{base}: no config.json, and the tensors are of no plain vision model that weft knows ({', '.join(ARCHITECTURES)}); "
            f"they are called {some_names(sorted(shapes))}"
        )
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if "num_batches" not in name}
    odd = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
    if odd:
        raise BaseError(
            f"{base}: nearly a {type(model).__name__}, but lacks, or has more or otherwise: {some_names(odd)}"
        )
    if dtype is not None:
        model.to(dtype)
    model.load_state_dict(tensors, strict=False)
    _read_settings(model, folder)
    if labels is not None:
        _label(model, list(labels))
    model.config._name_or_path = model.name_or_path = str(base)  # type: ignore[union-attr,assignment]
    model.requires_grad_(False)
    return model.eval()


def _read_settings(model: nn.Module, folder: Path) -> None:
    """Size, mean and std that stand beside the weights."""
    path = folder / SETTINGS
    if not path.is_file():
        return
    config: Any = model.config
    try:
        found = json.loads(path.read_bytes())
        size: Any = found.get("size", config.image_size)
        edge: Any = size.get("height", size.get("shortest_edge", 0)) if isinstance(size, dict) else size
        config.image_size = int(edge)
        config.image_mean = tuple(float(value) for value in found.get("image_mean", config.image_mean))
        config.image_std = tuple(float(value) for value in found.get("image_std", config.image_std))
    except (ValueError, TypeError, AttributeError) as error:
        raise BaseError(f"{path}: not the settings of an image processor: {error}") from error
    if config.image_size < 1 or len(config.image_mean) != 3 or len(config.image_std) != 3 or min(config.image_std) <= 0:
        raise BaseError(f"{path}: expected a size above 0, and three numbers each as image_mean and image_std")


def _label(model: Any, labels: list[str]) -> None:
    """Name the classes; another number of them gets a new head from a fixed seed."""
    model.config.id2label = dict(enumerate(labels))
    if len(labels) == model.config.num_labels:
        return
    generator = torch.Generator().manual_seed(0)
    old = model.linear
    model.linear = nn.Linear(old.in_features, len(labels), dtype=old.weight.dtype)
    with torch.no_grad():
        model.linear.weight.copy_(torch.randn(model.linear.weight.shape, generator=generator) * 0.02)
        model.linear.bias.zero_()
    model.config.num_labels = len(labels)
    model.weft_new_modules = ("linear",)
