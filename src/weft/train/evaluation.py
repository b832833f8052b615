"""`evaluate`: how well a base and an adapter do on examples, side by side.

Loss and perplexity; for prompts with completions what is generated, against all references of a prompt; for
classifications accuracy and macro-F1.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from weft.adapter import Adapter
from weft.data import Examples, collator, encode, encode_prompts, load_examples, prompts
from weft.data.pictures import EncodedImages
from weft.data.talks import EncodedTalks, TalkCollator
from weft.errors import DataError
from weft.train.generation import Sampling, continue_tokens
from weft.train.inputs import AnyEncoded, longest
from weft.train.metrics import text_metrics
from weft.train.opening import BaseLike, Opened, opened, trained_format
from weft.train.progress import counter
from weft.train.recipe import CLASSIFYING, Recipe
from weft.train.run import side_by_side
from weft.train.scoring import score
from weft.train.vision import encode_part, encode_talk_part, image_collator, in_the_heads_order
from weft.train.vision_settings import VisionSettings

__all__ = ["Evaluation", "encoded_for", "evaluate", "examples_for", "scores"]

SHOWN = 5


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        base: metrics of the base by name: ``loss`` (nats a token), ``perplexity``, ``exact_match`` (0 to 1), ``bleu``
            (0 to 100), ``rouge_l`` (0 to 1); or ``loss``, ``accuracy``, ``macro_f1`` (0 to 1).
        adapter: the same with the adapter; None without one.
        kind: of the examples. count: how many. generated: prompts that were answered.
        examples: some of them: prompt, references, and the answers of base and adapter.
        digest: of the adapter. data: source, digest and account. notes: what the user should know.
    """

    base: Mapping[str, float]
    adapter: Mapping[str, float] | None
    kind: str
    count: int
    generated: int = 0
    examples: tuple[Mapping[str, Any], ...] = ()
    digest: str | None = None
    data: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        values = dict(vars(self))
        return values | {"examples": [dict(item) for item in self.examples], "notes": list(self.notes)}

    def text(self) -> str:
        """A table for people: base and adapter side by side."""
        source = f" of {self.data['source']}" if self.data else ""
        lines = [f"{self.count:,} examples ({self.kind}){source}", *side_by_side(self.base, self.adapter)]
        if self.generated:
            lines.append(f"generated answers: {self.generated:,} prompts, greedy")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def evaluate(
    *,
    base: BaseLike = None,
    adapter: Adapter | str | os.PathLike[str] | None = None,
    data: Any,
    images: str | os.PathLike[str] | None = None,
    kind: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = 200,
    generation: bool = True,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    max_length: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    allow_other_base: bool = False,
    progress: bool | None = None,
) -> Evaluation:
    """Evaluate a base, and an adapter on it.

    Args:
        base: as in `weft.train`.
        adapter: an adapter, its path (a run folder too), or None: the base alone.
        data: as in `weft.train`; several rows with one prompt are its references.
        images: the folder that the data's paths of images begin in; None: that of the data.
        kind, columns: where the data are not recognised; None: as the adapter was trained, else recognised.
        limit: prompts that are answered; None: all. Losses are taken over all examples.
        generation: answer prompts at all; greedily, at most ``max_new_tokens`` each.
        batch_size: rows in one forward.
        max_length: longest example in tokens; None: as the adapter was trained, else what the base allows, at most 1024.
        allow_other_base: use the adapter on a base with another fingerprint; shapes have to agree.

    Raises:
        DataError: the data can't be read, or are of another kind than the adapter was trained on.
        BaseMismatchError: the adapter was made for another base.
    """
    from weft.formats import load

    value = adapter if isinstance(adapter, Adapter) or adapter is None else load(adapter)
    examples = examples_for(value, data, kind=kind, columns=columns, images=images)
    if examples.kind == "classify-images" and value is None:
        examples = in_the_heads_order(examples, base)
    labels = list(examples.labels or ()) if examples.kind in CLASSIFYING else None
    with opened(
        base, value, dtype=dtype, device=device, labels=labels, kind=examples.kind, allow_other_base=allow_other_base
    ) as ready:
        encoded, settings = encoded_for(value, examples, ready.model, ready.tokenizer, max_length, progress)
        sides = (False, True) if value is not None else (False,)
        collate, note = collator_for(value, encoded, ready.model, ready.tokenizer)
        found = [_losses(ready, side, encoded, batch_size, progress, collate) for side in sides]
        shown: list[dict[str, Any]] = []
        count = 0
        if generation and examples.kind in ("completion", "chat"):
            count = _answers(
                ready, sides, examples, settings, limit, max_new_tokens, batch_size, progress, found, shown
            )
    facts = {"source": str(examples.source), "digest": examples.digest, "summary": encoded.account.summary()}
    return Evaluation(
        base=found[0],
        adapter=found[1] if value is not None else None,
        kind=examples.kind,
        count=len(examples),
        generated=count,
        examples=tuple(shown),
        digest=value.digest if value is not None else None,
        data=facts,
        notes=(*examples.notes, *((note,) if note else ())),
    )


