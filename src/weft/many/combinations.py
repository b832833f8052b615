"""Which settings a sweep tries: all combinations of some values, or random ones.

Knows recipes, not how they are trained.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from weft.errors import RecipeError
from weft.train.recipe import Recipe
from weft.train.yaml12 import parse

__all__ = ["Grid", "combinations", "label", "read_grid", "recipe_of"]

Grid = Mapping[str, Sequence[Any]]

_RANGE = re.compile(r"\s*(\S+?)\s*\.\.\s*(\S+?)\s*")
MOST = 10_000


def read_grid(given: Grid | Sequence[str]) -> dict[str, list[Any]]:
    """Values by field, from a mapping or from texts as ``"rank=4,8,16"``.

    Raises:
        RecipeError: no ``=``, no value, a field twice.
    """
    if isinstance(given, Mapping):
        pairs = [
            (name, list(values) if isinstance(values, Sequence) and not isinstance(values, str) else [values])
            for name, values in given.items()
        ]
    else:
        pairs = [_read(text) for text in given]
    found: dict[str, list[Any]] = {}
    for name, values in pairs:
        if name in found:
            raise RecipeError(f"{name!r} is swept twice; give all of its values at once, as in {name}=1,2,3")
        if not values:
            raise RecipeError(f"{name!r} is swept over no values; expected at least one")
        found[name] = (
            list(dict.fromkeys(values)) if all(isinstance(value, int | float | str) for value in values) else values
        )
    if not found:
        raise RecipeError("a sweep of nothing: give fields with values, as in rank=4,8,16")
    return found


def _read(text: str) -> tuple[str, list[Any]]:
    name, equals, values = text.partition("=")
    if not equals or not name.strip() or not values.strip():
        raise RecipeError(f"{text!r} is nothing to sweep; expected NAME=A,B,C, as in rank=4,8,16")
    parsed = parse(f"[{values}]", f"the values of {name.strip()}")
    return name.strip(), list(parsed)


def combinations(grid: Mapping[str, list[Any]], sample: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """All combinations; or so many random ones, where ``"LOW..HIGH"`` stands for a range.

    Numbers of a range are drawn evenly in their logarithm; whole ones where both ends are whole.

    Raises:
        RecipeError: a range without a number of samples; more combinations than anybody can want.
    """
    ranges = {name: bounds for name, values in grid.items() if (bounds := _bounds(name, values)) is not None}
    if sample is None:
        if ranges:
            name = next(iter(ranges))
            raise RecipeError(
                f"{name}={grid[name][0]} is a range; say how many random combinations to try (sample=20, --random 20)"
            )
        count = math.prod(len(values) for values in grid.values())
        if count > MOST:
            raise RecipeError(f"{count:,} combinations; try fewer values, or random ones (sample=50, --random 50)")
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if sample < 1 or sample > MOST:
        raise RecipeError(f"sample={sample}: expected between 1 and {MOST:,} random combinations")
    generator = random.Random(f"sweep/{seed}")
    found: list[dict[str, Any]] = []
    for _ in range(50 * sample):
        drawn = {
            name: _draw(generator, ranges[name]) if name in ranges else generator.choice(values)
            for name, values in grid.items()
        }
        if drawn not in found:
            found.append(drawn)
        if len(found) == sample:
            break
    return found


def _bounds(name: str, values: Sequence[Any]) -> tuple[Any, Any] | None:
    match = _RANGE.fullmatch(values[0]) if len(values) == 1 and isinstance(values[0], str) else None
    if match is None:
        return None
    low, high = (parse(part, f"the range of {name}") for part in match.groups())
    numbers = all(isinstance(bound, int | float) and not isinstance(bound, bool) for bound in (low, high))
    if not numbers or not 0 < low < high:
        raise RecipeError(f"{name}={values[0]}: a range goes from a number above 0 to a larger one, as in 1e-5..1e-3")
    return low, high


def _draw(generator: random.Random, bounds: tuple[Any, Any]) -> Any:
    low, high = bounds
    value = math.exp(generator.uniform(math.log(low), math.log(high)))
    return round(value) if isinstance(low, int) and isinstance(high, int) else float(f"{value:.3g}")


def label(values: Mapping[str, Any]) -> str:
    """A combination as a name: ``"rank=4,learning_rate=0.001"``."""
    return ",".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )


def recipe_of(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe of a combination; fields of the spec too, and alpha follows the rank where it did.

    Raises:
        RecipeError: an unknown field, a wrong value.
    """
    plain = {name.removeprefix("spec."): value for name, value in values.items()}
    dotted = [name for name in plain if "." in name]
    changed = recipe.replace(**{name: value for name, value in plain.items() if name not in dotted})
    return changed.set(f"{name}={plain[name]}" for name in dotted)
