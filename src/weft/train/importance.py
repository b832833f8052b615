"""How much each direction of an adapter counts, and which ones a budget leaves.

Source:
    Zhang et al. 2023, AdaLoRA, arXiv:2303.10512, sections 3.2 (importance) and 3.3 (budget).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["Importance", "allocate", "budget_at", "direction_scores"]


class Importance:
    """Smoothed sensitivity and uncertainty of every entry of some parameters, by name.

    ``I = |w · ∂loss/∂w|``; ``Ī ← β₁ Ī + (1 − β₁) I``; ``Ū ← β₂ Ū + (1 − β₂) |I − Ī|``; an entry's importance is ``Ī · Ū``.

    Args:
        beta1, beta2: the smoothing.
    """

    def __init__(self, beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.sensitivity: dict[str, Tensor] = {}
        self.uncertainty: dict[str, Tensor] = {}

    @torch.no_grad()
    def see(self, name: str, value: Tensor, gradient: Tensor) -> None:
        """Take a gradient in, before the step that it makes."""
        found = (value.detach() * gradient).abs().float()
        if name not in self.sensitivity:
            self.sensitivity[name] = torch.zeros_like(found)
            self.uncertainty[name] = torch.zeros_like(found)
        sensitivity, uncertainty = self.sensitivity[name], self.uncertainty[name]
        found = found.view(sensitivity.shape)
        sensitivity.mul_(self.beta1).add_(found, alpha=1 - self.beta1)
        uncertainty.mul_(self.beta2).add_((found - sensitivity).abs(), alpha=1 - self.beta2)

    def of(self, name: str) -> Tensor:
        """Importance of each entry."""
        return self.sensitivity[name] * self.uncertainty[name]


def direction_scores(A: Tensor, B: Tensor) -> Tensor:
    """Scores of directions from importances of entries: the mean over a row of A plus the mean over its column of B.

    The paper's score of a triplet without its singular value, which plain factors have not.

    Args:
        A: (n, r, i); B: (n, o, r).

    Returns:
        (n, r)
    """
    return A.mean(-1) + B.mean(-2)


def budget_at(step: int, first: int, last: int, begin: int, end: int) -> int:
    """Directions that may stay at a step: a cubic from ``begin`` at step ``first`` to ``end`` at step ``last``."""
    if step <= first:
        return begin
    if step >= last:
        return end
    left = 1 - (step - first) / (last - first)
    return round(end + (begin - end) * left**3)


def allocate(
    scores: Mapping[str, Tensor], budget: int, least: int = 1, costs: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """Which directions stay: the best of all sites that the budget has room for, at least ``least`` at each.

    A site of n independent matrices has one rank for all: its k-th best directions count together, by the mean of their scores.

    Args:
        scores: (n, r) by path.
        budget: ranks of all sites together.
        least: rank of each site.
        costs: what one of the r adds to a site's rank: 1, and for a convolution with groups their number; None: 1 everywhere.

    Returns:
        (n, k) indices by path, in their order.
    """
    costs = costs or dict.fromkeys(scores, 1)
    order = {path: found.sort(dim=1, descending=True, stable=True) for path, found in scores.items()}
    kept = {path: min(math.ceil(least / costs[path]), found.shape[1]) for path, found in scores.items()}
    rest = [
        (-float(level), place, path)
        for place, (path, found) in enumerate(order.items())
        for level in found.values.double().mean(0)[kept[path] :]
    ]
    left = budget - sum(costs[path] * count for path, count in kept.items())
    for _, _, path in sorted(rest):
        if costs[path] <= left:
            kept[path] += 1
            left -= costs[path]
    return {path: found.indices[:, : kept[path]].sort(dim=1).values for path, found in order.items()}
