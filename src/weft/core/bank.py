"""Bank: what hangs on a running base. Adapters go in as slots and come out as values; the base stays what it was.

`attach` -> `Bank`; `Bank.detach` gives back the model that was there: same modules, same bytes. This module knows sites and slots, not
what a layer computes, no files and no architectures.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapter import Adapter, Provenance
from weft.core import loading
from weft.core.attention import place_attention
from weft.core.filling import loaded_slot, snapshot, start_slot, to_cpu
from weft.core.groups import form_groups
from weft.core.inits import initialise
from weft.core.layers import mixin_for
from weft.core.parameters import lazy_weight
from weft.core.sites import Site, SiteMap, find_sites
from weft.core.slots import Placed, Slot, State, hold, let_go, place, restore, slot_key
from weft.core.surroundings import Surroundings
from weft.core.tree import Node, by_path, walk
from weft.core.whole import copy_whole, place_whole, tie_copies
from weft.errors import BankError, did_you_mean, some_names
from weft.identity import Fingerprint, fingerprint
from weft.spec import LoraSpec

__all__ = ["Bank", "attach"]


@dataclass(eq=False)
class _Entry:
    """One adapter in the bank."""

    spec: LoraSpec
    sites: dict[str, Slot] = field(default_factory=dict)
    biases: dict[str, nn.Parameter] = field(default_factory=dict)
    whole: dict[str, nn.Module] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    provenance: Provenance = field(default_factory=Provenance)


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
        self._entries: dict[str, _Entry] = {}
        self._placed: dict[str, Placed] = {}
        self._owners: dict[str, nn.Module] = {}
        self._blocks: list[nn.Module] = []
        self._expected: dict[LoraSpec, frozenset[str]] = {}
        self._fingerprints: dict[tuple[str, ...], Fingerprint] = {}
        self._surroundings = Surroundings(model)
        model.__dict__["_weft_bank"] = self

    def __repr__(self) -> str:
        return f"Bank({list(self._entries)} on {type(self.model).__name__}, {len(self._placed)} sites, using {self.current!r})"

    def __enter__(self) -> Bank:
        return self

    def __exit__(self, *problem: object) -> None:
        self.detach()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters, in the order they came."""
        return tuple(self._entries)

    @property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of the base, whatever is attached; computed once."""
        return self._fingerprint(())

    def spec(self, name: str) -> LoraSpec:
        """The spec of an adapter."""
        return self._entry(name).spec

    def notes(self, name: str) -> tuple[str, ...]:
        """What the user has to know about an adapter's sites: tied weights, experts that are left out …"""
        return self._entry(name).notes

    def add(
        self, name: str, spec: LoraSpec, *, batches: Iterable[Mapping[str, Any]] | None = None, seed: int | None = None
    ) -> None:
        """A new trainable adapter; it changes nothing until it is trained and used.

        Raises:
            BankError: the name is taken or unusable.
            TargetError, SpecError: see `find_sites`; a combination that a kind of layer can't have.
        """
        self._check_new(name)
        found = find_sites(self.model, spec)
        for site in found.sites:
            loading.check_features(site, dora=spec.dora, dropout=spec.dropout > 0, lora_bias=spec.lora_bias)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        current, self_state = self.current, self.use
        self_state(None)
        try:
            starts = initialise(found.sites, spec, generator=generator, batches=batches, model=self.model)
        finally:
            self_state(current)
        slots = {site.path: start_slot(site, spec, starts[site.path]) for site in found.sites}
        self._install(name, _Entry(spec, slots, notes=found.notes), found, None)

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
        self._check_new(name)
        adapter.check_finite()
        if not allow_other_base:
            loading.check_base(adapter, self._fingerprint(tuple(adapter.modules)))
        found = loading.locate(self._nodes, adapter)
        if not allow_partial:
            loading.check_complete(found, self._expected_sites(adapter.spec))
        dtype = loading.factor_dtype(self.model)
        slots = {}
        for path, site in zip(adapter.factors, found.sites, strict=True):
            loading.check_features(site, dropout=trainable and adapter.spec.dropout > 0)
            slots[site.path] = loaded_slot(site, adapter.factors[path], adapter.spec.dropout, trainable, dtype)
        entry = _Entry(adapter.spec, slots, notes=found.notes, provenance=adapter.provenance)
        self._install(name, entry, found, adapter, trainable)

    def drop(self, name: str) -> None:
        """Take an adapter out; the others don't notice. If it was in use, the base is."""
        entry = self._entry(name)
        if self.current == name:
            self.use(None)
        del self._entries[name]
        key = slot_key(name)
        for path in entry.sites:
            placed = self._placed.get(path)
            if placed is not None and placed.slots.pop(name, None) is not None:
                let_go(placed.site.module, _child(key, placed.site.weight_name))
        for path in entry.biases:
            let_go(self._owners[path.rpartition(".")[0]], f"{key}:biases")
        for path in entry.whole:
            owner = self._owners.get(path)
            if owner is not None and _state(owner).whole.pop(name, None) is not None:
                let_go(owner, key)

    def use(self, name: str | None) -> None:
        """Choose the adapter of the next forwards; None: the base."""
        entry = None if name is None else self._entry(name)
        for placed in self._placed.values():
            placed.active = placed.slots.get(name) if name is not None else None
            if placed.group is not None:
                placed.group.forget()
            if placed.site.kind == "parameter":
                slot = placed.active
                reader = None if slot is None else functools.partial(lazy_weight, placed, slot)
                _state(placed.site.module).values[placed.site.weight_name] = reader
        biases = entry.biases if entry else {}
        for path, owner in self._owners.items():
            state = _state(owner)
            state.active_whole = state.whole.get(name) if name is not None else None
            for leaf in state.values:
                if leaf not in state.sites:
                    state.values[leaf] = biases.get(f"{path}.{leaf}" if path else leaf)
        self.current = name

    def adapter(self, name: str | None = None, provenance: Provenance | None = None) -> Adapter:
        """A snapshot of an adapter as an immutable value, tensors on the CPU.

        Args:
            name: of the slot; may be left out if there is only one.
            provenance: where it comes from; its base is filled in with this one's fingerprint.
        """
        name = self._only_name() if name is None else name
        entry = self._entry(name)
        factors = {path: snapshot(self._placed[path].site, slot) for path, slot in entry.sites.items()}
        whole = {
            path: {key: to_cpu(t) for key, t in module.state_dict().items()} for path, module in entry.whole.items()
        }
        came = provenance or entry.provenance
        came = loading.with_base(came, self._fingerprint(tuple(entry.whole)))
        spec = loading.spec_of(entry.spec, factors)
        return Adapter(spec, factors, whole, {path: to_cpu(t) for path, t in entry.biases.items()}, came)

    def named_parameters(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Trainable parameters of one adapter: (full name in the model, parameter); tied ones once."""
        entry = self._entry(name)
        key = slot_key(name)
        for path, slot in entry.sites.items():
            site = self._placed[path].site
            for leaf, parameter in slot.named_parameters():
                yield f"{site.owner}.weft.{_child(key, site.weight_name)}.{leaf}".lstrip("."), parameter
        for path, parameter in entry.biases.items():
            owner, _, leaf = path.rpartition(".")
            yield f"{owner}.weft.{key}:biases.{leaf}".lstrip("."), parameter
        seen: set[int] = set()
        for path, module in entry.whole.items():
            for leaf, parameter in module.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{path}.weft.{key}.{leaf}", parameter

    def detach(self) -> None:
        """Give back the model that was there: same modules, same bytes, same requires_grad, no hook. Idempotent."""
        for module in (*self._owners.values(), *self._blocks):
            restore(module)
        self._owners, self._blocks, self._placed, self._entries = {}, [], {}, {}
        self.current = None
        self._surroundings.restore()
        if self.model.__dict__.get("_weft_bank") is self:
            del self.model.__dict__["_weft_bank"]

    # inside

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise BankError(
                f"no adapter {name!r} in this bank.{did_you_mean(str(name), self.names)} There are: {some_names(self.names) or 'none'}"
            )
        return self._entries[name]

    def _only_name(self) -> str:
        if len(self._entries) != 1:
            raise BankError(f"which adapter? There are {len(self._entries)}: {some_names(self.names)}")
        return self.names[0]

    def _check_new(self, name: str) -> None:
        if not isinstance(name, str) or not name or any(ord(letter) < 32 for letter in name):
            raise BankError(f"an adapter's name is non-empty text, got {name!r}")
        if name in self._entries:
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

    def _fingerprint(self, without: tuple[str, ...]) -> Fingerprint:
        """Of the base without modules that an adapter replaces whole: a fresh head has other bytes each time."""
        if without not in self._fingerprints:
            weights = loading.base_weights(self.model, without)
            self._fingerprints[without] = fingerprint(self.model, weights)
        return self._fingerprints[without]

    def _install(
        self, name: str, entry: _Entry, found: SiteMap, adapter: Adapter | None, trainable: bool = True
    ) -> None:
        """Put slots, biases and whole modules into the model; all or nothing."""
        key = slot_key(name)
        self._surroundings.freeze()
        self._entries[name] = entry
        try:
            for site in found.sites:
                self._place_site(site, entry.sites[site.path], name)
            for path in found.biases:
                value = None if adapter is None else adapter.biases[path]
                entry.biases[path] = self._place_bias(path, value, key, trainable)
            self._place_whole(name, entry, found.save_modules, adapter, trainable)
            self._regroup()
        except BaseException:
            self.drop(name)
            raise
        self._surroundings.guard(self._owners)

    def _place_site(self, site: Site, slot: Slot, name: str) -> None:
        module = site.module
        if site.path not in self._placed:
            state = place(
                module, mixin_for(site.kind), (site.weight_name,) if site.kind == "parameter" else (), site.path
            )
            self._owners.setdefault(site.owner, module)
            if site.kind == "attention" or site.host is not None:
                host_path = site.owner if site.host is None else site.host
                self._owners.setdefault(host_path, place_attention(self.model.get_submodule(host_path), host_path))
            self._placed[site.path] = state.sites[site.weight_name] = Placed(site)
        hold(module, _child(slot_key(name), site.weight_name), slot)
        self._placed[site.path].slots[name] = slot

    def _place_bias(self, path: str, value: Tensor | None, key: str, trainable: bool) -> nn.Parameter:
        owner_path, _, leaf = path.rpartition(".")
        owner = self.model.get_submodule(owner_path)
        base = owner._parameters[leaf]
        assert base is not None
        place(owner, None, (leaf,))
        self._owners.setdefault(owner_path, owner)
        like = base if value is None else value
        mine = nn.Parameter(like.detach().to(base.device, loading.wide(base.dtype)).clone(), requires_grad=trainable)
        holder = owner._modules.get("weft")
        child = holder._modules.get(f"{key}:biases") if holder is not None else None
        if child is None:
            child = nn.Module()
            hold(owner, f"{key}:biases", child)
        child.register_parameter(leaf, mine)
        return mine

    def _place_whole(
        self, name: str, entry: _Entry, paths: tuple[str, ...], adapter: Adapter | None, trainable: bool
    ) -> None:
        pairs = []
        for path in paths:
            module = self.model.get_submodule(path)
            clone = copy_whole(module).requires_grad_(trainable)
            if adapter is not None:
                loading.fill_whole(clone, adapter.modules[path], path)
            pairs.append((module, clone))
            entry.whole[path] = clone
        tie_copies(pairs)
        for path, (module, clone) in zip(paths, pairs, strict=True):
            place_whole(module, path).whole[name] = clone
            self._owners.setdefault(path, module)
            hold(module, slot_key(name), clone)

    def _regroup(self) -> None:
        parents: dict[str, dict[str, tuple[nn.Module, Placed]]] = {}
        for path, placed in self._placed.items():
            if placed.site.kind == "linear" and placed.site.host is None:
                parent, _, child = path.rpartition(".")
                parents.setdefault(parent, {})[child] = (placed.site.module, placed)
        known = {id(block) for block in self._blocks}
        self._blocks += [block for block in form_groups(self.model, parents) if id(block) not in known]


def _state(module: nn.Module) -> State:
    state = module.__dict__["_weft"]
    assert isinstance(state, State)
    return state


def _child(key: str, weight_name: str) -> str:
    return key if weight_name == "weight" else f"{key}:{weight_name}"
