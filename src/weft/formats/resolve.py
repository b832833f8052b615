"""Fit an adapter of a file without dots to a model: flattened names to paths, and the kinds of layers that shapes don't tell.

This module reads a model's paths and layer kinds, no files.
"""

from __future__ import annotations

import dataclasses
import math

from torch import nn

from weft.adapter import Adapter
from weft.core.factors import Factors
from weft.core.loading import spec_of
from weft.core.tree import Node, walk
from weft.errors import KeysError, did_you_mean, some_names

__all__ = ["resolve"]


def resolve(adapter: Adapter, model: nn.Module) -> Adapter:
    """The same updates under the paths of a model.

    Args:
        adapter: as `weft.load` read it from a file of kohya, diffusers or loralib.
        model: the model that it is for; of a pipeline, the component.

    Returns:
        An adapter whose sites are paths of ``model``, and whose kinds are those of its layers.

    Raises:
        KeysError: a name that no module of the model has, or that two have: names them.

    Example:
        >>> unet_lora = resolve(weft.load("style.safetensors"), pipeline.unet)  # doctest: +SKIP
    """
    nodes = {node.path: node for node in walk(model) if node.kind is not None}
    flat: dict[str, list[str]] = {}
    for path in nodes:
        flat.setdefault(path.replace(".", "_"), []).append(path)
    found: dict[str, Factors] = {}
    lost = []
    for name, item in adapter.factors.items():
        candidates = [name] if name in nodes else flat.get(name.replace(".", "_"), [])
        if len(candidates) > 1:
            raise KeysError(
                f"{name!r} can be {' or '.join(repr(path) for path in candidates)}: the flattened name doesn't say which",
                key=name,
            )
        if not candidates:
            lost.append(name)
        elif candidates[0] in found:
            raise KeysError(f"two updates for {candidates[0]!r}", key=name)
        else:
            found[candidates[0]] = _fitted(item, nodes[candidates[0]])
    if lost:
        raise KeysError(
            f"{type(model).__name__} has no modules for {len(lost)} of {len(adapter.factors)} updates: {some_names(lost, 3)}."
            f"{did_you_mean(lost[0], [name for name in flat if name not in found])} Is it the right model, and the right component of its pipeline?", key=lost[0]
        )  # fmt: skip
    ordered = {path: found[path] for path in nodes if path in found}
    moved = set(adapter.factors) - set(ordered)
    notes = tuple(note for note in adapter.provenance.notes if not note.startswith("names are flattened"))
    if moved:
        notes = (*notes, f"{len(moved)} flattened names were fitted to the paths of a {type(model).__name__}")
    spec = adapter.spec.replace(targets=tuple(ordered), rank_pattern={}, alpha_pattern={})
    provenance = dataclasses.replace(adapter.provenance, notes=notes)
    return adapter.replace(spec=spec_of(spec, ordered), factors=ordered, provenance=provenance)


def _fitted(item: Factors, node: Node) -> Factors:
    """Factors of the kind that the layer is, where both mean the same numbers."""
    if node.kind == "embedding" and item.kind == "linear":
        return dataclasses.replace(item, kind="embedding")
    if node.kind in ("linear", "conv1d") and item.kind == "conv" and math.prod(item.kernel) == 1:
        return dataclasses.replace(item, kind="linear", kernel=())
    kernel = getattr(node.module, "kernel_size", ())
    if node.kind == "conv" and item.kind == "linear" and math.prod(kernel) == 1:
        return dataclasses.replace(item, kind="conv", kernel=tuple(kernel))
    return item
