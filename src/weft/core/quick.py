"""Inference through linear sites: as little around the products as there can be.

Where nobody wants gradients, sites that share an input share its product with all their A's, and each adds its own update to the base's
product. Factors stand ready as the products want them, until the numbers they were made from change. Whether siblings get the same
input is seen from the input itself, so that nothing is computed for a site before it is called.

Shapes: T tokens, i = d_in, o = d_out, R = sum of the ranks of the sites. This module does not know where a choice of adapters comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.core.adapted import is_ours
from weft.core.blocks import LONG, turned
from weft.core.slots import Placed
from weft.core.units import Loaded, add_product, product, units

__all__ = ["QuickRows", "Solo", "solo_for"]

NARROW = 256
"""Up to so many columns A is kept transposed: products of a few tokens are then twice as fast."""

MISSES = 16
"""Inputs in a row that siblings didn't share, after which each site computes for itself."""


class Shared:
    """Thin products of one input, until every sibling has had its own."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.misses = 0
        self._last: list[Any] | None = None

    def find(self, x: Tensor, stamp: Any = None) -> Any:
        """What was kept for this very input, while ``stamp`` is the same; or None."""
        last = self._last
        if last is None:
            return None
        if last[0] is not x or last[1] != x._version or last[2] != stamp:
            self.misses += 1
            self._last = None
            return None
        last[4] -= 1
        if not last[4]:
            self._last = None
            self.misses = 0
        return last[3]

    def keep(self, x: Tensor, thins: Any, stamp: Any = None) -> None:
        """Keep for the siblings that are still to come."""
        if self.count > 1:
            self._last = [x, x._version, stamp, thins, self.count - 1]

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return Shared(self.count)


class Home(NamedTuple):
    """A site's place in a `Solo`; a copied model makes its own."""

    solo: Solo
    number: int

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None


class Solo:
    """One adapter at some sites that share their input.

    Attributes:
        members: module and site. slots: of the adapter at each.
    """

    def __init__(self, members: Sequence[tuple[nn.Module, Placed]], slots: Sequence[Any]) -> None:
        self.members, self.slots = members, slots
        self.turned = [placed.site.transposed for _, placed in members]
        self.scales = [slot.scale for slot in slots]
        self.fixed = all(getattr(slot, "fixed", False) for slot in slots)
        self.dropout = any(slot.dropout for slot in slots)
        self.shared = Shared(len(members))
        self._made: dict[tuple[torch.dtype, torch.device], Any] = {}

    def __call__(self, number: int, x: Tensor) -> Tensor | None:
        """The output of one site: (..., i) -> (..., o); None where this way is not open."""
        if self.dropout and self.members[number][0].training:
            return None
        stamp = None if self.fixed else _stamp(self.slots)
        thins = self.shared.find(x, stamp)
        if thins is None:
            if self.shared.misses > MISSES:
                return split_solo(self, number).solo(0, x)
            A, ranks, B = self._ready(x)
            width = x.shape[-1]
            flat = x if x.dim() == 2 else x.reshape(-1, width)
            thin = torch.mm(flat, A)
            parts = (thin,) if len(ranks) == 1 else thin.split_with_sizes(ranks, 1)
            thins = (flat, parts, B, None if flat is x else (*x.shape[:-1], -1))
            self.shared.keep(x, thins, stamp)
        flat, parts, factors, shape = thins
        module = self.members[number][0]
        parameters = module._parameters
        W: Any = parameters["weight"]
        b: Any = module.bias if module.__dict__["_weft"].values else parameters["bias"]
        W = W.t() if self.turned[number] else W
        scale = self.scales[number]
        if b is None and flat.shape[0] >= LONG:
            B = factors[number]
            out = torch.mm(parts[number], B if scale == 1 else B * scale).addmm_(flat, W.t())
        else:
            out = F.linear(flat, W, b).addmm_(parts[number], factors[number], alpha=scale)
        return out if shape is None else out.view(shape)

    def _ready(self, x: Tensor) -> Any:
        """A (i, R), ranks and B (r, o), as products want them; kept where the numbers can't change."""
        key = (x.dtype, x.device)
        found = self._made.get(key)
        if found is not None:
            return found
        pairs = [slot.pair() for slot in self.slots]
        each = [A.detach().to(x) for A, _ in pairs]
        A = (each[0] if len(each) == 1 else torch.cat(each)).t()
        factors = [B.detach().to(x).t() for _, B in pairs]
        if x.shape[-1] <= NARROW:
            A, factors = A.contiguous(), [B.contiguous() for B in factors]
        found = (A, [int(part.shape[0]) for part in each], factors)
        if self.fixed:
            self._made[key] = found
        return found


