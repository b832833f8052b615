"""Adapter: the common currency. Training makes it, mixing maps it, a store keeps it, a server loads it.

An immutable value. It knows no model and no file format; `save` hands itself to `weft.formats`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from weft.core.factors import Factors
from weft.errors import BaseMismatchError, NotFiniteError, SpecError, TargetError, did_you_mean
from weft.identity import Fingerprint, TensorHashes, digest_of
from weft.spec import LoraSpec

__all__ = ["Adapter", "Provenance"]


@dataclass(frozen=True)
class Provenance:
    """Where an adapter comes from. Plain data; not part of the digest, except for the base.

    Attributes:
        base: fingerprint of the base; None where the file didn't say (an adapter that another tool wrote).
        base_name: what such a file calls its base: a name, no proof.
        data: one entry a data set: ``{"source", "digest", "examples"}``.
        recipe: the recipe that trained it.
        parents: digests (and weights) of the adapters it was made from.
        versions: of weft, torch, transformers, Python.
        evaluation: metrics by name, e.g. ``{"eval_loss": 1.83}``.
        notes: what a reader of the file had to say (unknown fields, keys that were mapped).
        mixture: of an adapter that was mixed or shrunk: method, settings, and the error by site.
        towers: fingerprints of the parts of the base, where the spec is one by part.
    """

    base: Fingerprint | None = None
    base_name: str | None = None
    data: tuple[Mapping[str, Any], ...] = ()
    recipe: Mapping[str, Any] | None = None
    parents: tuple[Mapping[str, Any], ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    evaluation: Mapping[str, float] = field(default_factory=dict)
    created: str | None = None
    notes: tuple[str, ...] = ()
    mixture: Mapping[str, Any] | None = None
    towers: Mapping[str, Fingerprint] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        values["base"] = self.base.to_dict() if self.base else None
        values["towers"] = {name: part.to_dict() for name, part in self.towers.items()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Provenance:
        """The inverse of `to_dict`; keys of later versions are dropped."""
        known = {item.name: values[item.name] for item in dataclasses.fields(cls) if item.name in values}
        base = known.get("base")
        known["base"] = Fingerprint.from_dict(base) if base else None
        known["towers"] = {name: Fingerprint.from_dict(part) for name, part in (known.get("towers") or {}).items()}
        for name in ("data", "parents", "notes"):
            known[name] = tuple(known.get(name) or ())
        return cls(**known)


@dataclass(frozen=True, eq=False)
class Adapter:
    """An immutable LoRA adapter. Two adapters are equal if their digests are.

    Attributes:
        spec: what was adapted and how.
        factors: by site (dotted path in the base), see `Factors`.
        modules: modules trained whole: ``{"score": {"weight": tensor}}``.
        biases: biases of the base trained with the adapter, by full parameter path.
        provenance: base, data, recipe, parents, versions, evaluation.
        proof: golden inputs and outputs, by which a later load can prove that the adapter is applied: ``input_ids``
            (n, t) and ``logits`` (n, vocabulary) at the last position, float32.
    """

    spec: LoraSpec
    factors: Mapping[str, Factors]
    modules: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)
    proof: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("factors", "biases", "proof"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        whole = {path: MappingProxyType(dict(tensors)) for path, tensors in self.modules.items()}
        object.__setattr__(self, "modules", MappingProxyType(whole))

    def __repr__(self) -> str:
        return f"Adapter({len(self.factors)} sites, rank {self.ranks()}, {self.num_parameters:,} parameters, {self.digest[:12]})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Adapter) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def sites(self) -> tuple[str, ...]:
        """Paths of the adapted sites, in the order of the model."""
        return tuple(self.factors)

    @property
    def num_parameters(self) -> int:
        """All numbers that the adapter carries: factors, modules trained whole, biases."""
        whole = sum(tensor.numel() for module in self.modules.values() for tensor in module.values())
        return (
            whole + sum(f.num_parameters for f in self.factors.values()) + sum(b.numel() for b in self.biases.values())
        )

    @functools.cached_property
    def digest(self) -> str:
        """Content address: sha256 over spec, factors, modules, biases and the base's fingerprint.

        Of the spec only what differs from the defaults: a field that a later version adds changes no digest.
        """
        return self.digest_with(None)

    def digest_with(self, hashes: TensorHashes | None) -> str:
        """`digest`, known or computed now, where the tensors' hashes are of use to others too."""
        if "digest" not in self.__dict__:
            base = self.provenance.base
            scales = {path: [item.scale, item.kind, list(item.kernel)] for path, item in self.factors.items()}
            facts = {
                "spec": self.spec.changes(),
                "scales": scales,
                "base": [base.layout, base.weights] if base else None,
            }
            self.__dict__["digest"] = digest_of(self.tensors(), facts, hashes)
        return str(self.__dict__["digest"])

    def ranks(self) -> str:
        """Rank, or range of ranks, for people: ``"8"`` or ``"2-16"``."""
        found = sorted({item.rank for item in self.factors.values()})
        return "none" if not found else str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}"

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a unique name: ``<site>.lora_A``, ``<module>.<name>``, ``<path of a bias>``."""
        named = {f"{path}.{name}": t for path, item in self.factors.items() for name, t in item.tensors().items()}
        named |= {f"{path}.{name}": t for path, module in self.modules.items() for name, t in module.items()}
        return named | dict(self.biases)

    def delta(self, site: str) -> Tensor:
        """Dense update of one site, see `Factors.delta`: (d_out, d_in).

        Raises:
            TargetError: the adapter has no such site; names near ones.
        """
        if site not in self.factors:
            raise TargetError(
                f"this adapter has no site {site!r}.{did_you_mean(site, self.sites)} It has {len(self.sites)} sites"
            )
        return self.factors[site].delta()

    @property
    def towers(self) -> tuple[str, ...]:
        """Parts of the base that have a spec each, see `LoraSpec.towers`; empty where there is one spec."""
        return tuple(self.spec.towers)

    def tower(self, name: str) -> Adapter:
        """What this adapter does to one part of the base: an adapter for that part alone, with its paths.

        Raises:
            TargetError: there is no such tower; names near ones.
        """
        if name not in self.spec.towers:
            there = f"It has {', '.join(self.towers)}" if self.towers else "Its spec is one for the whole base"
            raise TargetError(f"this adapter has no tower {name!r}.{did_you_mean(str(name), self.towers)} {there}")
        came = dataclasses.replace(
            self.provenance, base=self.provenance.towers.get(name), towers={}, evaluation={}, mixture=None
        )
        part = [_inside(name, values) for values in (self.factors, self.modules, self.biases)]
        return Adapter(self.spec.towers[name], part[0], part[1], part[2], came)

    def with_tower(self, name: str, part: Adapter) -> Adapter:
        """This adapter with another adapter in the place of one tower's: a mixed one, a shrunk one, one trained alone.

        Args:
            name: of the tower; a new one is added.
            part: an adapter of that part of the base.

        Raises:
            SpecError: towers that stand in each other. BaseMismatchError: ``part`` is for another base than the tower's.
        """
        known, here = self.provenance.towers.get(name), part.provenance.base
        if known is not None and here is not None and known.layout != here.layout:
            raise BaseMismatchError(
                f"tower {name!r} is a {known.architecture}, and the part is for another base: {'; '.join(here.differences(known))}"
            )
        if self.factors and not self.spec.towers:
            raise SpecError(
                "with_tower: this adapter has one spec for the whole base; join towers with Adapter.of_towers"
            )
        spec = self.spec if self.spec.towers else LoraSpec(save_modules=self.spec.save_modules)
        towers = {**spec.towers, name: part.spec}
        whole = [_outside(name, values) for values in (self.factors, self.modules, self.biases)]
        mine = [_as_inside(name, values) for values in (part.factors, part.modules, part.biases)]
        bases = {**self.provenance.towers, **({name: here} if here else {})}
        came = dataclasses.replace(self.provenance, towers=bases, evaluation={})
        return Adapter(spec.replace(towers=towers), whole[0] | mine[0], whole[1] | mine[1], whole[2] | mine[2], came)

    @classmethod
    def of_towers(cls, parts: Mapping[str, Adapter], rest: Adapter | None = None) -> Adapter:
        """One adapter of several parts of a base.

        Args:
            parts: an adapter by the path of its part.
            rest: what else belongs to it: an adapter of the whole whose modules outside of the parts, and whose provenance, are taken.

        Raises:
            SpecError: no part; parts that stand in each other.

        Example:
            >>> halves = {name: weft.shrink(both.tower(name), rank=4) for name in both.towers}  # doctest: +SKIP
            >>> small = weft.Adapter.of_towers(halves, both)  # doctest: +SKIP
        """
        if not parts:
            raise SpecError("Adapter.of_towers: got no part; expected a mapping of parts of the base to adapters")
        outer = {} if rest is None else {p: m for p, m in rest.modules.items() if rest.spec.tower_of(p) is None}
        came = Provenance() if rest is None else dataclasses.replace(rest.provenance, evaluation={})
        spec = LoraSpec(towers={name: part.spec for name, part in parts.items()}, save_modules=tuple(outer))
        joined = cls(spec, {}, outer, {}, came)
        for name, part in parts.items():
            joined = joined.with_tower(name, part)
        return joined

    def map(self, change: Callable[[Tensor], Tensor]) -> Adapter:
        """A copy with ``change(tensor)`` in the place of every tensor, e.g. ``adapter.map(lambda t: t.half())``."""
        return dataclasses.replace(
            self,
            factors={path: item.map(change) for path, item in self.factors.items()},
            modules={path: {name: change(t) for name, t in module.items()} for path, module in self.modules.items()},
            biases={name: change(t) for name, t in self.biases.items()},
        )

    def replace(self, **changes: Any) -> Adapter:
        """A copy with some attributes changed."""
        return dataclasses.replace(self, **changes)

    def check_finite(self) -> None:
        """Refuse NaN and infinity anywhere.

        Raises:
            NotFiniteError: names the site and the tensor.
        """
        for path, item in self.factors.items():
            item.check_finite(path)
        whole = {f"{path}.{name}": t for path, module in self.modules.items() for name, t in module.items()}
        for path, tensor in (*whole.items(), *self.biases.items()):
            if not bool(torch.isfinite(tensor).all()):
                raise NotFiniteError(
                    f"{path}: the adapter's trained copy has NaN or infinite values; take an earlier checkpoint"
                )

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False, for_peft: bool = True) -> Path:
        """Write a directory that `weft.load` and PEFT's ``PeftModel.from_pretrained`` read; beside, then renamed.

        Args:
            directory: where to; must not hold an adapter, unless ``overwrite``.
            overwrite: replace an adapter that stands there. Other files in the directory are left alone.
            for_peft: False keeps what PEFT's files can't express: the directory is then read by weft alone.

        Raises:
            FormatError: the directory holds an adapter already.
            UnsupportedError: a feature that PEFT's files can't express; names it and the site.
        """
        from weft.formats.peft import write  # the one upward import: a value that can save itself

        return write(self, directory, overwrite=overwrite, for_peft=for_peft)


def _inside(tower: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What is in a tower, by its paths there."""
    return {path[len(tower) + 1 :]: value for path, value in values.items() if path.startswith(f"{tower}.")}


def _outside(tower: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {path: value for path, value in values.items() if not path.startswith(f"{tower}.")}


def _as_inside(tower: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{tower}.{path}": value for path, value in values.items()}
