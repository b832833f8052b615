"""Layers of one kind repeat: a model with one of each kind, from which the whole follows exactly.

`Stacks.of` finds the stacks of layers and what kind each layer is; inside of ``shortened`` each stack holds one layer of each kind,
beside its first and its last, whose neighbours differ. This module does not know what a step is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["Stack", "Stacks"]

_SHORTEST = 5
"""A stack of fewer layers is not worth shortening."""


@dataclass
class Stack:
    """One stack of layers.

    Attributes:
        path: of the ModuleList.
        layers: all of them.
        kept: indices of those that stay, in order.
        stands_for: by layer, the place in `kept` of the one that is like it.
    """

    path: str
    owner: nn.Module
    name: str
    layers: list[nn.Module]
    kept: list[int]
    stands_for: list[int]


@dataclass
class Stacks:
    """The stacks of a model, from input to output."""

    model: nn.Module
    stacks: list[Stack] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, *, whole: bool = False) -> Stacks:
        """Find the stacks of a model as it is now: frozen or not, with adapters or without.

        Args:
            whole: keep every layer; the slow, obvious reference.
        """
        found: list[Stack] = []
        before = any(parameter.requires_grad for parameter in _outside(model))
        for path, module in model.named_modules():
            if not isinstance(module, nn.ModuleList) or len(module) < _SHORTEST:
                continue
            if any(path.startswith(f"{stack.path}.") for stack in found):
                continue
            owner_path, _, name = path.rpartition(".")
            layers = list(module)
            kept, stands_for = _kinds(layers, _types(model, len(layers)), before, whole)
            found.append(Stack(path, model.get_submodule(owner_path), name, layers, kept, stands_for))
            before = before or any(p.requires_grad for layer in layers for p in layer.parameters())
        return cls(model, found)

    @contextlib.contextmanager
    def shortened(self) -> Iterator[nn.Module]:
        """The model with the kept layers alone; lists in its configuration that go by layer are shortened too."""
        configs = _configs(self.model)
        saved = [
            (config, name, value)
            for config in configs
            for name, value in vars(config).items()
            if isinstance(value, list)
        ]
        try:
            for stack in self.stacks:
                stack.owner._modules[stack.name] = nn.ModuleList([stack.layers[index] for index in stack.kept])
                for config, name, value in saved:
                    if len(value) == len(stack.layers):
                        config.__dict__[name] = [value[index] for index in stack.kept]
            yield self.model
        finally:
            for stack in self.stacks:
                stack.owner._modules[stack.name] = nn.ModuleList(stack.layers)
            for config, name, value in saved:
                config.__dict__[name] = value


def _outside(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of the input embeddings: what comes before all layers."""
    getter: Any = getattr(model, "get_input_embeddings", None)
    try:
        module = getter() if getter is not None else None
    except (NotImplementedError, AttributeError):
        module = None
    return module.parameters() if isinstance(module, nn.Module) else iter(())


def _configs(model: nn.Module) -> list[Any]:
    found = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return list(found.values())


def _types(model: nn.Module, count: int) -> list[tuple[Any, ...]]:
    """What the configuration says of each of so many layers."""
    lists = [
        value
        for config in _configs(model)
        for value in vars(config).values()
        if isinstance(value, list) and len(value) == count
    ]
    return [tuple(str(values[index]) for values in lists) for index in range(count)]


def _kinds(
    layers: list[nn.Module], types: list[tuple[Any, ...]], before: bool, whole: bool
) -> tuple[list[int], list[int]]:
    """Which layers are kept, and which of them each layer is like."""
    last = len(layers) - 1
    first_of: dict[Any, int] = {}
    like = []
    for index, layer in enumerate(layers):
        edge = index if whole or index in (0, last) else -1
        key = (_signature(layer), types[index], before, edge)
        like.append(first_of.setdefault(key, index))
        before = before or any(parameter.requires_grad for parameter in layer.parameters())
    kept = sorted(first_of.values())
    return kept, [kept.index(index) for index in like]


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    """What decides how a layer is computed and what it keeps."""
    parts: list[Any] = []
    for path, module in layer.named_modules():
        plain = {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, bool | int | float | str)
            and name not in ("layer_idx", "layer_id", "layer_index", "training")
        }
        shapes = [
            (name, tuple(p.shape), str(p.dtype), p.requires_grad)
            for name, p in module._parameters.items()
            if p is not None
        ]
        parts.append((path, module.__class__.__qualname__, tuple(sorted(plain.items(), key=str)), tuple(shapes)))
    return tuple(parts)
