"""Gradient checkpointing: every layer, some layers, or all but the products of every layer. And the layers that are frozen low.

transformers marks the layers that can be recomputed; here is decided which of them are, and with which of torch's ways. Only the
reentrant way needs an input that requires a gradient, so the other ones don't ask for it: below the lowest site there is no backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from weft.core.patterns import Layers
from weft.core.sites import find_sites
from weft.errors import RecipeError
from weft.models.targets import resolve_default
from weft.spec import LoraSpec
from weft.train.recipe import Recipe
from weft.train.selective import contexts

__all__ = ["above", "check_below", "checkpointing", "recomputable"]


@contextlib.contextmanager
def checkpointing(model: nn.Module, recipe: Recipe) -> Iterator[None]:
    """Gradient checkpointing for the time of a training; the module flags are put back by `as_before`.

    Raises:
        RecipeError: the model doesn't support it; or has fewer layers than are asked for.
    """
    wanted = recipe.gradient_checkpointing
    if wanted:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise RecipeError(
                f"gradient_checkpointing={wanted!r}: {type(model).__name__} doesn't support it; set it to false"
            )
        settings: dict[str, Any] = {"use_reentrant": recipe.reentrant}
        if wanted == "selective":
            settings["context_fn"] = contexts
        enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(settings)
        disable: Any = getattr(model, "disable_input_require_grads", None)
        if not recipe.reentrant and disable is not None and hasattr(model, "_require_grads_hooks"):
            disable()
        if wanted is not True and isinstance(wanted, int):
            _only(model, wanted)
    yield


def recomputable(model: nn.Module) -> list[nn.Module]:
    """The layers whose activations can be computed again, in the order of the model."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _only(model: nn.Module, count: int) -> None:
    """Leave the flag on ``count`` layers: the lowest ones that keep anything.

    The activations of the highest layers are in use first in the backward, and gone by the time that the lowest are computed again.
    """
    layers = recomputable(model)
    if not layers:
        raise RecipeError(
            f"gradient_checkpointing={count}: {type(model).__name__} has no layers that could be chosen one by one; set it to true"
        )
    learns = [any(parameter.requires_grad for parameter in layer.parameters()) for layer in layers]
    kept = layers[learns.index(True) :] if True in learns else layers
    if count > len(kept):
        low = (
            f", {len(layers) - len(kept)} of them below the first site, where nothing is kept"
            if len(kept) < len(layers)
            else ""
        )
        raise RecipeError(
            f"gradient_checkpointing={count}, but {type(model).__name__} has {len(layers)} layers{low}; expected at most {len(kept)}, "
            "or true for all"
        )
    chosen = {id(layer) for layer in kept[:count]}
    for layer in layers:
        layer.gradient_checkpointing = id(layer) in chosen  # type: ignore[assignment]


def above(model: nn.Module, spec: LoraSpec, low: int | None) -> LoraSpec:
    """The spec without the sites in layers under ``low``.

    Args:
        model: the base.
        spec: what would be adapted.
        low: a layer's number, `Recipe.freeze_below`; None: the spec as it is.

    Raises:
        RecipeError: nothing is adapted from that layer on; or the sites stand in no numbered layers.
        TargetError: the spec names sites that aren't there.
    """
    if low is None:
        return spec
    resolved = resolve_default(model, spec)
    counted = Layers(spec.layers if spec.layers is not None else (), spec.layers_pattern)
    for site in find_sites(model, resolved).sites:
        counted.allow(site.path)
    there = sorted(counted.seen if spec.layers is None else counted.seen & set(spec.layers))
    if not there:
        raise RecipeError(
            f"freeze_below={low}: the sites of {type(model).__name__} stand in no numbered layers; leave it out, and name the targets"
        )
    kept = tuple(number for number in there if number >= low)
    if not kept:
        raise RecipeError(
            f"freeze_below={low}: no layer from there on is adapted; the sites stand in layers {there[0]} to {there[-1]}; lower it"
        )
    return resolved.replace(layers=kept)


def check_below(model: nn.Module, names: Iterable[str], low: int | None, pattern: str | None = None) -> None:
    """See that nothing is trained under ``low``: one bias there, and the backward goes all the way.

    Args:
        model: the base. names: of the parameters that are trained.
        low: `Recipe.freeze_below`. pattern: `LoraSpec.layers_pattern`.

    Raises:
        RecipeError: names a parameter, and the way out.
    """
    if low is None:
        return
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    first = next((f"{path}." for path, module in model.named_modules() if module is embeddings), "\0")
    for name in names:
        number = Layers((), pattern)
        number.allow(name)
        if min(number.seen, default=low) < low or name.startswith(first):
            raise RecipeError(
                f"freeze_below={low}, but {name!r} is trained and lies below; leave it out of the spec (targets, save_modules, bias), "
                "or freeze_below out of the recipe"
            )
