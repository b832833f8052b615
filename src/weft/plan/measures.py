"""What each measure saves and costs for one model, and the cheapest combination that fits a budget.

Every figure is of a step that was followed with the measure on. This module does not print.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from weft.errors import BudgetError, WeftError
from weft.plan.memory import Gauge, Memory
from weft.plan.sizes import in_words
from weft.train.recipe import Recipe

__all__ = ["Measure", "choose", "measures"]

EXACT, ROUNDING, OTHER = "same training", "other rounding", "another training"
_EFFECT_PRICE = {EXACT: 0.0, ROUNDING: 0.25, OTHER: 1.0}
"""What a change of the result is worth, as a share of the step's floating point operations: measures that change nothing come first."""

SPLIT_PRICE = 0.02
"""Of one halving of the batch: more and smaller products."""

MOVED = 16_000.0
"""Operations that a GPU could do while one byte is moved between it and the CPU: 4e14 a second beside 25e9 bytes."""

CHUNK = 1024


@dataclass(frozen=True)
class Measure:
    """One measure, and what it does to this model.

    Attributes:
        name: for people. changes: of the recipe.
        saving: bytes at the peak, against the recipe without it; below zero where it costs memory.
        extra_flops: share of the step's floating point operations that it adds; what is moved counts by `MOVED`.
        effect: on the result: the same training, other rounding, another training.
        applies: it can be used here; else `why` says why not.
    """

    name: str
    changes: dict[str, Any]
    saving: int = 0
    extra_flops: float = 0.0
    effect: str = EXACT
    applies: bool = True
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def measures(gauge: Gauge, recipe: Recipe, now: Memory) -> list[Measure]:
    """Every measure for this model, each alone, against the recipe as it is."""
    return [_measured(gauge, recipe, now, found) for found in _known(gauge, recipe)]


