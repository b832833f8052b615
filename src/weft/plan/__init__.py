"""Answers before anything is trained: what it takes, whether it fits, which rank, where, and which learning rate."""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weft.plan.measures import Measure
    from weft.plan.memory import Memory
    from weft.plan.planning import Plan, plan

__all__ = ["Measure", "Memory", "Plan", "plan"]

_HOME = {
    "Measure": "weft.plan.measures",
    "Memory": "weft.plan.memory",
    "Plan": "weft.plan.planning",
    "plan": "weft.plan.planning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _CallablePackage(types.ModuleType):
    """The package ``weft.plan``, which is the function `weft.plan` when it is called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.plan(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
