"""Linear sites under a route: the factors of a batch's rows, gathered once, for one site or for several that share their input.

A `Joint` knows which rows are computed together (`Block`) and with which slots. Factors that can't change are gathered when they are
first needed and kept for the life of the route; those in training are read anew in every forward, as autograd wants them.
This module does not know where a route comes from.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.core import dropout as dropping
from weft.core import ops
from weft.core.adapted import is_ours, magnitude_factor
from weft.core.blocks import gated, routed_linears
from weft.core.leaves import PoolSlot
from weft.core.members import FixedSlot
from weft.core.plans import segments, together
from weft.core.quick import MISSES, QuickRows, Shared, solo_for
from weft.core.routes import Route, Rows
from weft.core.slots import Placed
from weft.core.units import Block, Loaded
from weft.errors import BankError

__all__ = ["Joint", "joint_of", "run"]


class Joint:
    """Sites that get one input, under one route.

    Attributes:
        sites: `Rows` by site; None where the route says nothing.
    """

    def __init__(self, route: Route, members: Sequence[tuple[nn.Module, Placed]]) -> None:
        self.route, self.members = route, members
        found = [route.at(placed) for _, placed in members]
        self.sites: list[Rows | None] = [item if isinstance(item, Rows) else None for item in found]
        self.simple = [
            site is None or (site.simple and _is_plain(module, placed))
            for site, (module, placed) in zip(self.sites, members, strict=True)
        ]
        self.widths = [placed.site.d_out for _, placed in members]
        self.fixed = all(site is None or site.fixed for site in self.sites)
        self.plans = [(block, parts) for block, parts in self._plan()]
        self._kept: dict[tuple[torch.dtype, torch.device], list[Loaded]] = {}
        self._slots = [slot for site in self.sites if site is not None for terms in site.terms for slot, _ in terms]
        self.dropout = any(slot.dropout for slot in self._slots)
        self.open = all(self.simple) and all("bias" in module._parameters for module, _ in members)
        self._ready: QuickRows | None = None
        self._shared = Shared(len(members))
        self._seen: Any = None

    def run(self, x: Tensor) -> list[Tensor]:
        """The outputs by site: (..., d_in) -> (..., d_out)."""
        lead, path = tuple(x.shape[:-1]), self.members[0][1].site.path
        count, length = self.route.view(lead, path)
        x = x.to(ops.compute_dtype(x))
        rows = x if x.dim() == 3 and x.shape[0] == count else x.reshape(count, length, x.shape[-1])
        rows = rows.contiguous()
        bases = [
            _base(module, placed, x.dtype) if simple else (None, None)
            for simple, (module, placed) in zip(self.simple, self.members, strict=True)
        ]
        dropped = self._dropped()
        masks = None if dropped is None else lambda flat: self._masks(flat, length, dropped)
        found = routed_linears(rows, bases, self._loaded(x, dropped), masks, self.widths)
        outputs = []
        for number, update in enumerate(found):
            out = update if self.simple[number] else self._around(number, rows, update)
            outputs.append(
                out if out.shape[:-1] == x.shape[:-1] else ops.shaped_like(x, out.reshape(-1, out.shape[-1]))
            )
        return outputs

    @property
    def can_gate(self) -> bool:
        """Whether `gated` is open: one site that is nothing but products."""
        return len(self.members) == 1 and self.simple[0] and self.sites[0] is not None

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """``down(silu(gate) * up)`` with these rows' down projection: (..., d_in), (..., d_in) -> (..., d_out)."""
        module, placed = self.members[0]
        lead = tuple(gate.shape[:-1])
        count, length = self.route.view(lead, placed.site.path)
        shape = (count, length, gate.shape[-1])
        dropped = self._dropped()
        masks = None if dropped is None else lambda flat: self._masks(flat, length, dropped)
        base, loaded = _base(module, placed, gate.dtype), self._loaded(gate, dropped)
        out = gated(
            gate.reshape(shape).contiguous(), up.reshape(shape).contiguous(), base, loaded, masks, self.widths[0]
        )
        return out if out.shape[:-1] == lead else ops.shaped_like(gate, out.reshape(-1, out.shape[-1]))

    def quick(self, number: int, x: Tensor) -> Tensor | None:
        """The output of one site without gradients: (..., d_in) -> (..., d_out); None where the short way is not open."""
        if not self.open or not x.is_contiguous():
            return None
        if self.dropout and self.members[number][0].training:
            return None
        call, seen = self.route.ring.call, self._seen
        if seen is None or seen[0] != x.shape or seen[1] is not call:
            count, length = self.route.view(tuple(x.shape[:-1]), self.members[number][1].site.path)
            seen = self._seen = (x.shape, call, count, length)
        stamp = None if self.fixed else [slot.lora_A._version for slot in self._slots]
        ready = self._ready
        if ready is not None and ready.shared is self._shared:
            thins = self._shared.find(x, stamp)
            if thins is not None:
                return ready(number, x, seen[3], thins)
        if self._shared.misses > MISSES:
            self._part()
            return None
        if ready is None or not self.fixed or ready.dtype != x.dtype or ready.rows != seen[2]:
            with torch.no_grad():
                loaded = [self._load(block, parts, x, None, fold=True) for block, parts in self.plans]
            ready = self._ready = QuickRows(self.members, loaded, seen[2], x.dtype, self._shared)
        thins = ready.thins(x, seen[3])
        self._shared.keep(x, thins, stamp)
        return ready(number, x, seen[3], thins)

    def _part(self) -> None:
        """Siblings that don't get the same input go their own ways."""
        for module, placed in self.members:
            rows = self.route.at(placed)
            rows.home = (joint_of(self.route, placed, [(module, placed)]), 0)

    # which rows together

    def _plan(self) -> list[tuple[Block, list[int]]]:
        route = self.route
        ranks = [
            tuple(0 if site is None else sum(_rank(slot) for slot, _ in site.terms[part]) for site in self.sites)
            for part in range(len(route.parts))
        ]
        keys = [key if key >= 0 and any(ranks[key]) else -1 for key in route.keys]
        device = self.members[0][1].site.weight.device
        if route.lengths is not None and not route.even:
            return segments(keys, route.lengths, ranks, device)
        return together(keys, ranks, device)

    # factors

    def _loaded(self, x: Tensor, dropped: list[list[float]] | None) -> list[Loaded]:
        if not self.fixed or dropped is not None:
            return [self._load(block, parts, x, dropped, fold=False) for block, parts in self.plans]
        key = (x.dtype, x.device)
        if key not in self._kept:
            with torch.no_grad():
                self._kept[key] = [self._load(block, parts, x, None, fold=True) for block, parts in self.plans]
        return self._kept[key]

    def _load(self, block: Block, parts: list[int], x: Tensor, dropped: list[list[float]] | None, fold: bool) -> Loaded:
        """Gather one block. With ``fold`` scales and weights go into B."""
        A: list[Tensor] = []
        stacked: list[Tensor | None] = []
        scales: list[list[float]] = [[] for _ in parts]
        for number, (site, rank) in enumerate(zip(self.sites, block.ranks, strict=True)):
            if site is None or not rank:
                stacked.append(None)
                continue
            units = [site.terms[part] for part in parts]
            a, b = _stack([slot for terms in units for slot, _ in terms])
            A.append(a.to(x).view(block.units, rank, -1))
            b = b.to(x).view(block.units, rank, -1)
            stacked.append(b if site.simple else self._turned(number, units, b))
            for lines, part, terms in zip(scales, parts, units, strict=True):
                kept = 1.0 if dropped is None else 1 - dropped[number][part]
                for slot, weight in terms:
                    lines += [slot.scale * weight / kept] * _rank(slot)
        whole = A[0] if len(A) == 1 else torch.cat(A, dim=1)
        if all(value == 1 for of_unit in scales for value in of_unit):
            return Loaded(block, whole, tuple(stacked))
        factors = torch.tensor(scales, dtype=x.dtype, device=x.device)
        if not fold:
            return Loaded(block, whole, tuple(stacked), factors.unsqueeze(1))
        pairs = zip(stacked, torch.split(factors, list(block.ranks), dim=1), strict=True)
        return Loaded(block, whole, tuple(None if b is None else b * mine.unsqueeze(2) for b, mine in pairs))

    def _turned(self, number: int, units: list[Any], B: Tensor) -> Tensor:
        """B (U, r, o) with the factors of DoRA's magnitudes."""
        module, placed = self.members[number]
        if all(slot.magnitude is None for terms in units for slot, _ in terms):
            return B
        weight = _weight(module, placed)
        lines = []
        for slot in (slot for terms in units for slot, _ in terms):
            own = weight.new_ones(()) if slot.magnitude is None else magnitude_factor(placed, slot, weight)
            lines.append(own.to(B.dtype).expand(_rank(slot), B.shape[2]))
        return B * torch.cat(lines).view(B.shape)

    # dropout

    def _dropped(self) -> list[list[float]] | None:
        """Probabilities by site and part; None: nothing is dropped."""
        found, some = [], False
        for site, (module, placed) in zip(self.sites, self.members, strict=True):
            values = []
            for terms in () if site is None else site.terms:
                of_part = {slot.dropout for slot, _ in terms} if module.training else set()
                if len(of_part) > 1:
                    raise BankError(
                        f"{placed.site.path!r}: a mixture of adapters with different dropout {sorted(of_part)} can't be trained"
                    )
                values.append(of_part.pop() if of_part else 0.0)
            some = some or any(values)
            found.append(values)
        return found if some else None

    def _masks(self, flat: Tensor, length: int, dropped: list[list[float]]) -> list[Tensor | None]:
        route = self.route
        if route.lengths is not None:
            lengths: Sequence[int] = route.lengths
        else:
            lengths = [length] * len(route.keys)
        found = []
        for values, (_, placed) in zip(dropped, self.members, strict=True):
            ps = [values[key] if key >= 0 and values else 0.0 for key in route.keys]
            seeds = route.seeds or [None] * len(ps)
            mine = [None if seed is None else stream(seed, placed.site.path) for seed in seeds]
            found.append(dropping.draw_rows(flat, lengths, ps, mine))
        return found

    # what stands around an update: DoRA's magnitudes, biases, products that aren't ours

    def _around(self, number: int, rows: Tensor, update: Tensor) -> Tensor:
        site, (module, placed) = self.sites[number], self.members[number]
        assert site is not None
        bias = _bias(module, placed)
        if _is_plain(module, placed):
            base = F.linear(rows, _weight(module, placed).to(rows.dtype))
        else:
            base = _own_forward(module, rows)
            base = base if bias is None else base - bias.to(base.dtype)
        factor, extra = self._by_part(site, number, base.dtype)
        keys = torch.tensor(self.route.row_keys(rows.shape[0]), device=rows.device) + 1
        out = base if factor is None else base * factor.index_select(0, keys).unsqueeze(1)
        out = out + update.to(out.dtype)
        out = out if bias is None else out + bias.to(out.dtype)
        return out if extra is None else out + extra.index_select(0, keys).unsqueeze(1)

    def _by_part(self, site: Rows, number: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Factor of the base's product and what is added in the end, by part: (1 + parts, d_out); the first line is the base's."""
        module, placed = self.members[number]
        weight = _weight(module, placed)
        bias = _bias(module, placed)
        one = torch.ones(self.widths[number], dtype=dtype, device=weight.device)
        factors, extras, scaled, shifted = [one], [one * 0], False, False
        for terms, biases in zip(site.terms, site.biases, strict=True):
            factor, extra = one, one * 0
            for slot, share in terms:
                own = one if slot.magnitude is None else magnitude_factor(placed, slot, weight).to(dtype)
                if slot.magnitude is not None:
                    factor, scaled = factor + share * (own - 1), True
                if slot.bias is not None:
                    extra, shifted = extra + share * slot.scale * own * slot.bias.to(dtype), True
            for value, share in biases:
                extra = extra + share * (value.to(dtype) - (0 if bias is None else bias.to(dtype)))
                shifted = True
            factors.append(factor)
            extras.append(extra)
        return torch.stack(factors) if scaled else None, torch.stack(extras) if shifted else None


def joint_of(route: Route, key: Any, members: Sequence[tuple[nn.Module, Placed]]) -> Joint:
    """The joint of some sites under a route; made once."""
    found: Joint | None = route.joints.get(key)
    if found is None:
        found = route.joints[key] = Joint(route, members)
    return found


def quick(module: nn.Module, placed: Placed, slot: Any, x: Tensor) -> Tensor | None:
    """A linear site without gradients, by the shortest way; None where it is not open."""
    if slot.by_row:
        home = slot.home
        if home is None:
            home = slot.home = _home(module, placed, slot)
        joint: Joint = home[0]
        return joint.quick(home[1], x)
    found = solo_for(module, placed, slot) if slot.solo is None else None
    return found.solo(found.number, x) if found else None


def _home(module: nn.Module, placed: Placed, rows: Rows) -> tuple[Joint, int]:
    """The joint of a site with those of its siblings that the route means too, and the site's number in it."""
    group = placed.group
    members = [(module, placed)]
    if group is not None:
        members = [member for member in group.members if isinstance(rows.route.at(member[1]), Rows)]
    key = (group, len(members)) if len(members) > 1 else placed
    return joint_of(rows.route, key, members), next(n for n, member in enumerate(members) if member[1] is placed)


def run(module: nn.Module, placed: Placed, rows: Rows, x: Tensor) -> Tensor:
    """One linear site of a mixed batch: (..., d_in) -> (..., d_out)."""
    return joint_of(rows.route, placed, [(module, placed)]).run(x)[0]


def stream(seed: int, path: str) -> int:
    """A seed of its own for each site: 32 mixed bits.

    Source:
        Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators (the finaliser of SplitMix64).
    """
    z = (seed + 0x9E3779B97F4A7C15 * (1 + zlib.crc32(path.encode()))) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (z ^ (z >> 31)) & (2**32 - 1)


def _stack(slots: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """All A (R, d_in) and all B, transposed (R, d_out), of some slots at one site."""
    first = slots[0]
    if isinstance(first, PoolSlot) and all(
        isinstance(slot, PoolSlot) and slot.pool is first.pool and slot.start_A is None for slot in slots
    ):
        first.pool.settle()
        names = tuple(slot.name for slot in slots)
        return first.leaves["A"].gather(names), first.leaves["B"].gather(names)
    if all(isinstance(slot, FixedSlot) for slot in slots):
        return torch.cat([slot.lora_A for slot in slots]), torch.cat([slot.turned for slot in slots])
    pairs = [slot.pair() for slot in slots]
    return torch.cat([A for A, _ in pairs]), torch.cat([B.t() for _, B in pairs])


def _rank(slot: Any) -> int:
    if isinstance(slot, PoolSlot):
        return slot.rank if slot.start_A is None else slot.rank + int(slot.start_A.shape[0])
    rank = int(slot.lora_A.shape[0])
    return rank if slot.start_A is None else rank + int(slot.start_A.shape[0])


def _weight(module: nn.Module, placed: Placed) -> Tensor:
    weight: Any = getattr(module, placed.site.weight_name)
    weight = weight.dequantize() if hasattr(weight, "dequantize") and not _is_plain(module, placed) else weight
    return weight.t() if placed.site.transposed else weight  # type: ignore[no-any-return]


def _bias(module: nn.Module, placed: Placed) -> Tensor | None:
    name = placed.site.weight_name
    return module._parameters.get("bias" if name == "weight" else f"{name.removesuffix('_weight')}_bias")


def _is_plain(module: nn.Module, placed: Placed) -> bool:
    """Whether the base's output is one plain product of its weight: an attention's in_proj is, a quantised layer's isn't."""
    return placed.site.kind == "attention" or is_ours(module, placed)


def _base(module: nn.Module, placed: Placed, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    bias = _bias(module, placed)
    return _weight(module, placed).to(dtype), None if bias is None else bias.to(dtype)


def _own_forward(module: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = module.__dict__["_weft"].original.forward(module, x)
    return result
