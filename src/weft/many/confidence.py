"""How sure a comparison of adapters on the same evaluation rows is: a paired bootstrap.

Shapes: n rows, c candidates, b resamples. Knows numbers, not adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Comparison", "compare"]

RESAMPLES = 2000
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """What the resamples say.

    Attributes:
        losses: (c,) of all rows. low, high: (c,) between which nine of ten resamples are.
        wins: (c,) share of the resamples in which a candidate is the best.
    """

    losses: Floats
    low: Floats
    high: Floats
    wins: Floats

    def wins_of(self, group: Sequence[int]) -> float:
        """Share of the resamples in which one of the group is the best."""
        return float(self.wins[list(group)].sum())


def compare(candidates: Sequence[Sequence[Sequence[Sequence[float]]]], seed: int = 0) -> Comparison:
    """Compare candidates whose losses are known by row.

    Every resample draws rows with replacement, the same for all candidates, and of each candidate's seeds as many as it has.
    The wins say how far the choice depends on these evaluation rows and these seeds; they can't say what other data
    would have shown.

    Args:
        candidates: for each candidate, for each of its seeds, for each row ``[sum of losses, count]``. All have the same rows.
        seed: of the resamples.

    Source:
        Efron and Tibshirani 1993, An Introduction to the Bootstrap; paired over test examples as in Koehn 2004 (EMNLP).
    """
    generator = np.random.default_rng(seed)
    tables = [np.asarray(seeds, dtype=np.float64) for seeds in candidates]  # (seeds, n, 2) each
    rows = tables[0].shape[1]
    weights = generator.multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES).astype(np.float64)  # (b, n)
    whole = np.array([(table[..., 0].sum(1) / table[..., 1].sum(1)).mean() for table in tables])
    drawn = np.empty((RESAMPLES, len(tables)))
    for column, table in enumerate(tables):
        by_seed = (weights @ table[..., 0].T) / np.maximum(weights @ table[..., 1].T, 1)  # (b, seeds)
        count = by_seed.shape[1]
        if count > 1:
            picks = generator.integers(0, count, size=(RESAMPLES, count))
            by_seed = np.take_along_axis(by_seed, picks, axis=1)
        drawn[:, column] = by_seed.mean(1)
    drawn = np.where(np.isfinite(drawn), drawn, np.inf)
    wins = np.bincount(drawn.argmin(1), minlength=len(tables)) / RESAMPLES
    low, high = np.quantile(drawn, [0.05, 0.95], axis=0)
    return Comparison(whole, low, high, wins)
