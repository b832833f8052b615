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
