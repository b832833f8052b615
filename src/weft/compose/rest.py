"""What adapters train beside their factors, in a mixture: modules trained whole, and biases of the base.

They are values, not updates. Without the base nobody knows what of them is change, so that a weighted sum of them means nothing; what is
to become of them is a rule that the caller chooses. Biases can be mixed exactly where the base is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.compose.parents import Parent
from weft.compose.updates import Ground
from weft.errors import MixError, did_you_mean, some_names

__all__ = ["RULES", "mix_biases", "mix_modules"]

RULES = ("same", "average", "drop")
"""Beside the name of one of the parents, whose values are taken."""

Named = Mapping[str, Mapping[str, Tensor]]


def mix_modules(parents: Sequence[Parent], rule: str) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The modules trained whole of a mixture, and notes.

    Args:
        rule: ``"same"``: all parents have them, byte for byte; ``"average"``: by weight; ``"drop"``: none; or a parent's name.

    Raises:
        MixError: they differ; names the module and the ways out.
    """
    found, notes = _mixed(parents, {id(p): p.adapter.modules for p in parents}, rule, "module")
    return {path: dict(tensors) for path, tensors in found.items()}, notes


def mix_biases(parents: Sequence[Parent], rule: str, ground: Ground | None) -> tuple[dict[str, Tensor], list[str]]:
    """The biases of a mixture, and notes; with the base the exact ``b + Σ weight · (bᵢ - b)``, whatever the rule.

    Raises:
        MixError: they differ, and there is no base to count from.
    """
    paths = list(dict.fromkeys(path for parent in parents for path in parent.adapter.biases))
    if ground is None or rule == "drop":
        own: dict[int, Named] = {
            id(p): {path: {"bias": tensor} for path, tensor in p.adapter.biases.items()} for p in parents
        }
        found, notes = _mixed(parents, own, rule, "bias")
        return {path: tensors["bias"] for path, tensors in found.items()}, notes
    mixed = {}
    for path in paths:
        base = ground.bias(path).double()
        holders = [parent for parent in parents if path in parent.adapter.biases]
        change = [
            parent.weight_at(path.rpartition(".")[0]) * (parent.adapter.biases[path].double() - base)
            for parent in holders
        ]
        mixed[path] = (base + torch.stack(change).sum(0)).to(holders[0].adapter.biases[path].dtype)
    return mixed, []


def _mixed(
    parents: Sequence[Parent], own: Mapping[int, Named], rule: str, what: str
) -> tuple[dict[str, Mapping[str, Tensor]], list[str]]:
    paths = list(dict.fromkeys(path for parent in parents for path in own[id(parent)]))
    names = [parent.name for parent in parents]
    if rule not in RULES and rule not in names:
        raise MixError(
            f"whole={rule!r} is no rule for what is trained whole.{did_you_mean(rule, [*RULES, *names])} Expected "
            f"{', '.join(repr(name) for name in RULES)}, or the name of one of the adapters: {some_names(names)}"
        )
    if not paths:
        return {}, []
    if rule == "drop":
        return {}, [f"left out as asked: {what} {some_names(paths)}"]
    if rule == "same":
        return {path: _same(parents, own, path, what) for path in paths}, []
    if rule == "average":
        return {path: _average(parents, own, path, what) for path in paths}, []
    chosen = next(parent for parent in parents if parent.name == rule)
    lost = [path for path in paths if path not in own[id(chosen)]]
    notes = [f"{rule!r} has no {what} {some_names(lost)}: not in the mixture"] if lost else []
    return {path: own[id(chosen)][path] for path in paths if path in own[id(chosen)]}, notes


def _ways(names: Sequence[str], average: bool = True) -> str:
    mean = "whole='average' takes the mean by weight, " if average else ""
    return f"{mean}whole={names[0]!r} takes that adapter's, whole='drop' leaves it out"


def _same(parents: Sequence[Parent], own: Mapping[int, Named], path: str, what: str) -> Mapping[str, Tensor]:
    holders = [parent for parent in parents if path in own[id(parent)]]
    names = [parent.name for parent in holders]
    if len(holders) < len(parents):
        lacking = [parent.name for parent in parents if parent not in holders]
        raise MixError(
            f"the {what} {path!r} is trained whole in {some_names(names)}, and not in {some_names(lacking)}: it is a value, not an update, "
            f"and can't be added. {_ways(names, average=False)}"
        )
    first = own[id(holders[0])][path]
    for other in holders[1:]:
        theirs = own[id(other)][path]
        if first.keys() != theirs.keys() or not all(torch.equal(first[name], theirs[name]) for name in first):
            raise MixError(
                f"the {what} {path!r} is trained whole in {some_names(names)}, with different numbers: it is a value, not an update, and can't "
                f"be added. {_ways(names)}"
            )
    return first


def _average(parents: Sequence[Parent], own: Mapping[int, Named], path: str, what: str) -> dict[str, Tensor]:
    tensors = [own[id(parent)].get(path) for parent in parents]
    shapes: list[Any] = [None if one is None else {name: t.shape for name, t in one.items()} for one in tensors]
    if any(shape != shapes[0] for shape in shapes) or shapes[0] is None:
        raise MixError(
            f"whole='average': the {what} {path!r} is not in all of the adapters, or has other shapes in one of them"
        )
    owner = path.rpartition(".")[0] if what == "bias" else path  # a weight by pattern is meant for a module
    weights = [parent.weight_at(owner) for parent in parents]
    if min(weights) < 0 or not sum(weights) > 0:
        raise MixError(
            f"whole='average': weights {weights} have no mean; they have to be positive. {_ways([parents[0].name], average=False)}"
        )
    found = {}
    for name, first in (tensors[0] or {}).items():
        parts = [one[name] for one in tensors if one is not None]
        if not first.is_floating_point():
            found[name] = first  # a counter
            continue
        mean = sum(part.double() * (weight / sum(weights)) for part, weight in zip(parts, weights, strict=True))
        assert isinstance(mean, Tensor)
        found[name] = mean.to(first.dtype)
    return found
