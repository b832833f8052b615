"""The recipe's section for images: how they are prepared, and which parts of a model that sees are adapted.

Does not know torch, images or models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weft.data.transforms import AUGMENTATIONS, FITS
from weft.errors import RecipeError, did_you_mean

__all__ = ["HEADS", "VisionSettings"]

HEADS = ("train", "keep")


@dataclass(frozen=True)
class VisionSettings:
    """How images are read and what of the model is adapted; the section ``vision`` of a recipe.

    Args:
        augment: changes made to training images by chance, out of ``flip``, ``shift``, ``crop``, ``color``
            (see `weft.data.transforms`); none by default.
        size: side of the square that images become, for bases without a processor; None: as the base says.
        fit: how another shape becomes a square: ``crop``, ``stretch`` or ``pad``; for bases without a processor.
        cache_mb: decoded images that stay in memory, in MiB.
        head: ``"train"``: the classifier is trained whole and saved with the adapter; ``"keep"``: it stays as it is.
        language, vision, projector: parts of a vision-language model that are adapted, where the spec names no sites of its own.

    Raises:
        RecipeError: a value out of range, or nothing is adapted; names the field.
    """

    augment: tuple[str, ...] = ()
    size: int | None = None
    fit: str = "crop"
    cache_mb: int = 512
    head: str = "train"
    language: bool = True
    vision: bool = False
    projector: bool = False

    def __post_init__(self) -> None:
        augment: Any = self.augment
        if isinstance(augment, str | list | None):
            object.__setattr__(self, "augment", (augment,) if isinstance(augment, str) else tuple(augment or ()))
        whole = isinstance(self.cache_mb, int) and not isinstance(self.cache_mb, bool)
        size = self.size is None or (isinstance(self.size, int) and not isinstance(self.size, bool) and self.size >= 1)
        rules = (
            (
                "augment",
                all(name in AUGMENTATIONS for name in self.augment),
                f"a list out of {', '.join(AUGMENTATIONS)}",
            ),
            ("size", size, "a whole number of pixels above 0, or null"),
            ("fit", self.fit in FITS, f"one of {', '.join(FITS)}"),
            ("cache_mb", whole and self.cache_mb >= 0, "a whole number of at least 0"),
            ("head", self.head in HEADS, f"one of {', '.join(HEADS)}"),
            *(
                (name, isinstance(getattr(self, name), bool), "true or false")
                for name in ("language", "vision", "projector")
            ),
        )
        for name, holds, expected in rules:
            if not holds:
                raise RecipeError(f"Recipe.vision.{name}: got {getattr(self, name)!r}; expected {expected}")
        if not (self.language or self.vision or self.projector):
            raise RecipeError(
                "Recipe.vision: language, vision and projector are all false, so that nothing would be adapted; set one to true"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self) | {"augment": list(self.augment)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VisionSettings:
        """The inverse of `to_dict`.

        Raises:
            RecipeError: an unknown key, with near ones.
        """
        known = [item.name for item in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise RecipeError(
                    f"vision has no field {name!r}.{did_you_mean(str(name), known)} Fields: {', '.join(known)}"
                )
        return cls(**values)
