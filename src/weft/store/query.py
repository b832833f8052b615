"""Filters as SQL: every value is a bound parameter, every field one that is listed here or a metric's or tag's name.

This module knows the tables; it runs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy import ColumnElement

from weft.errors import StoreError
from weft.store import tables as t
from weft.store.names import check_name
from weft.store.predicates import And, Comparison, Condition, Not, parse_condition
from weft.store.records import checked_tags

__all__ = ["FIELDS", "Filter", "matching"]

FIELDS: dict[str, Any] = {
    "name": t.names.c.name,
    "version": t.versions.c.number,
    "digest": t.versions.c.digest,
    "base": t.versions.c.base,
    "base_name": t.versions.c.base_name,
    "architecture": t.versions.c.architecture,
    "rank": t.versions.c.rank,
    "sites": t.versions.c.sites,
    "parameters": t.versions.c.parameters,
    "bytes": t.versions.c.bytes,
    "created": t.versions.c.created,
    "note": t.versions.c.note,
}
"""Fields that every version has. Any other word is a metric; ``tag.KEY``, ``data`` and ``parent`` are looked up as well."""


class Few(Protocol):
    """Whether a query has at most so many rows."""

    def __call__(self, query: sa.Select[Any], most: int = ..., /) -> bool: ...


_FEW_OF_A_BASE = 500
"""Versions that are sorted; of more, the newest are looked at one by one until there are enough."""


@dataclass(frozen=True)
class Filter:
    """What `Store.find` is asked for.

    Attributes:
        name: a name, or its start with ``*``.
        base: first digits of a base's fingerprint, or its name.
        tags: that a version has to have.
        where: see `weft.store.predicates`.
        data: first digits of a data set's digest.
        alias: only versions that it points to.
        all_versions: not only the newest of each name.
        limit: at most as many.
    """

    name: str | None = None
    base: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    where: str | None = None
    data: str | None = None
    alias: str | None = None
    all_versions: bool = False
    limit: int = 100


def matching(asked: Filter, owner: str, few: Few, is_sqlite: bool) -> sa.Select[Any]:
    """Ids of the versions that a filter lets through, the newest first.

    Args:
        few: whether a query has few rows. A tag or metric that few versions have is looked up first; one that many have is looked at
            version by version, the newest first, until there are enough.

    Raises:
        StoreError: a filter that can't be.
    """
    if type(asked.limit) is not int or asked.limit < 1:
        raise StoreError(f"limit={asked.limit!r}; expected a whole number from 1 on")
    wanted: list[ColumnElement[bool]] = [t.versions.c.owner == owner]
    if not asked.all_versions and asked.alias is None:
        wanted.append(t.versions.c.newest == 1)
    order: ColumnElement[int] = t.versions.c.id
    if asked.name is not None:
        named = _named(asked.name, owner, is_sqlite)
        if few(named):  # the sums keep SQLite from going through all versions of the owner
            newest = [] if len(wanted) == 1 else [t.versions.c.newest + 0 == 1]
            wanted, order = newest, t.versions.c.id + 0  # the names are the owner's
        wanted.append(t.versions.c.name_id.in_(named))
    if asked.base is not None:
        wanted.append(_base(asked.base, few))
    for key, value in checked_tags(asked.tags).items():
        wanted.append(_holds(t.tags, key, t.tags.c.value == value, few))
    if asked.data is not None:
        wanted.append(_data(asked.data))
    if asked.alias is not None:
        pointing = sa.select(t.aliases.c.version_id).where(t.aliases.c.alias == check_name(asked.alias, "alias"))
        wanted.append(t.versions.c.id.in_(pointing))
    if asked.where is not None:
        condition = parse_condition(asked.where)
        wanted.append(_clause(condition, few))
    return sa.select(t.versions.c.id).where(*wanted).order_by(order.desc()).limit(asked.limit)


def _named(name: str, owner: str, is_sqlite: bool) -> sa.Select[Any]:
    """Ids of the names that are so, or that start so."""
    start = name.removesuffix("*")
    check_name(start or "x")
    found = sa.select(t.names.c.id).where(t.names.c.owner == owner)
    if start == name:
        return found.where(t.names.c.name == name)
    if is_sqlite:  # no letter of a name comes after ~; LIKE would not use the index
        return found.where(t.names.c.name >= start, t.names.c.name < f"{start}~")
    return found.where(t.names.c.name.startswith(start, autoescape=True))


def _holds(table: sa.Table, key: str, condition: ColumnElement[bool], few: Few) -> ColumnElement[bool]:
    rows = sa.select(table.c.version_id).where(table.c.key == key, condition)
    if few(rows):
        return t.versions.c.id.in_(rows)
    return sa.exists(rows.where(table.c.version_id == t.versions.c.id).correlate(t.versions))


def _base(text: str, few: Few) -> ColumnElement[bool]:
    """A base by its fingerprint's first digits, its name, or the last parts of its name."""
    _short_enough(text, "base")
    name = t.versions.c.base_name
    ends = sa.or_(name == text, name.endswith(f"/{text}", autoescape=True))
    ways = [sa.and_(t.versions.c.base_leaf == text.rpartition("/")[2], ends)]
    digits = text.lower()
    if len(digits) >= 6 and all(letter in "0123456789abcdef" for letter in digits):
        ways.append(sa.and_(t.versions.c.base >= digits, t.versions.c.base < digits + "g"))
    looked_up = sa.union_all(*(sa.select(t.versions.c.id).where(way) for way in ways)).subquery()
    if few(sa.select(looked_up.c.id), _FEW_OF_A_BASE):
        return t.versions.c.id.in_(sa.select(looked_up.c.id))
    return sa.or_(*ways)


