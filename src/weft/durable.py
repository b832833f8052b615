"""Onto the disk: what has to outlive a crash of the machine, and not only one of the process. Knows paths alone."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["flush", "flush_tree", "write_flushed"]

_TOGETHER = 6
"""Files that are flushed at once."""


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


def flush_tree(folder: Path, *more: Path) -> None:
    """A directory with everything in it, and other files or directories, onto the disk: at once, for the disk then takes one go for many.

    Raises:
        OSError: as `flush`.
    """
    with ThreadPoolExecutor(_TOGETHER, "weft-flush") as pool:
        for done in [pool.submit(flush, path) for path in (*folder.rglob("*"), folder, *more)]:
            done.result()


def write_flushed(path: Path, data: bytes) -> None:
    """Write a new file, onto the disk.

    Raises:
        OSError: as `flush`.
    """
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
