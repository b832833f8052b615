"""Modules that are trained whole: a copy stands in for the base's module while its adapter is in use."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weft.core.by_parts import route_of, whole_by_parts
from weft.core.layers import eagerly
from weft.core.ring import Ring
from weft.core.slots import State, place
from weft.errors import SpecError, some_names

__all__ = ["SequenceSite", "WholeSite", "copy_whole", "place_whole", "tie_copies"]

if TYPE_CHECKING:
    from torch.nn import Module as _Base
else:
    _Base = object
if TYPE_CHECKING:
    from torch.nn import Sequential as _Sequence
else:
    _Sequence = object


class WholeSite(_Base):
    """The forward of a module of which adapters may have their own copy."""

    _weft: State

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the module takes and gives."""
        state = self._weft
        if state.ring is not None and state.ring.routed and torch.compiler.is_compiling():
            return eagerly(WholeSite.forward, self, *args, **kwargs)
        route = route_of(state)
        if route is None:
            chosen = state.active_whole
            return super().forward(*args, **kwargs) if chosen is None else chosen(*args, **kwargs)
        copies = route.whole_at(state)
        if copies is None:
            return super().forward(*args, **kwargs)
        if route.alone() is not None:
            return copies[0][0][0](*args, **kwargs)
        return whole_by_parts(route, state, copies, super().forward, args, kwargs)


class SequenceSite(_Sequence):
    """nn.Sequential runs all of its children: what weft keeps there is none of them."""

    _weft: State

    def __len__(self) -> int:
        return super().__len__() - ("weft" in self._modules)

    def __iter__(self) -> Iterator[nn.Module]:
        return itertools.islice(super().__iter__(), len(self))

    def __getitem__(self, index: Any) -> Any:
        """One module, or a plain sequence of several."""
        return nn.Sequential(*list(self)[index]) if isinstance(index, slice) else list(self)[index]


def place_whole(module: nn.Module, path: str, ring: Ring) -> State:
    """Let copies stand in for a module.

    Raises:
        SpecError: a container that is never called, so that a copy of it would never be used.
    """
    if type(module).forward is nn.Module.forward:
        raise SpecError(
            f"LoraSpec.save_modules: {path!r} is a {type(module).__name__}, which has no forward of its own: a copy of it would never be "
            f"used. Name what is inside of it: {some_names(f'{path}.{name}' for name in module._modules)}"
        )
    if isinstance(module, nn.Sequential):
        place(module, SequenceSite, path=path, ring=ring)
    return place(module, WholeSite, path=path, ring=ring)


def copy_whole(module: nn.Module) -> nn.Module:
    """A copy of the base's module as it was before anything was attached, at it or inside of it; to be trained."""
    skipped: dict[int, Any] = {}
    for inner in module.modules():
        if "_weft" in inner.__dict__:
            skipped[id(inner.__dict__["_weft"])] = skipped[id(inner._modules.get("weft"))] = None
    clone = copy.deepcopy(module, skipped)
    for inner in list(clone.modules()):
        if "_weft" in inner.__dict__:
            del inner.__dict__["_weft"]
            inner._modules.pop("weft", None)
            inner.__class__ = type(inner)._weft_original  # type: ignore[attr-defined]
    return clone


def tie_copies(pairs: list[tuple[nn.Module, nn.Module]]) -> None:
    """Where several base modules share a parameter, their copies share one too.

    Args:
        pairs: (base module, its copy).
    """
    made: dict[int, nn.Parameter] = {}
    for base, clone in pairs:
        for name, original in base.named_parameters():
            if ".weft." in f".{name}":
                continue
            owner_path, _, leaf = name.rpartition(".")
            owner = clone.get_submodule(owner_path)
            mine = owner._parameters[leaf]
            assert isinstance(mine, Tensor)
            owner._parameters[leaf] = made.setdefault(id(original), mine)
