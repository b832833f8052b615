"""From what the caller named to tokens for training and evaluation, with an account of both.

Stands on `weft.data`. Does not know models beyond their longest sequence, and no training.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset

from weft.data import (
    Encoded,
    Examples,
    LengthGroupedSampler,
    collator,
    encode,
    load_examples,
    overlap,
    pack,
    require_packing,
)
from weft.data.pictures import EncodedImages
from weft.data.talks import EncodedTalks, TalkCollator
from weft.errors import DataError, RecipeError
from weft.train.recipe import Recipe
from weft.train.vision import encode_part, encode_talk_part, image_collator, in_the_heads_order
from weft.train.vision_settings import VisionSettings

__all__ = ["NOTHING_HELD_OUT", "Features", "Inputs", "Texts", "longest", "prepare", "read"]

NOTHING_HELD_OUT = "too few examples to hold some out: trained on all of them, to the end, and not evaluated"

DEFAULT_LENGTH = 1024
AnyEncoded = Encoded | EncodedImages | EncodedTalks


@dataclass(frozen=True)
class Texts:
    """Examples as they were read.

    Attributes:
        train, evaluated: the latter may be None.
        kind: of the rows, as they were read.
        notes: what the user should know (rows that are in both …).
    """

    train: Examples
    evaluated: Examples | None
    kind: str
    notes: tuple[str, ...] = ()

    def for_base(self, base: Any) -> Texts:
        """With the classes in the order of the base's own head, where it knows their names."""
        if self.kind != "classify-images":
            return self
        train = in_the_heads_order(self.train, base)
        evaluated = self.evaluated and dataclasses.replace(self.evaluated, labels=train.labels)
        return dataclasses.replace(self, train=train, evaluated=evaluated)


@dataclass(frozen=True)
class Inputs:
    """Everything that a trainer reads.

    Attributes:
        train, evaluated: encoded features.
        collate: makes a training batch; collate_eval one of an evaluation, which is never packed.
        data: provenance and account, by ``"train"`` and ``"eval"``.
    """

    train: AnyEncoded
    evaluated: AnyEncoded | None
    collate: Callable[[list[Any]], dict[str, Tensor]]
    collate_eval: Callable[[list[Any]], dict[str, Tensor]]
    max_length: int
    data: dict[str, dict[str, Any]]
    notes: tuple[str, ...]

    def sampler(self, recipe: Recipe, processes: int) -> LengthGroupedSampler:
        """The order of the training data, a function of seed and epoch, the same for one process and for many."""
        step = recipe.batch_size * recipe.accumulation * processes
        grouped = recipe.batching == "length"
        return LengthGroupedSampler(
            self.train.lengths.tolist(), step, seed=recipe.seed, **({} if grouped else {"megabatch": 1})
        )

    def eval_order(self) -> list[int]:
        """Evaluation features, longest first."""
        if self.evaluated is None:
            return []
        return [int(index) for index in np.argsort(-np.asarray(self.evaluated.lengths), kind="stable")]

    def first_batches(self, recipe: Recipe, count: int = 8) -> Iterator[dict[str, Tensor]]:
        """Some training batches, for initialisations that look at data."""
        order = iter(self.sampler(recipe, 1))
        for _ in range(count):
            indices = list(itertools.islice(order, recipe.batch_size))
            if not indices:
                return
            yield self.collate([self.train[index] for index in indices])


class Features(Dataset[Any]):
    """Encoded features as torch's data set.

    Args:
        sampler: its epoch, with `seed` and the row, is the seed of what is changed in images by chance; None: nothing is.
    """

    def __init__(self, encoded: AnyEncoded, sampler: LengthGroupedSampler | None = None, seed: int = 0) -> None:
        self.encoded, self.sampler, self.seed = encoded, sampler, seed

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> Any:
        feature = self.encoded[index]
        if self.sampler is not None and "image" in feature:
            feature["seed"] = f"{self.seed}/{self.sampler.epoch}/{index}"
        return feature


def read(
    recipe: Recipe, data: Any, eval_data: Any, labels: Sequence[str] | None = None, images: Any = None, lenient: bool = False
) -> Texts:  # fmt: skip
    """Read the examples; ``eval_data`` may be a share of the training data to hold out.

    Args:
        labels: names of the classes where they are known; None: those of the training data.
        images: the folder that paths of images begin in; None: that of the data.
        lenient: where nothing can be held out, take all for the training, with the note `NOTHING_HELD_OUT`.

    Raises:
        DataError: see `weft.data.load_examples`; or nothing was named.
    """
    if data is None:
        raise DataError("no training data: give data (--data FILE)")
    kind = None if recipe.kind == "auto" else recipe.kind
    columns = dict(recipe.columns) if recipe.columns else None
    train = load_examples(data, columns=columns, kind=kind, labels=labels, images=images)
    if images is not None and train.images is None:
        raise DataError(
            f"{train.source}: images are in {images}, but these examples have none ({train.kind}); say what they are, as in --task "
            "classify-images or --task image-text"
        )
    if isinstance(eval_data, float):
        if not 0 < eval_data < 1:
            raise DataError(f"eval_data={eval_data}: a share of the training data to hold out is above 0 and below 1")
        spare = not lenient or train.questions > 1
        train, evaluated = train.split(eval_data, seed=recipe.seed) if spare else (train, None)
    else:
        evaluated = None
        if eval_data is not None:
            evaluated = load_examples(
                eval_data, columns=columns, kind=train.kind, labels=train.labels or None, images=images
            )
    notes = [*train.notes, *(evaluated.notes if evaluated else ())]
    if evaluated is not None:
        warning = overlap(train, evaluated).warning()
        notes += [warning] if warning else []
    elif isinstance(eval_data, float):
        notes.append(NOTHING_HELD_OUT)
    else:
        notes.append("no evaluation data: the last checkpoint is kept, and nothing says whether it is a good one")
    kind = train.kind
    if recipe.as_chat:
        train, evaluated = train.as_chat(), evaluated.as_chat() if evaluated else None
    return Texts(train, evaluated, kind, tuple(notes))


