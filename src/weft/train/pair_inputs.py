"""From what the caller named to two towers, and to batches of texts and images.

Stands on `weft.data.pairs` and `weft.models.two_tower`. Does not know the trainer.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from weft.data.batches import LengthGroupedSampler
from weft.data.pairs import PairCollator, PairFeatures, Pairs, load_pairs
from weft.data.transforms import ImageTransform
from weft.errors import BaseError, DataError, RecipeError, did_you_mean, some_names
from weft.spec import LoraSpec
from weft.train.pair_settings import TOWERS, PairSettings
from weft.train.recipe import Recipe

__all__ = [
    "PairInputs",
    "PairProcessor",
    "PairTexts",
    "check_pair_base",
    "open_towers",
    "pair_spec",
    "prepare_pairs",
    "read_pairs",
    "settings_of",
    "transform_of",
]

MAX_LENGTH = 128
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PairTexts:
    """Pairs as they were read, under the names of `weft.train.inputs.Texts`."""

    train: Pairs
    evaluated: Pairs | None
    kind: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PairProcessor:
    """What turns texts and images into inputs.

    Attributes:
        tokenizer: of the text tower. size: side of the images; mean, std: of their channels.
        fit, resample: how another shape becomes this one, see `weft.data.transforms.ImageTransform`.
    """

    tokenizer: Any
    size: int
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD
    fit: str = "crop"
    resample: str = "bilinear"


@dataclass(frozen=True)
class PairInputs:
    """Everything that a trainer reads, under the names of `weft.train.inputs.Inputs`."""

    train: PairFeatures
    evaluated: PairFeatures | None
    collate: PairCollator
    collate_eval: PairCollator
    max_length: int
    data: dict[str, dict[str, Any]]
    notes: tuple[str, ...]

    def sampler(self, recipe: Recipe, processes: int) -> Any:
        """A random order, a function of seed and epoch; texts of like length don't come together, for then they are alike."""
        step = recipe.batch_size * recipe.accumulation * processes
        return _Sampler(self.train, step, recipe.seed)

    def eval_order(self) -> list[int]:
        """As the pairs stand."""
        return [] if self.evaluated is None else list(range(len(self.evaluated)))

    def first_batches(self, recipe: Recipe, count: int = 8) -> Iterator[dict[str, Any]]:
        """Some training batches, for initialisations that look at data."""
        order = iter(self.sampler(recipe, 1))
        for _ in range(count):
            indices = list(itertools.islice(order, recipe.batch_size))
            if not indices:
                return
            yield self.collate([self.train[index] for index in indices])


class _Sampler(LengthGroupedSampler):
    """Says the epoch to the features as well: what is done to an image is a function of it."""

    def __init__(self, features: PairFeatures, step: int, seed: int) -> None:
        super().__init__([1] * len(features), step, seed=seed, megabatch=1)
        self.features = features

    def set_epoch(self, epoch: int) -> None:
        """Before each epoch."""
        super().set_epoch(epoch)
        self.features.epoch = epoch


def settings_of(recipe: Recipe) -> PairSettings:
    """The section of a recipe, or its defaults.

    Raises:
        RecipeError: a fusion that doesn't go with the kind.
    """
    settings = recipe.two_tower or PairSettings(fusion="gated" if recipe.kind == "fused" else "contrastive")
    if recipe.two_tower is not None and recipe.kind == "fused" and settings.fusion == "contrastive":
        settings = dataclasses.replace(settings, fusion="gated")
    if recipe.kind == "contrastive" and settings.fusion != "contrastive":
        raise RecipeError(
            f"two_tower.fusion={settings.fusion!r} is a head that classifies, for kind='fused' (--task fused); contrastive has none"
        )
    if settings.modality_dropout and recipe.kind != "fused":
        raise RecipeError("two_tower.modality_dropout is for kind='fused': a comparison without one of the two is none")
    return settings


def check_pair_base(recipe: Recipe, base: Any) -> None:
    """See that kind, base and spec go together, before anything is read.

    Raises:
        RecipeError, BaseError: say what is missing.
    """
    settings_of(recipe)
    for name in ("quantize", "loss_chunk", "freeze_below", "adaptive"):
        if getattr(recipe, name, None):
            raise RecipeError(
                f"{name}={getattr(recipe, name)!r} is not there for kind={recipe.kind!r}, two towers; leave it out"
            )
    if base is None or isinstance(base, tuple):
        raise BaseError(
            f"kind={recipe.kind!r} needs two towers: base={{'text_model': …, 'vision_model': …}} (--text-base and --vision-base), or a CLIP-like base"
        )
    if isinstance(base, Mapping):
        odd = [name for name in base if name not in TOWERS]
        if odd or len(base) != len(TOWERS):
            hint = did_you_mean(str(odd[0]), TOWERS) if odd else ""
            raise BaseError(
                f"base has {some_names(base) or 'nothing'}; expected 'text_model' and 'vision_model'.{hint}"
            )


