"""Hashes of files, as text that says its kind.

    5f1e…             sha256 of the bytes
    tensors:9a07…     of a tensor file: sha256 over its header and the sha256 of each tensor's bytes

The second kind shares its work with an adapter's digest, which needs the tensors' hashes too, and several threads can work on it. Whatever changes
one byte of the file changes both kinds. Knows paths and bytes, no tensors.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

__all__ = ["HASH", "MAX_HEADER_BYTES", "TENSORS", "WORKERS", "hash_of", "is_hash", "of_tensors", "sha256_of"]

TENSORS = "tensors:"
"""What the hash of a tensor file begins with."""

HASH = re.compile(r"(tensors:)?[0-9a-f]{64}")
MAX_HEADER_BYTES = 100_000_000
WORKERS = 2
"""Threads that hash; hashing lets others run meanwhile."""

_PIECE = 1 << 18


def is_hash(text: object) -> bool:
    """Whether something can be the hash of a file."""
    return isinstance(text, str) and HASH.fullmatch(text) is not None


def sha256_of(path: Path) -> str:
    """sha256 over a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_tensors(head: bytes, parts: Iterable[str]) -> str:
    """The hash of a tensor file, from its header and the sha256 of each tensor's bytes, in the order of the file."""
    total = hashlib.sha256(head)
    for part in parts:
        total.update(bytes.fromhex(part))
    return f"{TENSORS}{total.hexdigest()}"


def hash_of(path: Path, like: str = "") -> str:
    """The hash of a file, of the kind that another hash has.

    Returns:
        The hash; of a file that should be one of tensors and is none, one that no file has.

    Raises:
        OSError: the file isn't there, or can't be read.
    """
    if not like.startswith(TENSORS):
        return sha256_of(path)
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        head = _head(file, size)
    places = _places(head, size)
    if places is None:
        return f"{TENSORS}none"
    with ThreadPoolExecutor(WORKERS, "weft-hash") as pool:
        return of_tensors(head, pool.map(lambda place: _sha256_within(path, *place), places))


def _sha256_within(path: Path, start: int, stop: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while start < stop and (piece := file.read(min(_PIECE, stop - start))):
            digest.update(piece)
            start += len(piece)
    return digest.hexdigest()


def _head(file: BinaryIO, size: int) -> bytes:
    first = file.read(8)
    length = int.from_bytes(first, "little")
    return first + file.read(length) if 2 <= length <= min(size - 8, MAX_HEADER_BYTES) else b""


def _places(head: bytes, size: int) -> Sequence[tuple[int, int]] | None:
    """Where each tensor's bytes start and stop in the file, in their order; None where the header describes no such file."""
    try:
        said = json.loads(head[8:])
        said.pop("__metadata__", None)
        places = sorted((facts["data_offsets"][0], facts["data_offsets"][1]) for facts in said.values())
        end = 0
        for start, stop in places:
            if type(start) is not int or type(stop) is not int or start != end or stop < start:
                return None
            end = stop
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    first = len(head)
    return [(first + start, first + stop) for start, stop in places] if first + end == size else None
