"""The measures that save memory: their names in a recipe, and which of them contradict each other.

What each does is in a module of its own: `recompute`, `quantized`, `offload`, `chunked`. This module does not know torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.errors import RecipeError

if TYPE_CHECKING:
    from weft.train.recipe import Recipe

__all__ = ["OFFLOADED", "QUANTIZED", "RECOMPUTED", "check_measures"]

RECOMPUTED = ("selective",)
"""Kinds of gradient checkpointing that have a name; the others are true, false and a number of layers."""

QUANTIZED = ("int8", "nf4")
OFFLOADED = ("base", "activations")


def check_measures(recipe: Recipe) -> None:
    """Refuse measures that are right alone and wrong together.

    Raises:
        RecipeError: names both, and the way out.
    """
    recomputes = recipe.gradient_checkpointing
    if recipe.reentrant and not recomputes:
        raise RecipeError(
            "reentrant=true selects a kind of gradient checkpointing, which is off; set gradient_checkpointing=true"
        )
    if recipe.reentrant and recomputes is not True:
        raise RecipeError(
            f"reentrant=true with gradient_checkpointing={recomputes!r}: torch's older kind can only recompute every layer, and whole; "
            "set reentrant=false, or gradient_checkpointing=true"
        )
    if recipe.reentrant and recipe.freeze_below:
        raise RecipeError(
            f"reentrant=true with freeze_below={recipe.freeze_below}: torch's older checkpointing sends gradients through every layer, "
            "so that freezing the low ones would save nothing; set reentrant=false"
        )
    if recipe.reentrant and "activations" in recipe.offload:
        raise RecipeError(
            "reentrant=true with offload=[activations]: torch's older checkpointing keeps its inputs where they can't be moved; "
            "set reentrant=false"
        )
    if recomputes and "base" in recipe.offload:
        raise RecipeError(
            f"offload=[base] with gradient_checkpointing={recomputes!r}: a layer that is computed again in the backward would be so "
            "without its weights; use offload=[base, activations], or gradient_checkpointing without 'base'"
        )
    if len(set(recipe.offload)) < len(recipe.offload):
        raise RecipeError(f"offload={list(recipe.offload)} names a part twice; name it once")
    if recipe.quantize and "base" in recipe.offload:
        raise RecipeError(
            f"quantize={recipe.quantize!r} with offload=[base]: quantised weights carry state that is bound to their device, "
            "and are small already; keep one of them"
        )
    _check_loss_chunk(recipe)
    _check_quantize(recipe)
    if recipe.compile:
        odd = [name for name in ("quantize", "offload") if getattr(recipe, name)]
        if recomputes == "selective" or (recomputes is not True and recomputes):
            odd.append("gradient_checkpointing")
        if odd:
            raise RecipeError(
                f"compile=true with {odd[0]}={getattr(recipe, odd[0])!r}: a compiled model makes its own choice of what is kept and "
                f"where; set compile=false, or leave {odd[0]} out"
            )
    if recipe.freeze_below is not None and recipe.spec is not None and recipe.spec.towers:
        raise RecipeError(
            f"freeze_below={recipe.freeze_below} with towers: each part counts its layers for itself; set layers in the parts' own specs"
        )
    if recipe.freeze_below is not None and recipe.spec is not None and recipe.spec.layers is not None:
        low = [layer for layer in recipe.spec.layers if layer < recipe.freeze_below]
        if low:
            raise RecipeError(
                f"freeze_below={recipe.freeze_below}, but the spec's layers={list(recipe.spec.layers)} adapt layer {low[0]}; "
                "drop one of them"
            )


def _check_quantize(recipe: Recipe) -> None:
    spec = recipe.spec
    if recipe.quantize is None or spec is None:
        return
    for own in spec.everywhere():
        init = own.init if own.init.startswith(("pissa", "olora", "lora_ga")) else None
        asked = {"dora": own.dora, "target_parameters": own.target_parameters, "init": init}
        for name, value in asked.items():
            if not value:
                continue
            raise RecipeError(
                f"quantize={recipe.quantize!r} with {name}={value!r}: that needs the weights themselves, and a quantised base has only "
                "their products; leave one of them out"
            )


def _check_loss_chunk(recipe: Recipe) -> None:
    if recipe.loss_chunk is None:
        return
    if recipe.kind in ("classification", "classify-images"):
        raise RecipeError(
            f"loss_chunk={recipe.loss_chunk} with kind={recipe.kind!r}: one label a row has no large logits; leave loss_chunk out"
        )
    if recipe.compile:
        raise RecipeError(
            f"compile=true with loss_chunk={recipe.loss_chunk}: the loss in parts calls the model's body and head by themselves; "
            "set one of them aside"
        )
