"""Pool: adapters that are trained together. Per site one tensor of all A and one of all B, whatever their number.

A line of such a tensor belongs to one rank of one adapter, so ragged ranks and different sites cost what they are. Adapters come and go
(`add`, `load`, `drop`); one of the same shape takes the lines of the one that left. Rows are given to adapters by `Bank.route`.
This module does not know optimizers: it moves along what they keep for each line (`companion`).

Shapes: R lines of a leaf: the sum of its adapters' ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weft.adapter import Adapter, Provenance
from weft.core import loading
from weft.core.filling import start_slot
from weft.core.inits import initialise
from weft.core.leaves import Leaf, PoolSlot
from weft.core.members import FlatSites, Member, flatten
from weft.core.resizing import Resize, blocks_of, rescaled
from weft.core.site import Site
from weft.core.sites import find_sites
from weft.errors import BankError, SpecError
from weft.spec import LoraSpec

if TYPE_CHECKING:
    from weft.core.bank import Bank

__all__ = ["Leaf", "Pool", "PoolSlot"]


class Pool:
    """Adapters that are trained together, see the module.

    Attributes:
        bank: whose adapters they are; names are the bank's.
    """

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self._seats: list[str | None] = []
        self._members: dict[str, Member] = {}
        self._leaves: dict[tuple[str, str], Leaf] = {}
        self._new: dict[tuple[str, str], dict[str, Tensor]] = {}
        self._dirty = False

    def __repr__(self) -> str:
        return f"Pool({len(self._members)} adapters, {len(self._leaves)} tensors)"

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters in the order of their slots."""
        return tuple(name for name in self._seats if name is not None)

    @property
    def capacity(self) -> int:
        """Slot numbers are below this."""
        return len(self._seats)

    def number(self, name: str) -> int:
        """Slot number of an adapter; it keeps it until it is dropped."""
        if name not in self._members:
            raise BankError(f"no adapter {name!r} in this pool; there are {list(self.names)[:8]}")
        return self._seats.index(name)

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """All tensors, in the order of the model: two a site, more with DoRA and ``lora_bias``."""
        self.settle()
        return tuple(leaf for leaf in self._leaves.values() if leaf.lines)

    def companion(self, key: str) -> tuple[Tensor, ...]:
        """A tensor beside each leaf, zero at first; lines move with their adapter, those of a new one are zero."""
        return tuple(leaf.companion(key) for leaf in self.leaves)

    def own_parameters(self, name: str) -> list[tuple[str, nn.Parameter]]:
        """Parameters of one adapter outside of the leaves: modules trained whole, biases."""
        self.number(name)
        return list(self.bank.named_parameters(name))

    def adapter(self, name: str, provenance: Provenance | None = None) -> Adapter:
        """A snapshot, as `Bank.adapter`."""
        self.number(name)
        return self.bank.adapter(name, provenance)

    def add(
        self, name: str, spec: LoraSpec, *, seed: int | None = None, batches: Iterable[Mapping[str, Any]] | None = None
    ) -> None:
        """A new adapter, started as `Bank.add` starts it.

        Raises:
            BankError: the name is taken. TargetError, SpecError: as `Bank.add`; a bare parameter, a convolution with groups.
        """
        bank = self.bank
        bank.check_new(name)
        found = find_sites(bank.model, spec)
        for site in found.sites:
            own = spec.at(site.path)
            loading.check_features(site, dora=own.dora, dropout=own.dropout > 0, lora_bias=own.lora_bias)
            _check_pooled(site)
        starts = bank.unrouted(lambda generator: initialise(
            found.sites, spec, generator=generator, batches=batches, model=bank.model), seed)  # fmt: skip
        slots = {site.path: start_slot(site, spec.at(site.path), starts[site.path]) for site in found.sites}
        self._join(Member(name, spec, notes=found.notes), found, None, slots)

    def load(self, name: str, adapter: Adapter, *, allow_other_base: bool = False, allow_partial: bool = False) -> None:
        """A finished adapter, to be trained on; arguments and errors as `Bank.load`."""
        bank = self.bank
        bank.check_new(name)
        layout = bank.layout_for(adapter, allow_other_base=allow_other_base, allow_partial=allow_partial)
        for site in layout.found.sites:
            loading.check_features(site, dropout=adapter.spec.at(site.path).dropout > 0)
            _check_pooled(site)
        adapter.check_finite()
        flat = flatten(adapter, layout, torch.device("cpu"), loading.factor_dtype(bank.model))
        member = Member(name, adapter.spec, notes=layout.found.notes, provenance=adapter.provenance)
        self._join(member, layout.found, adapter, FlatSites(layout, flat, adapter.spec))

    def slots(self, name: str) -> dict[str, tuple[Site, Any]]:
        """Sites of an adapter with what stands there, by path; for those who change it as a whole (`resize`)."""
        self.number(name)
        held: Mapping[str, Any] = self._members[name].sites
        return {path: (slot.site, slot) for path, slot in held.items()}

    @torch.no_grad()
    def resize(self, name: str, changes: Mapping[str, Resize], squares: Collection[str] = ()) -> None:
        """Give sites of an adapter more, fewer or other directions, see `weft.core.resizing`; the others stay as they are.

        Its lines of every companion go along: as means of gradients, those named in ``squares`` as means of their squares.
        """
        self.settle()
        moved: list[tuple[Leaf, dict[str, Tensor]]] = []
        for path, (site, slot) in self.slots(name).items():
            if path not in changes:
                continue
            change = changes[path]
            slot.rank = int(change.A(blocks_of(site, slot)[0]).shape[-2])
            slot.start_B, slot.scale = rescaled(slot, change)
            slot.solo = None
            for part, leaf in slot.leaves.items():
                if part == "magnitude":
                    continue
                value = leaf.parameter.detach()[leaf.lines[name]].clone()
                self._new.setdefault((path, part), {})[name] = _changed(change, part, value)
                kept = leaf.companions.items()
                moved.append((leaf, {key: _moved(change, part, held[leaf.lines[name]].clone(), key in squares) for key, held in kept}))  # fmt: skip
        self._dirty = bool(moved)
        self.settle()
        for leaf, parts in moved:
            for key, lines in parts.items():
                leaf.companion(key)[leaf.lines[name]] = lines

    def drop(self, name: str) -> None:
        """Take an adapter out; its slot number is the next one's."""
        self.number(name)
        self.bank.drop(name)

    def forget(self, name: str) -> None:
        """The bank has dropped an adapter."""
        if self._members.pop(name, None) is not None:
            self._seats[self._seats.index(name)] = None
            for values in self._new.values():
                values.pop(name, None)
            self._dirty = True

    def settle(self) -> None:
        """Lay out anew what has changed; sites call it before they read."""
        if not self._dirty:
            return
        while self._seats and self._seats[-1] is None:
            self._seats.pop()
        for (path, part), leaf in self._leaves.items():
            seats = []
            for number, name in enumerate(self._seats):
                slot: Any = None if name is None else self._members[name].sites.get(path)
                if name is not None and slot is not None and part in slot.leaves:
                    seats.append((number, name, slot.rank if part in ("A", "B") else 1))
            new = self._new.get((path, part), {})
            same = [name for _, name, _ in seats] == list(leaf.lines)
            if new or not same or any(int(leaf.owner[leaf.lines[name].start]) != number for number, name, _ in seats):
                leaf.arrange(seats, new)
        self._new, self._dirty = {}, False

    # inside

    def _join(self, member: Member, found: Any, adapter: Adapter | None, slots: Mapping[str, Any]) -> None:
        sites = {}
        written: list[tuple[tuple[str, str], Tensor]] = []
        for site in found.sites:
            slot = slots[site.path]
            parts = {"A": slot.lora_A.flatten(1), "B": slot.lora_B.flatten(1).t()}
            parts |= {key: value[None] for key in ("magnitude", "bias") if (value := getattr(slot, key)) is not None}
            leaves = {part: self._leaf(site, part, value) for part, value in parts.items()}
            written += [((site.path, part), value.detach().contiguous()) for part, value in parts.items()]
            start = None if slot.start_A is None else (slot.start_A, slot.start_B)
            sites[site.path] = PoolSlot(
                self, site, member.name, leaves, parts["A"].shape[0], slot.scale, slot.dropout, start
            )
        member.sites = sites  # type: ignore[assignment]
        self.bank.install(member, found, adapter)
        for key, value in written:
            self._new.setdefault(key, {})[member.name] = value
        self._members[member.name] = member
        free = self._seats.index(None) if None in self._seats else len(self._seats)
        self._seats[free : free + 1] = [member.name]
        self._dirty = True

    def _leaf(self, site: Site, part: str, like: Tensor) -> Leaf:
        key = (site.path, part)
        if key not in self._leaves:
            self._leaves[key] = Leaf(site.path, part, like.detach().to(site.weight.device))
        return self._leaves[key]


def _changed(change: Resize, part: str, lines: Tensor) -> Tensor:
    """Lines of a leaf after a change of directions."""
    if part == "A":
        return change.A(lines[None])[0]
    if part == "B":
        return change.B(lines.t()[None])[0].t().contiguous()
    return lines * change.ratio  # B's own bias


def _moved(change: Resize, part: str, lines: Tensor, squared: bool) -> Tensor:
    """Means of gradients of such lines, or of their squares."""
    if part == "A":
        return change.moment_A(lines[None], squared)[0]
    if part == "B":
        return change.moment_B(lines.t()[None], squared)[0].t()
    return lines / (change.ratio**2 if squared else change.ratio)


def _check_pooled(site: Site) -> None:
    """Refuse sites whose factors are no lines.

    Raises:
        SpecError: names the site.
    """
    if site.kind == "parameter" or site.groups > 1:
        what = "a bare parameter" if site.kind == "parameter" else f"a convolution with {site.groups} groups"
        raise SpecError(
            f"{site.path!r} is {what}, which adapters that are trained together can't share a batch at; leave it out with exclude=[…], or "
            "train these adapters one after another"
        )
