"""Where adapters are pushed to and pulled from: a directory, S3, the hub, a server of pages; or another store.

    blobs/…                     as in a store
    catalog/medical/3.json      what version 3 of medical is: digest, files, tags, metrics, provenance
    catalog/medical/aliases.json

A catalog needs no database. The record of a version is written last, once, and never changed: who finds it finds the files.
Nothing that is read from one is believed: sizes, hashes and the digest are compared, names are checked.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.durable import flush, write_flushed
from weft.errors import FormatError, StoreError
from weft.formats.checks import parse_object
from weft.formats.peft import OWNED
from weft.hashes import is_hash
from weft.store.blobs import Blobs, FileFacts, Files, LocalBlobs, checked_address, is_local
from weft.store.names import check_name, check_text
from weft.store.records import Version, checked_metrics, checked_tags
from weft.store.remote import RemoteBlobs, open_blobs, problems

__all__ = ["Catalog", "Record", "Shelf", "open_catalog", "record_of"]

FORMAT = 1
MAX_RECORD = 32 << 20
_RECORD = re.compile(r"catalog/([^/]+)/([1-9][0-9]{0,8})\.json")


@dataclass(frozen=True)
class Record:
    """A version as it stands in a catalog.

    Attributes:
        address: of its blob; files: in it.
        provenance: plain data.
    """

    name: str
    number: int
    digest: str
    address: str
    files: Files
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    note: str
    provenance: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.name}@{self.number}"

    @property
    def size(self) -> int:
        """Of its files."""
        return sum(facts.size for facts in self.files.values())

    def to_json(self) -> bytes:
        """Text of the record."""
        files = {name: [facts.size, facts.hash] for name, facts in sorted(self.files.items())}
        said = {"format": FORMAT, "name": self.name, "number": self.number, "digest": self.digest, "address": self.address, "files": files,
                "tags": dict(self.tags), "metrics": dict(self.metrics), "note": self.note, "provenance": dict(self.provenance)}  # fmt: skip
        return json.dumps(said, indent=1, ensure_ascii=False, allow_nan=False, sort_keys=True, default=str).encode(
            "utf-8", "replace"
        )

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Record:
        """The inverse of `to_json`, of bytes from anywhere.

        Raises:
            FormatError: no record, or one that can't be true.
        """
        said = parse_object(data, lambda message, key: FormatError(message, path=where, key=key))
        if said.get("format") != FORMAT:
            raise FormatError(
                f"format {str(said.get('format'))[:20]!r}; this weft reads {FORMAT}: use a newer weft", path=where
            )
        key = ""
        try:
            for key in ("digest", "address", "number", "files", "provenance", "tags", "metrics", "note", "name"):
                _ = said[key]
            key = "digest"
            _expect(isinstance(said[key], str) and re.fullmatch(r"[0-9a-f]{64}", said[key]))
            key = "address"
            _expect(isinstance(said[key], str) and checked_address(said[key]).startswith(said["digest"]))
            key = "number"
            _expect(type(said[key]) is int and 0 < said[key] < 10**9)
            key = "files"
            files = {name: _facts(name, facts) for name, facts in said[key].items()}
            _expect("weft.json" in files)
            key = "provenance"
            _expect(isinstance(said[key], dict))
            key = "name"
            name = check_name(said[key])
            key = "tags"
            tags = checked_tags(said[key])
            key = "metrics"
            metrics = checked_metrics(said[key])
            key = "note"
            note = check_text(said[key], "the note")
        except (KeyError, TypeError, ValueError, AttributeError, StoreError) as problem:
            raise FormatError(
                f"no record of a version ({str(problem)[:200]}): damaged, or not written by weft", path=where, key=key
            ) from None
        return cls(
            name, said["number"], said["digest"], said["address"], files, tags, metrics, note, said["provenance"]
        )


def record_of(version: Version, files: Files, provenance: Mapping[str, Any]) -> Record:
    """What a catalog is to say of a version."""
    return Record(
        version.name,
        version.number,
        version.digest,
        version.address,
        files,
        version.tags,
        version.metrics,
        version.note,
        provenance,
    )


def _expect(ok: object) -> None:
    if not ok:
        raise ValueError("not what is expected here")


def _facts(name: str, facts: Any) -> FileFacts:
    """A file of a record: one that adapters have, and no other."""
    _expect(name in OWNED and isinstance(facts, list) and len(facts) == 2)
    _expect(type(facts[0]) is int and 0 < facts[0] < 1 << 46 and is_hash(facts[1]))
    return FileFacts(facts[0], facts[1])


class Shelf(ABC):
    """What push and pull ask of the other side.

    Attributes:
        shown: the place, for messages.
    """

    shown: str

    @abstractmethod
    def numbers(self) -> dict[str, list[int]]:
        """Versions that are there, by name."""

    @abstractmethod
    def record(self, name: str, number: int) -> Record | None:
        """What is said of a version; None: it is not there."""

    @abstractmethod
    def aliases(self, name: str) -> dict[str, int]:
        """Aliases of a name."""

    @abstractmethod
    def fetch(self, record: Record) -> contextlib.AbstractContextManager[Path]:
        """A version's files, in a directory of this machine; sizes and hashes are compared."""

    @abstractmethod
    def send(self, record: Record, folder: Path) -> None:
        """Add a version, whose files are in a directory."""

    @abstractmethod
    def point(self, name: str, aliases: Mapping[str, int]) -> None:
        """Set aliases of a name."""


