"""Blobs: directories of files, each under an address; here on a local disk, `weft.store.remote` has them elsewhere.

    blobs/ab/ab12…/adapter_model.safetensors, adapter_config.json, weft.json      an adapter, as PEFT reads it
                   provenance/5f1e….json                                          where versions of it come from, by content
    tmp/…                                                                         what is being written, or thrown away

A blob appears in one step and never changes; a provenance is added beside it. On a local disk files are flushed, then
renamed into place. Elsewhere they are uploaded, and count only once the index says so. This module knows sizes and hashes,
no adapters.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from weft.durable import flush, flush_tree, write_flushed
from weft.errors import DamagedError, StoreError
from weft.hashes import hash_of

__all__ = [
    "DAMAGED_ADVICE",
    "Blobs",
    "FileFacts",
    "Files",
    "LocalBlobs",
    "checked_address",
    "checked_name",
    "disk_problem",
    "is_file",
    "is_local",
]

_ADDRESS = re.compile(r"[0-9a-f]{64}(-[0-9a-f]{16})?")
_FILE = re.compile(r"(provenance/)?[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
MAX_PROVENANCE = 16 << 20
"""Bytes of a provenance."""

DAMAGED_ADVICE = (
    ". Put the adapter again, or pull it from where it was pushed to; weft store verify says what else is damaged"
)

_STALE = 3600.0
"""Seconds after which a file in ``tmp`` belongs to nobody."""


@dataclass(frozen=True)
class FileFacts:
    """Size in bytes and hash of a file, see `weft.hashes`."""

    size: int
    hash: str


Files = Mapping[str, FileFacts]


def is_local(url: str) -> bool:
    """Whether a URL is a path of this machine."""
    return "://" not in url or url.startswith(("file://", "local://"))


class Blobs(ABC):
    """What the store asks of the place where its blobs are.

    Attributes:
        shown: the place, for messages.
    """

    shown: str

    @abstractmethod
    def stage(self) -> contextlib.AbstractContextManager[Path]:
        """A new directory of this machine to write into; gone afterwards."""

    @abstractmethod
    def install(self, address: str, staged: Path, files: Files, known: Files | None) -> None:
        """Make a staged directory, a provenance in it or not, the blob of an address; on the disk when this returns.

        A blob that is there already stays, if it has the same files, or those that the index knows, and gets the provenance; else
        it is replaced.
        """

    @abstractmethod
    def holds(self, address: str, files: Files) -> bool:
        """Whether a blob is there with these files; on a local disk all bytes are hashed."""

    @abstractmethod
    def add(self, address: str, name: str, data: bytes) -> None:
        """A further file of a blob; does nothing if it is there."""

    @abstractmethod
    def read(self, address: str, name: str, limit: int) -> bytes:
        """A small file of a blob."""

    @abstractmethod
    def fetch(self, address: str, files: Files) -> contextlib.AbstractContextManager[Path]:
        """A directory of this machine with a blob's files, not yet verified."""

    @abstractmethod
    def sizes(self, address: str) -> dict[str, int]:
        """Bytes of every file of a blob by name; empty without such a blob."""

    @abstractmethod
    def remove(self, address: str) -> None:
        """Remove a blob. Others see all of it or nothing that counts."""

    @abstractmethod
    def addresses(self) -> Iterator[tuple[str, float]]:
        """Every blob that is there, and when it was written."""

    @abstractmethod
    def sweep(self, older: float) -> int:
        """Remove what writers that died left in ``tmp``; gives how many."""

    @abstractmethod
    def mark(self, key: str | None = None) -> str | None:
        """The store that the blobs belong to; with a key they are marked with it, if they have no mark."""

    def seems(self, address: str, files: Files, more: str = "") -> bool:
        """Whether a blob is there, by the sizes of its files and the hashes of the small ones; and a further file."""
        there = self.sizes(address)
        if (
            not files
            or (more and more not in there)
            or any(there.get(name) != facts.size for name, facts in files.items())
        ):
            return False
        small = {name: facts for name, facts in files.items() if name.endswith(".json")}
        return all(
            hashlib.sha256(self.read(address, name, facts.size)).hexdigest() == facts.hash
            for name, facts in small.items()
        )

    def check(self, address: str, files: Files, folder: Path) -> None:
        """Compare a fetched directory with what the index knows.

        Raises:
            DamagedError: names the first file that is lost or changed.
        """
        for name, facts in files.items():
            path = folder / name
            if not path.is_file():
                raise self.damaged(address, name, "is missing")
            if not is_file(path, facts):
                raise self.damaged(address, name, "was changed")

    def damaged(self, address: str, name: str, what: str) -> DamagedError:
        """The error for a file that is not what was written."""
        return DamagedError(
            f"{self.shown}: blob {address[:12]}: {name} {what} since the store wrote it{DAMAGED_ADVICE}"
        )


# on a local disk


