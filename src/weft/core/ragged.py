"""Products of tokens with the matrix of their segment, where segments have different lengths.

Three ways compute the same: a loop over the segments, torch's grouped products, and one batched product of padded segments. `way` chooses by
shape; `loop_product` and `loop_outer` are the slow, obvious form that the others are compared with.

Shapes: T tokens, S segments of n_s > 0 tokens one after another, k and n the columns.
This module does not know autograd, modules or slots: gradients are these products, too.
"""

from __future__ import annotations

import functools
import itertools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Segments", "Way", "loop_outer", "loop_product", "outer", "product", "way"]

Way = Literal["loop", "grouped", "padded"]

GROUPED = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""Dtypes that torch's grouped products know."""

SHORT = 4000
"""On a CPU, up to so many padded numbers a segment one batched product is faster than a call of a product for each."""

SLOW = 16
"""The same in bfloat16 and float16, times this: single products of few tokens are slow there."""


class Segments:
    """Where segments lie among T tokens, on one device.

    Attributes:
        lengths: tokens by segment, none of them 0. ends: where each ends (S,) int32. longest: of the lengths.
    """

    def __init__(self, lengths: tuple[int, ...], device: torch.device) -> None:
        self.lengths, self.longest, self.total = lengths, max(lengths), sum(lengths)
        self._device = device
        self._ends = tuple(itertools.accumulate(lengths))

    @functools.cached_property
    def ends(self) -> Tensor:
        """Where each segment ends: (S,) int32."""
        return torch.tensor(self._ends, dtype=torch.int32, device=self._device)

    @functools.cached_property
    def places(self) -> Tensor:
        """Where each token is among the padded ones: (T,) int64, below S * longest."""
        return torch.arange(self.total, device=self._device) + torch.repeat_interleave(
            torch.tensor(
                [number * self.longest - end + n for number, (end, n) in enumerate(zip(self._ends, self.lengths, strict=True))],
                device=self._device,
            ),
            torch.tensor(self.lengths, device=self._device),
        )  # fmt: skip

    @functools.cached_property
    def owners(self) -> Tensor:
        """The segment of each token: (T,) int64."""
        lengths = torch.tensor(self.lengths, device=self._device)
        return torch.repeat_interleave(torch.arange(len(self.lengths), device=self._device), lengths)

    def slices(self) -> list[slice]:
        """The tokens of each segment."""
        return [slice(end - n, end) for end, n in zip(self._ends, self.lengths, strict=True)]


def way(segments: Segments, columns: int, dtype: torch.dtype, device: torch.device, aligned: bool = True) -> Way:
    """Which way is the fastest, by shape.

    On a CPU (measured with one thread, see docs/log.md) short segments are padded: calls cost more than the numbers that are added. Longer
    ones go through grouped products where torch has them. On other devices the grouped product is one kernel, and always taken.

    Args:
        columns: of both factors: k + n.
        aligned: whether the rows of both factors start at multiples of 16 bytes, which grouped products ask for.
    """
    if device.type != "cpu":
        return "grouped" if aligned and dtype in GROUPED else "padded"
    most = SHORT if dtype in (torch.float32, torch.float64) else SHORT * SLOW
    if segments.longest * columns <= most:
        return "padded"
    return "grouped" if aligned and dtype in GROUPED else "loop"


def product(x: Tensor, factors: Tensor, segments: Segments) -> Tensor:
    """Each token times the matrix of its segment: (T, k), (S, k, n) -> (T, n)."""
    x, factors = _lined(x), _lined(factors)
    aligned = _aligned(x) and _aligned(factors)
    chosen = way(segments, x.shape[1] + factors.shape[2], x.dtype, x.device, aligned)
    if chosen == "grouped":
        return F.grouped_mm(x, factors, offs=segments.ends)
    if chosen == "padded":
        return torch.bmm(_padded(x, segments), factors).flatten(0, 1).index_select(0, segments.places)
    return loop_product(x, factors, segments)


def outer(x: Tensor, y: Tensor, segments: Segments) -> Tensor:
    """Sum over the tokens of each segment of x yᵀ: (T, k), (T, n) -> (S, k, n)."""
    x, y = _lined(x), _lined(y)
    chosen = way(segments, x.shape[1] + y.shape[1], x.dtype, x.device, _aligned(x) and _aligned(y))
    if chosen == "grouped":
        return F.grouped_mm(x.t(), y, offs=segments.ends)
    if chosen == "padded":
        return torch.bmm(_padded(x, segments).mT, _padded(y, segments))
    return loop_outer(x, y, segments)


def loop_product(x: Tensor, factors: Tensor, segments: Segments) -> Tensor:
    """`product`, one segment after another."""
    out = x.new_empty(x.shape[0], factors.shape[2])
    for number, mine in enumerate(segments.slices()):
        torch.mm(x[mine], factors[number], out=out[mine])
    return out


def loop_outer(x: Tensor, y: Tensor, segments: Segments) -> Tensor:
    """`outer`, one segment after another."""
    out = x.new_empty(len(segments.lengths), x.shape[1], y.shape[1])
    for number, mine in enumerate(segments.slices()):
        torch.mm(x[mine].t(), y[mine], out=out[number])
    return out


def _padded(x: Tensor, segments: Segments) -> Tensor:
    """(T, k) -> (S, longest, k), zero where there is no token."""
    full = x.new_zeros(len(segments.lengths) * segments.longest, x.shape[1])
    return full.index_copy_(0, segments.places, x).view(len(segments.lengths), segments.longest, -1)


def _lined(tensor: Tensor) -> Tensor:
    """A tensor whose last or last but one dimension has its numbers side by side, at an address that grouped products take."""
    return tensor if _aligned(tensor) else tensor.contiguous()


def _aligned(tensor: Tensor) -> bool:
    size = tensor.element_size()
    strides = list(tensor.stride())
    last = strides.pop() if strides[-1] == 1 else strides.pop(-2)
    return last == 1 and tensor.storage_offset() * size % 16 == 0 and all(step * size % 16 == 0 for step in strides)
