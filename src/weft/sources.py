"""Names of adapters that are no paths: where ``medical@prod`` is looked up when a directory was expected.

Whoever reads adapters asks `find`; who knows names is registered by `weft` itself, as text, so that it is imported when it is
asked and not before. This module knows neither adapters nor stores.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Found", "find", "register"]

_BARE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*(@[A-Za-z0-9._-]*)?")
_MAX = 300

_finders: list[str] = []


@dataclass(frozen=True)
class Found:
    """What a name means.

    Attributes:
        text: the name with its version.
        load: gives the adapter; None if nothing is called so.
        files: name and bytes of each file.
        hint: for who expected something of this name: where it was looked for, and near names.
    """

    text: str
    load: Callable[[], Any] | None = None
    files: Mapping[str, int] = field(default_factory=dict)
    hint: str = ""


def register(finder: str) -> None:
    """Add who knows names.

    Args:
        finder: ``"module:function"``; the function takes the name, and whether a file or directory is called so too. It gives a `Found`;
            of a name that is a path, None, once it has said what else it could have meant.
    """
    if finder not in _finders:
        _finders.append(finder)


def find(text: object, *, is_path: bool) -> Found | None:
    """What a name means beside a path; None for what can be nothing but a path, or if nobody knows names."""
    if not isinstance(text, str) or len(text) > _MAX or not _BARE.fullmatch(text):
        return None
    missed = None
    for finder in _finders:
        module, _, function = finder.partition(":")
        found: Found | None = getattr(importlib.import_module(module), function)(text, is_path)
        if found is not None and found.load is not None:
            return found
        missed = missed or found
    return missed
