"""Bases and adapters as a caller names them become a model that runs; afterwards the model is what it was.

Does not know data or training.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from weft.adapter import Adapter
from weft.core.bank import Bank
from weft.errors import BaseError
from weft.spec import LoraSpec
from weft.train.vision import open_classifier, open_talker

__all__ = [
    "BaseLike",
    "Opened",
    "as_before",
    "head_modules",
    "open_base",
    "opened",
    "trained_format",
    "with_head",
]

BaseLike = str | os.PathLike[str] | tuple[nn.Module, Any] | Mapping[str, Any] | None


def open_base(
    base: BaseLike, *, labels: Sequence[str] | None = None, dtype: str | None = None, kind: str | None = None
) -> tuple[nn.Module, Any]:
    """The model and the tokenizer of a base; where there are images, its processor.

    Args:
        base: a path, a hub id, None for the embedded base, or a (model, tokenizer) pair.
        labels: label names where the model is to classify; None: a causal language model.
        dtype: of the weights, for a base that is loaded here; None: as stored.
        kind: of the examples, where they have images.

    Raises:
        BaseError: it can't be loaded; or a pair whose model has another number of labels.
    """
    if isinstance(base, Mapping):
        raise BaseError(
            "two towers are trained with kind='contrastive' or 'fused' (--task), and evaluated with their run: weft eval RUN"
        )
    if kind == "classify-images":
        return open_classifier(base, labels, dtype)
    if kind == "image-text":
        return open_talker(base, dtype)
    if isinstance(base, tuple):
        model, tokenizer = base
        there = getattr(getattr(model, "config", None), "num_labels", None)
        if labels is not None and there != len(labels):
            raise BaseError(
                f"the model has {there} labels, the data {len(labels)}: {', '.join(labels)}; load it with as many: "
                f"weft.load_base(path, task='classification', labels={list(labels)!r})"
            )
        return model, tokenizer
    from weft.models.load import load_base

    task = "causal-lm" if labels is None else "classification"
    loaded: tuple[nn.Module, Any] = load_base(base, task=task, labels=labels, dtype=dtype)
    return loaded


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """Modules to train whole for a classification: what the checkpoint didn't have, else all outside of the body."""
    from weft.models.load import new_modules

    new = new_modules(model)
    if new:
        return new
    if not hasattr(model, "base_model_prefix"):  # plain PyTorch: the last module, as models are written
        last = [
            name for name, child in model.named_children() if name != "weft" and any(True for _ in child.parameters())
        ]
        return tuple(last[-1:])
    body = model.base_model_prefix
    return tuple(
        name
        for name, child in model.named_children()
        if name not in (body, "weft") and next(child.parameters(), None) is not None
    )


@dataclass(frozen=True)
class Opened:
    """A base that runs, and perhaps an adapter on it.

    Attributes:
        adapter: what is loaded; None: the base alone.
    """

    model: nn.Module
    tokenizer: Any
    adapter: Adapter | None
    _bank: Bank | None
    _slot: str | None

    @contextlib.contextmanager
    def using(self, with_adapter: bool) -> Iterator[nn.Module]:
        """The model with the adapter, or the base; what was in use before is put back."""
        if self._bank is None:
            yield self.model
            return
        before = self._bank.current
        self._bank.use(self._slot if with_adapter else None)
        try:
            yield self.model
        finally:
            self._bank.use(before)


@contextlib.contextmanager
def opened(
    base: BaseLike,
    adapter: Adapter | str | os.PathLike[str] | None,
    *,
    dtype: str | None = None,
    device: str | None = None,
    labels: Sequence[str] | None = None,
    kind: str | None = None,
    allow_other_base: bool = False,
) -> Iterator[Opened]:
    """Open a base, put an adapter on it, and take it off again.

    A model that has a bank already keeps it: the adapter gets a slot of its own for the time.

    Args:
        device: for a base that is loaded here; None: a GPU where there is one.
        labels: label names, for a classification; None: those that the adapter was trained with.
        kind: of the examples, where they have images; None: what the adapter was trained on.

    Raises:
        BaseMismatchError: the adapter was made for another base.
    """
    from weft.formats import load
    from weft.models.attach import attach

    value = adapter if isinstance(adapter, Adapter) or adapter is None else load(adapter)
    trained = trained_format(value)
    model, tokenizer = open_base(
        base, labels=labels or trained.get("labels"), dtype=dtype, kind=kind or trained.get("kind")
    )
    if not isinstance(base, tuple):
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if value is None:
        bank = model.__dict__.get("_weft_bank")
        yield Opened(model, tokenizer, None, bank, None)
        return
    bank = model.__dict__.get("_weft_bank")
    own = bank is None
    bank = attach(model, {}) if bank is None else bank
    slot = "opened"
    while slot in bank.names:
        slot += "'"
    try:
        bank.load(slot, value, allow_other_base=allow_other_base)
        yield Opened(model, tokenizer, value, bank, slot)
    finally:
        if own:
            bank.detach()
        elif slot in bank.names:
            bank.drop(slot)


def trained_format(adapter: Adapter | None) -> dict[str, Any]:
    """How the training of an adapter wrote its examples: kind, labels, separator, as_chat, max_length; empty if unknown."""
    if adapter is None:
        return {}
    recipe = dict(adapter.provenance.recipe or {})
    found = {
        name: recipe[name]
        for name in ("kind", "separator", "as_chat", "mask_prompt", "max_length", "vision")
        if recipe.get(name) is not None
    }
    labels = next((part["labels"] for part in adapter.provenance.data if part.get("labels")), None)
    return found | ({"labels": list(labels)} if labels else {})


@contextlib.contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Put back what a training changes around the factors: modes, hooks, devices, wrapped forwards, the config, random state."""
    saved = [(module, dict(module.__dict__), _hooks(module)) for module in model.modules()]
    config = getattr(model, "config", None)
    had_cache = getattr(config, "use_cache", None)
    device = next((parameter.device for parameter in model.parameters()), None)
    states = random.getstate(), torch.random.get_rng_state()
    try:
        yield
    finally:
        for module, before, hooks in saved:
            module.__dict__.clear()
            module.__dict__.update(before)
            for found, entries in hooks:
                found.clear()
                found.update(entries)
        if config is not None and had_cache is not None:
            config.use_cache = had_cache
        if device is not None and next(model.parameters()).device != device:
            model.to(device)
        random.setstate(states[0])
        torch.random.set_rng_state(states[1])


def _hooks(module: nn.Module) -> list[tuple[dict[Any, Any], dict[Any, Any]]]:
    """The module's own dictionaries of hooks, each with a copy of what is in it."""
    found = (value for name, value in module.__dict__.items() if "hooks" in name and isinstance(value, dict))
    return [(hooks, dict(hooks)) for hooks in found]


def with_head(spec: LoraSpec, model: nn.Module) -> LoraSpec:
    """The spec with the classification head among the modules that are trained whole."""
    head = head_modules(model)
    return spec.replace(save_modules=tuple(dict.fromkeys((*spec.save_modules, *head))))
