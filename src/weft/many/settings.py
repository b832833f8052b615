"""One recipe a user: what was given for all, or by name; and what all have to share because they share the base.

Knows neither data nor models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from weft.errors import RecipeError, did_you_mean, some_names
from weft.spec import LoraSpec
from weft.train.adaptive import GrowOnPlateau, check_spec
from weft.train.recipe import Recipe
from weft.train.training import one_recipe

__all__ = ["SHARED", "check_evaluated", "check_shared", "recipes_for"]

SHARED = (
    "dtype",
    "mixed_precision",
    "gradient_checkpointing",
    "reentrant",
    "quantize",
    "offload",
    "loss_chunk",
    "compile",
    "device",
)
"""Fields of a recipe that are about the base."""


def recipes_for(
    names: Sequence[str],
    spec: LoraSpec | Mapping[str, LoraSpec] | None,
    recipe: Recipe | Mapping[str, Recipe] | None,
) -> dict[str, Recipe]:
    """The recipe of each user, its spec in it.

    Args:
        spec, recipe: one for all, or one by name (then all names must be there).

    Raises:
        RecipeError: a name without an entry, an entry without a user; spec and recipe contradict each other.
    """
    for what, given in (("spec", spec), ("recipe", recipe)):
        if isinstance(given, Mapping):
            strange = [name for name in given if name not in names]
            missing = [name for name in names if name not in given]
            if strange:
                hint = did_you_mean(strange[0], names)
                raise RecipeError(f"{what} names {some_names(strange)}, of whom there are no data.{hint}")
            if missing:
                raise RecipeError(
                    f"{what} is given by name, but not for {some_names(missing)}; give one for each, or one for all"
                )
    found = {}
    for name in names:
        own = recipe[name] if isinstance(recipe, Mapping) else recipe
        own = one_recipe(spec[name] if isinstance(spec, Mapping) else spec, own)
        found[name] = own if own.spec is not None else dataclasses.replace(own, spec=LoraSpec())
    check_shared(found)
    return found


def check_evaluated(recipes: Mapping[str, Recipe], evaluated: Mapping[str, bool]) -> None:
    """Whether those whose ranks grow have something to evaluate.

    Raises:
        RecipeError: names who has not.
    """
    without = [name for name, own in recipes.items() if isinstance(own.adaptive, GrowOnPlateau) and not evaluated[name]]
    if without:
        raise RecipeError(
            f"{some_names(without)}: adaptive growth looks at evaluations, and there is no evaluation data; give eval_data (--eval 0.1)"
        )


def check_shared(recipes: Mapping[str, Recipe]) -> None:
    """Whether these recipes can run on one base at once.

    Raises:
        RecipeError: names the field and who differs; or a field that many adapters at once can't have.
    """
    first = next(iter(recipes.values()))
    for name in SHARED:
        odd = [user for user, recipe in recipes.items() if getattr(recipe, name) != getattr(first, name)]
        if odd:
            values = sorted({repr(getattr(recipe, name)) for recipe in recipes.values()})
            raise RecipeError(
                f"{name} differs between recipes ({' and '.join(values)}; {some_names(odd)}), but all adapters of a run share one "
                "base; give all the same, or make two runs"
            )
    kinds: dict[Recipe, str] = {}
    for user, recipe in recipes.items():
        kinds.setdefault(recipe, user)
    for recipe, user in kinds.items():
        where = f"{user!r}: " if len(kinds) > 1 else ""
        for name in ("quantize", "offload", "loss_chunk"):
            if getattr(recipe, name):
                raise RecipeError(
                    f"{where}{name}={getattr(recipe, name)!r} is for one adapter: many at once share products with the plain weights; "
                    f"leave {name} out, or train alone"
                )
        if recipe.optimizer not in ("adamw_torch", "adamw_torch_fused"):
            raise RecipeError(
                f"{where}optimizer={recipe.optimizer!r}: many adapters at once are trained by adamw_torch; train alone for others"
            )
        if recipe.report_to:
            raise RecipeError(
                f"{where}report_to={list(recipe.report_to)}: trackers know one run at a time; a many-run writes report.html and a log each"
            )
        if recipe.mixed_precision == "fp16":
            raise RecipeError(
                f"{where}mixed_precision='fp16' scales all losses by one factor, which one user's overflow would change; use bf16 or no"
            )
        for name, asked in (
            ("general", recipe.general is not None),
            ("on_trouble", recipe.on_trouble == "act"),
            ("samples", recipe.samples not in (0, Recipe().samples)),
        ):
            if asked:
                raise RecipeError(
                    f"{where}{name}={getattr(recipe, name)!r} is for one adapter: a run of many has no part for it; leave {name} out, or "
                    "train alone"
                )
        if recipe.adaptive is not None and recipe.spec is not None:
            try:
                check_spec(recipe.adaptive, recipe.spec)
            except RecipeError as error:
                raise RecipeError(f"{where}{error}") from error
        if recipe.compile:
            raise RecipeError(f"{where}compile=true compiles for one adapter; leave it out here")
