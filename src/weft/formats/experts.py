"""Updates of single experts, fitted to a model that stacks its experts.

Before transformers 5 an expert was a module of linear layers (``…experts.3.w1``); since then a layer's experts are two stacked parameters,
``…experts.gate_up_proj`` (E, 2 · inner, width) and ``…experts.down_proj`` (E, width, inner). Adapters made before are stacked here: the gate and
up halves become one block-diagonal update of twice the rank.

This module does not know files.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from weft.adapter import Adapter
from weft.core.factors import Factors
from weft.core.loading import spec_of
from weft.errors import KeysError

__all__ = ["stack_experts"]

_EXPERT = re.compile(r"(?P<owner>.+)\.experts\.(?P<index>\d+)\.(?P<part>w1|w2|w3|gate_proj|up_proj|down_proj)")
_PARTS = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}


def stack_experts(adapter: Adapter, model: nn.Module) -> Adapter:
    """The same updates, those of single experts as updates of the model's stacked parameters.

    Args:
        adapter: of a mixture of experts, with linear sites for single experts.
        model: whose experts are stacked.

    Returns:
        The adapter as it was where the model has such modules, or no stacked experts in their place.

    Raises:
        KeysError: an update for an expert that the model has not, or one that can't be stacked (DoRA, a bias of B).
    """
    known = dict(model.named_modules())
    stacks: dict[str, dict[str, dict[int, Factors]]] = {}
    factors: dict[str, Factors] = {}
    for path, item in adapter.factors.items():
        match = _EXPERT.fullmatch(path)
        home = _home(match["owner"], known) if match and path not in known else None
        if match and home is not None:
            if item.magnitude is not None or item.bias is not None:
                raise KeysError(
                    "DoRA or a bias of B on a single expert: stacked experts have neither; load it on transformers 4",
                    key=path,
                )
            stacks.setdefault(home, {}).setdefault(_PARTS[match["part"]], {})[int(match["index"])] = item
        else:
            router = _router(path, known)
            factors[router or path] = dataclasses.replace(item, kind="parameter") if router else item
    if not stacks and list(factors) == list(adapter.factors):
        return adapter
    for home, parts in stacks.items():
        for name, stacked in _stacked(known[home], parts, home).items():
            factors[f"{home}.{name}"] = stacked
    bare = tuple(path for path, item in factors.items() if item.kind == "parameter")
    named = tuple(path for path in factors if path not in set(bare))
    spec = adapter.spec.replace(
        targets=named,
        target_parameters=bare,
        exclude=(),
        layers=None,
        layers_pattern=None,
        rank_pattern={},
        alpha_pattern={},
        dropout=0.0,
    )
    note = f"updates of single experts were stacked for {type(model).__name__}: {len(stacks)} layers, gate and up halves at twice the rank"
    provenance = dataclasses.replace(adapter.provenance, notes=(*adapter.provenance.notes, note))
    return adapter.replace(spec=spec_of(spec, factors), factors=factors, provenance=provenance)


def _home(owner: str, known: Mapping[str, nn.Module]) -> str | None:
    """Path of the module with the stacked parameters; Mixtral's block had another name."""
    for candidate in (f"{owner}.experts", re.sub(r"\.block_sparse_moe$", ".mlp", owner) + ".experts"):
        module = known.get(candidate)
        if module is not None and {"gate_up_proj", "down_proj"} <= set(module._parameters):
            return candidate
    return None


def _router(path: str, known: Mapping[str, nn.Module]) -> str | None:
    """The router was a linear layer, and is a module with a bare weight."""
    if path in known and isinstance(known[path], nn.Linear):
        return None
    owner = re.sub(r"\.block_sparse_moe\.gate$", ".mlp.gate", path)
    module = known.get(owner)
    weight = None if module is None else module._parameters.get("weight")
    bare = weight is not None and weight.dim() == 2 and owner.endswith(".gate") and not isinstance(module, nn.Linear)
    return f"{owner}.weight" if bare else None


def _stacked(module: nn.Module, parts: Mapping[str, Mapping[int, Factors]], home: str) -> dict[str, Factors]:
    """Updates of gate_up_proj and down_proj from those of the experts; experts without an update get zeros."""
    experts = int(module._parameters["gate_up_proj"].shape[0])  # type: ignore[union-attr]
    beyond = [index for found in parts.values() for index in found if index >= experts]
    if beyond:
        raise KeysError(f"an update for expert {beyond[0]}, and {home!r} has {experts}", key=home)
    made: dict[str, Factors] = {}
    if "down" in parts:
        A, B, scale = _stack(parts["down"], experts)
        made["down_proj"] = Factors(A, B, scale, "parameter")
    halves = {name: _stack(parts[name], experts) for name in ("gate", "up") if name in parts}
    if halves:
        some_A, some_B, scale = next(iter(halves.values()))
        empty = (some_A[:, :0], some_B[:, :, :0], scale)
        (A1, B1, s1), (A2, B2, s2) = (halves.get(name, empty) for name in ("gate", "up"))
        upper = torch.cat([B1, B1.new_zeros(*B1.shape[:2], B2.shape[2])], dim=2)
        lower = torch.cat([B2.new_zeros(*B2.shape[:2], B1.shape[2]), B2 * (s2 / s1)], dim=2)
        made = {
            "gate_up_proj": Factors(torch.cat([A1, A2], dim=1), torch.cat([upper, lower], dim=1), s1, "parameter"),
            **made,
        }
    return made


def _stack(found: Mapping[int, Factors], experts: int) -> tuple[Tensor, Tensor, float]:
    """(E, r, d_in), (E, d_out, r) and the scale, from the updates of single experts."""
    some = next(iter(found.values()))
    rank = max(item.rank for item in found.values())
    A, B = some.A.new_zeros(experts, rank, some.d_in), some.B.new_zeros(experts, some.d_out, rank)
    for index, item in found.items():
        A[index, : item.rank], B[index, :, : item.rank] = item.A, item.B * (item.scale / some.scale)
    return A, B, some.scale
