"""The index: which versions there are, whose, and what points to them. Each method is one transaction.

    index = Index(Database.at(url), owner="acme")

An owner sees and changes only what is theirs. Names are locked while their versions or aliases change, so that of two
processes the second finds what the first left. This module knows no files: what has to be true of a blob when a version
is added, its caller says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from weft.errors import NotInStoreError, StoreError, did_you_mean, some_names
from weft.store import tables as t
from weft.store.aliases import Aliases
from weft.store.names import check_name, parse, parse_name
from weft.store.records import Draft, Version, checked_metrics, checked_tags
from weft.store.rows import Files, pack_files, select_versions, unpack_files

__all__ = ["Index"]


class Index(Aliases):
    """Versions and aliases of one owner, in a database that others share."""

    # adding

    def add(
        self,
        name: str,
        draft: Draft,
        address: str,
        settle: Callable[[Files | None], Files | None],
        *,
        number: int | None = None,
        again: bool = False,
    ) -> Version | None:
        """Add a version.

        Args:
            settle: called while nobody can remove the blob, with its files as the index knows them; gives the files that are there,
                or None if the blob has to be written again.
            number: of a version that comes from another store; None: the next one.
            again: add a version although the newest one is the same.

        Returns:
            The version; None if the blob went away.

        Raises:
            StoreError: the number is taken by another adapter; the name differs from another one in its case only.
        """
        parse_name(name)

        def work(c: Connection) -> Version | None:
            home = self._home(c, name)  # names are locked before blobs, everywhere
            where = t.blobs.c.address == address
            blob = c.execute(sa.select(t.blobs.c.files).where(where).with_for_update()).first()
            if blob is None:
                c.execute(sa.insert(t.blobs), {"address": address, "bytes": 0, "touched": time.time()})
            known = unpack_files(blob.files) if blob is not None else None
            there = settle(known)
            if there is None:
                return None
            size = sum(facts.size for facts in there.values())
            same = None if again else self._same(c, home.id, draft, address, number)
            if same is None or there != known:
                values = {"files": pack_files(there), "bytes": size, "touched": time.time()}
                c.execute(sa.update(t.blobs).where(where), values)
            return same or self._insert(c, home, draft, address, number, size)

        return self.database.write(work)

    def _home(self, c: Connection, name: str) -> Any:
        """The row of a name, locked; made where there is none."""
        asked = sa.select(t.names).where(t.names.c.owner == self.owner, t.names.c.folded == name.lower())
        found = c.execute(asked.with_for_update()).first()
        if found is None:
            values = {"owner": self.owner, "name": name, "folded": name.lower(), "last": 0, "created": time.time()}
            c.execute(sa.insert(t.names).values(values))
            found = c.execute(asked.with_for_update()).first()
        assert found is not None
        if found.name != name:
            raise StoreError(
                f"name {name!r}: there is {found.name!r} already, which differs in its case only; use that one, or another name"
            )
        return found

    def _same(self, c: Connection, name_id: int, draft: Draft, address: str, number: int | None) -> Version | None:
        """The newest version, or the one of this number, if it is what would be added."""
        which = t.versions.c.newest == 1 if number is None else t.versions.c.number == number
        row = c.execute(select_versions().where(t.versions.c.name_id == name_id, which)).first()
        if row is None:
            return None
        if number is not None and row.digest != address[:64]:
            raise StoreError(
                f"{row.name}@{row.number} is there already with another adapter ({row.digest[:12]}, not {address[:12]}): versions never change; "
                "take it under another name"
            )
        mine = (address, draft.columns["provenance"], draft.columns["note"])
        if number is None and (row.address, row.provenance, row.note) != mine:
            return None
        found = self._filled(c, [row], is_new=False)[0]
        alike = number is not None or (found.tags, found.metrics) == (draft.tags, draft.metrics)
        return found if alike else None

    def _insert(self, c: Connection, home: Any, draft: Draft, address: str, number: int | None, size: int) -> Version:
        given = home.last + 1 if number is None else number
        last = c.execute(sa.select(sa.func.max(t.versions.c.number)).where(t.versions.c.name_id == home.id)).scalar()
        newest = last is None or given > last
        if newest and last is not None:
            older = (t.versions.c.name_id == home.id, t.versions.c.newest == 1)
            c.execute(sa.update(t.versions).where(*older), {"newest": 0})
        c.execute(sa.update(t.names).where(t.names.c.id == home.id), {"last": max(given, home.last)})
        now = time.time()
        facts = {**draft.columns, "bytes": size, "owner": self.owner, "number": given, "digest": address[:64], "address": address,
                 "created": now}  # fmt: skip
        key = c.execute(
            sa.insert(t.versions), {**facts, "name_id": home.id, "newest": int(newest)}
        ).inserted_primary_key  # fmt: skip
        assert key is not None
        many = (
            (t.tags, [{"key": k, "value": v} for k, v in draft.tags.items()]),
            (t.metrics, [{"key": k, "value": v} for k, v in draft.metrics.items()]),
            (t.parents, [{"position": n, "digest": d, "weight": w} for n, (d, w) in enumerate(draft.parents)]),
            (t.datasets, [{"position": n, **facts} for n, facts in enumerate(draft.data)]),
        )
        for table, rows in many:
            if rows:
                c.execute(sa.insert(table), [{"version_id": key[0], **row} for row in rows])
        own = {field: value for field, value in facts.items() if field not in ("base_layout", "base_leaf")}
        return Version(
            **own, name=home.name, tags=draft.tags, metrics=draft.metrics, parents=draft.parents, data=draft.data
        )

    # changing what is not the version itself

    def tag(self, text: str, add: Mapping[str, str], remove: Iterable[str] = ()) -> Version:
        """Set and remove tags of a version.

        Raises:
            NotInStoreError: no such version, or a tag to remove that it hasn't.
        """
        values, gone = checked_tags(add), [check_name(key, "tag") for key in remove]

        def work(c: Connection) -> Version:
            row = self._locked(c, parse(text))
            there = set(c.execute(sa.select(t.tags.c.key).where(t.tags.c.version_id == row.id)).scalars())
            lost = [key for key in gone if key not in there]
            if lost:
                raise NotInStoreError(f"{row.name}@{row.number} has no tag {lost[0]!r}.{did_you_mean(lost[0], there)}")
            drop = [*gone, *(key for key in values if key in there)]
            if drop:
                c.execute(sa.delete(t.tags).where(t.tags.c.version_id == row.id, t.tags.c.key.in_(drop)))
            if values:
                c.execute(sa.insert(t.tags), [{"version_id": row.id, "key": k, "value": v} for k, v in values.items()])
            return self._filled(c, [row])[0]

        return self.database.write(work)

    def measure(self, text: str, metrics: Mapping[str, float]) -> Version:
        """Add metrics to a version.

        Raises:
            StoreError: it has one of them, with another value: what was measured doesn't change.
        """
        values = checked_metrics(metrics)

        def work(c: Connection) -> Version:
            row = self._locked(c, parse(text))
            there = self._filled(c, [row])[0].metrics
            for name, value in values.items():
                if there.get(name, value) != value:
                    raise StoreError(
                        f"{row.name}@{row.number}: {name} is {there[name]:g} already, and what was measured doesn't change; give the metric another name"
                    )
            fresh = [{"version_id": row.id, "key": k, "value": v} for k, v in values.items() if k not in there]
            if fresh:
                c.execute(sa.insert(t.metrics), fresh)
            return self._filled(c, [row])[0]

        return self.database.write(work)

    # removing

    def remove(self, text: str) -> list[Version]:
        """Remove a version, or a name with all its versions; blobs stay until gc.

        Raises:
            StoreError: an alias points to it: names it.
        """
        reference = parse(text)
        whole = bool(reference.name) and reference.number is None and "@" not in reference.text

        def work(c: Connection) -> list[Version]:
            if whole:
                home = self._name(c, reference.name, lock=True)
                rows = c.execute(
                    select_versions().where(t.versions.c.name_id == home.id).order_by(t.versions.c.number)
                ).all()
            else:
                rows = [self._locked(c, reference)]
            found = self._filled(c, rows)
            held = [f"{item.name}@{alias}" for item in found for alias in item.aliases]
            if held:
                raise StoreError(
                    f"{text}: {some_names(held)} points to it; move the alias first (weft store promote), or remove it (weft store rm {held[0]})"
                )
            ids = [row.id for row in rows]
            for table in (t.tags, t.metrics, t.parents, t.datasets):
                c.execute(sa.delete(table).where(table.c.version_id.in_(ids)))
            c.execute(sa.delete(t.versions).where(t.versions.c.id.in_(ids)))
            touched = {"touched": time.time()}
            c.execute(sa.update(t.blobs).where(t.blobs.c.address.in_({row.address for row in rows})).values(touched))
            self._mark_newest(c, rows[0].name_id)
            return found

        return self.database.write(work)

    def _mark_newest(self, c: Connection, name_id: int) -> None:
        newest = c.execute(sa.select(sa.func.max(t.versions.c.number)).where(t.versions.c.name_id == name_id)).scalar()
        if newest is not None:
            mine = (t.versions.c.name_id == name_id, t.versions.c.number == newest)
            c.execute(sa.update(t.versions).where(*mine).values(newest=1))
