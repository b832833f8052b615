"""What has to be true of a foreign file before anything in it is used.

Each check raises an error that names the file, the key and the way out. This module knows files, JSON and names, no
tensors and no format.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from weft.errors import FormatError, some_names

__all__ = ["MAX_JSON_BYTES", "MAX_NAME", "check_name", "inside", "listing", "path_of", "plain_file", "read_json"]

MAX_JSON_BYTES = 16 << 20
"""A configuration above this size is refused: real ones have a few thousand bytes."""

MAX_DEPTH = 32
"""Lists and objects inside of each other; real configurations have four."""

MAX_NAME = 1024
"""Letters in the name of a tensor."""

_LFS = b"version https://git-lfs"


def path_of(source: str | os.PathLike[str]) -> Path:
    """A path as people give it; ``~`` is their home.

    Raises:
        FormatError: text that no path can be.
    """
    try:
        text = os.path.expanduser(os.fspath(source))
        os.lstat(text)
    except (TypeError, ValueError) as problem:
        raise FormatError(f"not a path: {problem}", path=shortened(repr(source))) from None
    except OSError:
        pass  # nothing is there, which is another question
    return Path(text)


def inside(path: Path, folder: Path) -> Path:
    """The file that a path in a folder stands for.

    The hub's cache is known: its snapshots hold links to ``blobs`` beside them.

    Raises:
        FormatError: a link that leaves the folder, or that leads nowhere.
    """
    home = folder.resolve()
    roots = [home]
    if home.parent.name == "snapshots":
        roots.append(home.parent.parent / "blobs")
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as problem:
        raise FormatError(f"a link that leads nowhere ({problem}); get the file itself", path=path) from None
    if not any(real.is_relative_to(root) for root in roots):
        raise FormatError(
            f"this is a link to {real}, outside of its folder: copy the file to where the link is, if you trust it",
            path=path,
        )
    return real


def plain_file(path: Path, folder: Path | None = None) -> int:
    """Size of a file that can be read: a plain one, not empty, no Git LFS pointer, inside of ``folder``.

    Raises:
        FormatError: says which of these it is not.
    """
    if folder is not None:
        inside(path, folder)
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise FormatError("this is not a plain file", path=path)
        with path.open("rb") as file:
            head = file.read(len(_LFS))
    except OSError as problem:
        raise FormatError(f"can't be read: {problem.strerror or problem}", path=path) from None
    if not facts.st_size:
        raise FormatError("the file is empty: a download or a copy was cut short; get it again", path=path)
    if head == _LFS:
        raise FormatError(
            "this is a Git LFS pointer, not the file itself: run 'git lfs pull' in its repository, or download it from the hub",
            path=path,
        )
    return facts.st_size


def read_json(path: Path, folder: Path | None = None) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FormatError: too large, no UTF-8, no JSON, no object, too deep, a key twice, NaN or infinity.
    """
    size = plain_file(path, folder)
    if size > MAX_JSON_BYTES:
        raise FormatError(
            f"{size:,} bytes are too large for a configuration; at most {MAX_JSON_BYTES:,} are read", path=path
        )
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
    except OSError as problem:
        raise FormatError(f"can't be read: {problem.strerror or problem}", path=path) from None
    return parse_object(raw, lambda message, key: FormatError(message, path=path, key=key))


def parse_object(raw: bytes, refuse: Callable[[str, str | None], FormatError]) -> dict[str, Any]:
    """A JSON object from bytes; ``refuse`` makes the error from a message and a key."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise refuse("stands there twice: nobody can know which one is meant; remove one", shortened(twice))
        return found

    def constant(name: str) -> NoReturn:
        raise refuse(f"holds {name}, which is no JSON; numbers have to be finite", None)

    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=once, parse_constant=constant)
    except RecursionError:
        raise refuse(f"lists or objects are nested deeper than {MAX_DEPTH}", None) from None
    except FormatError:
        raise
    except ValueError as problem:
        raise refuse(f"this is no JSON ({problem}): damaged, or another kind of file; get it again", None) from None
    if not isinstance(value, dict):
        raise refuse(f"expected a JSON object, got {type(value).__name__}", None)
    if too_deep(value):
        raise refuse(f"lists or objects are nested deeper than {MAX_DEPTH}", None)
    return value


def too_deep(value: Any) -> bool:
    """Whether lists and objects are nested deeper than `MAX_DEPTH`."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [part for item in level for part in _parts(item)]
        if not level:
            return False
    return True


def _parts(item: Any) -> Iterable[Any]:
    if isinstance(item, dict):
        return item.values()
    return item if isinstance(item, list) else ()


def check_name(name: str, path: Path) -> None:
    """Refuse a tensor's name that no module tree can have.

    Raises:
        FormatError: empty, too long, control characters.
    """
    if not name or len(name) > MAX_NAME:
        raise FormatError(
            f"a name of {len(name)} letters; expected 1 to {MAX_NAME}", path=path, key=shortened(name) or None
        )
    if not name.isprintable():
        raise FormatError(
            "a name with control characters; no tool writes such names: don't trust this file",
            path=path,
            key=shortened(name),
        )


def shortened(name: str) -> str:
    """A name for messages."""
    return name if len(name) <= 120 else f"{name[:100]}…"


def listing(folder: Path) -> str:
    """What a folder holds, for messages."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError as problem:
        return f"nothing that can be listed ({problem.strerror})"
    return some_names(names) or "nothing"


def is_number(value: Any) -> bool:
    """A finite number that is no bool and that a float can hold."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 1 << 1000
    return isinstance(value, float) and math.isfinite(value)
