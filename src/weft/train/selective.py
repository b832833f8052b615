"""Selective checkpointing: a layer is computed again in the backward, but for its products and its attention, which are kept.

torch's own (`create_selective_checkpoint_contexts`) can't keep what is written in place, and a site's output is: the base's product is
added to the update's. Here both are kept as the one piece of memory that they are. This module does not know models or recipes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["NARROW", "contexts"]

NARROW = 64
"""A product that sums over fewer numbers than this is cheaper to compute again than its output is to keep."""

_aten: Any = torch.ops.aten
_PRODUCTS = {_aten.mm.default: 0, _aten.addmm.default: 1, _aten.bmm.default: 0, _aten.baddbmm.default: 1}
"""Products, and which argument has the summed dimension last."""

_ADDED = {_aten.addmm_.default, _aten.baddbmm_.default}
"""Products that are added in place."""

_ALWAYS = {
    _aten.convolution.default, _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default, _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default, _aten._scaled_dot_product_fused_attention_overrideable.default,
}  # fmt: skip
_PASSED = {_aten.detach.default, torch.ops.prim.device.default}
_AGAIN, _SKIP, _SPENT = object(), object(), object()


def contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The pair that `torch.utils.checkpoint.checkpoint` wants as ``context_fn``: around the forward, and around its replay.

    Source:
        Korthikanti et al. 2022, Reducing Activation Recomputation in Large Transformer Models, arXiv:2205.05198.
    """
    kept: dict[Any, list[Any]] = defaultdict(list)
    return _Keep(kept), _Replay(kept)


class _Keep(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down, operation by operation, what is kept."""

    def __init__(self, kept: dict[Any, list[Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = kept
        self.at: dict[int, list[tuple[list[Any], int]]] = {}  # entries of a piece of memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _PASSED:
            return out
        entries = self.kept[func]
        if func in _ADDED:
            there = self.at.setdefault(_memory(args[0]), [])
            entries.append(_SKIP if there else out.detach())  # what is kept of this memory has become the sum
            there.append((entries, len(entries) - 1))
        elif func._schema.is_mutable:
            for tensor in _changed(func, args, kwargs or {}):
                for others, index in self.at.pop(_memory(tensor), ()):
                    others[index] = _AGAIN
            entries.append(_AGAIN)
        elif _is_worth(func, args):
            entries.append(tree_map_only(Tensor, torch.detach, out))
            for tensor in tree_leaves(entries[-1]):
                if isinstance(tensor, Tensor):
                    self.at.setdefault(_memory(tensor), []).append((entries, len(entries) - 1))
        else:
            entries.append(_AGAIN)
        return out


class _Replay(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives what was kept instead of computing it, and lets go of it."""

    def __init__(self, kept: dict[Any, list[Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = kept
        self.count: dict[Any, int] = defaultdict(int)

    def __enter__(self) -> Any:
        self.count.clear()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PASSED:
            return func(*args, **(kwargs or {}))
        entries, index = self.kept[func], self.count[func]
        self.count[func] += 1
        if index >= len(entries) or entries[index] is _SPENT:
            raise RuntimeError(
                f"selective checkpointing: {func} in the backward was not in the forward, or this is a second backward; "
                "set gradient_checkpointing=true"
            )
        found = entries[index]
        if found is _AGAIN:
            return func(*args, **(kwargs or {}))
        entries[index] = _SPENT
        if found is _SKIP:
            return args[0]
        return args[0].copy_(found) if func in _ADDED else found


def _is_worth(func: Any, args: Sequence[Any]) -> bool:
    place = _PRODUCTS.get(func)
    return func in _ALWAYS or (place is not None and args[place].shape[-1] >= NARROW)


def _changed(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operation writes into."""
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            yield from (item for item in tree_leaves(value) if isinstance(item, Tensor))


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
