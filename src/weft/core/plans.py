"""Plans: which rows of a mixed batch are computed together.

Rows are numbers of parts here (-1: the base alone), parts have ranks by site. This module does not know factors or modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weft.core.ragged import Segments
from weft.core.units import Block

__all__ = ["Plan", "segments", "together"]

Plan = tuple[Block, list[int]]
"""A block, and by unit its part."""

MOST_BLOCKS = 4
"""Rows of one adapter are put together while that makes no more blocks than this; beyond it every row is a unit of its own."""


def together(keys: list[int], ranks: list[tuple[int, ...]], device: torch.device) -> list[tuple[Block, list[int]]]:
    """Blocks of rows of equal length: by number of rows and ranks."""
    rows: dict[int, list[int]] = {}
    for row, key in enumerate(keys):
        if key >= 0:
            rows.setdefault(key, []).append(row)
    classes: dict[Any, list[tuple[int, list[int]]]] = {}
    for part, mine in rows.items():
        classes.setdefault((len(mine), ranks[part]), []).append((part, mine))
    if len(classes) > MOST_BLOCKS:
        classes = {}
        for row, key in enumerate(keys):
            if key >= 0:
                classes.setdefault((1, ranks[key]), []).append((key, [row]))
    plans = []
    for (count, of_site), items in classes.items():
        order = [row for _, mine in items for row in mine]
        plans.append(
            (Block(_compact(order, len(keys), device), len(items), count, of_site), [part for part, _ in items])
        )
    return plans


def segments(
    keys: Sequence[int], lengths: Sequence[int], ranks: Sequence[tuple[int, ...]], device: torch.device
) -> list[Plan]:  # fmt: skip
    """Blocks of packed tokens: neighbouring segments of equal ranks are one, whatever their lengths.

    Where that makes more than `MOST_BLOCKS`, all segments of equal ranks are one, and their tokens are gathered.
    """
    runs = _runs(keys, lengths)
    total = sum(lengths)
    groups: list[list[_Run]] = []
    for run in runs:
        last = groups[-1][-1] if groups else None
        if last and last.stop == run.start and ranks[last.part] == ranks[run.part]:
            groups[-1].append(run)
        else:
            groups.append([run])
    if len(groups) > MOST_BLOCKS:
        by_ranks: dict[tuple[int, ...], list[_Run]] = {}
        for run in runs:
            by_ranks.setdefault(ranks[run.part], []).append(run)
        groups = list(by_ranks.values())
    plans = []
    for group in groups:
        order = [token for run in group for token in range(run.start, run.stop)]
        sizes = tuple(run.stop - run.start for run in group)
        even = len(set(sizes)) == 1
        block = Block(
            _compact(order, total, device), len(group), sizes[0] if even else 0, ranks[group[0].part],
            None if even else Segments(sizes, device),
        )  # fmt: skip
        plans.append((block, [run.part for run in group]))
    return plans


class _Run(NamedTuple):
    """Neighbouring tokens of one part."""

    part: int
    start: int
    stop: int


def _runs(keys: Sequence[int], lengths: Sequence[int]) -> list[_Run]:
    """The tokens that have a part, neighbours of the same part together."""
    runs: list[_Run] = []
    at = 0
    for key, length in zip(keys, lengths, strict=True):
        if length and key >= 0:
            first = at
            if runs and runs[-1].part == key and runs[-1].stop == at:
                first = runs.pop().start
            runs.append(_Run(key, first, at + length))
        at += length
    return runs


def _compact(order: list[int], count: int, device: torch.device) -> tuple[int, int] | Tensor | None:
    if order == list(range(count)):
        return None
    if order == list(range(order[0], order[0] + len(order))):
        return order[0], order[0] + len(order)
    return torch.tensor(order, device=device)
