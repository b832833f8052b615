"""Blobs on any filesystem that fsspec knows: S3 and what speaks its protocol, the hub, memory …

Files are uploaded, and count only once the index says so; an upload that stops half-way is no blob.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from weft.errors import MissingDependencyError, StoreError
from weft.store.blobs import Blobs, Files, LocalBlobs, checked_address, checked_name, is_local

__all__ = ["RemoteBlobs", "open_blobs", "open_filesystem", "problems"]


def open_blobs(url: str, options: Mapping[str, Any] | None = None) -> Blobs:
    """Blobs at a path or URL.

    Args:
        url: ``/path``, ``s3://bucket/prefix``, ``hf://datasets/org/name`` …
        options: for fsspec's filesystem.

    Raises:
        StoreError: no such kind of place; MissingDependencyError: its library is missing.
    """
    if is_local(url):
        path = url.partition("://")[2] if "://" in url else url
        if not path or "\0" in path:
            raise StoreError(f"{ascii(url)[:100]} is no directory for a store")
        return LocalBlobs(Path(path).expanduser().absolute())
    filesystem, root = open_filesystem(url, options)
    return RemoteBlobs(filesystem, root, url)


def open_filesystem(url: str, options: Mapping[str, Any] | None = None) -> tuple[Any, str]:
    """A filesystem of fsspec, and the path on it.

    Raises:
        StoreError: no such kind of place; MissingDependencyError: its library is missing.
    """
    import fsspec

    protocol = url.partition("://")[0]
    try:
        filesystem, root = fsspec.core.url_to_fs(url, **{"use_listings_cache": False, **(options or {})})
    except ImportError as problem:
        library = "'weft[s3]'" if protocol in ("s3", "s3a") else f"the library of fsspec's {protocol!r}"
        raise MissingDependencyError(
            f"{url}: needs a library that isn't here: pip install {library} ({problem})"
        ) from None
    except ValueError as problem:
        raise StoreError(f"{url}: {problem}; expected a path, or a URL such as s3://bucket/prefix") from None
    return filesystem, root.rstrip("/")


@contextlib.contextmanager
def problems(shown: str) -> Iterator[None]:
    """Errors of filesystems as errors of the store."""
    try:
        yield
    except FileNotFoundError as problem:
        raise StoreError(f"{shown}: not found: {problem}; check the name of the bucket or repository") from problem
    except _failures() as problem:
        first = (str(problem).strip().splitlines() or [""])[0]
        raise StoreError(f"{shown}: {type(problem).__name__}: {first[:300]}; nothing was changed") from problem


class RemoteBlobs(Blobs):
    """Blobs on a filesystem of fsspec. Whoever uploads the same blob at the same time uploads the same files."""

    def __init__(self, filesystem: Any, root: str, shown: str) -> None:
        self.filesystem, self.root, self.shown = filesystem, root, shown

    @contextlib.contextmanager
    def stage(self) -> Iterator[Path]:
        """See `Blobs.stage`: in this machine's directory for temporary files."""
        with tempfile.TemporaryDirectory(prefix="weft-store-") as folder:
            yield Path(folder)

    def install(self, address: str, staged: Path, files: Files, known: Files | None) -> None:
        """See `Blobs.install`."""
        place = self._place(address)
        there = self.seems(address, files) or (known and self.seems(address, known))
        more = [f"provenance/{path.name}" for path in staged.glob("provenance/*")]
        with problems(self.shown):
            for name in [*more, *(() if there else files)]:
                self.filesystem.put_file(str(staged / name), f"{place}/{name}")

    def holds(self, address: str, files: Files) -> bool:
        """See `Blobs.holds`: large files by their sizes."""
        return self.seems(address, files)

    def add(self, address: str, name: str, data: bytes) -> None:
        """See `Blobs.add`."""
        path = f"{self._place(address)}/{checked_name(name)}"
        with problems(self.shown):
            try:
                if self.filesystem.cat_file(path) == data:
                    return
            except FileNotFoundError:
                pass
            self.filesystem.pipe_file(path, data)

    def read(self, address: str, name: str, limit: int) -> bytes:
        """See `Blobs.read`."""
        path = f"{self._place(address)}/{checked_name(name)}"
        with problems(self.shown):
            try:
                data: bytes = self.filesystem.cat_file(path, start=0, end=limit + 1)
            except FileNotFoundError:
                raise self.damaged(address, name, "is missing") from None
        if len(data) > limit:
            raise self.damaged(address, name, "was changed")
        return data

    @contextlib.contextmanager
    def fetch(self, address: str, files: Files) -> Iterator[Path]:
        """See `Blobs.fetch`: downloaded, once the sizes are what they should be."""
        there = self.sizes(address)
        for name, facts in files.items():
            if there.get(checked_name(name)) != facts.size:
                raise self.damaged(address, name, "is missing" if name not in there else "was changed")
        with self.stage() as folder:
            with problems(self.shown):
                for name in files:
                    self.filesystem.get_file(f"{self._place(address)}/{name}", str(folder / name))
            yield folder

    def sizes(self, address: str) -> dict[str, int]:
        """See `Blobs.sizes`."""
        place = self._place(address)
        with problems(self.shown):
            self.filesystem.invalidate_cache()
            try:
                found = self.filesystem.find(place, detail=True)
            except FileNotFoundError:
                return {}
        return {path.partition(f"{address}/")[2]: int(facts["size"] or 0) for path, facts in found.items()}

    def remove(self, address: str) -> None:
        """See `Blobs.remove`."""
        with problems(self.shown), contextlib.suppress(FileNotFoundError):
            self.filesystem.invalidate_cache()
            self.filesystem.rm(self._place(address), recursive=True)

    def addresses(self) -> Iterator[tuple[str, float]]:
        """See `Blobs.addresses`."""
        newest: dict[str, float] = {}
        with problems(self.shown):
            self.filesystem.invalidate_cache()
            try:
                found = self.filesystem.find(f"{self.root}/blobs", detail=True)
            except FileNotFoundError:
                found = {}
        for path, facts in found.items():
            parts = path.rpartition("/blobs/")[2].split("/")
            if len(parts) > 2:
                newest[parts[1]] = max(newest.get(parts[1], 0.0), _written(facts))
        yield from newest.items()

    def sweep(self, older: float) -> int:
        """See `Blobs.sweep`: nothing is written beside."""
        return 0

    def mark(self, key: str | None = None) -> str | None:
        """See `Blobs.mark`."""
        path = f"{self.root}/store-id"
        with problems(self.shown):
            try:
                return bytes(self.filesystem.cat_file(path)).decode("ascii", "replace").strip()
            except FileNotFoundError:
                if key is None:
                    return None
            self.filesystem.pipe_file(path, key.encode())
        return key

    def _place(self, address: str) -> str:
        return f"{self.root}/blobs/{checked_address(address)[:2]}/{address}"


def _failures() -> tuple[type[BaseException], ...]:
    """What filesystems raise. Libraries that aren't imported can't have raised anything."""
    found: list[type[BaseException]] = [OSError, TimeoutError]
    for module, name in (("botocore.exceptions", "BotoCoreError"), ("botocore.exceptions", "ClientError"), ("aiohttp", "ClientError"),
                         ("huggingface_hub.errors", "HfHubHTTPError"), ("huggingface_hub.errors", "HFValidationError")):  # fmt: skip
        error = getattr(sys.modules.get(module), name, None)
        if isinstance(error, type) and issubclass(error, BaseException):
            found.append(error)
    return tuple(found)


def _written(facts: Mapping[str, Any]) -> float:
    """When a file was written, as filesystems say it in their ways; now, where they don't."""
    names = ("LastModified", "mtime", "last_modified", "created")
    value: Any = next((facts[name] for name in names if facts.get(name)), None)
    if isinstance(value, datetime):
        return value.timestamp()
    return float(value) if isinstance(value, int | float) else time.time()
