"""gc and verify: what may go, and whether what stays is what was written. Both look at the blobs of all owners.

A blob is removed while its row is locked, after a last look whether a version refers to it; a put that runs at the same time
finds its row gone and starts again. So nothing has to stop for gc.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

from weft.errors import DamagedError, some_names
from weft.store import tables as t
from weft.store.blobs import DAMAGED_ADVICE, MAX_PROVENANCE, Blobs
from weft.store.database import Database
from weft.store.records import Collected, Verified
from weft.store.rows import unpack_files
from weft.train.bars import counted, counter

__all__ = ["collect", "verify"]


def collect(database: Database, blobs: Blobs, grace: float, dry_run: bool) -> Collected:
    """See `Store.gc`."""
    now = time.time()
    rows = database.read(lambda c: c.execute(_unreferenced()).all())
    old = [row for row in rows if row.touched <= now - grace]
    gone: list[str] = []
    size = 0
    for row in old:
        if dry_run or database.write(functools.partial(_remove, blobs=blobs, address=row.address, grace=grace)):
            gone.append(row.address)
            size += row.bytes
    leftovers = 0
    for address in _strays(database, blobs, now - max(grace, 0.0)):
        leftovers += int(dry_run or database.write(functools.partial(_remove_stray, blobs=blobs, address=address)))
    if not dry_run:
        leftovers += blobs.sweep(grace)
    return Collected(tuple(address[:64] for address in gone), size, leftovers, len(rows) - len(gone))


def _unreferenced() -> sa.Select[Any]:
    used = sa.select(t.versions.c.id).where(t.versions.c.address == t.blobs.c.address)
    return sa.select(t.blobs).where(~sa.exists(used)).order_by(t.blobs.c.address)


def _remove(c: Connection, *, blobs: Blobs, address: str, grace: float) -> bool:
    """Remove a blob, if still nothing refers to it; its row is locked meanwhile."""
    row = c.execute(sa.select(t.blobs).where(t.blobs.c.address == address).with_for_update()).first()
    used = c.execute(sa.select(t.versions.c.id).where(t.versions.c.address == address).limit(1)).first()
    if row is None or used is not None or row.touched > time.time() - grace:
        return False
    blobs.remove(address)
    c.execute(sa.delete(t.blobs).where(t.blobs.c.address == address))
    return True


def _strays(database: Database, blobs: Blobs, before: float) -> Iterable[str]:
    """Blobs that the index doesn't know: a writer or a gc died between files and index."""
    there = [address for address, written in blobs.addresses() if written <= before]
    known = database.read(lambda c: set(c.execute(sa.select(t.blobs.c.address)).scalars()))
    return [address for address in there if address not in known]


def _remove_stray(c: Connection, *, blobs: Blobs, address: str) -> bool:
    """Remove files without a row; a row of that name is held meanwhile, so that no put counts on them."""
    try:
        c.execute(sa.insert(t.blobs).values(address=address, bytes=0, touched=0.0))
    except IntegrityError:  # a put came first
        return False
    try:
        blobs.remove(address)
    except DamagedError:  # not a name that the store gives: somebody else's
        c.execute(sa.delete(t.blobs).where(t.blobs.c.address == address))
        return False
    c.execute(sa.delete(t.blobs).where(t.blobs.c.address == address))
    return True


def verify(database: Database, blobs: Blobs, progress: bool | None = None) -> Verified:
    """See `Store.verify`."""
    asked = sa.select(t.blobs).order_by(t.blobs.c.address)
    rows = database.read(lambda c: c.execute(asked).all())
    wanted = database.read(_provenances)
    problems: list[str] = []
    count = size = leftovers = 0
    with counter("verifying", len(rows), progress) as advance:
        for row in counted(rows, advance):
            if row.address not in wanted:
                leftovers += 1
                continue
            found = _check(blobs, row, wanted[row.address])
            if found and not _still_there(database, row.address):  # removed while it was looked at
                continue
            problems += [f"{problem}. {_advice(database, row.address)}" for problem in found]
            count, size = count + 1, size + row.bytes
    known = {row.address for row in rows}
    leftovers += sum(address not in known for address, _ in blobs.addresses())
    lost = sorted(set(wanted) - known)
    problems += [
        f"blob {address[:12]}: the index has versions of it, and no blob. {_advice(database, address)}"
        for address in lost
    ]
    return Verified(count, size, tuple(problems), leftovers)


def _provenances(c: Connection) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for row in c.execute(sa.select(t.versions.c.address, t.versions.c.provenance).distinct()):
        found.setdefault(row.address, set()).add(row.provenance)
    return found


def _still_there(database: Database, address: str) -> bool:
    asked = sa.select(t.versions.c.id).where(t.versions.c.address == address).limit(1)
    return database.read(lambda c: c.execute(asked).first()) is not None


def _advice(database: Database, address: str) -> str:
    """Which versions a damaged blob is, and what to do."""
    asked = (
        sa.select(t.names.c.name, t.versions.c.number)
        .join(t.names, t.names.c.id == t.versions.c.name_id)
        .where(t.versions.c.address == address)
        .order_by(t.versions.c.id)
        .limit(100)
    )
    refs = [f"{row.name}@{row.number}" for row in database.read(lambda c: c.execute(asked).all())]
    if not refs:
        return "Nothing refers to it any more: weft store gc"
    return (
        f"It is {some_names(refs)}: pull it again from another place, or put it again; or give it up: "
        f"weft store rm {refs[0]}"
    )


def _check(blobs: Blobs, row: Any, provenances: set[str]) -> list[str]:
    """What is wrong with a blob."""
    files = unpack_files(row.files)
    if not files:
        return [f"blob {row.address[:12]}: the index doesn't know its files"]
    found = []
    try:
        with blobs.fetch(row.address, files) as folder:
            blobs.check(row.address, files, folder)
        for name in sorted(provenances):
            data = blobs.read(row.address, f"provenance/{name}.json", MAX_PROVENANCE)
            if hashlib.sha256(data).hexdigest() != name:
                found.append(f"blob {row.address[:12]}: provenance/{name}.json was changed")
    except DamagedError as problem:
        found.append(str(problem).removesuffix(DAMAGED_ADVICE))
    strange = set(blobs.sizes(row.address)) - set(files)
    strange = {name for name in strange if not name.startswith("provenance/")}
    return found + [f"blob {row.address[:12]}: {name} is no file of it" for name in sorted(strange)]
