"""Units: the rows of a mixed batch that are computed by one product, and these products.

A `Block` is a set of rows that is computed by one batched product: units of equally many rows each, every unit with factors of its own,
all of one rank. Units of unequally many tokens (segments of a packed batch) go through `weft.core.ragged`. A batch of one rank
is one block; ragged ranks are several, so that nobody pays for the largest.

Shapes: N rows, L tokens a row, U units of a block, c rows of a unit, T tokens of a block, i = d_in, o = d_out, R = sum of the ranks of
the sites of a call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weft.core import ragged
from weft.core.ragged import Segments

__all__ = ["Block", "Loaded", "add_product", "by_row", "outer", "product", "units"]


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """Which rows are computed together, and with what ranks.

    Attributes:
        rows: (start, stop) of neighbours; indices (U * c,) int64, unit by unit; None: all rows in their order.
        units: U. count: c.
        ranks: rank by site of the call, 0 where the units have no factors at it.
        segments: of units with unequally many rows; rows are single tokens then (L = 1), and c is no matter. In the shapes below such
            a block has (1, T, ·) in the place of (U, c * L, ·).
    """

    rows: tuple[int, int] | Tensor | None
    units: int
    count: int
    ranks: tuple[int, ...]
    segments: Segments | None = None

    def slices(self) -> list[slice]:
        """Of the block's rows, those of each unit."""
        if self.segments is not None:
            return self.segments.slices()
        return [slice(unit * self.count, (unit + 1) * self.count) for unit in range(self.units)]


@dataclass(frozen=True, eq=False, slots=True)
class Loaded:
    """The factors of a block.

    Attributes:
        A: (U, R, i), the sites' A above each other.
        B: by site (U, r, o), transposed; None where the rank is 0.
        scale: (U, 1, R), or None: it is in B.
    """

    block: Block
    A: Tensor
    B: tuple[Tensor | None, ...]
    scale: Tensor | None = None


def by_row(block: Block, scale: Tensor) -> Tensor:
    """Scales of units (U, 1, R) as a thin product takes them."""
    return scale if block.segments is None else scale[:, 0].index_select(0, block.segments.owners)[None]


def units(x: Tensor, block: Block) -> Tensor:
    """The rows of a block of (N, L, ·), unit by unit: (U, c * L, ·)."""
    rows = block.rows
    if rows is None:
        chosen = x
    elif isinstance(rows, tuple):
        chosen = x[rows[0] : rows[1]]
    else:
        chosen = x.index_select(0, rows)
    return chosen.view(1 if block.segments is not None else block.units, -1, x.shape[2])


def product(block: Block, left: Tensor, right: Tensor) -> Tensor:
    """Each unit's rows times its matrix: (U, c * L, k), (U, k, n) -> (U, c * L, n)."""
    if block.segments is None:
        return torch.bmm(left, right)
    return ragged.product(left[0], right, block.segments)[None]


def outer(block: Block, left: Tensor, right: Tensor) -> Tensor:
    """Each unit's sum over its rows: (U, c * L, k), (U, c * L, n) -> (U, k, n)."""
    if block.segments is None:
        return torch.bmm(left.mT, right)
    return ragged.outer(left[0], right[0], block.segments)


def add_product(out: Tensor, block: Block, left: Tensor, right: Tensor) -> None:
    """Add a batched product (U, c * L, ·) to the block's rows of ``out`` (N, L, ·)."""
    rows = block.rows
    if isinstance(rows, Tensor):
        out.index_add_(0, rows, product(block, left, right).view(-1, *out.shape[1:]))
        return
    target = out if rows is None else out[rows[0] : rows[1]]
    if block.segments is not None:
        target += product(block, left, right).view(target.shape)
        return
    target.view(block.units, -1, out.shape[2]).baddbmm_(left, right)