def examples_for(
    adapter: Adapter | None,
    data: Any,
    *,
    kind: str | None = None,
    columns: Mapping[str, str] | None = None,
    images: Any = None,
) -> Examples:
    """Data as an adapter was trained to see them.

    Raises:
        DataError: they can't be read, or are of another kind than the adapter was trained on.
    """
    trained = trained_format(adapter)
    own = trained.get("kind")
    wanted = kind or (own if own in (*CLASSIFYING, "image-text") else None)
    columns = dict(columns) if columns else None
    examples = load_examples(data, columns=columns, kind=wanted, labels=trained.get("labels"), images=images)
    if trained.get("as_chat"):
        examples = examples.as_chat()
    if adapter is not None and examples.kind != own and own == "classify-images":
        raise DataError(f"{examples.source}: {examples.kind} examples, and this adapter was trained to classify images")
    if adapter is not None and examples.kind == "classification" and not adapter.modules:
        raise DataError("the data have labels, and this adapter was not trained to classify: it has no head")
    return examples


def encoded_for(
    adapter: Adapter | None,
    examples: Examples,
    model: nn.Module,
    tokenizer: Any,
    max_length: int | None = None,
    progress: bool | None = False,
) -> tuple[AnyEncoded, dict[str, Any]]:
    """Examples as tokens (or images), written as an adapter was trained to see them; and the settings by which they were.

    Raises:
        DataError: no example is left.
    """
    trained = trained_format(adapter)
    labels = list(examples.labels or ()) if examples.kind in CLASSIFYING else None
    if examples.kind == "classify-images":
        return encode_part(examples, _vision(trained), labels, progress), {}
    if examples.kind == "image-text":
        own = Recipe(max_length=max_length or trained.get("max_length"), mask_prompt=trained.get("mask_prompt", True))
        most = longest(own, model, getattr(tokenizer, "tokenizer", None))
        return encode_talk_part(examples, tokenizer, own, most, progress), {}
    recipe = Recipe(max_length=max_length or trained.get("max_length"))
    settings = {
        "max_length": longest(recipe, model, tokenizer),
        "mask_prompt": trained.get("mask_prompt", True),
        "separator": trained.get("separator", ""),
    }
    encoded = encode(examples, tokenizer, labels=labels, **settings)
    if not len(encoded):
        raise DataError(f"no example is left: {encoded.account.summary()}")
    return encoded, settings


def collator_for(
    adapter: Adapter | None, encoded: AnyEncoded, model: nn.Module, tokenizer: Any
) -> tuple[Callable[[Any], dict[str, Tensor]], str]:
    """What makes batches of examples as an adapter was trained to see them; and a note for the user, or nothing."""
    if isinstance(encoded, EncodedImages):
        return image_collator(model, tokenizer, _vision(trained_format(adapter)), augment=False)
    if isinstance(encoded, EncodedTalks):
        return TalkCollator(tokenizer), ""
    return collator(tokenizer, encoded.kind), ""


def _vision(trained: Mapping[str, Any]) -> VisionSettings:
    return VisionSettings.from_dict(trained.get("vision") or {})


def scores(
    model: nn.Module,
    tokenizer: Any,
    encoded: AnyEncoded,
    batch_size: int,
    tick: Callable[[int], None] | None = None,
    collate: Callable[[Any], dict[str, Tensor]] | None = None,
) -> dict[str, float]:
    """Loss and what follows from it, of a model as it is."""
    collate = collate or collator(tokenizer, encoded.kind)
    order = np.argsort(-np.asarray(encoded.lengths), kind="stable")

    def batches() -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(order), batch_size):
            yield collate([encoded[int(index)] for index in order[start : start + batch_size]])

    return score(model, batches(), encoded.kind in CLASSIFYING, tick)


def _losses(
    ready: Opened, side: bool, encoded: AnyEncoded, batch_size: int, progress: bool | None, collate: Any
) -> dict[str, float]:
    name = "adapter" if side else "base"
    with ready.using(side) as model, counter(f"{name}: loss", len(encoded), progress) as tick:
        return scores(model, ready.tokenizer, encoded, batch_size, tick, collate)


def _answers(
    ready: Opened, sides: Sequence[bool], examples: Examples, settings: Mapping[str, Any], limit: int | None, max_new_tokens: int,
    batch_size: int, progress: bool | None, found: list[dict[str, float]], shown: list[dict[str, Any]],
) -> int:  # fmt: skip
    """Answer the prompts; adds to metrics and shown examples. Returns how many prompts."""
    asked = prompts(examples, limit)
    tokens = encode_prompts(asked, ready.tokenizer, max_length=settings["max_length"], separator=settings["separator"])
    references = [list(prompt.references) for prompt in asked]
    shown += [{"prompt": prompt.prompt, "references": list(prompt.references)} for prompt in asked[:SHOWN]]
    for index, side in enumerate(sides):
        name = "adapter" if side else "base"
        with ready.using(side) as model, counter(f"{name}: answers", len(asked), progress) as tick:
            texts = _texts(model, ready.tokenizer, tokens, max_new_tokens, batch_size, tick)
        found[index] |= text_metrics(texts, references)
        for item, text in zip(shown, texts, strict=False):
            item[name] = text
    return len(asked)


def _texts(
    model: nn.Module, tokenizer: Any, tokens: list[list[int]], max_new_tokens: int, batch_size: int, tick: Any
) -> list[str]:
    answers = continue_tokens(model, tokenizer, tokens, Sampling(max_new_tokens=max_new_tokens), batch_size, tick)
    return [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