class Catalog(Shelf):
    """Records beside blobs, on any filesystem."""

    def __init__(self, blobs: Blobs) -> None:
        self.blobs, self.shown = blobs, blobs.shown

    def numbers(self) -> dict[str, list[int]]:
        """See `Shelf.numbers`."""
        found: dict[str, list[int]] = {}
        for path in self._paths():
            match = _RECORD.fullmatch(path)
            if match is not None:
                found.setdefault(match[1], []).append(int(match[2]))
        return {name: sorted(numbers) for name, numbers in sorted(found.items())}

    def record(self, name: str, number: int) -> Record | None:
        """See `Shelf.record`.

        Raises:
            FormatError: a record that can't be true.
        """
        path = f"catalog/{check_name(name)}/{number}.json"
        data = self._read(path)
        if data is None:
            return None
        found = Record.from_json(data, f"{self.shown}/{path}")
        if (found.name, found.number) != (name, number):
            raise FormatError(f"it says that it is {found}; moved, or not written by weft", path=f"{self.shown}/{path}")
        return found

    def aliases(self, name: str) -> dict[str, int]:
        """See `Shelf.aliases`; what can't be one is left out."""
        path = f"catalog/{check_name(name)}/aliases.json"
        data = self._read(path)
        said = (
            {}
            if data is None
            else parse_object(data, lambda message, key: FormatError(message, path=f"{self.shown}/{path}", key=key))
        )
        return {alias: number for alias, number in said.items() if type(number) is int and number > 0}

    @contextlib.contextmanager
    def fetch(self, record: Record) -> Iterator[Path]:
        """See `Shelf.fetch`."""
        with self.blobs.fetch(record.address, record.files) as folder:
            self.blobs.check(record.address, record.files, folder)
            yield folder

    def send(self, record: Record, folder: Path) -> None:
        """See `Shelf.send`."""
        if not self.blobs.seems(record.address, record.files):
            with self.blobs.stage() as staged:
                for name in record.files:
                    shutil.copyfile(folder / name, staged / name)
                self.blobs.install(record.address, staged, record.files, None)
        self._create(f"catalog/{record.name}/{record.number}.json", record)

    def point(self, name: str, aliases: Mapping[str, int]) -> None:
        """See `Shelf.point`; who writes last wins."""
        there = self.aliases(name)
        if aliases and {**there, **aliases} != there:
            self._write(
                f"catalog/{name}/aliases.json", json.dumps({**there, **aliases}, indent=1, sort_keys=True).encode()
            )

    def _create(self, path: str, record: Record) -> None:
        """Write a record that isn't there; of two writers at once one finds the other's."""
        if not self._write(path, record.to_json(), only_new=True):
            there = self.record(record.name, record.number)
            if there is None or there.digest != record.digest:
                raise StoreError(
                    f"{self.shown}: {record} is there already with another adapter ({there.digest[:12] if there else '?'}, not {record.digest[:12]})"
                )

    def _paths(self) -> list[str]:
        """Files of the catalog."""
        if isinstance(self.blobs, LocalBlobs):
            root = self.blobs.root
            return [path.relative_to(root).as_posix() for path in sorted((root / "catalog").glob("*/*.json"))]
        assert isinstance(self.blobs, RemoteBlobs)
        with problems(self.shown):
            self.blobs.filesystem.invalidate_cache()
            try:
                found = self.blobs.filesystem.find(f"{self.blobs.root}/catalog")
            except FileNotFoundError:
                return []
        return [f"catalog/{path.rpartition('/catalog/')[2]}" for path in found]

    def _read(self, path: str) -> bytes | None:
        try:
            if isinstance(self.blobs, LocalBlobs):
                with (self.blobs.root / path).open("rb") as file:
                    data = file.read(MAX_RECORD + 1)
            else:
                assert isinstance(self.blobs, RemoteBlobs)
                with problems(self.shown):
                    try:
                        data = bytes(
                            self.blobs.filesystem.cat_file(f"{self.blobs.root}/{path}", start=0, end=MAX_RECORD + 1)
                        )
                    except FileNotFoundError:
                        return None
        except FileNotFoundError:
            return None
        except OSError as problem:
            raise StoreError(f"{self.shown}: {path}: {problem.strerror or problem}") from problem
        if len(data) > MAX_RECORD:
            raise FormatError(f"more than {MAX_RECORD:,} bytes are no record", path=f"{self.shown}/{path}")
        return data

    def _write(self, path: str, data: bytes, only_new: bool = False) -> bool:
        """Write a small file in one step; False if it is there and ``only_new``."""
        if isinstance(self.blobs, LocalBlobs):
            return _write_local(self.blobs, self.blobs.root / path, data, only_new)
        assert isinstance(self.blobs, RemoteBlobs)
        filesystem, place = self.blobs.filesystem, f"{self.blobs.root}/{path}"
        with problems(self.shown):
            if only_new:
                if filesystem.exists(place):
                    return False
                try:
                    filesystem.pipe_file(place, data, mode="create")
                    return True
                except FileExistsError:
                    return False
                except (TypeError, ValueError, NotImplementedError):  # a filesystem that can't make sure
                    pass
            filesystem.pipe_file(place, data)
        return True


def _write_local(blobs: LocalBlobs, path: Path, data: bytes, only_new: bool) -> bool:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with blobs.stage() as folder:
            write_flushed(folder / "new", data)
            if only_new:
                try:
                    os.link(folder / "new", path)
                except FileExistsError:
                    return False
            else:
                os.replace(folder / "new", path)
        flush(path.parent)
    except OSError as problem:
        raise StoreError(f"{path}: can't be written: {problem.strerror or problem}") from problem
    return True


def open_catalog(url: str, options: Mapping[str, Any] | None = None) -> Catalog:
    """A catalog at a path or URL.

    Raises:
        StoreError: no such kind of place; MissingDependencyError: its library is missing.
    """
    protocol = url.partition("://")[0] if not is_local(url) else ""
    if protocol in ("http", "https"):
        from weft.store.pages import Served

        return Served(url.rstrip("/"))
    if protocol == "hf":
        from weft.store.hub import HubCatalog

        return HubCatalog(url, options)
    return Catalog(open_blobs(url, options))
