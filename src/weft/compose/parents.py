"""The adapters that go into a mixture, with their weights: read, named, and checked against each other.

This module does not know methods.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.adapter import Adapter
from weft.core import loading
from weft.core.patterns import unmatched_patterns
from weft.errors import BaseMismatchError, MixError, did_you_mean, some_names
from weft.identity import Fingerprint

__all__ = ["DEFAULT", "AdapterLike", "Parent", "Weight", "all_sites", "check_bases", "read_parents"]

AdapterLike = Adapter | str | os.PathLike[str]
Weight = float | Mapping[str, float]

DEFAULT = "default"
"""The key of a weight by pattern that is meant for all sites which no pattern matches."""


@dataclass(frozen=True, eq=False)
class Parent:
    """One adapter of a mixture.

    Attributes:
        weight: one number; or numbers by pattern, see `weft.combine`.
        name: for messages and reports: what the caller called it.
    """

    adapter: Adapter
    weight: Weight
    name: str

    def weight_at(self, path: str) -> float:
        """The weight of a site.

        Raises:
            MixError: weights by pattern, none of which matches the site, and no default.
        """
        if not isinstance(self.weight, Mapping):
            return self.weight
        found = _first(tuple(self.weight), path)
        if found is None:
            raise MixError(
                f"the weights of {self.name!r} say nothing about its site {path!r}: add a pattern for it, or {DEFAULT!r}: a number for "
                "all that no pattern matches"
            )
        return self.weight[found]

    @property
    def is_idle(self) -> bool:
        """Whether all of its weights are 0."""
        return not any(self.weight.values()) if isinstance(self.weight, Mapping) else self.weight == 0

    def facts(self) -> dict[str, Any]:
        """What the provenance of a mixture says of it."""
        weight = dict(self.weight) if isinstance(self.weight, Mapping) else self.weight
        return {"digest": self.adapter.digest, "name": self.name, "weight": weight}


@functools.lru_cache(maxsize=4096)
def _first(patterns: tuple[str, ...], path: str) -> str | None:
    found = (pattern for pattern in patterns if pattern != DEFAULT and re.match(rf"(.*\.)?({pattern})$", path))
    return next(found, DEFAULT if DEFAULT in patterns else None)


def read_parents(
    adapters: Iterable[Any], weights: Sequence[Weight] | None = None, *, fewest: int = 1
) -> tuple[Parent, ...]:
    """Adapters and weights as a caller gives them.

    Args:
        adapters: adapters or paths; or pairs of one and its weight.
        weights: as many; None: those of the pairs, 1 without.
        fewest: how many there have to be.

    Raises:
        MixError: too few adapters, one that stands twice, a list of weights of another length, a weight that is no finite number, a
            pattern that matches nothing.
        FormatError: a path that can't be read as an adapter.
    """
    if isinstance(adapters, Adapter | str | os.PathLike) or not isinstance(adapters, Iterable):
        raise MixError(
            f"expected a list of adapters, or of pairs of adapter and weight; got one {type(adapters).__name__}"
        )
    items = list(adapters)
    pairs = [item if _is_pair(item) else (item, None) for item in items]
    if weights is not None:
        if any(_is_pair(item) for item in items):
            raise MixError("weights stand in the pairs and in weights=[…]: give them once")
        given = list(weights)
        if len(given) != len(items):
            raise MixError(f"{len(items)} adapters and {len(given)} weights: expected one weight for each adapter")
        pairs = [(item, weight) for item, weight in zip(items, given, strict=True)]
    if len(pairs) < fewest:
        raise MixError(f"got {len(pairs)} adapters; expected at least {fewest}")
    read = [_adapter(item) for item, _ in pairs]
    names = _names([item for item, _ in pairs], read)
    found = tuple(
        Parent(adapter, _weight(1.0 if weight is None else weight, name), name)
        for adapter, (_, weight), name in zip(read, pairs, names, strict=True)
    )
    _check_different(found)
    for parent in found:
        _check_patterns(parent)
    return found


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], Adapter | str | os.PathLike)


def _adapter(item: Any) -> Adapter:
    if isinstance(item, Adapter):
        return item
    if not isinstance(item, str | os.PathLike):
        raise MixError(
            f"expected an adapter or its path, perhaps with a weight; got {type(item).__name__}: {str(item)[:80]}"
        )
    from weft.formats import load

    return load(item)


def _names(given: Sequence[Any], read: Sequence[Adapter]) -> list[str]:
    """What the caller wrote; adapters without a name are called by their digest."""
    return [
        os.fspath(item) if not isinstance(item, Adapter) else adapter.digest[:12]
        for item, adapter in zip(given, read, strict=True)
    ]


def _weight(weight: Any, name: str) -> Weight:
    if isinstance(weight, Mapping):
        return {str(pattern): _number(value, f"{name!r} at {pattern!r}") for pattern, value in weight.items()}
    return _number(weight, repr(name))


def _number(value: Any, whose: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise MixError(f"the weight of {whose} is {value!r}; expected a finite number")
    return float(value)


def _check_different(parents: Sequence[Parent]) -> None:
    seen: dict[str, str] = {}
    for parent in parents:
        digest = parent.adapter.digest
        if digest in seen:
            raise MixError(
                f"{seen[digest]!r} and {parent.name!r} are the same adapter ({digest[:12]}): give it once, with the sum of the weights"
            )
        seen[digest] = parent.name


def _check_patterns(parent: Parent) -> None:
    """A pattern that is no expression, or that matches no site, does silently nothing."""
    if not isinstance(parent.weight, Mapping):
        return
    patterns = {pattern: value for pattern, value in parent.weight.items() if pattern != DEFAULT}
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as problem:
            raise MixError(f"a weight of {parent.name!r}: {pattern!r} is no regular expression: {problem}") from None
    lost = unmatched_patterns(patterns, parent.adapter.sites)
    if lost:
        leaves = {path.rpartition(".")[2] for path in parent.adapter.sites}
        raise MixError(
            f"a weight of {parent.name!r}: {lost[0]!r} matches the end of none of its {len(parent.adapter.sites)} sites."
            f"{did_you_mean(lost[0], [*leaves, *parent.adapter.sites])} They are {some_names(parent.adapter.sites, 3)}"
        )


def all_sites(parents: Sequence[Parent]) -> tuple[str, ...]:
    """The sites of all parents, each once; in the order of the model as far as the parents tell it."""
    longest = max(parents, key=lambda parent: len(parent.adapter.sites), default=None)
    ordered = dict.fromkeys(longest.adapter.sites if longest else ())
    for parent in parents:
        ordered |= dict.fromkeys(parent.adapter.sites)
    return tuple(ordered)


def check_bases(parents: Sequence[Parent], allow_other_base: bool = False) -> list[str]:
    """Refuse adapters of different bases; what can't be compared is said in notes.

    Raises:
        BaseMismatchError: names the two adapters, and what differs.
    """
    if allow_other_base:
        return []
    notes = []
    first = parents[0]
    for other in parents[1:]:
        mine, theirs = first.adapter.provenance, other.adapter.provenance
        who = f"{first.name!r} and {other.name!r}"
        if mine.base is not None and theirs.base is not None:
            _check_fingerprints(first, other, mine.base)
            continue
        left, right = (_last_part(came.base.name if came.base else came.base_name) for came in (mine, theirs))
        if left and right and left != right:
            raise BaseMismatchError(
                f"{who} name different bases: {left} and {right}. Updates of different bases don't add; pass allow_other_base=True (--allow-other-base) if "
                "you know that these are one base"
            )
        notes.append(f"{who}: not both say the fingerprint of their base; names and shapes were compared, not weights")
    return notes


def _check_fingerprints(first: Parent, other: Parent, base: Fingerprint) -> None:
    try:
        loading.check_base(other.adapter, base)
    except BaseMismatchError as problem:
        why = ""
        if set(first.adapter.modules) != set(other.adapter.modules):
            why = (
                " They train different modules whole, which the fingerprints leave out, so these can't be compared: "
                "pass base=… to compare both with it."
            )
        detail = str(problem).partition(": ")[2].partition(". Load the base")[0]
        raise BaseMismatchError(
            f"{first.name!r} and {other.name!r} were made for different bases: {detail}.{why} Updates of different bases don't add; pass "
            "allow_other_base=True (--allow-other-base) if you know that they are interchangeable"
        ) from None


def _last_part(name: str | None) -> str | None:
    return name.rstrip("/").rpartition("/")[2].lower() if name else None