def read_pairs(recipe: Recipe, data: Any, eval_data: Any, images: Any) -> PairTexts:
    """Read the pairs; ``eval_data`` may be a share of the images to hold out.

    Raises:
        DataError: see `weft.data.pairs.load_pairs`.
    """
    if data is None:
        raise DataError("no training data: give data (--data FILE)")
    columns = dict(recipe.columns) if recipe.columns else None
    fused = recipe.kind == "fused"
    train = load_pairs(data, images, columns=columns, labelled=fused)
    evaluated: Pairs | None = None
    if isinstance(eval_data, float):
        if not 0 < eval_data < 1:
            raise DataError(f"eval_data={eval_data}: a share of the training data to hold out is above 0 and below 1")
        train, evaluated = train.split(eval_data, recipe.seed)
    elif eval_data is not None:
        evaluated = load_pairs(
            eval_data, images, columns=columns, labelled=fused, labels=train.labels if fused else None
        )
    notes = [*train.notes, *(evaluated.notes if evaluated is not None and evaluated.source != train.source else ())]
    if evaluated is None:
        notes.append("no evaluation data: the last checkpoint is kept, and nothing says whether it is a good one")
    shared = len(train) - len(set(train.text_ids))
    if shared and not fused:
        said = {
            "targets": "count as right as well",
            "mask": "count neither as right nor as wrong",
            "ignore": "count as wrong",
        }
        notes.append(
            f"{shared:,} training pairs have the text of another one; where such pairs meet in a batch, they {said[settings_of(recipe).duplicates]}"
        )
    return PairTexts(train, evaluated, recipe.kind, tuple(notes))


def open_towers(recipe: Recipe, base: Any, classes: int | None, dtype: str | None) -> tuple[nn.Module, PairProcessor]:
    """Two towers, or a CLIP-like model, and what makes their inputs.

    Args:
        base: ``{"text_model": …, "vision_model": …}``, each a path, a hub id or a (model, tokenizer or processor) pair; or one CLIP-like base.
        classes: of a head over both; None: they are compared.

    Raises:
        BaseError: a base that can't be loaded, or that isn't a text encoder or a vision model.
    """
    from weft.models.load import load_base
    from weft.models.two_tower import TwoTower

    settings = settings_of(recipe)
    if not isinstance(base, Mapping):
        model, processor = base if isinstance(base, tuple) else load_base(base, task="auto", dtype=dtype)
        if not all(hasattr(model, name) for name in (*TOWERS, "logit_scale")):
            raise BaseError(
                f"{base}: a {type(model).__name__} is no CLIP-like model, which has a text_model, a vision_model and a logit_scale; give two towers"
            )
        if recipe.kind == "fused":
            raise BaseError("kind='fused' needs two towers, base={'text_model': …, 'vision_model': …}")
        return model, _processor(
            settings,
            getattr(processor, "tokenizer", processor),
            getattr(processor, "image_processor", None),
            model.vision_model,
        )
    text, tokenizer = (
        base["text_model"]
        if isinstance(base["text_model"], tuple)
        else load_base(base["text_model"], task="encoder", dtype=dtype)
    )
    vision, images = _vision(base["vision_model"], dtype)
    for name, model, wanted in (("text_model", text, "input_ids"), ("vision_model", vision, "pixel_values")):
        takes = getattr(model, "main_input_name", wanted)
        if takes != wanted and hasattr(model, "config"):
            raise BaseError(
                f"{name}: a {type(model).__name__} reads {takes}, and this tower has to read {wanted}; are the two towers in each other's place?"
            )
    if tokenizer is None:
        raise BaseError(f"{base['text_model']}: no tokenizer; a text tower needs one")
    frozen = tuple(name for name, tower in settings.towers.items() if tower.frozen)
    model = TwoTower(
        text, vision, settings.dim, settings.fusion, classes=classes, loss=settings.loss, duplicates=settings.duplicates,
        features=settings.features, modality_dropout=settings.modality_dropout, frozen_features=frozen, seed=recipe.seed,
    )  # fmt: skip
    names = [getattr(tower, "name_or_path", None) for tower in (text, vision)]
    model.name_or_path = " + ".join(str(name) for name in names if name) or None  # type: ignore[assignment]
    return model, _processor(settings, tokenizer, images, vision)


def _vision(base: Any, dtype: str | None) -> tuple[nn.Module, Any]:
    """A vision model of transformers or of plain PyTorch, and its image processor."""
    if isinstance(base, tuple):
        return base
    if isinstance(base, nn.Module):
        return base, None
    from weft.models.load import load_base
    from weft.models.plain_vision import is_plain, load_plain

    if is_plain(base):
        return load_plain(base), None
    model, processor = load_base(base, task="encoder", dtype=dtype)
    return (model.vision_model if hasattr(model, "vision_model") else model), getattr(
        processor, "image_processor", processor
    )


