"""`evaluate_pairs`: how well a trained pair of towers finds images by text and texts by image, and names what it was not trained to name."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapter import Adapter
from weft.core.bank import Bank
from weft.data.pairs import PairCollator, PairFeatures, Pairs, load_pairs
from weft.errors import DataError, RunError
from weft.train.bars import counter
from weft.train.evaluation import Evaluation
from weft.train.metrics import accuracy, macro_f1
from weft.train.pair_inputs import PairProcessor, open_towers, transform_of
from weft.train.pair_settings import PAIR_KINDS
from weft.train.pair_trainer import compared
from weft.train.recipe import Recipe
from weft.train.retrieval import recalls
from weft.train.run import Folder

__all__ = ["TEMPLATE", "embedded_pairs", "evaluate_pairs", "is_pair_run"]

TEMPLATE = "a photo of a {}"


def is_pair_run(path: str | os.PathLike[str] | None) -> bool:
    """Whether a folder is a run that was trained on texts and images."""
    recipe = Path(path or "-") / "recipe.yaml"
    return recipe.is_file() and Recipe.load(recipe).kind in PAIR_KINDS


def evaluate_pairs(
    run: str | os.PathLike[str],
    data: Any,
    *,
    images: str | os.PathLike[str] | None = None,
    base: Any = None,
    adapter: Any = None,
    classes: Sequence[str] | None = None,
    template: str = TEMPLATE,
    columns: Mapping[str, str] | None = None,
    batch_size: int = 64,
    dtype: str | None = None,
    allow_other_base: bool = False,
    progress: bool | None = None,
) -> Evaluation:
    """Evaluate a run of ``kind="contrastive"`` or ``"fused"``, before and after training.

    Args:
        run: the run folder.
        data, images, columns: as in `weft.train`.
        base: the towers, where the run's were objects or stand elsewhere now.
        adapter: another one than the run's, as a mixture or a shrunken one: an `Adapter` or a path.
        classes: names for zero-shot classification; None: those of the data's labels, if it has any.
        template: what is said of a class, with ``{}`` for its name.
        batch_size: pairs in one forward.
        allow_other_base: use the adapter on towers with another fingerprint.

    Returns:
        Metrics by name: ``image_to_text_r1`` …, ``recall_at_1``, ``zero_shot_accuracy`` (0 to 1); or ``accuracy`` and ``macro_f1``.

    Raises:
        RunError: no finished run on pairs. DataError: see `weft.data.pairs.load_pairs`; a class that the data don't have.
        BaseMismatchError: the towers are others than those of the run.
    """
    with _opened(run, data, images, base, columns, dtype, allow_other_base, adapter) as (
        bank,
        processor,
        recipe,
        pairs,
        used,
    ):
        if "{}" not in template:
            raise DataError(f"template={template!r}: expected a text with {{}} for the name of the class")
        sides = []
        for name in (None, "run"):
            bank.use(name)
            with counter("before" if name is None else "after", len(pairs), progress) as tick:
                sides.append(_measured(bank.model, processor, recipe, pairs, classes, template, batch_size, tick))
    facts = {"source": pairs.source, "digest": pairs.digest, "summary": pairs.summary()}
    return Evaluation(sides[0], sides[1], recipe.kind, len(pairs), digest=used.digest, data=facts, notes=pairs.notes)


def embedded_pairs(
    run: str | os.PathLike[str],
    data: Any,
    *,
    images: str | os.PathLike[str] | None = None,
    base: Any = None,
    batch_size: int = 64,
) -> list[tuple[Tensor, Tensor]]:
    """Embeddings of texts and images by row, (N, D) each and of length one, before and after training; else as `evaluate_pairs`.

    Raises:
        RunError: also for a run of ``kind="fused"``, which compares nothing.
    """  # fmt: skip
    with _opened(run, data, images, base, None, None, False) as (bank, processor, recipe, pairs, _):
        if recipe.kind != "contrastive":
            raise RunError(f"{run}: kind={recipe.kind!r} has no common space; expected a run of kind='contrastive'")
        found = []
        for name in (None, "run"):
            bank.use(name)
            parts = [
                compared(bank.model, outputs)[:2]
                for outputs, _ in _forwards(bank.model, processor, recipe, pairs, batch_size)
            ]
            found.append((torch.cat([text for text, _ in parts]), torch.cat([image for _, image in parts])))
        return found


@contextlib.contextmanager
def _opened(
    run: str | os.PathLike[str],
    data: Any,
    images: Any,
    base: Any,
    columns: Mapping[str, str] | None,
    dtype: str | None,
    allow_other_base: bool,
    given: Any = None,
) -> Iterator[tuple[Bank, PairProcessor, Recipe, Pairs, Adapter]]:
    """The towers of a run with its adapter loaded as ``run``, and the pairs."""
    from weft.formats import load
    from weft.models.attach import attach

    folder = Folder(run).require()
    recipe = Recipe.load(folder.recipe)
    if recipe.kind not in PAIR_KINDS:
        raise RunError(
            f"{run}: trained with kind={recipe.kind!r}, not on texts and images; weft eval --adapter {run} evaluates it"
        )
    adapter = load(folder.adapter)
    labels = next((list(part["labels"]) for part in adapter.provenance.data if part.get("labels")), None)
    if given is not None:
        adapter = given if isinstance(given, Adapter) else load(given)
    base = folder.read_environment().get("inputs", {}).get("base") if base is None else base
    if base is None or (isinstance(base, str) and base == "(given)"):
        raise RunError(
            f"{run}: its towers were objects, which can't be read from the folder; give base={{'text_model': …, 'vision_model': …}}"
        )
    fused = recipe.kind == "fused"
    pairs = load_pairs(data, images, columns=columns, labelled=fused, labels=labels if fused else None)
    model, processor = open_towers(recipe, base, len(labels or ()) if fused else None, dtype)
    with attach(model, {}) as bank:
        bank.load("run", adapter, allow_other_base=allow_other_base)
        yield bank, processor, recipe, pairs, adapter


@torch.no_grad()
def _forwards(
    model: nn.Module, processor: PairProcessor, recipe: Recipe, pairs: Pairs, batch_size: int
) -> Iterator[tuple[Any, int]]:
    """What the model says of each batch, and how many rows it has."""
    features, collate = _featured(processor, recipe, pairs)
    model.eval()
    for start in range(0, len(features), batch_size):
        batch = collate([features[index] for index in range(start, min(start + batch_size, len(features)))])
        rows = len(batch.pop("labels"))
        batch.pop("image_ids", None)
        yield model(**batch), rows


def _featured(processor: PairProcessor, recipe: Recipe, pairs: Pairs) -> tuple[PairFeatures, PairCollator]:
    length = recipe.max_length or 128
    ids = [list(processor.tokenizer(text, truncation=True, max_length=length)["input_ids"]) for text in pairs.texts]
    collate = PairCollator(processor.tokenizer.pad_token_id or 0, recipe.kind == "fused")
    return PairFeatures(pairs, ids, transform_of(processor), recipe.kind), collate


@torch.no_grad()
def _measured(
    model: nn.Module, processor: PairProcessor, recipe: Recipe, pairs: Pairs, classes: Sequence[str] | None, template: str, batch_size: int,
    tick: Any,
) -> dict[str, float]:  # fmt: skip
    """One side."""
    texts, images, predicted = [], [], []
    for outputs, rows in _forwards(model, processor, recipe, pairs, batch_size):
        if recipe.kind == "fused":
            predicted += outputs.logits.argmax(1).tolist()
        else:
            text, image, _, _ = compared(model, outputs)
            texts.append(text)
            images.append(image)
        tick(rows)
    if recipe.kind == "fused":
        return {
            "accuracy": accuracy(predicted, list(pairs.classes)),
            "macro_f1": macro_f1(predicted, list(pairs.classes)),
        }
    found = recalls(torch.cat(texts), torch.cat(images), pairs.text_ids, pairs.image_ids)
    names = list(classes or pairs.labels)
    if names and pairs.labels:
        features, collate = _featured(processor, recipe, pairs)
        found["zero_shot_accuracy"] = _zero_shot(
            model, processor, recipe, pairs, torch.cat(images), features, collate, names, template
        )
    return found


def _zero_shot(
    model: nn.Module, processor: PairProcessor, recipe: Recipe, pairs: Pairs, images: Tensor, features: PairFeatures, collate: PairCollator,
    names: list[str], template: str,
) -> float:  # fmt: skip
    """Share of images whose class has the nearest prompt."""
    odd = sorted(set(pairs.labels) - set(names))
    if odd:
        raise DataError(
            f"{pairs.source}: the label {odd[0]!r} is none of the classes {json.dumps(names, ensure_ascii=False)[:200]}"
        )
    length = recipe.max_length or 128
    ids = [
        list(processor.tokenizer(template.format(name), truncation=True, max_length=length)["input_ids"])
        for name in names
    ]
    if len({tuple(one) for one in ids}) < len(set(names)):
        raise DataError(
            f"cut at {length} tokens, prompts of different classes are the same, as {template.format(names[0])!r}; give a shorter template (--template '{{}}')"
        )
    pixels = features.pixels(0)
    rows = [
        {
            "input_ids": one,
            "pixel_values": pixels,
            "labels": 0,
            "image_ids": 0,
        }
        for one in ids
    ]
    batch = collate(rows)
    batch.pop("labels")
    batch.pop("image_ids")
    prompts, _, _, _ = compared(model, model(**batch))
    nearest = (images @ prompts.T).argmax(1).tolist()
    wanted = [names.index(pairs.labels[index]) for index in pairs.classes]
    return accuracy(nearest, wanted)
