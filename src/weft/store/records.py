"""What the store says about adapters: versions, moves of aliases, what gc and verify found. Plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from weft.errors import StoreError
from weft.store.names import check_name, check_text

__all__ = [
    "Collected",
    "Draft",
    "Move",
    "Verified",
    "Version",
    "checked_metrics",
    "checked_tags",
    "is_metric",
    "moment",
]

MAX_TAGS = 64


@dataclass(frozen=True)
class Version:
    """One version of a name: it never changes. ``str(version)`` is a reference, as in ``medical@3``.

    Attributes:
        owner: whose it is.
        number: from 1.
        digest: of the adapter.
        created: seconds since 1970.
        aliases: that point to it now.
        tags: labels; they can change.
        metrics: by name, from the adapter's evaluation or given when it was put; metrics can be added, never changed.
        base: sha256 of the base's weights; base_name: what it was called; both empty where nothing is known.
        rank: the largest.
        bytes: of its files.
        parents: digests and weights of the adapters that it was made from.
        data: digest, source and role of each data set.
        is_new: False where `Store.put` found the newest version to be the same.
    """

    owner: str
    name: str
    number: int
    digest: str
    created: float
    aliases: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    base: str = ""
    base_name: str = ""
    architecture: str = ""
    rank: int = 0
    sites: int = 0
    parameters: int = 0
    bytes: int = 0
    parents: tuple[tuple[str, float | None], ...] = ()
    data: tuple[Mapping[str, str], ...] = ()
    is_new: bool = True
    address: str = field(default="", repr=False)
    provenance: str = field(default="", repr=False)

    def __str__(self) -> str:
        return f"{self.name}@{self.number}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        facts = {name: value for name, value in asdict(self).items() if name not in ("address", "provenance", "is_new")}
        facts["parents"] = [{"digest": digest, "weight": weight} for digest, weight in self.parents]
        return facts | {
            "ref": str(self),
            "created": moment(self.created),
            "aliases": list(self.aliases),
            "data": list(self.data),
        }


@dataclass(frozen=True)
class Move:
    """An alias went from one version to another.

    Attributes:
        kind: ``promote``, ``rollback`` or ``remove``.
        before: number of the version that it pointed to; None: to none.
        required: the requirement that was met.
        undone: a later rollback took it back.
    """

    alias: str
    kind: str
    before: int | None
    after: int | None
    at: float
    by: str = ""
    required: str = ""
    undone: bool = False


@dataclass(frozen=True)
class Collected:
    """What `Store.gc` removed, or would remove.

    Attributes:
        blobs: digests; bytes: their size.
        leftovers: files of writers that died.
        kept: blobs that nothing refers to, but that are younger than the grace time.
    """

    blobs: tuple[str, ...]
    bytes: int
    leftovers: int
    kept: int


@dataclass(frozen=True)
class Verified:
    """What `Store.verify` found.

    Attributes:
        blobs: how many were hashed; bytes: their size.
        problems: one line each; empty: all is well.
        leftovers: blobs that no version refers to; gc removes them in its time.
    """

    blobs: int
    bytes: int
    problems: tuple[str, ...]
    leftovers: int

    @property
    def ok(self) -> bool:
        """Whether all is as it was written."""
        return not self.problems


@dataclass(frozen=True)
class Draft:
    """What the index is to say of an adapter.

    Attributes:
        columns: of the table of versions.
    """

    columns: Mapping[str, Any]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    parents: tuple[tuple[str, float | None], ...]
    data: tuple[Mapping[str, str], ...]


def checked_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags as they are kept.

    Raises:
        StoreError: too many; a key that is no name; a value that is no text.
    """
    if not isinstance(tags, Mapping):
        raise StoreError(f"tags are names and values, as in {{'domain': 'health'}}; got {type(tags).__name__}")
    if len(tags) > MAX_TAGS:
        raise StoreError(f"{len(tags):,} tags; at most {MAX_TAGS} are kept")
    return {check_name(key, "tag"): check_text(value, f"tag {key}") for key, value in tags.items()}


def checked_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics as they are kept.

    Raises:
        StoreError: a name that is none, or a value that is no finite number.
    """
    for name, value in metrics.items():
        check_name(name, "metric")
        if not is_metric(name, value):
            raise StoreError(f"metric {name}: expected a finite number, got {str(value)[:60]!r}")
    return {name: float(value) for name, value in metrics.items()}


def moment(seconds: float) -> str:
    """A time, as text in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def is_metric(name: str, value: Any) -> bool:
    """Whether a metric can be kept: a short name and a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return len(name) <= 128 and name.isprintable() and math.isfinite(value)
