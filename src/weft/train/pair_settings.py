"""Settings of a training on pairs of texts and images: a section of the recipe, `Recipe.two_tower`. Does not know torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weft.errors import RecipeError, did_you_mean

__all__ = ["PAIR_KINDS", "TOWERS", "PairSettings", "TowerSettings", "pair_settings"]

PAIR_KINDS = ("contrastive", "fused")
"""Kinds of training over text and image: compare them, or classify them together."""

TOWERS = ("text_model", "vision_model")
_FUSIONS = ("contrastive", "concat", "gated", "cross-attention")


@dataclass(frozen=True)
class TowerSettings:
    """Of one tower.

    Args:
        learning_rate: of its factors; None: the recipe's.
        frozen: no factors in this tower: it is used as it is.
    """

    learning_rate: float | None = None
    frozen: bool = False


@dataclass(frozen=True)
class PairSettings:
    """How texts and images are brought together.

    Args:
        dim: length of the common vectors.
        fusion: ``"contrastive"``, or for ``kind="fused"`` a head: ``"concat"``, ``"gated"``, ``"cross-attention"``.
        loss: of a comparison: ``"softmax"`` (CLIP's) or ``"sigmoid"`` (SigLIP's).
        duplicates: a caption or an image that stands in a batch twice: ``"targets"`` (both are right), ``"mask"`` (neither right nor
            wrong), ``"ignore"`` (wrong).
        modality_dropout: probability that a row loses its text or its image, for ``kind="fused"``.
        image_size: side of the images in pixels; None: as the vision base was trained.
        augment: changes of training images, see `weft.data.transforms.AUGMENTATIONS`.
        features: where the vision base's features are, see `weft.TwoTower`; None: found.
        heads_learning_rate: of projections, temperature and head; None: the recipe's.
        text_model, vision_model: by tower.

    Raises:
        RecipeError: a value of the wrong type or out of range; an unknown name.
    """

    dim: int = 128
    fusion: str = "contrastive"
    loss: str = "softmax"
    duplicates: str = "targets"
    modality_dropout: float = 0.0
    image_size: int | None = None
    augment: tuple[str, ...] = ()
    features: str | None = None
    heads_learning_rate: float | None = None
    text_model: TowerSettings = field(default_factory=TowerSettings)
    vision_model: TowerSettings = field(default_factory=TowerSettings)

    def __post_init__(self) -> None:
        if isinstance(self.augment, str | list):
            object.__setattr__(
                self, "augment", (self.augment,) if isinstance(self.augment, str) else tuple(self.augment)
            )
        for name in TOWERS:
            if isinstance(getattr(self, name), Mapping):
                object.__setattr__(self, name, _section(TowerSettings, getattr(self, name), f"two_tower.{name}"))
        rules: tuple[tuple[str, bool, str], ...] = (
            ("dim", _is_count(self.dim), "a whole number of at least 1"),
            ("fusion", self.fusion in _FUSIONS, f"one of {', '.join(_FUSIONS)}"),
            ("loss", self.loss in ("softmax", "sigmoid"), "softmax or sigmoid"),
            ("duplicates", self.duplicates in ("targets", "mask", "ignore"), "targets, mask or ignore"),
            (
                "modality_dropout",
                _is_number(self.modality_dropout) and 0 <= self.modality_dropout < 1,
                "a number in [0, 1)",
            ),
            (
                "image_size",
                self.image_size is None or _is_count(self.image_size),
                "a whole number of at least 1, or null",
            ),
            ("augment", all(isinstance(item, str) for item in self.augment), "a list of names"),
            ("features", self.features is None or isinstance(self.features, str), "the path of a module, or null"),
            ("heads_learning_rate", _is_rate(self.heads_learning_rate), "a number above 0, or null"),
        )
        for name, ok, expected in rules:
            if not ok:
                raise RecipeError(f"Recipe.two_tower.{name}: got {getattr(self, name)!r}; expected {expected}")
        for name in TOWERS:
            tower = getattr(self, name)
            if (
                not isinstance(tower, TowerSettings)
                or not _is_rate(tower.learning_rate)
                or not isinstance(tower.frozen, bool)
            ):
                raise RecipeError(
                    f"Recipe.two_tower.{name}: got {tower!r}; expected learning_rate (a number above 0) and frozen (true or false)"
                )
            if tower.frozen and tower.learning_rate is not None:
                raise RecipeError(f"Recipe.two_tower.{name}: frozen, and with a learning rate; drop one of them")

    @property
    def towers(self) -> dict[str, TowerSettings]:
        """By name."""
        return {name: getattr(self, name) for name in TOWERS}

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self) | {"augment": list(self.augment)}


def pair_settings(values: Any) -> PairSettings:
    """The section of a recipe.

    Raises:
        RecipeError: no mapping, an unknown key, or any rule of `PairSettings`.
    """
    found: PairSettings = _section(PairSettings, values, "two_tower")
    return found


def _section(kind: Any, values: Any, where: str) -> Any:
    if isinstance(values, kind):
        return values
    known = [item.name for item in dataclasses.fields(kind)]
    if not isinstance(values, Mapping):
        raise RecipeError(f"Recipe.{where}: got {values!r}; expected a section with {', '.join(known)}")
    for name in values:
        if name not in known:
            raise RecipeError(
                f"Recipe.{where} has no field {name!r}.{did_you_mean(str(name), known)} Fields: {', '.join(known)}"
            )
    return kind(**values)


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and value == value and abs(value) != float("inf")
    )


def _is_rate(value: Any) -> bool:
    return value is None or (_is_number(value) and value > 0)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
