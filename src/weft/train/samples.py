"""A handful of answers of the base and of the base with the adapter, on rows that were held out: samples.json of a run.

    {"kind": "completion", "rows": [{"prompt", "reference", "base", "adapter"}], "note": "…"}

Greedy and short, so that they are the same every time and cost little. Does not know how good they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from weft.core.bank import Bank
from weft.train.generation import Sampling, continue_tokens
from weft.train.inputs import Inputs
from weft.train.recipe import CLASSIFYING

__all__ = ["record_samples"]

NEW_TOKENS = 48
"""Longest answer."""
LONGEST_PROMPT = 256
"""Tokens of a prompt that are kept, its last ones."""
OF_TEXT = 32
"""Tokens of a plain text that are given, where nothing is a question."""


def record_samples(
    model: nn.Module, tokenizer: Any, bank: Bank, slot: str, inputs: Inputs, count: int
) -> dict[str, Any]:
    """Answers before and after; plain data.

    Args:
        model: with the bank on it. slot: the adapter's.
        count: how many rows, spread over the evaluation data, or over the training data where there is none.
    """
    held_out = inputs.evaluated is not None
    features: Any = inputs.evaluated if inputs.evaluated is not None else inputs.train
    kind = str(features.kind)
    chosen = [index * len(features) // count for index in range(min(count, len(features)))]
    found: dict[str, Any] = {"kind": kind, "rows": []}
    found["note"] = "" if held_out else "Rows of the training data: there was no evaluation data."
    before = bank.current
    try:
        if kind in CLASSIFYING:
            found["rows"] = _classes(model, tokenizer, bank, slot, inputs, features, chosen)
        elif kind in ("chat", "completion", "text") and _generates(model):
            found["rows"] = _answers(model, tokenizer, bank, slot, features, chosen)
        else:
            found["note"] = f"Answers are not written down for kind {kind!r}."
    finally:
        bank.use(before)
    return found


def _generates(model: Any) -> bool:
    return hasattr(model, "generate") and not getattr(model.config, "is_encoder_decoder", False)


def _answers(model: nn.Module, tokenizer: Any, bank: Bank, slot: str, features: Any, chosen: Sequence[int]) -> list[dict[str, str]]:  # fmt: skip
    asked = [_question(features, index) for index in chosen]
    prompts, found = [prompt for prompt, _ in asked], []
    for name in (None, slot):
        bank.use(name)
        found.append(continue_tokens(model, tokenizer, prompts, Sampling(max_new_tokens=NEW_TOKENS), batch_size=8))
    return [
        {"prompt": _said(tokenizer, prompt), "reference": _said(tokenizer, reference), "base": _said(tokenizer, before), "adapter": _said(tokenizer, after)}
        for (prompt, reference), before, after in zip(asked, *found, strict=True)
    ]  # fmt: skip


def _question(features: Any, index: int) -> tuple[list[int], list[int]]:
    """Tokens before the first that is learned, and those that are, up to the next that is not."""
    feature = features[index]
    ids, labels = feature["input_ids"].tolist(), feature["labels"].tolist()
    if features.packed:  # the first example of the row alone
        starts = [at for at, place in enumerate(feature["position_ids"].tolist()) if place == 0 and at]
        ids, labels = (part[: starts[0]] if starts else part for part in (ids, labels))
    first = next((at for at, label in enumerate(labels) if label >= 0), len(ids) - 1)
    if first <= 1:  # plain text: all of it is learned
        first = max(1, min(OF_TEXT, len(ids) // 2))
    last = next((at for at in range(first, len(labels)) if labels[at] < 0), len(labels))
    return ids[max(0, first - LONGEST_PROMPT) : first], ids[first : min(last, first + NEW_TOKENS)]


def _said(tokenizer: Any, tokens: Sequence[int]) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text


def _classes(
    model: nn.Module, tokenizer: Any, bank: Bank, slot: str, inputs: Inputs, features: Any, chosen: Sequence[int]
) -> list[dict[str, str]]:
    rows = [features[index] for index in chosen]
    batch: dict[str, Any] = dict(inputs.collate_eval(rows))
    device = next(model.parameters()).device
    batch.pop("labels")
    batch = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    names, training = features.labels or (), model.training
    found = []
    model.eval()
    try:
        with torch.no_grad():
            for name in (None, slot):
                bank.use(name)
                found.append(model(**batch).logits.float().softmax(-1).max(-1))
    finally:
        model.train(training)
    return [
        {"prompt": _shown(tokenizer, features, row, index), "reference": _named(names, int(row["labels"])), "base": _voted(names, before, place), "adapter": _voted(names, after, place)}
        for place, (row, index, before, after) in enumerate(zip(rows, chosen, [found[0]] * len(rows), [found[1]] * len(rows), strict=True))
    ]  # fmt: skip


def _named(names: Sequence[str], label: int) -> str:
    return names[label] if label < len(names) else f"class {label}"


def _voted(names: Sequence[str], found: Any, place: int) -> str:
    return f"{_named(names, int(found.indices[place]))} ({float(found.values[place]):.0%})"


def _shown(tokenizer: Any, features: Any, row: dict[str, Any], index: int) -> str:
    if "input_ids" in row:
        return _said(tokenizer, row["input_ids"].tolist()[:LONGEST_PROMPT])
    where = features.references[index]
    return f"image {where}" if isinstance(where, str) else f"image of row {row.get('row', index)}"
