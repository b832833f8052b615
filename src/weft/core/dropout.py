"""LoRA-dropout that keeps what was dropped, not a copy of what was left.

A mask is drawn once in the forward and kept for the backward, in the smallest form for the probability: below
`SPARSE_BELOW` the positions of the dropped elements (their gaps are geometric, so one random number a *dropped*
element is enough), above it one byte an element. Neither depends on the values, and both follow torch's generator,
so that gradient checkpointing draws the same mask again.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["SPARSE_BELOW", "draw", "draw_rows", "drop", "drop_", "own_stream"]

SPARSE_BELOW = 0.13
"""Below this probability positions are smaller than bytes, and cheaper to draw. CPU only: a GPU draws bytes faster."""

_LONGEST = 2.0**30  # of a gap: a tiny probability would leave int32


@contextlib.contextmanager
def own_stream(seed: int | None) -> Iterator[None]:
    """Draw from a stream of one's own; afterwards torch's generators are where they were. None: draw from theirs.

    Seeds what draws here, and not, as `torch.manual_seed` does, also devices that are not in use: for those it keeps a stack
    trace, which costs more than a small step of training.
    """
    if seed is None:
        yield
        return
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed(seed)
        if torch.backends.mps.is_available():
            torch.mps.manual_seed(seed)
        yield


def draw(like: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Draw which elements of a contiguous tensor are dropped, each with probability ``p``, independently.

    What is drawn for the first elements does not depend on how many follow.

    Returns:
        either positions of dropped elements, int32 or int64 (n_dropped,), ascending, or a bool mask shaped as ``like``
        that is True where an element is dropped.

    Source:
        Hu et al. 2021, arXiv:2106.09685 (dropout on the input of A). Gaps of Bernoulli trials are geometric:
        Devroye 1986, Non-Uniform Random Variate Generation, chapter X.2.
    """
    if like.device.type == "cpu" and p < SPARSE_BELOW:
        return _positions(like.numel(), p, generator)
    return torch.rand(like.shape, device=like.device, generator=generator) < p


def draw_rows(x: Tensor, lengths: Sequence[int], ps: Sequence[float], seeds: Sequence[int | None]) -> Tensor | None:
    """Draw for rows one after another, each with its own probability and seed.

    Args:
        x: (T, i), the rows' tokens one row after another.
        lengths: tokens of each row; their sum is T.
        ps: probabilities. seeds: of a stream of its own for each row; None: torch's generator.

    Returns:
        positions in x, or a mask shaped as x, as `draw` gives them; None: nothing is dropped.
    """
    if not any(ps):
        return None
    generator = torch.Generator(x.device)
    sparse = x.device.type == "cpu" and all(p < SPARSE_BELOW for p in ps)
    whole = None if sparse else torch.zeros(x.shape, dtype=torch.bool, device=x.device)
    found: list[Tensor] = []
    start = 0
    for length, p, seed in zip(lengths, ps, seeds, strict=True):
        if p and length:
            row = x[start : start + length]
            drawn = draw(row, p, None if seed is None else generator.manual_seed(seed))
            if whole is None:
                found.append(drawn.long().add_(start * x.shape[1]))
            elif drawn.dtype == torch.bool:
                whole[start : start + length] = drawn
            else:
                whole[start : start + length].view(-1).index_fill_(0, drawn.long(), True)
        start += length
    return whole if whole is not None else torch.cat(found) if found else None


def _positions(n: int, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Positions in 0 … n-1 that are dropped: the running sum of geometric gaps."""
    found: list[Tensor] = []
    start = -1
    while start < n - 1:
        expected = (n - 1 - start) * p
        gaps = _geometric(2 * int(expected / 2 + 3 * math.sqrt(expected) + 4), p, generator)
        places = gaps.cumsum(0).add_(start)
        start = int(places[-1])
        found.append(places[: int(torch.searchsorted(places, n))] if start >= n else places)
    if not found:
        return torch.empty(0, dtype=torch.int32)
    places = found[0] if len(found) == 1 else torch.cat(found)
    return places.to(torch.int32) if n < 2**31 else places


def _geometric(count: int, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Independent gaps 1, 2, … with P(gap = k) = p (1 - p)^(k - 1): (count,) int32.

    One 64-bit draw makes two 31-bit uniforms: drawing dominates the cost of dropout on a CPU.
    """
    bits = torch.empty((count + 1) // 2, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    bits = bits.view(torch.int32)[:count]
    uniform = bits.bitwise_and(0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_max_(1.0)
    return uniform.log_().div_(math.log1p(-p)).floor_().clamp_max_(_LONGEST).to(torch.int32).add_(1)


def drop(x: Tensor, dropped: Tensor) -> Tensor:
    """A copy of ``x`` with zeros where it was dropped. Not rescaled: the caller folds 1 / (1 - p) into its scale."""
    if dropped.dtype == torch.bool:
        return x.masked_fill(dropped, 0)
    return drop_(x.clone(memory_format=torch.contiguous_format), dropped)


def drop_(x: Tensor, dropped: Tensor) -> Tensor:
    """Like `drop`, in place; ``x`` must be contiguous."""
    if dropped.dtype == torch.bool:
        return x.masked_fill_(dropped, 0)
    x.view(-1).index_fill_(0, dropped.long(), 0)
    return x