class LocalBlobs(Blobs):
    """Blobs in a directory. Files are flushed before they are renamed, directories after."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.shown = str(root)
        self._lasting: set[str] = set()

    @contextlib.contextmanager
    def stage(self) -> Iterator[Path]:
        """See `Blobs.stage`; on the same disk, so that it can be renamed into place."""
        with self._problems():
            (self.root / "tmp").mkdir(parents=True, exist_ok=True)
            folder = self.root / "tmp" / f"{int(time.time())}-{secrets.token_hex(8)}"
            folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def install(self, address: str, staged: Path, files: Files, known: Files | None) -> None:
        """See `Blobs.install`."""
        place = self._place(address)
        with self._problems():
            place.parent.mkdir(parents=True, exist_ok=True)
            flush_tree(staged, *self._above(place))  # before it has its name: a blob is whole from its first moment on
            self._lasting.add(place.parent.name)
            for _ in range(100):
                try:
                    os.rename(staged, place)
                    flush(place.parent)
                    return
                except OSError as problem:
                    if problem.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                if self.holds(address, files) or (known and self.holds(address, known)):
                    for path in staged.glob("provenance/*"):
                        self.add(address, f"provenance/{path.name}", path.read_bytes())
                    flush(place.parent)  # whoever made it may be about to
                    return
                with contextlib.suppress(FileNotFoundError):
                    self._throw_away(place)
        raise StoreError(f"{self.shown}: blob {address[:12]} is made and removed by others all the time; try again")

    def holds(self, address: str, files: Files) -> bool:
        """See `Blobs.holds`."""
        place = self._place(address)
        try:
            there = {entry.name for entry in os.scandir(place) if not entry.is_dir(follow_symlinks=False)}
            return there == set(files) and all(is_file(place / name, facts) for name, facts in files.items())
        except (FileNotFoundError, NotADirectoryError):
            return False

    def add(self, address: str, name: str, data: bytes) -> None:
        """See `Blobs.add`."""
        path = self._place(address) / checked_name(name)
        with self._problems():
            if not (path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data):
                with contextlib.suppress(FileExistsError):
                    path.parent.mkdir()
                with self.stage() as folder:
                    write_flushed(folder / "new", data)
                    os.replace(folder / "new", path)
            flush(path.parent)  # also what another writer is about to
            flush(path.parent.parent)

    def read(self, address: str, name: str, limit: int) -> bytes:
        """See `Blobs.read`."""
        path = self._place(address) / checked_name(name)
        try:
            with self._problems(), path.open("rb") as file:
                data = file.read(limit + 1)
        except FileNotFoundError:
            raise self.damaged(address, name, "is missing") from None
        if len(data) > limit:
            raise self.damaged(address, name, "was changed")
        return data

    @contextlib.contextmanager
    def fetch(self, address: str, files: Files) -> Iterator[Path]:
        """See `Blobs.fetch`: the blob itself."""
        yield self._place(address)

    def sizes(self, address: str) -> dict[str, int]:
        """See `Blobs.sizes`."""
        place = self._place(address)
        found: dict[str, int] = {}
        for folder, prefix in ((place, ""), (place / "provenance", "provenance/")):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
                found |= {f"{prefix}{entry.name}": entry.stat().st_size for entry in entries if entry.is_file()}
        return found

    def remove(self, address: str) -> None:
        """See `Blobs.remove`: renamed away first."""
        with self._problems(), contextlib.suppress(FileNotFoundError):
            self._throw_away(self._place(address))

    def addresses(self) -> Iterator[tuple[str, float]]:
        """See `Blobs.addresses`."""
        for shelf in _entries(self.root / "blobs"):
            for entry in _entries(Path(shelf.path)):
                with contextlib.suppress(FileNotFoundError):
                    yield entry.name, entry.stat().st_mtime

    def sweep(self, older: float) -> int:
        """See `Blobs.sweep`."""
        removed = 0
        now = time.time()
        for entry in _entries(self.root / "tmp"):
            with contextlib.suppress(OSError):
                if now - entry.stat().st_mtime > max(older, _STALE):
                    shutil.rmtree(entry.path)
                    removed += 1
        return removed

    def mark(self, key: str | None = None) -> str | None:
        """See `Blobs.mark`: the file ``store-id``."""
        path = self.root / "store-id"
        with self._problems():
            with contextlib.suppress(FileNotFoundError):
                return path.read_text(encoding="ascii", errors="replace").strip()
            if key is None:
                return None
            with self.stage() as folder:
                write_flushed(folder / "id", key.encode())
                with contextlib.suppress(FileExistsError):
                    os.link(folder / "id", path)
            flush(self.root)
        return self.mark()

    def _place(self, address: str) -> Path:
        return self.root / "blobs" / checked_address(address)[:2] / address

    def _above(self, place: Path) -> tuple[Path, ...]:
        """What has to be flushed so that a blob's shelf stays; whoever made the shelf may not have done it yet."""
        return () if place.parent.name in self._lasting else (place.parent.parent,)

    def _throw_away(self, place: Path) -> None:
        with self.stage() as folder:
            os.rename(place, folder / "gone")
            flush(place.parent)

    @contextlib.contextmanager
    def _problems(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as problem:
            raise disk_problem(problem, self.shown) from problem


def disk_problem(problem: OSError, where: str) -> StoreError:
    """A clear error for a disk that is full, or that can't be written."""
    reason = problem.strerror or str(problem)
    if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreError(
            f"{where}: {reason}; nothing was changed. Free some space (weft store gc removes what nothing refers to), then try again"
        )
    return StoreError(f"{where}: {problem.filename or 'a file'} can't be used: {reason}; nothing was changed")


def is_file(path: Path, facts: FileFacts) -> bool:
    """Whether a file has this size and this hash.

    Raises:
        OSError: it isn't there, or can't be read.
    """
    return path.stat().st_size == facts.size and hash_of(path, facts.hash) == facts.hash


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def checked_address(address: str) -> str:
    """An address, if it can be one: whatever else would lead out of the store.

    Raises:
        DamagedError: it can't.
    """
    if not _ADDRESS.fullmatch(address):
        raise DamagedError(f"{ascii(address)[:100]} is no address of a blob: who wrote this can't be trusted")
    return address


def checked_name(name: str) -> str:
    """The name of a file of a blob, if it can be one.

    Raises:
        DamagedError: it can't.
    """
    if not _FILE.fullmatch(name) or ".." in name:
        raise DamagedError(f"{ascii(name)[:100]} is no file of a blob: who wrote this can't be trusted")
    return name
