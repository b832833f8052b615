"""What goes into one forward: the rows of several adapters, put together so that little padding is computed.

A piece is one micro-batch of one adapter and is never cut: so it is the batch that the adapter has when it is trained alone.

Knows neither models nor tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["OVERHEAD", "Piece", "compose", "computed"]

OVERHEAD = 96
"""What one more forward and backward costs, in tokens: below it, padding is cheaper than another pass."""


@dataclass(frozen=True)
class Piece:
    """Rows of one adapter that are computed together.

    Attributes:
        key: the adapter's name in the bank; None: the base.
        features: encoded features, see `weft.data.Encoded`.
        weight: of each loss; one over what the adapter learns in its whole step.
        seeds: of dropout, one a row.
        packed: a row holds several examples.
        classifies: labels are one a row.
        micro: which forward of the adapter's step; pieces of two micro-batches are never mixed.
        stream: seed of what the base itself draws (its own dropout), where it is trained.
        owner: whose result it is, where a key is not enough (the base is measured for somebody).
    """

    key: str | None
    features: Sequence[Any]
    weight: float = 1.0
    seeds: tuple[int, ...] = ()
    packed: bool = False
    classifies: bool = False
    micro: int = 0
    owner: str = ""
    stream: int = 0

    @property
    def rows(self) -> int:
        """How many rows."""
        return len(self.features)

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(len(feature["input_ids"]) for feature in self.features)

    @property
    def kind(self) -> tuple[bool, bool, int]:
        """Pieces of one kind can be in one forward."""
        return self.packed, self.classifies, self.micro


def compose(pieces: Sequence[Piece], budget: int, overhead: int = OVERHEAD) -> list[list[Piece]]:
    """Pieces as forwards: of all ways to cut the list, sorted by length, the one that computes least.

    The cost of a forward is its rows times its longest row, plus ``overhead``; no forward of several pieces passes the
    budget. The result depends on the pieces alone, so that a resumed run computes what it would have computed.

    Args:
        pieces: in the order of their adapters; within a forward this order stays.
        budget: most tokens in one forward, padding included. A piece that is larger has a forward of its own.
        overhead: see `OVERHEAD`.
    """
    forwards: list[list[Piece]] = []
    place = {id(piece): number for number, piece in enumerate(pieces)}
    kinds = sorted({piece.kind for piece in pieces}, key=lambda kind: (kind[2], kind))
    for kind in kinds:
        group = sorted(
            (piece for piece in pieces if piece.kind == kind), key=lambda piece: (-piece.length, place[id(piece)])
        )
        for first, last in _cuts([(piece.rows, piece.length) for piece in group], budget, overhead):
            forwards.append(sorted(group[first:last], key=lambda piece: place[id(piece)]))
    return forwards


def _cuts(sizes: list[tuple[int, int]], budget: int, overhead: int) -> list[tuple[int, int]]:
    """Where to cut a list of (rows, length), longest first: (first, last) of each part. Dynamic programming, O(n²)."""
    count = len(sizes)
    best = [0] + [0] * count
    came = [0] * (count + 1)
    for last in range(1, count + 1):
        rows, cost = 0, None
        for first in range(last - 1, -1, -1):
            rows += sizes[first][0]
            tokens = rows * sizes[first][1]
            if tokens > budget and first < last - 1:
                break
            found = best[first] + tokens + overhead
            if cost is None or found <= cost:
                cost, came[last] = found, first
        best[last] = cost or 0
    parts, last = [], count
    while last:
        parts.append((came[last], last))
        last = came[last]
    return parts[::-1]


def computed(forwards: Sequence[Sequence[Piece]]) -> int:
    """Tokens that these forwards compute, padding included."""
    return sum(sum(piece.rows for piece in part) * max(piece.length for piece in part) for part in forwards)
