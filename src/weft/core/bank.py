"""Bank: what hangs on a running base. Adapters go in as slots and come out as values; the base stays what it was.

`attach` -> `Bank`; `Bank.detach` gives back the model that was there: same modules, same bytes. This module knows sites and slots, not
what a layer computes, no files and no architectures.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from weft.adapter import Adapter, Provenance
from weft.core import loading, routes
from weft.core.filling import loaded_slot, snapshot, start_slot, to_cpu
from weft.core.inits import initialise
from weft.core.members import FlatSites, Layout, Member, flatten
from weft.core.norms import has_statistics
from weft.core.parameters import lazy_weight
from weft.core.placing import Ground, child_key, ends_in_bias, state_of
from weft.core.pool import Pool
from weft.core.resizing import Resize, Swap, resize_slot
from weft.core.routes import Entry, Route
from weft.core.site import Site
from weft.core.sites import SiteMap, find_sites
from weft.core.slots import Placed, Slot, hold, let_go, slot_key
from weft.core.starts import Start
from weft.core.tree import Node, by_path, walk
from weft.errors import BankError, did_you_mean, some_names
from weft.identity import Fingerprint, fingerprint
from weft.spec import LoraSpec

__all__ = ["Bank", "attach"]

Starts = dict[str, Start]


def attach(
    model: nn.Module,
    specs: Mapping[str, LoraSpec] | LoraSpec,
    *,
    batches: Iterable[Mapping[str, Any]] | None = None,
    seed: int | None = None,
) -> Bank:
    """Hang trainable adapters on a base; the first one is in use.

    Args:
        model: any module tree. Its parameters are frozen until `Bank.detach`, its bytes never change.
        specs: a spec by adapter name (one spec alone is called ``"default"``). May be empty: adapters can be loaded later.
        batches: model inputs with labels, for initialisations that look at data (``"eva"``, ``"lora_ga"``).
        seed: of the random factors; None: torch's own generator.

    Returns:
        The bank, also a context manager that detaches at its end.

    Raises:
        BankError: the model has a bank already.
        TargetError: a part of a spec matches nothing. Whatever is raised, the model is left as it was.
    """
    taken = next(
        (path for path, module in model.named_modules() if module.__dict__.keys() & {"_weft", "_weft_bank"}), None
    )
    if taken is not None:
        where = f"the module {taken!r} of this model belongs to" if taken else "this model has"
        raise BankError(
            f"{where} a bank already: add another adapter with bank.add(name, spec), or call bank.detach() first"
        )
    bank = Bank(model)
    named = {"default": specs} if isinstance(specs, LoraSpec) else dict(specs)
    try:
        for name, spec in named.items():
            bank.add(name, spec, batches=batches, seed=seed)
        if named:
            bank.use(next(iter(named)))
    except BaseException:
        bank.detach()
        raise
    return bank


class Bank:
    """Adapters on one running base, see `attach`.

    Attributes:
        model: the base.
        current: name of the adapter in use; None: the base.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.current: str | None = None
        self._members: dict[str, Member] = {}
        self._ground = Ground(model)
        self._pools: list[Pool] = []
        self._expected: dict[LoraSpec, frozenset[str]] = {}
        self._layouts: dict[Any, Layout] = {}
        self._fingerprints: dict[tuple[str, ...], Fingerprint] = {}
        self._part_fingerprints: dict[tuple[str, ...], Fingerprint] = {}
        self._ground.ring.moved = self._follow
        model.__dict__["_weft_bank"] = self

    def __repr__(self) -> str:
        return f"Bank({list(self._members)} on {type(self.model).__name__}, {len(self._placed)} sites, using {self.current!r})"

    def __enter__(self) -> Bank:
        return self

    def __exit__(self, *problem: object) -> None:
        self.detach()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters, in the order they came."""
        return tuple(self._members)

    @property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of the base, whatever is attached; computed once."""
        return self._fingerprint(())

    def spec(self, name: str) -> LoraSpec:
        """The spec of an adapter."""
        return self._member(name).spec

    def notes(self, name: str) -> tuple[str, ...]:
        """What the user has to know about an adapter's sites: tied weights, experts that are left out …"""
        return self._member(name).notes

    def add(
        self, name: str, spec: LoraSpec, *, batches: Iterable[Mapping[str, Any]] | None = None, seed: int | None = None
    ) -> None:
        """A new trainable adapter; it changes nothing until it is trained and used.

        Raises:
            BankError: the name is taken or unusable.
            TargetError, SpecError: see `find_sites`; a combination that a kind of layer can't have.
        """
        self.check_new(name)
        found = find_sites(self.model, spec)
        for site in found.sites:
            own = spec.at(site.path)
            loading.check_features(site, dora=own.dora, dropout=own.dropout > 0, lora_bias=own.lora_bias)
        starts = self.unrouted(
            lambda generator: initialise(found.sites, spec, generator=generator, batches=batches, model=self.model),
            seed,
        )
        slots = {site.path: start_slot(site, spec.at(site.path), starts[site.path]) for site in found.sites}
        self.install(Member(name, spec, slots, notes=found.notes), found, None)

    def load(
        self,
        name: str,
        adapter: Adapter,
        *,
        trainable: bool = False,
        allow_other_base: bool = False,
        allow_partial: bool = False,
    ) -> None:
        """Put a finished adapter into the bank, under a new name.

        Args:
            name: of the slot.
            adapter: any `Adapter`; its tensors are copied.
            trainable: train it on.
            allow_other_base: skip the comparison of fingerprints. Shapes have to agree in any case.
            allow_partial: accept an adapter that lacks sites which its own spec names on this model.

        Raises:
            BaseMismatchError: the adapter was made for another base; says what differs.
            ShapeError, KeysError, TargetError, NotFiniteError: the adapter doesn't fit; names the sites.
        """
        self.check_new(name)
        layout = self.layout_for(adapter, allow_other_base=allow_other_base, allow_partial=allow_partial)
        member = Member(
            name, adapter.spec, notes=layout.found.notes, provenance=adapter.provenance, fixed=not trainable
        )
        if trainable:
            adapter.check_finite()
            member.sites = self._trainable_slots(adapter, layout.found)
            self.install(member, layout.found, adapter)
            return
        loading.check_others_finite(adapter)
        flat = flatten(adapter, layout, self._device(layout.found))
        member.sites = FlatSites(layout, flat, adapter.spec)
        self.install(member, layout.found, adapter, False)

    def drop(self, name: str) -> None:
        """Take an adapter out; the others don't notice. If it was in use, the base is. A route that was made before keeps it."""
        member = self._member(name)
        if self.current == name:
            self.use(None)
        del self._members[name]
        for pool in self._pools:
            pool.forget(name)
        key = slot_key(name)
        for placed in (self._placed.get(path) for path in (() if member.fixed else member.sites)):
            if placed is None:
                continue
            site = placed.site
            let_go(site.module, child_key(key, site.weight_name))
        for path in member.biases:
            self._ground.drop_bias(name, path)
        for path in member.whole:
            self._ground.drop_whole(name, path)

    def use(self, name: str | None) -> None:
        """Choose the adapter of the next forwards that no route is on for; None: the base."""
        member = None if name is None else self._member(name)
        for path, placed in self._placed.items():
            placed.active = None if member is None else member.sites.get(path)
            if placed.group is not None:
                placed.group.forget()
            if placed.site.kind == "parameter":
                reader = None if placed.active is None else functools.partial(lazy_weight, placed, placed.active)
                state_of(placed.site.module).values[placed.site.weight_name] = reader
        biases = member.biases if member else {}
        for path, owner in self._ground.owners.items():
            state = state_of(owner)
            state.active_whole = state.whole.get(name) if name is not None else None
            for leaf in state.values:
                if leaf not in state.sites:
                    state.values[leaf] = biases.get(f"{path}.{leaf}" if path else leaf)
        self.current = name

    def route(
        self, entries: Entry | Sequence[Entry], *, lengths: Sequence[int] | None = None, seeds: Sequence[int] | None = None
    ) -> Route:  # fmt: skip
        """Choose adapters by row, for the forwards of this thread inside of a ``with``.

        Inside of it `use` has no say, a nested route replaces the outer one, and other threads see none of it. What runs later because of
        a forward in here (the replay of a checkpoint in a backward) has this route too. An adapter that is dropped or loaded anew meanwhile
        stays what it was in routes that were made before. A route may be entered as often as one likes; it keeps what it has gathered.

        Args:
            entries: one entry a row of the batch: a name, None for the base, or ``{name: weight, …}``, which adds ``Σ wᵢ ΔWᵢ`` exactly.
                One entry alone is for all rows. A forward may have k times as many rows as there are entries (beams, several returned
                sequences): each entry then has k rows in a row, as transformers orders them.
            lengths: tokens of each entry in a packed batch, whose inputs are (1, T, …) or (T, …) with T their sum.
            seeds: one whole number an entry. Dropout of a row then is a function of its seed, the site and the place in the row, and of
                nothing else: not of other rows, padding on the right, or how often a checkpoint computes it.

        Raises:
            BankError: an unknown name, a weight that is no finite number, lengths or seeds that don't fit; adapters whose rows can't be told
                apart at one of their sites, which is named. In the forward: a batch of another number of rows.

        Example:
            >>> with bank.route(["alice", None, "bob", {"alice": 0.7, "bob": 0.3}]):
            ...     model.generate(**batch)          # four rows, or eight with two beams
        """
        if self.model.__dict__.get("_weft_bank") is not self:
            raise BankError("this bank was detached: attach a new one")
        route = routes.parse(self._ground.ring, self._members, entries, lengths, seeds)
        self._check_route(route)
        self._ground.watch_calls()
        return route

    def pool(self) -> Pool:
        """Room for adapters that are trained together, see `weft.core.pool.Pool`."""
        pool = Pool(self)
        self._pools.append(pool)
        return pool

    def adapter(self, name: str | None = None, provenance: Provenance | None = None) -> Adapter:
        """A snapshot of an adapter as an immutable value, tensors on the CPU.

        Args:
            name: of the slot; may be left out if there is only one.
            provenance: where it comes from; its base is filled in with this one's fingerprint.
        """
        name = self._only_name() if name is None else name
        entry = self._member(name)
        factors = {path: snapshot(self._placed[path].site, slot) for path, slot in entry.sites.items()}
        whole = {
            path: {key: to_cpu(t) for key, t in module.state_dict().items()} for path, module in entry.whole.items()
        }
        came = provenance or entry.provenance or Provenance()
        came = loading.with_base(came, self._fingerprint(tuple(entry.whole)), self._towers(entry))
        spec = loading.spec_of(entry.spec, factors)
        return Adapter(spec, factors, whole, {path: to_cpu(t) for path, t in entry.biases.items()}, came)

    def named_parameters(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Trainable parameters of one adapter: (full name in the model, parameter); tied ones once."""
        entry = self._member(name)
        key = slot_key(name)
        for path, slot in entry.sites.items():
            site = self._placed[path].site
            for leaf, parameter in slot.named_parameters() if isinstance(slot, Slot) else ():
                yield f"{site.owner}.weft.{child_key(key, site.weight_name)}.{leaf}".lstrip("."), parameter
        for path, parameter in entry.biases.items():
            owner, _, leaf = path.rpartition(".")
            yield f"{owner}.weft.{key}:biases.{leaf}".lstrip("."), parameter
        seen: set[int] = set()
        for path, module in entry.whole.items():
            for leaf, parameter in module.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{path}.weft.{key}.{leaf}", parameter

    def slots(self, name: str) -> dict[str, tuple[Site, Slot]]:
        """Sites of a trainable adapter with what stands there, by path; for those who change it as a whole (`resize`).

        Raises:
            BankError: it isn't trainable by itself.
        """
        member = self._member(name)
        found = {path: (self._placed[path].site, slot) for path, slot in member.sites.items() if isinstance(slot, Slot)}
        if len(found) != len(member.sites):
            raise BankError(f"{name!r}: an adapter that is only used, or trained in a pool, has no slots of its own")
        return found

    def resize(self, name: str, changes: Mapping[str, Resize]) -> list[Swap]:
        """Give sites of a trainable adapter more, fewer or other directions, see `weft.core.resizing`.

        The parameters there are new objects: an optimizer has to take them, and can take its moments along by `Swap.moment`.
        """
        slots = self.slots(name)
        swaps = [swap for path, change in changes.items() for swap in resize_slot(*slots[path], change)]
        self.use(self.current)
        return swaps

    def detach(self) -> None:
        """Give back the model that was there: same modules, same bytes, same requires_grad, no hook. Idempotent."""
        self._ground.restore()
        self._members, self._pools = {}, []
        self.current = None
        if self.model.__dict__.get("_weft_bank") is self:
            del self.model.__dict__["_weft_bank"]

    # inside

    @property
    def _placed(self) -> dict[str, Placed]:
        return self._ground.placed

    def _member(self, name: str) -> Member:
        if name not in self._members:
            raise BankError(
                f"no adapter {name!r} in this bank.{did_you_mean(str(name), self.names)} There are: {some_names(self.names) or 'none'}"
            )
        return self._members[name]

    def _towers(self, entry: Member) -> dict[str, Fingerprint]:
        """Fingerprints of the parts of the base that an adapter has specs for, so that a part of it can be used alone."""
        found = {}
        for name in entry.spec.towers:
            without = tuple(path[len(name) + 1 :] for path in entry.whole if path.startswith(f"{name}."))
            key = (name, *without)
            if key not in self._part_fingerprints:
                tower = self.model.get_submodule(name)
                self._part_fingerprints[key] = fingerprint(tower, loading.base_weights(tower, without))
            found[name] = self._part_fingerprints[key]
        return found

    def _only_name(self) -> str:
        if len(self._members) != 1:
            raise BankError(f"which adapter? There are {len(self._members)}: {some_names(self.names)}")
        return self.names[0]

    def check_new(self, name: str) -> None:
        """Refuse a name that is taken or can't be one.

        Raises:
            BankError: says why.
        """
        if not isinstance(name, str) or not name or any(ord(letter) < 32 for letter in name):
            raise BankError(f"an adapter's name is non-empty text, got {name!r}")
        if name in self._members:
            raise BankError(
                f"this bank has an adapter {name!r} already: choose another name, or bank.drop({name!r}) first"
            )
        if self.model.__dict__.get("_weft_bank") is not self:
            raise BankError("this bank was detached: attach a new one")

    @functools.cached_property
    def _nodes(self) -> dict[str, Node]:
        return by_path(walk(self.model))

    def _expected_sites(self, spec: LoraSpec) -> frozenset[str]:
        if spec not in self._expected:
            self._expected[spec] = loading.expected_sites(self.model, spec)
        return self._expected[spec]

    def stands_for(self, base: Fingerprint, without: tuple[str, ...] = ()) -> None:
        """Say whose adapters these are, where the weights here are a quantised copy of another base's.

        Args:
            base: fingerprint of the base as it is stored. without: paths of modules that adapters replace whole.
        """
        self._fingerprints[without] = base

    def _fingerprint(self, without: tuple[str, ...]) -> Fingerprint:
        """Of the base without modules that an adapter replaces whole: a fresh head has other bytes each time."""
        if without not in self._fingerprints:
            weights = loading.base_weights(self.model, without)
            self._fingerprints[without] = fingerprint(self.model, weights)
        return self._fingerprints[without]

    def unrouted(self, initialise: Callable[[torch.Generator | None], Starts], seed: int | None) -> Starts:
        """Run an initialisation on the base alone, with a generator of its own where there is a seed."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        current = self.current
        self.use(None)
        try:
            with self._ground.ring.entered(None):
                return initialise(generator)
        finally:
            self.use(current)

    def layout_for(self, adapter: Adapter, *, allow_other_base: bool, allow_partial: bool) -> Layout:
        """Where an adapter's tensors belong in this model; looked up once for all adapters of the same shape.

        Raises:
            BaseMismatchError, ShapeError, KeysError, TargetError: as `load`.
        """
        if not allow_other_base:
            loading.check_base(adapter, self._fingerprint(tuple(adapter.modules)))
        key = (adapter.spec, allow_partial, *loading.shape_key(adapter))
        found = self._layouts.get(key)
        if found is None:
            sites = loading.locate(self._nodes, adapter)
            if not allow_partial:
                loading.check_complete(sites, self._expected_sites(adapter.spec))
            found = self._layouts[key] = Layout.of(adapter, sites)
        return found

    def _trainable_slots(self, adapter: Adapter, found: SiteMap) -> dict[str, Slot]:
        dtype = loading.factor_dtype(self.model)
        slots = {}
        for site, factors in zip(found.sites, adapter.factors.values(), strict=True):
            loading.check_features(site, dropout=adapter.spec.at(site.path).dropout > 0)
            slots[site.path] = loaded_slot(site, factors, adapter.spec.at(site.path).dropout, True, dtype)
        return slots

    def _device(self, found: SiteMap) -> torch.device:
        first = next((site.weight.device for site in found.sites), None)
        return first or next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def install(self, member: Member, found: SiteMap, adapter: Adapter | None, trainable: bool = True) -> None:
        """Put what an adapter has into the model; all or nothing. For pools; users call `add` or `load`."""
        name, key, ground = member.name, slot_key(member.name), self._ground
        ground.freeze()
        self._members[name] = member
        known = len(ground.owners)
        try:
            for site in found.sites:
                if site.path not in ground.placed:
                    ground.site(site)
                if not member.fixed:
                    slot: Any = member.sites[site.path]
                    if isinstance(slot, Slot):
                        hold(site.module, child_key(key, site.weight_name), slot)
            for path in found.biases:
                value = None if adapter is None else adapter.biases[path]
                member.biases[path] = ground.bias(path, value, key, trainable)
            tensors = None if adapter is None else adapter.modules
            member.whole = ground.whole(name, found.save_modules, tensors, trainable)
            for path, copy in member.whole.items():
                if has_statistics(copy) and member.spec.at(path).batch_norm == "adapted":
                    copy.requires_grad_(False)
            if len(ground.owners) != known:
                ground.settle()
        except BaseException:
            self.drop(name)
            raise

    def _follow(self) -> None:
        """The model goes to another device: loaded adapters go along, and the one in use is taken up there."""
        followed = [member for member in self._members.values() if member.follow()]
        if followed:
            self.use(self.current)

    def _check_route(self, route: Route) -> None:
        """Refuse rows that can't be told apart at one of their sites, before anything is computed.

        Raises:
            BankError: names the site.
        """
        if route.alone() is not None or not route.parts:
            return
        paths = {path: None for part in route.parts for member, _ in part for path in member.sites}
        for path in paths:
            placed = self._placed[path]
            if placed.site.kind == "parameter":
                route.at(placed)
            elif not route.whole and loading.sees_no_rows(path):
                raise BankError(
                    f"{path!r} is one of several experts, which see tokens without their rows: rows that differ there can't be in one batch. "
                    "Route all rows to one adapter"
                )
        for part in route.parts:
            for path in (path for member, _ in part for path in member.biases):
                owner, _, leaf = path.rpartition(".")
                state = state_of(self._ground.owners[owner])
                if not state.sites and not (leaf == "bias" and ends_in_bias(self._ground.owners[owner])):
                    raise BankError(
                        f"{path!r} is a trained bias of a {state.original.__name__}, whose place in the computation nobody knows: rows with "
                        "different biases there can't be in one batch. Route all rows to one adapter"
                    )
