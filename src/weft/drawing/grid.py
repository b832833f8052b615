"""Where a site stands in a grid: kinds of sites down, layers across."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["axes_of", "place_of"]


def place_of(path: str) -> tuple[str, str]:
    """What stands behind the first number of a path, or the whole path; and that number, ``""`` without one.

    Example:
        >>> place_of("model.layers.3.mlp.up_proj"), place_of("lm_head")
        (('mlp.up_proj', '3'), ('lm_head', ''))
    """
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    if match is None:
        return path, ""
    before = path[: match.start()].rpartition(".")[2]
    return path[match.end() :] or before, match[1]


def axes_of(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Kinds of sites, and layer numbers (``""`` for paths without one, last)."""
    places = [place_of(path) for path in paths]
    layers = sorted({layer for _, layer in places}, key=lambda layer: (layer == "", int(layer or 0)))
    return list(dict.fromkeys(kind for kind, _ in places)), layers
