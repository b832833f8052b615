"""Successive halving: everybody trains a little, the better ones go on.

Knows members and their metrics, not how they are trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from weft.errors import RecipeError
from weft.many.member import Member
from weft.many.rounds import Parked

__all__ = ["Halving"]


@dataclass(frozen=True)
class Halving:
    """When adapters are compared, and how many of them go on.

    Args:
        count: adapters at the start.
        keep: one in so many goes on at each rung; 1: all go on to the end.

    Source:
        Jamieson and Talwalkar 2016, arXiv:1502.07943; the rungs are those of one bracket of Hyperband, arXiv:1603.06560.
    """

    count: int
    keep: int = 3

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise RecipeError(
                f"halving={self.keep}: one in so many goes on at a rung; expected at least 1 (1: all go on)"
            )

    @property
    def shares(self) -> list[float]:
        """Which part of its steps an adapter has done at each rung: for 9 adapters and one in 3, 1/9 and 1/3."""
        if self.keep == 1:
            return []
        rungs = math.floor(math.log(self.count, self.keep) + 1e-9) if self.count > 1 else 0
        return [self.keep ** -(rungs - index) for index in range(rungs)]

    def rungs(self, member: Member) -> list[int]:
        """Steps of the rungs of one adapter: where it is evaluated anyway, so that halving changes nothing that it learns."""
        every, steps = member.schedule.eval_every, member.schedule.steps
        if not every:
            return []
        found = {min(steps, math.ceil(share * steps / every) * every) for share in self.shares}
        return sorted(step for step in found if step < steps)

    def first(self, member: Member) -> int:
        """Where it waits for the others for the first time; the end of its schedule where there is no rung."""
        return next(iter(self.rungs(member)), member.schedule.steps)

    def judge(self, waiting: Sequence[Parked]) -> list[Parked]:
        """Who goes on, in the order of ``waiting``; each gets its next rung."""
        count = max(1, math.ceil(len(waiting) / self.keep))
        best = sorted(range(len(waiting)), key=lambda index: (_badness(waiting[index].member), index))[:count]
        going = [waiting[index] for index in sorted(best)]
        for item in going:
            member = item.member
            later = [step for step in self.rungs(member) if step > member.course.step]
            member.due = later[0] if later and count > 1 else member.schedule.steps
        return going


def _badness(member: Member) -> float:
    """The metric now, turned so that less is better; what is no number is worst."""
    value = member.course.metrics[member.schedule.metric.removeprefix("eval_")]
    if math.isnan(value):
        return math.inf
    return -value if member.schedule.higher_is_better else value
