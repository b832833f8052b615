"""Write an adapter directory so that a reader sees the old one, the new one or an error, whenever the writer dies.

A new directory is written beside its place and renamed. Into a directory that is there already, the files are first
written to ``.weft-new`` in it; the rename that gives that folder its name is the moment of truth: from then on a reader
takes the files from there, until they have moved to their places. This module does not know what is in the files.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from weft.durable import flush, flush_tree
from weft.errors import FormatError, some_names
from weft.formats.checks import path_of

__all__ = ["STAGED", "home_of", "write_folder"]

STAGED = ".weft-new"
"""Files of a write that was interrupted after it was complete."""


def home_of(folder: Path) -> Path:
    """Where the files of a directory are to be read: in `STAGED` if a write was interrupted after it was complete."""
    staged = folder / STAGED
    return staged if staged.is_dir() and not staged.is_symlink() else folder


def write_folder(
    directory: str | os.PathLike[str],
    files: Mapping[str, Callable[[Path], object]],
    *,
    owned: Iterable[str],
    overwrite: bool,
) -> Path:
    """Write files as one: all of them or none.

    Args:
        directory: where to; its parents are made.
        files: a writer by name, in which one folder may stand (``text_model/adapter_config.json``); the last one is the one without which other tools see no adapter.
        owned: names that belong to such a directory. Those not in ``files`` are removed.
        overwrite: replace such files if they are there; anything else in the directory is left alone.

    Raises:
        FormatError: files of these names are there, the place is no directory, or it can't be written.
    """
    target = path_of(directory)
    target = target.resolve() if target.is_symlink() else target.absolute()
    owned = sorted({*owned, *files})
    if os.path.lexists(target) and not target.is_dir():
        raise FormatError("a file stands there: give the name of a directory", path=target)
    there = [name for name in owned if os.path.lexists(target / name)] + (
        [STAGED] if (target / STAGED).is_dir() else []
    )
    if there and not overwrite:
        raise FormatError(
            f"holds an adapter already ({some_names(there)}): give another directory, or pass overwrite=True",
            path=target,
        )
    try:
        if target.is_dir():
            _into_existing(target, files, owned)
        else:
            _new(target, files)
    except OSError as problem:
        raise FormatError(
            f"can't be written: {problem.strerror or problem}", path=problem.filename or target
        ) from problem
    return target


def _stage(beside: Path, files: Mapping[str, Callable[[Path], object]]) -> None:
    for name, write in files.items():
        (beside / name).parent.mkdir(exist_ok=True)
        write(beside / name)
    flush_tree(beside)


def _new(target: Path, files: Mapping[str, Callable[[Path], object]]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = _fresh(target.parent, f".{target.name}.weft-")
    try:
        _stage(beside, files)
        os.rename(beside, target)
        flush(target.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _into_existing(target: Path, files: Mapping[str, Callable[[Path], object]], owned: list[str]) -> None:
    staged = target / STAGED
    if staged.is_dir():
        _settle(target, staged, owned)
    beside = _fresh(target, ".weft-")
    try:
        _stage(beside, files)
        os.rename(beside, staged)
        flush(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    _settle(target, staged, owned)


def _settle(target: Path, staged: Path, owned: list[str]) -> None:
    """Move a complete write to its place. Every step can be repeated; until the last one a reader takes `STAGED`.

    Other tools, which don't know that folder, find the file that they need last: they see the old adapter, none, or the new one.
    """
    names = sorted(path.relative_to(staged).as_posix() for path in staged.rglob("*") if not path.is_dir())
    last = [name for name in ("adapter_config.json",) if name in names]
    for name in [*last, *(name for name in owned if name not in names)]:
        (target / name).unlink(missing_ok=True)
        if "/" in name:
            with contextlib.suppress(OSError):  # other files are in there
                (target / name).parent.rmdir()
    for name in [*(name for name in names if name not in last), *last]:
        (target / name).parent.mkdir(exist_ok=True)
        copy = (target / name).with_name(f".{(target / name).name}.weft")
        copy.unlink(missing_ok=True)
        try:
            os.link(staged / name, copy)
        except OSError:
            shutil.copyfile(staged / name, copy)
            flush(copy)
        os.replace(copy, target / name)
        copy.unlink(missing_ok=True)  # two links to one file: replacing leaves both
    for folder in {(target / name).parent for name in names}:
        flush(folder)
    flush(target)
    gone = _fresh(target, ".weft-")
    os.rename(staged, gone / "old")
    shutil.rmtree(gone, ignore_errors=True)


def _fresh(parent: Path, prefix: str) -> Path:
    """A new directory with a name of its own, and the permissions that directories usually get."""
    folder = parent / f"{prefix}{secrets.token_hex(6)}"
    folder.mkdir()
    return folder
