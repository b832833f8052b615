"""Bases that classify images: opened with their processor, their images prepared.

Does not know recipes' texts, run folders or the trainer.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.data import Examples
from weft.data.pictures import EncodedImages, ImageCollator, encode_images
from weft.data.talks import EncodedTalks, encode_talks
from weft.data.transforms import ImageTransform
from weft.errors import BaseError, RecipeError
from weft.train.bars import counter
from weft.train.vision_settings import VisionSettings

__all__ = [
    "ByProcessor",
    "ByTransform",
    "encode_part",
    "encode_talk_part",
    "image_collator",
    "in_the_heads_order",
    "open_classifier",
    "open_talker",
]

USUAL_SIZE = 224


@dataclass(frozen=True)
class ByProcessor:
    """Images to pixels as the base's own image processor makes them."""

    processor: Any

    def __call__(self, images: list[Any]) -> Tensor:
        """(B, 3, H, W)."""
        found: Tensor = self.processor(images=images, return_tensors="pt")["pixel_values"]
        return found


@dataclass(frozen=True)
class ByTransform:
    """Images to pixels by a transform of weft, for bases without a processor."""

    transform: ImageTransform

    def __call__(self, images: list[Any]) -> Tensor:
        """(B, 3, H, W)."""
        return torch.stack([self.transform(image) for image in images])


def open_classifier(base: Any, labels: Sequence[str] | None, dtype: str | None = None) -> tuple[nn.Module, Any]:
    """An image classifier and its processor: of transformers, plain PyTorch, or a pair that the caller brings.

    Raises:
        BaseError: it can't be loaded; a pair whose model has another number of classes.
    """
    from weft.models.load import dtype_named, load_base
    from weft.models.plain_vision import is_plain, load_plain

    if isinstance(base, tuple):
        model, processor = base
        config = getattr(model, "config", None)
        there = getattr(config, "num_labels", None)
        if labels is not None and there is not None and there != len(labels):
            raise BaseError(
                f"the model has {there} classes, the data {len(labels)}: {', '.join(labels)}; load it with as many: "
                f"weft.load_base(path, task='image-classification', labels={list(labels)!r})"
            )
        return model, processor
    if base is None:
        raise BaseError("the embedded base reads text alone; give a vision model: --base DIR")
    if is_plain(base):
        return load_plain(base, labels=labels, dtype=dtype_named(dtype)), None
    loaded: tuple[nn.Module, Any] = load_base(base, task="image-classification", labels=labels, dtype=dtype)
    return loaded


def in_the_heads_order(examples: Examples, base: Any) -> Examples:
    """The classes in the order that the base's own head has them, where it knows these very names."""
    own = _own_names(base)
    if examples.labels and own and set(own) == set(examples.labels):
        return dataclasses.replace(examples, labels=tuple(own))
    return examples


def _own_names(base: Any) -> list[str]:
    from weft.models.plain_vision import is_plain
    from weft.models.source import find_source

    if isinstance(base, tuple):
        names = getattr(getattr(base[0], "config", None), "id2label", None)
    elif base is None or is_plain(base):
        names = None
    else:
        names = find_source(os.fspath(base)).config.get("id2label")
    return [str(name) for _, name in sorted(names.items(), key=lambda item: int(item[0]))] if names else []


def encode_part(
    examples: Examples, settings: VisionSettings, labels: Sequence[str] | None, progress: bool | None
) -> EncodedImages:
    """Check and decode all images, with a counter.

    Raises:
        DataError: none can be read.
    """
    with counter("images", len(examples), progress) as tick:
        return encode_images(examples, labels=labels, cache_bytes=settings.cache_mb * 2**20, tick=tick)


def encode_talk_part(
    examples: Examples, processor: Any, recipe: Any, max_length: int, progress: bool | None
) -> EncodedTalks:
    """Conversations with images as tokens, with a counter.

    Raises:
        DataError: nothing is left to learn.
    """
    settings = recipe.vision or VisionSettings()
    with counter("images", len(examples), progress) as tick:
        return encode_talks(
            examples, processor, max_length=max_length, mask_prompt=recipe.mask_prompt,
            cache_bytes=settings.cache_mb * 2**20, tick=tick,
        )  # fmt: skip


def open_talker(base: Any, dtype: str | None = None) -> tuple[nn.Module, Any]:
    """A vision-language model and its processor.

    Raises:
        BaseError: it can't be loaded for images and text.
    """
    from weft.models.load import load_base

    if isinstance(base, tuple):
        return base
    if base is None:
        raise BaseError("the embedded base reads text alone; give a vision-language model: --base DIR")
    loaded: tuple[nn.Module, Any] = load_base(base, task="image-text", dtype=dtype)
    return loaded


def image_collator(
    model: nn.Module, processor: Any, settings: VisionSettings, augment: bool
) -> tuple[ImageCollator, str]:
    """What makes batches of images, and a note on how pixels are prepared where the base doesn't say.

    Raises:
        RecipeError: a size for a base whose processor has its own.
    """
    names = settings.augment if augment else ()
    if isinstance(processor, ImageTransform):
        return ImageCollator(ByTransform(processor), names), ""
    if processor is not None and callable(processor):
        if settings.size is not None:
            raise RecipeError(
                f"vision.size={settings.size}: this base has an image processor with a size of its own ({type(processor).__name__}); "
                "leave it out"
            )
        return ImageCollator(ByProcessor(processor), names), ""
    config = getattr(model, "config", None)
    own = getattr(config, "image_size", None)
    size = settings.size or (own if isinstance(own, int) else USUAL_SIZE)
    found = {"mean": getattr(config, "image_mean", None), "std": getattr(config, "image_std", None)}
    transform = ImageTransform(size, fit=settings.fit, **{name: value for name, value in found.items() if value})
    said = (
        "as this architecture has it"
        if found["mean"]
        else "the mean and deviation of ImageNet, for nothing says what it was trained on"
    )
    return ImageCollator(ByTransform(transform), names), f"no image processor: images of {size} x {size}, {said}"
