"""Push and pull: versions with their numbers, tags, metrics and provenance go to another place, or come from there.

A version that is there already with the same digest is left; with another one it is an error, because versions never change.
What comes from elsewhere is read as an adapter and put, so that nothing but an adapter gets into a store.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import NotInStoreError, StoreError, did_you_mean, some_names
from weft.store.blobs import is_local
from weft.store.names import LATEST, Reference, check_name, parse
from weft.store.packing import provenance_of, unpack
from weft.store.places import INDEX_FILE
from weft.store.shelves import Record, Shelf, open_catalog, record_of
from weft.train.bars import counted, counter

if TYPE_CHECKING:
    from weft.store.store import Store

__all__ = ["Transfer", "pull", "push"]


@dataclass(frozen=True)
class Transfer:
    """What was pushed or pulled.

    Attributes:
        moved: references of versions that were not there before; there: of those that were.
        bytes: of the files of ``moved``.
        notes: aliases that were left as they are.
    """

    place: str
    moved: tuple[str, ...]
    there: tuple[str, ...]
    bytes: int
    notes: tuple[str, ...] = ()


def push(
    store: Store, url: str, refs: Sequence[str], options: Mapping[str, Any] | None, progress: bool | None = None
) -> Transfer:
    """See `Store.push`."""
    shelf = _shelf(store, url, options)
    versions = (
        [version for ref in refs for version in _asked(store, ref)]
        if refs
        else store.find(all_versions=True, limit=1 << 30)
    )
    moved, there, size = [], [], 0
    unique = {str(version): version for version in sorted(versions, key=lambda version: (version.name, version.number))}
    with counter("pushing", len(unique), progress) as advance:
        for version in counted(unique.values(), advance):
            known = shelf.record(version.name, version.number)
            if known is not None:
                if known.digest != version.digest:
                    raise StoreError(
                        f"{shelf.shown}: {version} is there already with another adapter ({known.digest[:12]}, not {version.digest[:12]}): versions never change. "
                        f"Put it under another name: weft store put {version} --name NAME"
                    )
                there.append(str(version))
                continue
            files = store.index.files(version.address)
            record = record_of(version, files, store.provenance(version).to_dict())
            with store.blobs.fetch(version.address, files) as folder:
                store.blobs.check(version.address, files, folder)
                shelf.send(record, folder)
            moved.append(str(version))
            size += record.size
    for name in dict.fromkeys(version.name for version in unique.values()):
        sent = [version for version in unique.values() if version.name == name]
        shelf.point(name, {alias: version.number for version in sent for alias in version.aliases})
    return Transfer(shelf.shown, tuple(moved), tuple(there), size)


def _asked(store: Store, ref: str) -> list[Any]:
    return store.versions(ref) if _is_whole(parse(ref)) else [store.version(ref)]


def _is_whole(reference: Reference) -> bool:
    """Whether a name stands alone: all its versions are meant."""
    return bool(reference.name) and "@" not in reference.text and not reference.prefix


def pull(
    store: Store,
    url: str,
    refs: Sequence[str],
    name: str | None,
    options: Mapping[str, Any] | None,
    progress: bool | None = None,
) -> Transfer:
    """See `Store.pull`."""
    shelf = _shelf(store, url, options)
    numbers = shelf.numbers()
    asked = (
        [item for ref in refs for item in _wanted(shelf, numbers, ref)]
        if refs
        else [(n, k) for n, ks in numbers.items() for k in ks]
    )
    if not asked and not refs:
        raise NotInStoreError(f"{shelf.shown}: there is nothing to pull: no adapter was pushed to this place")
    if name is not None and len({item[0] for item in asked}) > 1:
        raise StoreError(
            f"as {check_name(name)!r}: several names can't be pulled as one; name one of {some_names(sorted({item[0] for item in asked}))}"
        )
    moved: list[str] = []
    there: list[str] = []
    notes: list[str] = []
    size = 0
    with counter("pulling", len(set(asked)), progress) as advance:
        for home, number in counted(dict.fromkeys(asked), advance):
            record = shelf.record(check_name(home), number)
            if record is None:
                raise NotInStoreError(f"{shelf.shown}: {home}@{number} went away meanwhile; try again")
            with shelf.fetch(record) as folder:
                adapter = unpack(
                    folder, record.digest, provenance_of(dict(record.provenance), f"{shelf.shown}: {record}")
                )
            version = store.put(
                adapter, name or home, tags=record.tags, metrics=record.metrics, note=record.note, number=number
            )
            (moved if version.is_new else there).append(str(version))
            size += record.size if version.is_new else 0
    for home in dict.fromkeys(item[0] for item in asked):
        notes += _take_aliases(store, shelf, home, name or home, {number for other, number in asked if other == home})
    return Transfer(shelf.shown, tuple(moved), tuple(there), size, tuple(notes))


def _take_aliases(store: Store, shelf: Shelf, home: str, name: str, numbers: set[int]) -> list[str]:
    """Aliases that are new here are set; one that points elsewhere here stays, and is said."""
    notes = []
    for alias, number in sorted(shelf.aliases(home).items()):
        if number in numbers:
            move = store.index.promote(f"{name}@{number}", alias, only_new=True)
            if move.after != number:
                notes.append(
                    f"{name}@{alias} stays at {name}@{move.after}; there it is {number}: weft store promote {name}@{number} {alias}"
                )
    return notes


def _wanted(shelf: Shelf, numbers: Mapping[str, list[int]], ref: str) -> list[tuple[str, int]]:
    """The versions on a shelf that a reference means."""
    reference = parse(ref)
    name = reference.name
    if not name or name not in numbers:
        raise NotInStoreError(
            f"{shelf.shown} has no {ref!r}.{did_you_mean(name, numbers)} It has {some_names(numbers) or 'nothing'}"
        )
    if _is_whole(reference) or "@" not in reference.text:
        return [(name, number) for number in numbers[name]]
    number = (
        numbers[name][-1] if reference.alias == LATEST else reference.number or shelf.aliases(name).get(reference.alias)
    )
    if number not in numbers[name]:
        known = [*map(str, numbers[name]), *shelf.aliases(name)]
        raise NotInStoreError(f"{shelf.shown} has no {ref!r}; of {name} it has {some_names(known)}")
    return [(name, number)]


class _Other(Shelf):
    """Another store, as the same owner."""

    def __init__(self, store: Store) -> None:
        self.store, self.shown = store, store.place

    def numbers(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for version in self.store.find(all_versions=True, limit=1 << 30):
            found.setdefault(version.name, []).append(version.number)
        return {name: sorted(numbers) for name, numbers in sorted(found.items())}

    def record(self, name: str, number: int) -> Record | None:
        try:
            version = self.store.version(f"{name}@{number}")
        except NotInStoreError:
            return None
        return record_of(version, self.store.index.files(version.address), self.store.provenance(version).to_dict())

    def aliases(self, name: str) -> dict[str, int]:
        return {alias: version.number for version in self.store.versions(name) for alias in version.aliases}

    @contextlib.contextmanager
    def fetch(self, record: Record) -> Iterator[Path]:
        with self.store.blobs.fetch(record.address, record.files) as folder:
            self.store.blobs.check(record.address, record.files, folder)
            yield folder

    def send(self, record: Record, folder: Path) -> None:
        adapter = unpack(folder, record.digest, provenance_of(dict(record.provenance), str(record)))
        self.store.put(
            adapter, record.name, tags=record.tags, metrics=record.metrics, note=record.note, number=record.number
        )

    def point(self, name: str, aliases: Mapping[str, int]) -> None:
        for alias, number in aliases.items():
            self.store.index.promote(f"{name}@{number}", alias, only_new=True)


def _shelf(store: Store, url: str, options: Mapping[str, Any] | None) -> Shelf:
    """The other side: another store where there is one, else a catalog."""
    if not isinstance(url, str) or not url:
        raise StoreError(
            "expected a place: a directory, s3://bucket/prefix, hf://org/name or the address of weft store serve-index"
        )
    place = os.path.abspath(os.path.expanduser(url.removeprefix("file://"))) if is_local(url) else url.rstrip("/")
    if place == os.path.abspath(store.place) or url.rstrip("/") == store.place.rstrip("/"):
        raise StoreError(f"{url} is this store itself")
    if is_local(url) and os.path.isfile(os.path.join(place, INDEX_FILE)):
        return _Other(type(store)(place, index=f"sqlite:///{place}/{INDEX_FILE}", owner=store.owner))
    return open_catalog(place, options)
