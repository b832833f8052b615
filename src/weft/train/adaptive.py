"""Ranks that change while an adapter is trained: what can be asked for. Three kinds, each a section ``adaptive`` of a recipe.

    {kind: grow, max_rank: 64}           more directions when the evaluation stagnates        GrowOnPlateau
    {kind: budget, target_rank: 8}       a budget of directions that goes where they count    BudgetRanks
    {kind: shrink, energy: 0.99}         directions that carry next to nothing go             ShrinkBySpectrum

These are values; what they do stands in `weft.train.ranks`. This module does not know torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from weft.errors import RecipeError, did_you_mean
from weft.spec import LoraSpec

__all__ = ["Adaptive", "BudgetRanks", "GrowOnPlateau", "ShrinkBySpectrum", "adaptive_from", "check_spec"]


@dataclass(frozen=True)
class GrowOnPlateau:
    """Start small, and add directions whenever the evaluation stagnates. The function is unchanged at the moment of growth.

    An evaluation is progress when it is better than the last progress by at least `min_change` of it. After `patience` evaluations
    without progress the rank grows at every site. Where early stopping would end the run and ranks can still grow, they grow instead.

    Args:
        max_rank: no site grows beyond it, nor beyond min(d_in, d_out).
        factor: the new rank is the old one times this; 2 by default. Or `add`.
        add: the new rank is the old one plus this.
        patience: evaluations without progress before a growth.
        min_change: smallest progress, as a share of the metric (0.01: one percent).
        cooldown: evaluations after a growth that don't count as stagnant.
        until: share of the run after which nothing grows: a falling learning rate ends all progress, and new directions would learn little.
        restart: after a growth the learning rate begins anew at its peak, and the schedule is run through in what is left of the run.
        warmup: optimizer steps after a growth in which the learning rate rises from next to nothing to the schedule's.

    Raises:
        RecipeError: a value out of range; names the field.
    """

    KIND: ClassVar[str] = "grow"
    max_rank: int = 64
    factor: float | None = None
    add: int | None = None
    patience: int = 2
    min_change: float = 0.01
    cooldown: int = 0
    until: float = 0.75
    restart: bool = True
    warmup: int = 0

    def __post_init__(self) -> None:
        _check(
            self,
            {
                "max_rank": (_whole(1), "a whole number of at least 1"),
                "factor": (lambda v: v is None or (_is_number(v) and v > 1), "a number above 1"),
                "add": (lambda v: v is None or _whole(1)(v), "a whole number of at least 1"),
                "patience": (_whole(1), "a whole number of at least 1"),
                "min_change": (lambda v: _is_number(v) and 0 <= v < 1, "a share from 0 to below 1, as in 0.01"),
                "cooldown": (_whole(0), "a whole number of at least 0"),
                "until": (lambda v: _is_number(v) and 0 < v <= 1, "a share above 0, at most 1"),
                "restart": (lambda v: isinstance(v, bool), "true or false"),
                "warmup": (_whole(0), "a whole number of at least 0"),
            },
        )
        if self.factor is not None and self.add is not None:
            raise RecipeError(
                f"adaptive.factor={self.factor} and adaptive.add={self.add} both say how to grow; give one of them"
            )

    def next_rank(self, rank: int) -> int:
        """The rank after a growth, at least one more, at most `max_rank`."""
        grown = rank + self.add if self.add is not None else math.floor(rank * (self.factor or 2.0))
        return max(rank, min(max(grown, rank + 1), self.max_rank))


@dataclass(frozen=True)
class BudgetRanks:
    """Start with more than is wanted, and take the directions that count least, wherever they are, until the budget is met.

    Every optimizer step scores each direction by how much the loss depends on it (sensitivity, smoothed) times how uncertain that is; in
    stages the lowest go for good, over all sites together. AdaLoRA masks triplets of a decomposition that a penalty keeps orthogonal; here
    plain factors lose their directions really, so that memory and steps get smaller while it trains, and what is left is a plain LoRA.

    Args:
        target_rank: rank at the end, on average over the sites; the spec's rank is where it starts (1.5 to 2 times as much is usual).
        min_rank: no site has less.
        warmup: share of the run before anything goes.
        final: share of the run at the end with the final ranks.
        every: optimizer steps between stages; None: ten stages.
        beta1, beta2: smoothing of sensitivity and of uncertainty.

    Raises:
        RecipeError: a value out of range; names the field.

    Source:
        Zhang et al. 2023, AdaLoRA, arXiv:2303.10512, section 3.
    """

    KIND: ClassVar[str] = "budget"
    target_rank: float = 4
    min_rank: int = 1
    warmup: float = 0.1
    final: float = 0.3
    every: int | None = None
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        share = (lambda v: _is_number(v) and 0 <= v < 1, "a share from 0 to below 1")
        _check(
            self,
            {
                "target_rank": (lambda v: _is_number(v) and v >= 1, "a number of at least 1"),
                "min_rank": (_whole(1), "a whole number of at least 1"),
                "warmup": share,
                "final": share,
                "every": (lambda v: v is None or _whole(1)(v), "a whole number of at least 1"),
                "beta1": share,
                "beta2": share,
            },
        )
        if self.warmup + self.final >= 1:
            raise RecipeError(
                f"adaptive.warmup={self.warmup} and adaptive.final={self.final} leave no steps in between; their sum has to be below 1"
            )
        if self.min_rank > self.target_rank:
            raise RecipeError(f"adaptive.min_rank={self.min_rank} is above target_rank={self.target_rank}; lower it")


@dataclass(frozen=True)
class ShrinkBySpectrum:
    """Drop the directions of each update that carry next to nothing, by its singular values.

    Args:
        energy: share of ‖ΔW‖² that stays at each site; default 0.99. Or `error`.
        error: share of ‖ΔW‖ that may be lost at each site.
        every: optimizer steps between shrinkings during the training; None: once, when it has ended.
        start: share of the run before the first one.
        min_rank: no site has less.

    Raises:
        RecipeError: a value out of range; names the field.

    Source:
        Eckart and Young 1936, The approximation of one matrix by another of lower rank.
    """

    KIND: ClassVar[str] = "shrink"
    energy: float | None = None
    error: float | None = None
    every: int | None = None
    start: float = 0.3
    min_rank: int = 1

    def __post_init__(self) -> None:
        _check(
            self,
            {
                "energy": (lambda v: v is None or (_is_number(v) and 0 < v < 1), "a share between 0 and 1, as in 0.99"),
                "error": (lambda v: v is None or (_is_number(v) and 0 < v < 1), "a share between 0 and 1, as in 0.05"),
                "every": (lambda v: v is None or _whole(1)(v), "a whole number of at least 1"),
                "start": (lambda v: _is_number(v) and 0 <= v < 1, "a share from 0 to below 1"),
                "min_rank": (_whole(1), "a whole number of at least 1"),
            },
        )
        if self.energy is not None and self.error is not None:
            raise RecipeError(
                f"adaptive.energy={self.energy} and adaptive.error={self.error} both say what stays; give one of them"
            )

    @property
    def limit(self) -> dict[str, float]:
        """The limit that counts, by its name in `factors.truncate`."""
        return {"error": self.error} if self.error is not None else {"energy": self.energy or 0.99}


Adaptive = GrowOnPlateau | BudgetRanks | ShrinkBySpectrum
_KINDS: dict[str, type[Adaptive]] = {kind.KIND: kind for kind in (GrowOnPlateau, BudgetRanks, ShrinkBySpectrum)}
_STARTING_PRODUCTS = ("pissa", "olora", "lora_ga")


def adaptive_from(value: Any) -> Adaptive | None:
    """What a recipe's section says: a mapping with ``kind``, a kind alone, or such a value itself.

    Raises:
        RecipeError: an unknown kind or field, with near ones; a value out of range.
    """
    if value is None or isinstance(value, GrowOnPlateau | BudgetRanks | ShrinkBySpectrum):
        return value
    section = {"kind": value} if isinstance(value, str) else value
    if not isinstance(section, Mapping):
        raise RecipeError(f"Recipe.adaptive: got {value!r}; expected a section such as {{kind: grow, max_rank: 64}}")
    kind = section.get("kind")
    if kind not in _KINDS:
        hint = did_you_mean(str(kind), _KINDS) if kind is not None else ""
        raise RecipeError(f"Recipe.adaptive.kind: got {kind!r}; expected one of {', '.join(_KINDS)}.{hint}")
    fields = [item.name for item in dataclasses.fields(_KINDS[kind])]
    for name in section:
        if name != "kind" and name not in fields:
            raise RecipeError(
                f"Recipe.adaptive of kind {kind!r} has no field {name!r}.{did_you_mean(str(name), fields)} Fields: {', '.join(fields)}"
            )
    make: Callable[..., Adaptive] = _KINDS[kind]
    return make(**{name: item for name, item in section.items() if name != "kind"})


def to_section(value: Adaptive | None) -> dict[str, Any] | None:
    """The inverse of `adaptive_from`; what stands at its default and is None is left out."""
    if value is None:
        return None
    fields = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
    return {"kind": value.KIND} | {name: item for name, item in fields.items() if item is not None}


def check_spec(value: Adaptive, spec: LoraSpec) -> None:
    """Whether a spec leaves room for the change of ranks.

    Raises:
        RecipeError: it doesn't; says what to change.
    """
    highest = max([spec.rank, *spec.rank_pattern.values()])
    if isinstance(value, GrowOnPlateau) and spec.rank >= value.max_rank:
        raise RecipeError(
            f"adaptive.max_rank={value.max_rank} leaves no room to grow from rank={spec.rank}; start lower, as in rank=2, or allow more"
        )
    if isinstance(value, BudgetRanks) and value.target_rank >= highest:
        raise RecipeError(
            f"adaptive.target_rank={value.target_rank} is not below the rank that it starts from, {highest}; start with 1.5 to 2 times as much, "
            f"as in rank={math.ceil(value.target_rank * 2)}"
        )
    if not isinstance(value, GrowOnPlateau) and spec.init.partition("_niter_")[0] in _STARTING_PRODUCTS:
        raise RecipeError(
            f"adaptive.kind={value.KIND} drops directions of B @ A, and init={spec.init!r} subtracts a starting product from it, so that none of "
            "them is small; use init='kaiming', or shrink the finished adapter with `weft shrink`"
        )


def _check(value: Any, rules: Mapping[str, tuple[Callable[[Any], bool], str]]) -> None:
    for name, (holds, expected) in rules.items():
        if not holds(getattr(value, name)):
            raise RecipeError(f"adaptive.{name}: got {getattr(value, name)!r}; expected {expected}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(low: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= low