def _stamp(slots: Sequence[Any]) -> list[int]:
    """Changes when the A's do, as far as torch counts it."""
    return [-1 if slot.lora_A.is_inference() else slot.lora_A._version for slot in slots]


def solo_for(module: nn.Module, placed: Placed, slot: Any) -> Home | None:
    """The `Solo` of a site and its siblings under one adapter, and the site's number in it; None where a site is no plain product."""
    group = placed.group
    members = [(module, placed)] if group is None else group.members
    found: list[tuple[tuple[nn.Module, Placed], Any]] = []
    for member in members:
        other = slot if member[1] is placed else member[1].chosen
        if other is not None:
            found.append((member, other))
    open_ = all(
        not other.by_row and other.plain and is_ours(*member) and "bias" in member[0]._parameters
        for member, other in found
    )
    if not open_ or not is_ours(module, placed):
        slot.solo = False
        return None
    solo = Solo([member for member, _ in found], [other for _, other in found])
    for number, (_, other) in enumerate(found):
        other.solo = Home(solo, number)
    return Home(solo, next(number for number, (member, _) in enumerate(found) if member[1] is placed))


def split_solo(solo: Solo, number: int) -> Home:
    """Siblings that don't get the same input go their own ways."""
    for member, slot in zip(solo.members, solo.slots, strict=True):
        slot.solo = Home(Solo([member], [slot]), 0)
    return solo.slots[number].solo  # type: ignore[no-any-return]


class QuickRows:
    """Rows of different adapters at some sites that share their input.

    Attributes:
        members: module and site. blocks: their gathered factors, scales in B. rows: N, for the blocks. dtype: of the factors.
        shared: for whom thin products are kept.
    """

    def __init__(
        self, members: Sequence[tuple[nn.Module, Placed]], blocks: Sequence[Loaded], rows: int, dtype: torch.dtype,
        shared: Shared,
    ) -> None:  # fmt: skip
        self.members, self.blocks, self.rows, self.dtype, self.shared = members, blocks, rows, dtype, shared
        self.turned = [placed.site.transposed for _, placed in members]
        self._A = [item.A.mT.contiguous() if item.A.shape[2] <= NARROW else item.A.mT for item in blocks]
        self._one = len(blocks) == 1 and blocks[0].block.rows is None and blocks[0].block.segments is None

    def __call__(self, number: int, x: Tensor, length: int, thins: Any) -> Tensor:
        """The output of one site: (..., i) -> (..., o), x contiguous, N rows of ``length`` tokens."""
        parameters = self.members[number][0]._parameters
        W: Any = parameters["weight"]
        b: Any = parameters["bias"]
        W = W.t() if self.turned[number] else W
        if self._one:
            part, B = thins[0][number], self.blocks[0].B[number]
            assert B is not None
            if b is None and self.rows * length >= LONG:
                out = torch.bmm(part, turned(B))
                out.view(-1, out.shape[2]).addmm_(x.view(-1, x.shape[-1]), W.t())
                return out if out.shape[:2] == x.shape[:-1] else out.view(*x.shape[:-1], out.shape[2])
            out = F.linear(x, W, b)
            whole = out if out.dim() == 3 and out.shape[0] == B.shape[0] else out.view(B.shape[0], -1, out.shape[-1])
            whole.baddbmm_(part, B)
            return out
        out = F.linear(x, W, b)
        target = out.view(self.rows, length, -1)
        for item, parts in zip(self.blocks, thins, strict=True):
            B = item.B[number]
            if B is not None:
                add_product(target, item.block, parts[number], B)
        return out

    def thins(self, x: Tensor, length: int) -> list[Any]:
        """The products with the A's: by block and site (U, tokens of a unit, r)."""
        found = []
        whole = x if x.dim() == 3 and x.shape[0] == self.rows else x.view(self.rows, length, -1)
        for item, A in zip(self.blocks, self._A, strict=True):
            block = item.block
            mine = whole if block.rows is None and block.units == self.rows else units(whole, block)
            thin = product(block, mine, A)
            found.append((thin,) if len(block.ranks) == 1 else thin.split_with_sizes(list(block.ranks), 2))
        return found
