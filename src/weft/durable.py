"""Onto the disk: what has to outlive a crash of the machine, and not only one of the process. Knows paths alone."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["flush", "flush_tree", "write_flushed"]


def flush(path: Path) -> None:
    """A file's contents, or a directory's entries, onto the disk.

    Raises:
        OSError: it isn't there, or the disk refused.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no directories
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_tree(folder: Path) -> None:
    """A directory with everything in it, onto the disk.

    Raises:
        OSError: as `flush`.
    """
    for path in (*folder.rglob("*"), folder):
        flush(path)


def write_flushed(path: Path, data: bytes) -> None:
    """Write a new file, onto the disk.

    Raises:
        OSError: as `flush`.
    """
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