def _processor(settings: PairSettings, tokenizer: Any, images: Any, vision: nn.Module) -> PairProcessor:
    """How texts and images become inputs: as the base's own image processor has it, where there is one."""
    config: Any = getattr(vision, "config", None)
    crop = getattr(images, "crop_size", None) if getattr(images, "do_center_crop", None) else None
    own = (crop, getattr(images, "size", None), getattr(config, "image_size", None))
    size = settings.image_size or next((edge for found in own if (edge := _edge(found))), 224)
    mean = getattr(images, "image_mean", None) or getattr(config, "image_mean", None) or _MEAN
    std = getattr(images, "image_std", None) or getattr(config, "image_std", None) or _STD
    stretched = images is not None and crop is None and not _named(getattr(images, "size", None), "shortest_edge")
    resample = _RESAMPLE.get(int(getattr(images, "resample", None) or 2), "bilinear")
    return PairProcessor(tokenizer, size, tuple(mean), tuple(std), "stretch" if stretched else "crop", resample)


_RESAMPLE = {1: "lanczos", 2: "bilinear", 3: "bicubic"}


def _named(size: Any, name: str) -> Any:
    """A number of a size that is a mapping, or an object with attributes."""
    return size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)


def _edge(size: Any) -> int | None:
    """One side in pixels, of a number, a pair, or a size by names."""
    if isinstance(size, list | tuple):
        size = size[0] if size else None
    if size is None or isinstance(size, int):
        return size
    found = _named(size, "height") or _named(size, "shortest_edge")
    return None if found is None else int(found)


def transform_of(processor: PairProcessor, augment: tuple[str, ...] = ()) -> ImageTransform:
    """From images of Pillow to the vision tower's input."""
    return ImageTransform(
        processor.size, processor.mean, processor.std, augment, fit=processor.fit, resample=processor.resample
    )


def prepare_pairs(recipe: Recipe, texts: PairTexts, model: nn.Module, processor: PairProcessor) -> PairInputs:
    """Encode texts; images become tensors when they are asked for, and stay.

    Raises:
        DataError: augmentations that nobody knows. RecipeError: batches of one pair.
    """
    if recipe.kind == "contrastive" and recipe.batch_size * int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise RecipeError(
            "batch_size=1: a pair alone has nothing to be compared with; take at least 2, better 32 or more"
        )
    settings = settings_of(recipe)
    length = min(recipe.max_length or MAX_LENGTH, _longest(processor.tokenizer, model))
    notes = list(texts.notes)
    train = _features(texts.train, texts.kind, processor, length, settings.augment, recipe.seed)
    evaluated = None if texts.evaluated is None else _features(texts.evaluated, texts.kind, processor, length)
    cut = sum(len(ids) == length for ids in train.tokens)
    if cut:
        notes.append(f"{cut:,} texts have {length} tokens or more, and were cut there (max_length)")
    where = getattr(model, "features_from", None)
    if where not in (None, "states", "get_features"):
        notes.append(
            f"vision features: {'what the model returns' if where == 'output' else f'what goes into {where!r}'} (two_tower.features chooses)"
        )
    collate = PairCollator(processor.tokenizer.pad_token_id or 0, texts.kind == "fused")
    data = {
        role: _account(part) for role, part in (("train", texts.train), ("eval", texts.evaluated)) if part is not None
    }
    for part in data.values():
        part["kind"] = texts.kind
    return PairInputs(train, evaluated, collate, collate, length, data, tuple(notes))


def _longest(tokenizer: Any, model: nn.Module) -> int:
    config: Any = getattr(getattr(model, "text_model", None), "config", None)
    limits = [getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)]
    return min((int(limit) for limit in limits if isinstance(limit, int) and 0 < limit < 10**9), default=MAX_LENGTH)


def _features(
    pairs: Pairs,
    kind: str,
    processor: PairProcessor,
    length: int,
    augment: tuple[str, ...] = (),
    seed: int | None = None,
) -> PairFeatures:
    known: dict[str, list[int]] = {}
    for text in dict.fromkeys(pairs.texts):
        known[text] = list(processor.tokenizer(text, truncation=True, max_length=length)["input_ids"])
    return PairFeatures(pairs, [known[text] for text in pairs.texts], transform_of(processor, augment), kind, seed)


def _account(pairs: Pairs) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "source": pairs.source,
        "digest": pairs.digest,
        "examples": len(pairs),
        "summary": pairs.summary(),
    }
    return facts | ({"labels": list(pairs.labels)} if pairs.labels else {})


def pair_spec(recipe: Recipe, spec: LoraSpec, model: nn.Module) -> LoraSpec:
    """The spec by tower: as given, or one spec for both with each tower's usual sites; frozen towers have none.

    Raises:
        SpecError, TargetError: see `weft.attach`; a name that is in no tower.
    """
    from weft.models.towers import spread_spec

    frozen = [name for name, tower in settings_of(recipe).towers.items() if tower.frozen]
    return spread_spec(model, spec, TOWERS, frozen, tuple(getattr(model, "weft_heads", ())))
