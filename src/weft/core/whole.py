"""Modules that are trained whole: a copy stands in for the base's module while its adapter is in use."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from weft.core.slots import State

__all__ = ["WholeSite", "copy_whole", "tie_copies"]

_Base = nn.Module if TYPE_CHECKING else object


class WholeSite(_Base):
    """The forward of a module of which adapters may have their own copy."""

    _weft: State

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the module takes and gives."""
        chosen = self._weft.active_whole
        return super().forward(*args, **kwargs) if chosen is None else chosen(*args, **kwargs)


def copy_whole(module: nn.Module) -> nn.Module:
    """A copy of the base's module as it was before anything was attached, to be trained."""
    state: State | None = module.__dict__.get("_weft")
    holder = module._modules.get("weft")
    skipped: dict[int, Any] = {} if state is None else {id(state): None}
    if holder is not None:
        skipped[id(holder)] = None
    clone = copy.deepcopy(module, skipped)
    if state is not None:
        clone.__class__ = state.original
        clone.__dict__.pop("_weft", None)
        clone._modules.pop("weft", None)
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