def _known(gauge: Gauge, recipe: Recipe) -> Iterator[Measure]:
    """The measures, and those that can't be used with the reason."""
    gpu, counts = gauge.subject.device != "cpu", gauge.counts(recipe)
    half = max(1, counts.layers // 2)
    stored = max(counts.by_dtype, key=lambda name: counts.by_dtype[name])
    on = "it is on already"
    recomputes = recipe.gradient_checkpointing
    yield _if("checkpoint every layer", {"gradient_checkpointing": True}, EXACT, on if recomputes is True else "")
    yield _if(f"checkpoint {half} of {counts.layers} layers", {"gradient_checkpointing": half}, EXACT,
              on if recomputes else "" if counts.layers > 1 else "no stack of layers")  # fmt: skip
    yield _if("checkpoint all but products", {"gradient_checkpointing": "selective"}, EXACT, on if recomputes else "")
    rows = recipe.batch_size
    yield _if(f"1 row at a time, {rows} times", {"batch_size": 1, "accumulation": recipe.accumulation * rows}, EXACT,
              "the batch has one row" if rows == 1 else "")  # fmt: skip
    yield _if(f"loss of {CHUNK} tokens at a time", {"loss_chunk": CHUNK}, EXACT,
              on if recipe.loss_chunk else "no large logits in a classification" if gauge.subject.labels else "")  # fmt: skip
    yield _if("mixed precision, bf16", {"mixed_precision": "bf16"}, ROUNDING, on if gauge.precision(recipe) != "no" else
              "the weights are in half precision already" if stored in ("bfloat16", "float16") else "")  # fmt: skip
    yield _if(
        "base in bf16",
        {"dtype": "bfloat16"},
        ROUNDING,
        "it is in half precision already" if stored in ("bfloat16", "float16") else "",
    )
    lacks = "" if importlib.util.find_spec("bitsandbytes") else "bitsandbytes is not installed"
    trains_all = "all weights are trained" if gauge.subject.spec is None else ""
    for kind, effect in (("int8", ROUNDING), ("nf4", OTHER)):
        yield _if(f"base in {kind}", {"quantize": kind}, effect, trains_all or (on if recipe.quantize else lacks))
    nowhere = "" if gpu else "the device is the CPU: there is nowhere to move it"
    for part in ("activations", "base"):
        yield _if(
            f"{part} off-loaded",
            {"offload": [*recipe.offload, part]},
            EXACT,
            nowhere or (on if part in recipe.offload else ""),
        )
    yield _if("factored optimizer", {"optimizer": "adafactor"}, OTHER, on if recipe.optimizer == "adafactor" else "")
    yield _if(f"no site below layer {half}", {"freeze_below": half}, OTHER, trains_all or
              (on if recipe.freeze_below else "" if counts.layers > 1 else "no stack of layers"))  # fmt: skip


def _if(name: str, changes: dict[str, Any], effect: str, why_not: str) -> Measure:
    return Measure(name, changes, effect=effect, applies=not why_not, why=why_not)


def _measured(gauge: Gauge, recipe: Recipe, now: Memory, measure: Measure) -> Measure:
    """The measure with its figures; where only its library is missing, the figures are given all the same."""
    unknown = not measure.applies and not ("quantize" in measure.changes and "bitsandbytes" in measure.why)
    if unknown:
        return measure
    try:
        then = gauge.memory(recipe.replace(**measure.changes))
    except WeftError as problem:
        return Measure(
            measure.name, measure.changes, effect=measure.effect, applies=False, why=str(problem).split(";")[0]
        )
    extra = then.flops / now.flops - 1 if now.flops else 0.0
    if "offload" in measure.changes and now.flops:  # there and back, in every forward of the step
        moved = now.kept if "activations" in measure.changes["offload"] else now.weights - then.weights
        extra += 2 * recipe.accumulation * moved * MOVED / now.flops
    return Measure(
        measure.name, measure.changes, now.total - then.total, extra, measure.effect, measure.applies, measure.why
    )


@dataclass(frozen=True)
class Option:
    changes: dict[str, Any]
    price: float


def choose(gauge: Gauge, recipe: Recipe, budget: int, known: list[Measure]) -> tuple[Recipe, Memory]:
    """The cheapest combination of measures that fits a budget.

    The price of a combination is what its measures add to the floating point operations of a step, each as computed alone, with
    `SPLIT_PRICE` for each halving of the batch and `_EFFECT_PRICE` where the result changes. Combinations are tried from the cheapest on, and
    where there are many, those between the prices; around the first that fits, cheaper ones are looked for that differ in one measure or
    two. The step of each that is tried is followed, so that what is given back is known to fit.

    Args:
        known: from `measures`.

    Returns:
        the recipe with its measures, and its memory.

    Raises:
        BudgetError: none fits; says by how much the smallest fails, and what would help most.
    """
    axes = axes_of(gauge, recipe, known)
    trial = Trial(gauge, recipe, axes, budget)
    everything = sorted(itertools.product(*(range(len(axis)) for axis in axes)), key=trial.price)
    chosen = next((places for places in _promising(everything) if trial.fits(places)), None) or trial.smaller()
    if chosen is not None and trial.fits(chosen):
        changed, memory = trial.tried[trial.cheaper(chosen)]
        rows = changed.eval_batch_size or changed.batch_size  # an evaluation of as many rows takes less than a step
        return changed.replace(eval_batch_size=min(rows, changed.batch_size)), memory
    strongest, least = trial.tried[chosen] if chosen is not None else (recipe, gauge.memory(recipe))
    raise BudgetError(_too_small(gauge, strongest, least, budget))


Places = tuple[int, ...]
"""A combination: the place of an option on each axis, 0 for none."""

NEAR = 40
"""Combinations around the first that fits, whose steps are followed in search of a cheaper one."""


@dataclass
class Trial:
    """Combinations and whether they fit; the step of each is followed once."""

    gauge: Gauge
    recipe: Recipe
    axes: list[list[Option]]
    budget: int
    tried: dict[Places, tuple[Recipe, Memory]] = field(default_factory=dict)

    def price(self, places: Places) -> float:
        return sum(axis[place].price for axis, place in zip(self.axes, places, strict=True))

    def fits(self, places: Places) -> bool:
        """Whether it can be, and fits; not followed where even what is there before a step is too much."""
        changed = self._changed(places)
        if changed is None or (places not in self.tried and self.gauge.least(changed) > self.budget):
            return False
        return self.total(places) <= self.budget

    def total(self, places: Places) -> float:
        """Bytes; infinite where measures contradict each other."""
        changed = self._changed(places)
        if changed is None:
            return math.inf
        if places not in self.tried:
            self.tried[places] = (changed, self.gauge.memory(changed))
        return self.tried[places][1].total

    def smaller(self) -> Places | None:
        """The smallest that was found, one measure after another; the first that fits, if one does."""
        places: Places | None = min(self.tried, key=self.total, default=(0,) * len(self.axes))
        while places is not None and not self.fits(places):
            best = min(self._near(places, 1), key=self.total, default=places)
            if self.total(best) >= self.total(places):
                break
            places = best
        return places

    def _changed(self, places: Places) -> Recipe | None:
        return _applied(self.recipe, [axis[place] for axis, place in zip(self.axes, places, strict=True)])

    def cheaper(self, places: Places) -> Places:
        """The cheapest that was found by going on from one that fits, in steps of one or two measures."""
        limit = len(self.tried) + NEAR
        while True:
            near = sorted(
                (item for item in self._near(places) if self.price(item) < self.price(places)), key=self.price
            )
            better = next((item for item in near if len(self.tried) < limit and self.fits(item)), None)
            if better is None:
                return places
            places = better

    def _near(self, places: Places, steps: int = 2) -> set[Places]:
        """Those that differ in so many measures at most."""
        found = {places}
        for _ in range(steps):
            found |= {
                (*item[:at], place, *item[at + 1 :])
                for item in found
                for at, axis in enumerate(self.axes)
                for place in range(len(axis))
            }
        return found - {places}


def axes_of(gauge: Gauge, recipe: Recipe, known: list[Measure]) -> list[list[Option]]:
    """Independent choices, each with "nothing" first."""
    by_field: dict[str, list[Option]] = {}
    for measure in known:
        if (
            not measure.applies
            or "batch_size" in measure.changes
            or (measure.saving <= 0 and "loss_chunk" not in measure.changes)
        ):
            continue
        axis = "precision" if {"mixed_precision", "dtype"} & set(measure.changes) else next(iter(measure.changes))
        price = max(0.0, measure.extra_flops) + _EFFECT_PRICE[measure.effect] + 0.001
        by_field.setdefault(axis, []).append(Option(measure.changes, price))
    if len(alone := by_field.get("offload", [])) > 1:
        both = tuple(dict.fromkeys(part for option in alone for part in option.changes["offload"]))
        alone.append(Option({"offload": both}, sum(option.price for option in alone)))
    rows, split = recipe.batch_size, 1
    splits: list[Option] = []
    while rows % (2 * split) == 0:
        split *= 2
        splits.append(
            Option(
                {"batch_size": rows // split, "accumulation": recipe.accumulation * split},
                SPLIT_PRICE * (len(splits) + 1),
            )
        )
    if rows > 1 and split < rows:
        splits.append(
            Option({"batch_size": 1, "accumulation": recipe.accumulation * rows}, SPLIT_PRICE * (len(splits) + 2))
        )
    nothing = Option({}, 0.0)
    return [[nothing, *options] for options in (splits, *by_field.values()) if options]


def _promising(everything: list[Places], most: int = 40) -> Iterator[Places]:
    """Combinations from the cheapest on; a few dozen of them, evenly over the prices, so that a plan stays a matter of seconds."""
    yield from everything if len(everything) <= most else everything[: most // 2]
    rest = everything[most // 2 :] if len(everything) > most else []
    step = max(1, len(rest) // (most // 2))
    yield from rest[::step]


def _applied(recipe: Recipe, combination: Iterable[Option]) -> Recipe | None:
    changes: dict[str, Any] = {}
    for option in combination:
        changes |= option.changes
    try:
        return recipe.replace(**changes)
    except WeftError:  # measures that contradict each other
        return None


def _too_small(gauge: Gauge, strongest: Recipe, least: Memory, budget: int) -> str:
    parts = sorted(((size, name) for name, size in least.parts.items()), reverse=True)
    helps = {
        "weights": "a smaller base, or weights of fewer bits (quantize=nf4)"
        if not strongest.quantize
        else "a smaller base",
        "overhead": "a device that is used for nothing else",
        "activations": f"shorter rows (now {gauge.seq_len} tokens)",
        "temporary": f"shorter rows (now {gauge.seq_len} tokens)",
        "logits": f"shorter rows (now {gauge.seq_len} tokens)",
    }
    best = next((helps[name] for _, name in parts if name in helps), "a smaller rank")
    first = ", ".join(f"{name} {in_words(size)}" for size, name in parts[:3])
    return (
        f"the budget of {in_words(budget)} can't be met: with every measure that applies it takes {in_words(least.total)}, "
        f"{in_words(least.total - budget)} too much ({first}). What would help most: {best}"
    )
