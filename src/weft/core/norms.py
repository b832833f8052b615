"""Normalisations with running statistics: where they are, and what a spec makes of them.

Those of the base never change (see `weft.core.surroundings`); an adapter may have copies with statistics of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from weft.core.tree import Node
from weft.spec import LoraSpec

__all__ = ["has_statistics", "norm_notes", "norm_paths"]


def has_statistics(module: nn.Module) -> bool:
    """Whether a module normalises by statistics that it gathers in training."""
    return getattr(module, "running_mean", None) is not None and hasattr(module, "num_batches_tracked")


def norm_paths(nodes: Iterable[Node], taken: Iterable[str]) -> list[str]:
    """Paths of such modules, but for those in modules that are trained whole."""
    inside = tuple(f"{path}." for path in taken)
    return [
        node.path
        for node in nodes
        if node.path and has_statistics(node.module) and not f"{node.path}.".startswith(inside)
    ]


def norm_notes(spec: LoraSpec, paths: Sequence[str]) -> list[str]:
    """What the user has to know about them."""
    many = f"{len(paths)} normalisation{'s' if len(paths) != 1 else ''} with running statistics"
    if spec.batch_norm == "frozen":
        if not paths:
            return []
        return [
            f"{many}: the base's statistics are used and kept, in training too; batch_norm='adapted' or 'saved' gives the adapter its own"
        ]
    if not paths:
        return [f"batch_norm={spec.batch_norm!r} has no effect: there is no normalisation with running statistics"]
    what = "statistics" if spec.batch_norm == "adapted" else "statistics, weights and biases"
    return [f"{many}: {what} are the adapter's own, follow its data and are saved with it"]
