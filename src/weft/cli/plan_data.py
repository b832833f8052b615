"""What ``weft plan`` says of data: ``--data`` (which rank, which learning rate, how long) and ``--sites`` (ranks by site)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weft.cli.options import Usage

if TYPE_CHECKING:
    from weft.plan.budget import Spending
    from weft.plan.ranks import RankAdvice
    from weft.train import Recipe

__all__ = ["Advised"]


class Advised:
    """The advice of one call, and what becomes of its recipe.

    Attributes:
        recipe: with the recommended rank, or with ranks by site.
    """

    def __init__(
        self, base: str | None, data: str | None, sites: str | None, recipe: Recipe, *, own_rank: bool
    ) -> None:
        """Look at base and data.

        Args:
            sites: a budget in bytes; None: one rank everywhere.
            own_rank: the user named a rank: the advice is said, and the plan keeps the user's.

        Raises:
            Usage: a budget for sites without data, or with a rank.
        """
        if data is None:
            raise Usage("--sites spends a budget where the data need it; give --data FILE too")
        if sites is not None and own_rank:
            raise Usage("--rank is one rank everywhere, and --sites finds one for each site; give one of them")
        from weft.plan.ranks import recommend_rank
        from weft.plan.sizes import bytes_of

        budget = None if sites is None else bytes_of(sites, "--sites")
        self.advice: RankAdvice = recommend_rank(base, data, recipe=recipe)
        self.spent: Spending | None = None if budget is None else self.advice.spend(budget)
        if self.spent is not None:
            self.recipe = self.advice.recipe.replace(spec=self.spent.spec(self.advice.spec))
        else:
            self.recipe = recipe if own_rank else self.advice.recipe

    def timed(self, seconds_per_step: float | None, tokens_per_step: int) -> None:
        """Add the time of the run, where the machine was measured."""
        if seconds_per_step is not None:
            self.advice = self.advice.at_speed(seconds_per_step, tokens_per_step)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, beside those of the plan."""
        found: dict[str, Any] = {"advice": self.advice.to_dict()}
        return found | ({"sites": self.spent.to_dict()} if self.spent is not None else {})

    def text(self) -> str:
        """For people."""
        return self.advice.text() + (f"\n\n{self.spent.text()}" if self.spent is not None else "")
