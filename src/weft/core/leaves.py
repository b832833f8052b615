"""The tensors of a pool: a line for every rank of every adapter, and one adapter's share of them at one site.

This module does not know who is in a pool, only which lines are whose.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from weft.core.site import Site
from weft.errors import BankError

__all__ = ["Leaf", "PoolSlot", "Settles"]


class Settles(Protocol):
    """A pool, as far as a slot knows it."""

    def settle(self) -> None:
        """Lay out anew what has changed."""


class Leaf:
    """One tensor of a pool.

    Attributes:
        path, part: of which site, and what: ``"A"``, ``"B"`` (transposed), ``"magnitude"`` or ``"bias"``.
        parameter: (R, d): A's d_in (a convolution's with its kernel), else d_out.
        lines: which lines are whose, by name.
        owner: (R,) int64, number of the slot of each line.
    """

    def __init__(self, path: str, part: str, like: Tensor) -> None:
        self.path, self.part = path, part
        self.parameter = nn.Parameter(like.new_empty(0, like.shape[1]))
        self.lines: dict[str, slice] = {}
        self.owner = torch.empty(0, dtype=torch.int64)
        self.version = 0
        self._companions: dict[str, Tensor] = {}
        self._rows: dict[tuple[str, ...], Any] = {}

    def __repr__(self) -> str:
        return f"Leaf({self.path}, {self.part}, {tuple(self.parameter.shape)})"

    def of(self, name: str) -> Tensor:
        """The lines of one adapter, as a view that autograd knows."""
        if name not in self.lines:
            raise BankError(f"{name!r} has left this pool, and the route still names it: make a new route after a drop")
        return self.parameter[self.lines[name]]

    def gather(self, names: tuple[str, ...]) -> Tensor:
        """The lines of several adapters, one after another: a view where they stand so, else a copy."""
        found = self._rows.get(names)
        if found is None:
            found = self._rows[names] = self._find(names)
        if isinstance(found, Tensor):
            return self.parameter.index_select(0, found)
        return self.parameter if found == slice(0, self.parameter.shape[0]) else self.parameter[found]

    def _find(self, names: tuple[str, ...]) -> slice | Tensor:
        for name in names:
            self.of(name)
        spans = [self.lines[name] for name in names]
        if all(left.stop == right.start for left, right in itertools.pairwise(spans)):
            return slice(spans[0].start, spans[-1].stop)
        return torch.cat([torch.arange(span.start, span.stop) for span in spans]).to(self.parameter.device)

    @property
    def companions(self) -> Mapping[str, Tensor]:
        """Those that there are, by key."""
        return self._companions

    def companion(self, key: str) -> Tensor:
        """A tensor that goes with the parameter, zero at first."""
        if key not in self._companions:
            self._companions[key] = torch.zeros_like(self.parameter, requires_grad=False)
        return self._companions[key]

    @torch.no_grad()
    def arrange(self, seats: list[tuple[int, str, int]], new: Mapping[str, Tensor]) -> None:
        """Lay the lines out: (slot number, name, lines) in order, ``new`` the values of those that are new (or written anew)."""
        lines, at = {}, 0
        for _, name, count in seats:
            lines[name] = slice(at, at + count)
            at += count
        kept = [name for name in lines if name in self.lines and name not in new]
        if at == self.parameter.shape[0] and all(lines[name] == self.lines[name] for name in kept):
            for name in lines.keys() & new.keys():
                self.parameter[lines[name]] = new[name].to(self.parameter)
                for tensor in (*self._companions.values(), self.parameter.grad):
                    if tensor is not None:
                        tensor[lines[name]] = 0
        else:
            self.parameter = nn.Parameter(self._moved(self.parameter, lines, kept, at))
            for key, tensor in self._companions.items():
                self._companions[key] = self._moved(tensor, lines, kept, at)
            for name in lines.keys() & new.keys():
                self.parameter[lines[name]] = new[name].to(self.parameter)
        self.lines = lines
        numbers = [torch.full((count,), number) for number, _, count in seats]
        self.owner = torch.cat(numbers).to(self.parameter.device) if numbers else torch.empty(0, dtype=torch.int64)
        self._rows = {}
        self.version += 1

    def _moved(self, tensor: Tensor, lines: Mapping[str, slice], kept: Iterable[str], count: int) -> Tensor:
        moved = tensor.detach().new_zeros(count, tensor.shape[1])
        for name in kept:
            moved[lines[name]] = tensor[self.lines[name]]
        return moved


class PoolSlot:
    """One adapter at one site of a pool; the same attributes as `weft.core.slots.Slot`."""

    by_row = False
    fixed = False

    def __init__(
        self, pool: Settles, site: Site, name: str, leaves: Mapping[str, Leaf], rank: int, scale: float, dropout: float,
        start: tuple[Tensor, Tensor] | None,
    ) -> None:  # fmt: skip
        self.pool, self.site, self.name, self.leaves, self.rank = pool, site, name, leaves, rank
        self.scale, self.dropout = scale, dropout
        self.solo: Any = None
        self.start_A: Tensor | None = None if start is None else start[0]
        self.start_B: Tensor | None = None if start is None else start[1]

    @property
    def lora_A(self) -> Tensor:
        """(r, d_in), or (r, in_channels, *kernel): a view of the pool's tensor."""
        A = self._lines("A")
        return A.view(A.shape[0], -1, *self.site.kernel) if self.site.kind == "conv" else A

    @property
    def lora_B(self) -> Tensor:
        """(d_out, r)."""
        return self._lines("B").t()

    @property
    def magnitude(self) -> Tensor | None:
        """(d_out,) or None."""
        return self._lines("magnitude")[0] if "magnitude" in self.leaves else None

    @property
    def bias(self) -> Tensor | None:
        """(d_out,) or None."""
        return self._lines("bias")[0] if "bias" in self.leaves else None

    @property
    def plain(self) -> bool:
        """No magnitude and no bias."""
        return len(self.leaves) == 2

    def pair(self) -> tuple[Tensor, Tensor]:
        """A and B as the forward uses them, with a starting product as in `Slot.pair`."""
        A, B = self.lora_A, self.lora_B
        if self.start_A is None or self.start_B is None:
            return A, B
        return torch.cat([A, self.start_A.to(A.dtype)], dim=0), torch.cat([B, -self.start_B.to(B.dtype)], dim=1)

    def _lines(self, part: str) -> Tensor:
        self.pool.settle()
        return self.leaves[part].of(self.name)
