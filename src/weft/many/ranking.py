"""Ranks that change while an adapter is trained beside others: `weft.train.ranks` decides, by its own evaluations and gradients.

What it decides is what it would decide alone, and nobody else's factors are touched. This module does not know how engines change a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from weft.core.resizing import Resize
from weft.core.site import Site
from weft.many.engine import Engine
from weft.many.member import Member
from weft.spec import LoraSpec
from weft.train.ranks import Ranks, ranks_for

__all__ = ["Place", "changing", "plain", "restore"]

T = TypeVar("T")


class Place:
    """A `weft.train.ranks.Host`: a member in the bank of an engine. Processes that share rows decide alike, from the same sums."""

    main = True

    def __init__(self, engine: Engine, member: Member) -> None:
        self.engine, self.member = engine, member

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return self.member.course.step

    @property
    def steps(self) -> int:
        """Of its whole run."""
        return self.member.schedule.steps

    @property
    def spec(self) -> LoraSpec:
        """As it began."""
        return self.member.spec

    def rate_at(self, step: float) -> float:
        """Its own schedule."""
        return self.member.rate_at(step)

    def slots(self) -> Mapping[str, tuple[Site, Any]]:
        """Those of the engine."""
        return self.engine.slots(self.member.key)

    def resize(self, changes: Mapping[str, Resize]) -> None:
        """Factors and moments."""
        self.engine.resize(self.member.key, changes)

    def stopping(self) -> bool:
        """Whether its patience is used up."""
        patience = self.member.schedule.patience
        return bool(patience) and self.member.course.waited >= patience

    def go_on(self) -> None:
        """Take an early stop back."""
        course = self.member.course
        course.waited = 0
        course.stopped = "" if course.stopped == "early" else course.stopped

    def forget_best(self) -> None:
        """The next evaluation is the best so far."""
        self.member.best, self.member.best_rows = None, []

    def agreed(self, value: T) -> T:
        """All processes have it."""
        return value


def changing(engine: Engine, member: Member, write: Callable[[dict[str, Any]], None]) -> Ranks | None:
    """What changes the ranks of a member that has just entered; None: they stay.

    Args:
        write: takes a line of its log.
    """
    plan = member.recipe.adaptive
    return ranks_for(plan, Place(engine, member), member.schedule, member.recipe.seed, write)


def plain(ranks: Ranks) -> dict[str, Any]:
    """What a checkpoint keeps of it, beside its tensors."""
    return {"changes": ranks.changes, "state": ranks.state()}


def restore(ranks: Ranks, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """The inverse; the sites have their sizes already."""
    ranks.changes = list(values["changes"])
    ranks.load(values["state"], tensors)
