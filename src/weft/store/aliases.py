"""Aliases: promote, rollback, remove. A name is locked while one of its aliases moves.

A requirement is looked at in the transaction that moves the alias: what it compared with is what is replaced.
"""

from __future__ import annotations

import dataclasses
import getpass
import time
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from weft.errors import NotInStoreError, RequirementError, did_you_mean, some_names
from weft.store import tables as t
from weft.store.names import LATEST, Reference, check_label, parse, parse_name
from weft.store.predicates import OPERATORS, And, Comparison, Condition, Not, Word, comparisons, parse_condition
from weft.store.records import Move, Version
from weft.store.rows import Reader, select_versions

__all__ = ["Aliases"]


class Aliases(Reader):
    """What moves aliases."""

    def promote(self, text: str, alias: str, require: str | None = None, *, only_new: bool = False) -> Move:
        """Point an alias to a version, if the requirement is met; both in one step.

        Args:
            require: a condition over the version's metrics; a word on the right is an alias of the same name, and means its metric.
            only_new: leave an alias that points to another version as it is.

        Raises:
            RequirementError: it is not met; says by which numbers.
            StoreError: see `check_label`.
        """
        label, condition = check_label(alias), parse_condition(require) if require is not None else None

        def work(c: Connection) -> Move:
            row = self._locked(c, parse(text))
            before = self._aliased(c, row.name_id, label)
            if condition is not None:
                self._require(c, row, condition, label)
            if before is not None and (before.id == row.id or only_new):
                return Move(label, "promote", before.number, before.number, time.time(), _me(), require or "")
            return self._move(
                c, row, label, "promote", before.number if before else None, row.number, row.id, require or ""
            )

        return self.database.write(work)

    def rollback(self, name: str, alias: str) -> Move:
        """Point an alias to where it pointed before its last promotion that was not taken back yet.

        Raises:
            NotInStoreError: the alias was never moved; there is nothing before; the version before was removed.
        """
        label = check_label(alias)

        def work(c: Connection) -> Move:
            home = self._name(c, parse_name(name), lock=True)
            of_alias = (t.moves.c.name_id == home.id, t.moves.c.alias == label)
            open_moves = (*of_alias, t.moves.c.kind != "rollback", t.moves.c.undone == 0)
            last = c.execute(sa.select(t.moves).where(*open_moves).order_by(t.moves.c.id.desc()).limit(1)).first()
            if last is None:
                known = c.execute(sa.select(t.aliases.c.alias).where(t.aliases.c.name_id == home.id)).scalars().all()
                raise NotInStoreError(
                    f"{name}@{label}: no move to take back.{did_you_mean(label, known)} Aliases of {name}: {some_names(known) or 'none'}"
                )
            if last.before is None:
                raise NotInStoreError(
                    f"{name}@{label}: it pointed to no version before {name}@{last.after}; weft store rm {name}@{label} removes the alias"
                )
            row = c.execute(
                select_versions().where(t.versions.c.name_id == home.id, t.versions.c.number == last.before)
            ).first()
            if row is None:
                raise NotInStoreError(
                    f"{name}@{label}: the version before, {name}@{last.before}, was removed; promote another one"
                )
            c.execute(sa.update(t.moves).where(t.moves.c.id == last.id).values(undone=1))
            return self._move(c, row, label, "rollback", last.after, row.number, row.id, "")

        return self.database.write(work)

    def unalias(self, name: str, alias: str) -> Move:
        """Remove an alias; its version stays.

        Raises:
            NotInStoreError: no such alias.
        """
        label = check_label(alias)

        def work(c: Connection) -> Move:
            row = self._locked(c, Reference(f"{name}@{label}", parse_name(name), alias=label))
            return self._move(c, row, label, "remove", row.number, None, None, "")

        return self.database.write(work)

    def _move(
        self,
        c: Connection,
        row: Any,
        alias: str,
        kind: str,
        before: int | None,
        after: int | None,
        version: int | None,
        required: str,
    ) -> Move:
        move = Move(alias, kind, before, after, time.time(), _me(), required)
        c.execute(sa.delete(t.aliases).where(t.aliases.c.name_id == row.name_id, t.aliases.c.alias == alias))
        if version is not None:
            c.execute(sa.insert(t.aliases).values(name_id=row.name_id, alias=alias, version_id=version))
        values = {item.name: getattr(move, item.name) for item in dataclasses.fields(move) if item.name != "undone"}
        c.execute(sa.insert(t.moves).values(name_id=row.name_id, undone=0, **values))
        return move

    def _require(self, c: Connection, row: Any, condition: Condition, label: str) -> None:
        """Raise unless the version meets the condition."""
        mine = self._filled(c, [row])[0]
        others: dict[str, Version | None] = {}
        failed: list[str] = []
        for item in comparisons(condition):
            if isinstance(item.value, Word) and item.value not in others:
                other = self._aliased(c, row.name_id, str(item.value)) if item.value != LATEST else None
                if other is None and item.value != label:
                    raise RequirementError(
                        f"the requirement {item} names the alias {str(item.value)!r}, which {row.name} has not; nothing was moved"
                    )
                others[item.value] = self._filled(c, [other])[0] if other is not None else None
        if not _meets(mine, condition, others, failed):
            raise RequirementError(
                f"{mine} was not promoted to {label}: {'; '.join(dict.fromkeys(failed))}. Nothing was moved"
            )


def _meets(mine: Version, condition: Condition, others: Mapping[str, Version | None], failed: list[str]) -> bool:
    """Whether a version meets a condition; what is not met is appended to ``failed``."""
    if isinstance(condition, Comparison):
        problem = _problem(mine, condition, others)
        failed.extend([problem] if problem else [])
        return problem is None
    if isinstance(condition, Not):
        met = not _meets(mine, condition.part, others, [])
        failed.extend([] if met else [f"not ({', '.join(map(str, comparisons(condition.part)))}) is required"])
        return met
    said: list[str] = []
    met_parts = [_meets(mine, part, others, said) for part in condition.parts]
    met = all(met_parts) if isinstance(condition, And) else any(met_parts)
    failed.extend([] if met else said)
    return met


def _problem(mine: Version, item: Comparison, others: Mapping[str, Version | None]) -> str | None:
    """Why a comparison isn't met; None if it is."""
    name = item.field.removeprefix("metric.")
    value, wanted = mine.metrics.get(name), item.value
    if value is None:
        return (
            f"it has no metric {name!r}.{did_you_mean(name, mine.metrics)} It has {some_names(mine.metrics) or 'none'}; "
            f"weft store tag {mine} --metric {name}=NUMBER adds it"
        )
    if isinstance(wanted, Word):
        other = others[wanted]
        if other is None:  # the first promotion: there is nothing to compare with
            return None
        if name not in other.metrics:
            return f"{other}, which is {wanted}, has no metric {name!r}"
        limit, shown = other.metrics[name], f"{other.metrics[name]:g}, that of {other}, which is {wanted}"
    elif isinstance(wanted, str):
        return f"{item}: metrics are compared with numbers, or with an alias"
    else:
        limit, shown = wanted, f"{wanted:g}"
    return (
        None if OPERATORS[item.operator](value, limit) else f"{name} is {value:g}, required is {item.operator} {shown}"
    )


def _me() -> str:
    """Who moves an alias, for its history."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return ""
