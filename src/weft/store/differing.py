"""What differs between two versions: settings, base, sites, the updates themselves, metrics, tags, data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weft.adapter import Adapter
from weft.core.factors import Factors, inner
from weft.store.records import Version

__all__ = ["Difference", "difference"]


@dataclass(frozen=True)
class Difference:
    """Two versions, side by side.

    Attributes:
        same: both are the same adapter.
        facts: what differs, by name: the value of each, None where one has none.
        sites: by site that both have: ``‖ΔW₁ − ΔW₂‖ / ‖ΔW₁‖``; only sites that differ.
        only: sites that one has alone.
        relative: the same over all sites; infinite where the first has no update.
        cosine: of the two updates, over the sites that both have; None where one of them is zero.
    """

    first: Version
    second: Version
    same: bool
    facts: Mapping[str, tuple[Any, Any]]
    sites: Mapping[str, float]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    relative: float
    cosine: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"first": str(self.first), "second": str(self.second), "same": self.same, "facts": {name: list(pair) for name, pair in self.facts.items()},
                "relative": self.relative, "cosine": self.cosine, "sites": dict(self.sites), "only": [list(part) for part in self.only]}  # fmt: skip


def difference(first: Version, one: Adapter, second: Version, other: Adapter) -> Difference:
    """Compare two adapters and what the store knows of them.

    Updates are compared by r × r products, in float64; DoRA's magnitudes are not in them, and are named where they differ.
    """
    facts: dict[str, tuple[Any, Any]] = {}
    pairs: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = [
        ("", _facts(first, one), _facts(second, other)),
        ("spec.", one.spec.to_dict(), other.spec.to_dict()),
        ("metric.", first.metrics, second.metrics),
        ("tag.", first.tags, second.tags),
        ("recipe.", one.provenance.recipe or {}, other.provenance.recipe or {}),
        ("version of ", one.provenance.versions, other.provenance.versions),
    ]
    for prefix, left, right in pairs:
        for name in dict.fromkeys([*left, *right]):
            if left.get(name) != right.get(name):
                facts[f"{prefix}{name}"] = left.get(name), right.get(name)
    sites, apart, mine, theirs, product = {}, 0.0, 0.0, 0.0, 0.0
    for path in dict.fromkeys([*one.sites, *other.sites]):
        a, b = one.factors.get(path), other.factors.get(path)
        squares = (a.norm() ** 2 if a else 0.0, b.norm() ** 2 if b else 0.0)
        gap, both = _apart(a, b, squares)
        if gap <= 1e-12 * (squares[0] + squares[1]):
            gap = 0.0
        if a is not None and b is not None and gap:
            sites[path] = math.sqrt(gap / squares[0]) if squares[0] else math.inf
        apart, mine, theirs, product = apart + gap, mine + squares[0], theirs + squares[1], product + both
    only = tuple(tuple(path for path in x.sites if path not in y.factors) for x, y in ((one, other), (other, one)))
    relative = math.sqrt(apart / mine) if mine else (math.inf if apart else 0.0)
    cosine = product / math.sqrt(mine * theirs) if mine and theirs else None
    return Difference(first, second, one == other, facts, sites, (only[0], only[1]), relative, cosine)


def _apart(a: Factors | None, b: Factors | None, squares: tuple[float, float]) -> tuple[float, float]:
    """``‖ΔW₁ − ΔW₂‖²`` and ``⟨ΔW₁, ΔW₂⟩`` of one site; updates of different shapes have nothing in common."""
    both = 0.0
    if a is not None and b is not None and (a.A.shape[:-2], a.d_in, a.d_out) == (b.A.shape[:-2], b.d_in, b.d_out):
        if (a.groups, b.groups) == (1, 1):
            both = inner(a, b)
        else:
            both = float((a.delta().double() * b.delta().double()).sum())
    return max(0.0, sum(squares) - 2 * both), both


def _facts(version: Version, adapter: Adapter) -> dict[str, Any]:
    base = adapter.provenance.base
    magnitudes = sum(item.magnitude is not None for item in adapter.factors.values())
    return {
        "digest": version.digest[:12],
        "base": f"{version.base_name} {version.base[:12]}".strip() or None,
        "dtype of base": base.dtype if base else None,
        "sites": len(adapter.factors),
        "parameters": adapter.num_parameters,
        "sites with a DoRA magnitude": magnitudes or None,
        "modules": ", ".join(adapter.modules) or None,
        "parents": ", ".join(f"{digest[:12]}" for digest, _ in version.parents) or None,
        "data": ", ".join(f"{item['source']} {item['digest'][:12]}".strip() for item in version.data) or None,
        "note": version.note or None,
    }
