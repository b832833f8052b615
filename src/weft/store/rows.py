"""Versions as the index has them: what a reference means, and all that is known of a version.

An owner sees what is theirs. This module reads; what changes the index stands on it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from weft.errors import NotInStoreError, StoreError, did_you_mean, some_names
from weft.store import tables as t
from weft.store.blobs import FileFacts
from weft.store.database import Database
from weft.store.names import LATEST, Reference, check_name, parse, parse_name
from weft.store.query import Filter, matching
from weft.store.records import Move, Version

__all__ = ["Files", "Reader", "pack_files", "select_versions", "unpack_files"]

logger = logging.getLogger(__name__)

Files = Mapping[str, FileFacts]

_FEW = 10_000
"""Rows that are looked up before anything else."""


class Reader:
    """Versions of one owner, in a database that others share. Each public method sees one moment."""

    def __init__(self, database: Database, owner: str) -> None:
        self.database, self.owner = database, check_name(owner, "owner")

    def key(self) -> str:
        """The id of the store."""
        return str(
            self.database.read(
                lambda c: c.execute(sa.select(t.meta.c.value).where(t.meta.c.key == "store")).scalar_one()
            )
        )

    def version(self, text: str | Reference) -> Version:
        """The version that a reference means.

        Raises:
            NotInStoreError: there is none; names near ones.
            StoreError: a digest's first digits that several have.
        """
        reference = parse(text) if not isinstance(text, Reference) else text

        def work(c: Connection) -> tuple[Version, str]:
            found = self._filled(c, [self._row(c, reference)])[0]
            return found, self._hidden(c, reference, found) if reference.name and reference.prefix else ""

        found, hidden = self.database.read(work)
        if hidden:
            logger.warning(
                "%s is a name here, and the first digits of %s: the name is taken; sha256:%s is the other",
                reference.text, hidden[:16], hidden[:16],
            )  # fmt: skip
        return found

    def versions(self, name: str) -> list[Version]:
        """All versions of a name, the newest first.

        Raises:
            NotInStoreError: no such name.
        """

        def work(c: Connection) -> list[Version]:
            found = self._name(c, parse_name(name))
            rows = c.execute(
                select_versions().where(t.versions.c.name_id == found.id).order_by(t.versions.c.number.desc())
            ).all()
            return self._filled(c, rows)

        return self.database.read(work)

    def find(self, asked: Filter) -> list[Version]:
        """Versions that a filter lets through, the newest first."""

        def work(c: Connection) -> list[Version]:
            def few(query: sa.Select[Any], most: int = _FEW) -> bool:
                counted = sa.select(sa.func.count()).select_from(query.limit(most + 1).subquery())
                return c.execute(counted).scalar_one() <= most

            ids = [row.id for row in c.execute(matching(asked, self.owner, few, self.database.is_sqlite))]
            rows = c.execute(select_versions().where(t.versions.c.id.in_(ids))).all() if ids else []
            order = {key: place for place, key in enumerate(ids)}
            return self._filled(c, sorted(rows, key=lambda row: order[row.id]))

        return self.database.read(work)

    def holding(self, digests: Iterable[str]) -> dict[str, list[Version]]:
        """The owner's versions by digest, oldest first; digests that the owner doesn't have are not in it."""
        asked = list(dict.fromkeys(digests))

        def work(c: Connection) -> dict[str, list[Version]]:
            found: dict[str, list[Version]] = {}
            for start in range(0, len(asked), 500):
                mine = (t.versions.c.owner == self.owner, t.versions.c.digest.in_(asked[start : start + 500]))
                rows = c.execute(select_versions().where(*mine).order_by(t.versions.c.id)).all()
                for version in self._filled(c, rows):
                    found.setdefault(version.digest, []).append(version)
            return found

        return self.database.read(work)

    def moves(self, name: str) -> list[Move]:
        """What became of a name's aliases, the newest first."""

        def work(c: Connection) -> list[Move]:
            found = self._name(c, parse_name(name))
            rows = c.execute(sa.select(t.moves).where(t.moves.c.name_id == found.id).order_by(t.moves.c.id.desc()))
            return [Move(r.alias, r.kind, r.before, r.after, r.at, r.by, r.required, bool(r.undone)) for r in rows]

        return self.database.read(work)

    def files(self, address: str) -> Files:
        """What the index knows of a blob's files; empty where there is none."""
        text = self.database.read(
            lambda c: c.execute(sa.select(t.blobs.c.files).where(t.blobs.c.address == address)).scalar()
        )
        return unpack_files(text) or {}

    # what references mean

    def _name(self, c: Connection, name: str, *, lock: bool = False) -> Any:
        asked = sa.select(t.names).where(t.names.c.owner == self.owner, t.names.c.folded == name.lower())
        row = c.execute(asked.with_for_update() if lock else asked).first()
        if row is None or not (lock or self._has_versions(c, row.id)) or row.name != name:
            raise self._unknown(c, name)
        return row

    def _has_versions(self, c: Connection, name_id: int) -> bool:
        return c.execute(sa.select(t.versions.c.id).where(t.versions.c.name_id == name_id).limit(1)).first() is not None

    def _unknown(self, c: Connection, name: str) -> NotInStoreError:
        alive = t.versions.c.newest == 1
        known = c.execute(
            sa.select(t.names.c.name).join(t.versions, t.versions.c.name_id == t.names.c.id)
            .where(t.names.c.owner == self.owner, alive).order_by(t.versions.c.id.desc()).limit(2000)
        ).scalars().all()  # fmt: skip
        return NotInStoreError(
            f"the store has no {name!r}.{did_you_mean(name, known)} It has {some_names(known, 4) or 'nothing yet: weft store put DIR --name NAME'}"
        )

    def _locked(self, c: Connection, reference: Reference) -> Any:
        """The row that a reference means, with its name locked."""
        row = self._row(c, reference)
        c.execute(sa.select(t.names.c.id).where(t.names.c.id == row.name_id).with_for_update())
        return self._row(c, reference)

    def _row(self, c: Connection, reference: Reference) -> Any:
        if reference.name:
            asked = sa.select(t.names.c.id).where(t.names.c.owner == self.owner, t.names.c.name == reference.name)
            home = c.execute(asked).scalar()
            if home is not None and (not reference.prefix or self._has_versions(c, home)):
                return self._of_name(c, home, reference)
        if reference.prefix:
            return self._by_digest(c, reference)
        raise self._unknown(c, reference.name)

    def _of_name(self, c: Connection, home: int, reference: Reference) -> Any:
        name = reference.name
        if reference.alias == LATEST:
            row = c.execute(select_versions().where(t.versions.c.name_id == home, t.versions.c.newest == 1)).first()
        elif reference.number is not None:
            row = c.execute(
                select_versions().where(t.versions.c.name_id == home, t.versions.c.number == reference.number)
            ).first()
        else:
            row = self._aliased(c, home, reference.alias)
        if row is not None:
            return row
        numbers = (
            c.execute(
                sa.select(t.versions.c.number).where(t.versions.c.name_id == home).order_by(t.versions.c.number.desc())
            )
            .scalars()
            .all()
        )
        if not numbers:
            raise self._unknown(c, name)
        if reference.number is not None:
            raise NotInStoreError(
                f"{name} has no version {reference.number}; it has {', '.join(map(str, numbers[:8]))}{' …' if len(numbers) > 8 else ''}"
            )
        known = c.execute(sa.select(t.aliases.c.alias).where(t.aliases.c.name_id == home)).scalars().all()
        raise NotInStoreError(
            f"{name} has no alias {reference.alias!r}.{did_you_mean(reference.alias, known)} It has {some_names(known) or 'none'}; weft store promote {name} {reference.alias} makes it"
        )

    def _aliased(self, c: Connection, name_id: int, alias: str) -> Any:
        joined = select_versions().join(t.aliases, t.aliases.c.version_id == t.versions.c.id)
        return c.execute(joined.where(t.aliases.c.name_id == name_id, t.aliases.c.alias == alias)).first()

    def _by_digest(self, c: Connection, reference: Reference) -> Any:
        starts = (t.versions.c.digest >= reference.prefix, t.versions.c.digest < reference.prefix + "g")
        rows = c.execute(
            select_versions()
            .where(t.versions.c.owner == self.owner, *starts)
            .order_by(t.versions.c.id.desc())
            .limit(200)
        ).all()
        if not rows:
            raise self._unknown(c, reference.text)
        digests = list(dict.fromkeys(row.digest for row in rows))
        if len(digests) > 1:
            raise StoreError(
                f"{reference.text} can be {some_names([digest[:16] for digest in digests], 3)}: give more digits"
            )
        return rows[0]

    def _hidden(self, c: Connection, reference: Reference, found: Version) -> str:
        """Another adapter's digest, whose first digits are the name that was taken; empty: there is none."""
        if found.name != reference.name:
            return ""
        starts = (t.versions.c.digest >= reference.prefix, t.versions.c.digest < reference.prefix + "g")
        asked = sa.select(t.versions.c.digest).where(
            t.versions.c.owner == self.owner, t.versions.c.digest != found.digest, *starts
        )
        return c.execute(asked.limit(1)).scalar() or ""

    def _filled(self, c: Connection, rows: Iterable[Any], is_new: bool = True) -> list[Version]:
        """Versions from rows: aliases, tags, metrics, parents and data sets of all of them in five queries."""
        rows = list(rows)
        ids = [row.id for row in rows]
        more: dict[str, dict[int, list[Any]]] = {}
        tables_ = (("aliases", t.aliases, t.aliases.c.alias), ("tags", t.tags, t.tags.c.key), ("metrics", t.metrics, t.metrics.c.key),
                   ("parents", t.parents, t.parents.c.position), ("data", t.datasets, t.datasets.c.position))  # fmt: skip
        for name, table, order in tables_:
            found = more.setdefault(name, {})
            for start in range(0, len(ids), 500):
                for item in c.execute(
                    sa.select(table).where(table.c.version_id.in_(ids[start : start + 500])).order_by(order)
                ):
                    found.setdefault(item.version_id, []).append(item)
        return [
            Version(
                owner=row.owner, name=row.name, number=row.number, digest=row.digest, created=row.created, note=row.note, base=row.base,
                base_name=row.base_name, architecture=row.architecture, rank=row.rank, sites=row.sites, parameters=row.parameters,
                bytes=row.bytes, is_new=is_new, address=row.address, provenance=row.provenance,
                aliases=tuple(item.alias for item in more["aliases"].get(row.id, ())),
                tags={item.key: item.value for item in more["tags"].get(row.id, ())},
                metrics={item.key: item.value for item in more["metrics"].get(row.id, ())},
                parents=tuple((item.digest, item.weight) for item in more["parents"].get(row.id, ())),
                data=tuple({"digest": item.digest, "source": item.source, "role": item.role} for item in more["data"].get(row.id, ())),
            )
            for row in rows
        ]  # fmt: skip


def select_versions() -> sa.Select[Any]:
    """A version with the name it has."""
    return sa.select(t.versions, t.names.c.name).join(t.names, t.names.c.id == t.versions.c.name_id)


def pack_files(files: Files) -> str:
    """Files as text for the index."""
    return json.dumps({name: [facts.size, facts.hash] for name, facts in sorted(files.items())})


def unpack_files(text: str | None) -> dict[str, FileFacts] | None:
    """The inverse of `pack_files`."""
    return (
        None if text is None else {name: FileFacts(size, digest) for name, (size, digest) in json.loads(text).items()}
    )