def longest(recipe: Recipe, model: nn.Module, tokenizer: Any) -> int:
    """The longest example in tokens: the recipe's, or what base and tokenizer allow, at most 1024.

    Raises:
        RecipeError: the recipe asks for more than the base has positions.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    limits.append(getattr(tokenizer, "model_max_length", None))
    allowed = min(
        (int(limit) for limit in limits if isinstance(limit, int) and 0 < limit < 10**9), default=DEFAULT_LENGTH
    )
    if recipe.max_length is not None and recipe.max_length > allowed:
        raise RecipeError(
            f"max_length={recipe.max_length}, but this base and its tokenizer go up to {allowed} tokens; lower it"
        )
    return recipe.max_length or min(allowed, DEFAULT_LENGTH)


def prepare(recipe: Recipe, texts: Texts, model: nn.Module, tokenizer: Any, progress: bool | None = False) -> Inputs:
    """Encode, and pack if the recipe says so.

    Args:
        tokenizer: of the base; for images its processor.
        progress: see `weft.train.bars.counter`; images take a while.

    Raises:
        DataError: nothing is left to train on; the model can't take packed rows; see `weft.data.encode`.
    """
    if texts.kind == "classify-images":
        return _prepare_images(recipe, texts, model, tokenizer, progress)
    if texts.kind == "image-text":
        return _prepare_talks(recipe, texts, model, tokenizer, progress)
    max_length = longest(recipe, model, tokenizer)
    settings: dict[str, Any] = {
        "max_length": max_length,
        "mask_prompt": recipe.mask_prompt,
        "separator": recipe.separator,
    }
    labels = texts.train.labels or None
    train = encode(texts.train, tokenizer, labels=labels, **settings)
    evaluated = encode(texts.evaluated, tokenizer, labels=labels, **settings) if texts.evaluated is not None else None
    embeddings = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    for name, part in (("training", train), ("evaluation", evaluated)):
        if part is not None and not len(part):
            raise DataError(f"no {name} example is left: {part.account.summary()}")
        if part is not None and part.highest_id >= embeddings:
            raise DataError(
                f"the tokenizer gives token {part.highest_id}, but the base has embeddings for {embeddings}: they don't belong together"
            )
    data = {"train": _account(texts.train, train)}
    if evaluated is not None and texts.evaluated is not None:
        data["eval"] = _account(texts.evaluated, evaluated)
    if recipe.batching == "packed":
        require_packing(model)
        train = pack(train, max_length)
    collate_eval = collator(tokenizer, train.kind, packed=False)
    collate = collator(tokenizer, train.kind, packed=train.packed)
    return Inputs(train, evaluated, collate, collate_eval, max_length, data, texts.notes)


def _prepare_images(recipe: Recipe, texts: Texts, model: nn.Module, processor: Any, progress: bool | None) -> Inputs:
    """Images and classes: decoded once, so that what can't be read is known before anything starts."""
    settings = recipe.vision or VisionSettings()
    labels = texts.train.labels
    train = encode_part(texts.train, settings, labels, progress)
    evaluated = None if texts.evaluated is None else encode_part(texts.evaluated, settings, labels, progress)
    data = {"train": _account(texts.train, train) | {"digest": train.digest}}
    if evaluated is not None and texts.evaluated is not None:
        data["eval"] = _account(texts.evaluated, evaluated) | {"digest": evaluated.digest}
    collate, note = image_collator(model, processor, settings, augment=True)
    collate_eval, _ = image_collator(model, processor, settings, augment=False)
    notes = (*texts.notes, *((note,) if note else ()))
    return Inputs(train, evaluated, collate, collate_eval, 0, data, notes)


def _prepare_talks(recipe: Recipe, texts: Texts, model: nn.Module, processor: Any, progress: bool | None) -> Inputs:
    """Conversations with images."""
    if recipe.batching == "packed":
        raise RecipeError(
            "batching='packed' puts several examples in a row, and images can't be parted there; use 'length'"
        )
    max_length = longest(recipe, model, getattr(processor, "tokenizer", None))
    train = encode_talk_part(texts.train, processor, recipe, max_length, progress)
    evaluated = (
        None if texts.evaluated is None else encode_talk_part(texts.evaluated, processor, recipe, max_length, progress)
    )
    data = {"train": _account(texts.train, train) | {"digest": train.digest}}
    if evaluated is not None and texts.evaluated is not None:
        data["eval"] = _account(texts.evaluated, evaluated) | {"digest": evaluated.digest}
    collate = TalkCollator(processor)
    return Inputs(train, evaluated, collate, collate, max_length, data, texts.notes)


def _account(examples: Examples, encoded: AnyEncoded) -> dict[str, Any]:
    account = encoded.account
    facts = {
        "source": str(examples.source),
        "digest": examples.digest,
        "examples": len(examples),
        "kind": encoded.kind,
        "summary": account.summary(),
        "account": account.to_dict(),
    }
    return facts | ({"labels": list(examples.labels)} if examples.labels else {})