def _data(text: str) -> ColumnElement[bool]:
    _short_enough(text, "data")
    starts = sa.and_(t.datasets.c.digest >= text, t.datasets.c.digest < text + "g")
    return t.versions.c.id.in_(sa.select(t.datasets.c.version_id).where(sa.or_(starts, t.datasets.c.source == text)))


def _clause(condition: Condition, few: Few) -> ColumnElement[bool]:
    if isinstance(condition, Comparison):
        return _comparison(condition, few)
    if isinstance(condition, Not):
        return sa.not_(_clause(condition.part, few))
    parts = [_clause(part, few) for part in condition.parts]
    return sa.and_(*parts) if isinstance(condition, And) else sa.or_(*parts)


def _comparison(item: Comparison, few: Few) -> ColumnElement[bool]:
    """One comparison. A version without the metric or tag is let through by none, ``!=`` as little as ``=``."""
    kind, dot, key = item.field.partition(".")
    if kind == "tag" and dot:
        return _holds(t.tags, check_name(key, "tag"), _compare(t.tags.c.value, item.operator, item.text), few)
    if item.field in ("data", "parent"):
        if item.operator != "=":
            raise StoreError(f"{item}: {item.field} is compared with a digest by =, as in {item.field}=9f2c41d0")
        if item.field == "data":
            return _data(item.text)
        starts = (t.parents.c.digest >= item.text, t.parents.c.digest < item.text + "g")
        return t.versions.c.id.in_(sa.select(t.parents.c.version_id).where(*starts))
    if item.field in FIELDS:
        return _column(item, few)
    metric = key if kind == "metric" and dot else item.field
    if isinstance(item.value, str):
        raise StoreError(
            f"{item}: {item.field} is taken for a metric, and metrics are compared with numbers. Fields with text: "
            "name, digest, base, base_name, architecture, note, created, tag.KEY"
        )
    return _holds(t.metrics, metric, _compare(t.metrics.c.value, item.operator, float(item.value)), few)


def _column(item: Comparison, few: Few) -> ColumnElement[bool]:
    column = FIELDS[item.field]
    if item.field == "name":
        return t.versions.c.name_id.in_(sa.select(t.names.c.id).where(_compare(column, item.operator, item.text)))
    if item.field == "created" and isinstance(item.value, str):
        return _compare(column, item.operator, _seconds(str(item.value)))
    if isinstance(column.type, sa.Integer | sa.Float):
        if isinstance(item.value, str):
            raise StoreError(f"{item}: {item.field} is a number")
        return _compare(column, item.operator, float(item.value))
    if item.field == "base" and item.operator in ("=", "!="):
        found = _base(item.text, few)
        return found if item.operator == "=" else sa.not_(found)
    return _compare(column, item.operator, item.text)


def _compare(column: Any, operator: str, value: Any) -> ColumnElement[bool]:
    found: ColumnElement[bool] = {
        "<": column.__lt__, "<=": column.__le__, ">": column.__gt__, ">=": column.__ge__, "=": column.__eq__, "!=": column.__ne__,
    }[operator](value)  # fmt: skip
    return found


def _seconds(text: str) -> float:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise StoreError(f"created is compared with a date, as in created>='2026-01-31'; got {text[:40]!r}") from None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def _short_enough(text: object, what: str) -> None:
    if not isinstance(text, str) or not text or len(text) > 512 or "\0" in text:
        raise StoreError(f"{what}: expected a name or the first digits of a digest, got {ascii(text)[:60]}")
