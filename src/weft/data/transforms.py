"""An RGB image to a tensor: augmented, resized, normalised. Pillow computes; the same seed gives the same tensor.

Does not know files, models or processors of transformers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weft.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

__all__ = ["AUGMENTATIONS", "FITS", "IMAGENET_MEAN", "IMAGENET_STD", "ImageTransform", "augmented", "check_augment"]

AUGMENTATIONS = ("flip", "shift", "crop", "color")
"""What may be done to a training image:

    flip    mirrored left and right, half of the time
    shift   moved by up to an eighth of its sides, the gap black (He et al. 2015, arXiv:1512.03385, section 4.2)
    crop    a piece of 40 to 100 % of its area, about as wide as high (Szegedy et al. 2014, arXiv:1409.4842, section 6)
    color   brightness, contrast and saturation changed by up to 30 %
"""

FITS = ("crop", "stretch", "pad")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


@dataclass(frozen=True)
class ImageTransform:
    """RGB images to tensors ``(3, H, W)`` float32: ``(pixel / 255 - mean) / std``. Can be pickled for workers.

    Args:
        size: ``(H, W)``, or one number for a square.
        mean, std: by channel.
        augment: names out of `AUGMENTATIONS`, applied where a seed is given.
        fit: how another shape becomes this one: ``"crop"`` the middle, ``"stretch"``, ``"pad"`` with black.
        resample: ``"bilinear"``, ``"bicubic"``, ``"lanczos"``, ``"nearest"``.

    Raises:
        DataError: a value out of range or an unknown name.
    """

    size: int | tuple[int, int]
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    augment: Sequence[str] = ()
    fit: str = "crop"
    resample: str = "bilinear"

    def __post_init__(self) -> None:
        check_augment(self.augment)
        if self.fit not in FITS:
            raise DataError(f"fit={self.fit!r}: expected one of {', '.join(FITS)}.{did_you_mean(self.fit, FITS)}")
        if self.resample not in _FILTERS:
            raise DataError(f"resample={self.resample!r}: expected one of {', '.join(_FILTERS)}")
        if min(self.shape) < 1:
            raise DataError(f"size={self.size}: expected at least one pixel a side")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise DataError(f"mean={self.mean}, std={self.std}: expected three numbers each, std above 0")

    @property
    def shape(self) -> tuple[int, int]:
        """``(H, W)``."""
        return (self.size, self.size) if isinstance(self.size, int) else (self.size[0], self.size[1])

    def __call__(self, image: Image, seed: int | str | None = None) -> Tensor:
        """One image as a tensor.

        Args:
            image: in RGB, as `weft.data.images.open_image` gives it.
            seed: of the augmentation; None: none, as at an evaluation.

        Returns:
            (3, H, W) float32.
        """
        import numpy as np
        import torch

        if seed is not None:
            image = augmented(image, self.augment, seed)
        bytes_HWC = torch.from_numpy(np.array(self._fitted(image), dtype=np.uint8))
        mean, std = (torch.tensor(tuple(values)).view(3, 1, 1) for values in (self.mean, self.std))
        return (bytes_HWC.permute(2, 0, 1).float() / 255 - mean) / std

    def _fitted(self, image: Image) -> Any:
        from PIL import Image as pillow
        from PIL import ImageOps

        height, width = self.shape
        if image.size == (width, height):
            return image
        how: Any = pillow.Resampling(_FILTERS[self.resample])
        if self.fit == "stretch":
            return image.resize((width, height), how)
        return (ImageOps.fit if self.fit == "crop" else ImageOps.pad)(image, (width, height), how)


def check_augment(names: Sequence[str]) -> None:
    """Refuse names that no augmentation has.

    Raises:
        DataError: names it, and near ones.
    """
    for name in (names,) if isinstance(names, str) else names:
        if name not in AUGMENTATIONS:
            raise DataError(
                f"augment: {name!r} is unknown; expected some of {', '.join(AUGMENTATIONS)}.{did_you_mean(str(name), AUGMENTATIONS)}"
            )


def augmented(image: Image, names: Sequence[str], seed: int | str) -> Image:
    """The image, changed by chance; a function of names and seed alone."""
    from PIL import Image as pillow
    from PIL import ImageEnhance, ImageOps

    draw = random.Random(seed)
    width, height = image.size
    if "flip" in names and draw.random() < 0.5:
        image = ImageOps.mirror(image)
    if "shift" in names:
        across, down = (draw.randint(-(side // 8), side // 8) for side in (width, height))
        moved = pillow.new("RGB", image.size)
        moved.paste(image, (across, down))
        image = moved
    if "crop" in names:
        share, shape = draw.uniform(0.4, 1.0) ** 0.5, draw.uniform(0.75, 4 / 3) ** 0.5
        w, h = (
            max(1, min(side, round(side * part))) for side, part in ((width, share * shape), (height, share / shape))
        )
        left, top = draw.randint(0, width - w), draw.randint(0, height - h)
        image = image.crop((left, top, left + w, top + h))
    if "color" in names:
        for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = change(image).enhance(draw.uniform(0.7, 1.3))
    return image
