"""Names of users as names of folders. Names come out of data: they may be paths, very long, empty of letters, or the same but for case.

Knows nothing of runs.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence

__all__ = ["folder_names"]

LONGEST = 80
"""Bytes of a folder's name; file systems take 255, and files inside have names too."""

_DEVICES = {"con", "prn", "aux", "nul", *(f"{kind}{digit}" for kind in ("com", "lpt") for digit in range(10))}


def folder_names(names: Sequence[str], reserved: Iterable[str] = ()) -> dict[str, str]:
    """A safe folder for each name: itself where that is safe, else a cleaned form, with a piece of its hash where needed.

    Letters and digits of every script, ``-``, ``_`` and inner ``.`` stay, all else becomes ``_``. A hash is added where the
    cleaned name is another's too (no two folders differ in case alone, so that they stay apart on any file system), is
    reserved, was cut, or has nothing left. The result depends on the set of names only, not on their order.

    Args:
        names: distinct names.
        reserved: folders that something else needs.

    Example:
        >>> folder_names(["First Citizen", "alice", "../alice"])
        {'First Citizen': 'First_Citizen', 'alice': 'alice', '../alice': 'alice-8be1c9b5'}
    """
    plain = {name: _cleaned(name) for name in names}
    taken = {name.casefold() for name in reserved}
    wanted: dict[str, list[str]] = {}
    for name, clean in plain.items():
        wanted.setdefault(clean.casefold(), []).append(name)
    found = {}
    for name, clean in plain.items():
        key, cut = clean.casefold(), len(clean.encode()) > LONGEST - 9
        rivals = [other for other in wanted[key] if other != name]
        first = name == clean and all(other != plain[other] for other in rivals)
        usable = clean and not cut and key not in taken and key.partition(".")[0] not in _DEVICES
        found[name] = clean if usable and (first or not rivals) else _marked(clean, name)
    return found


def _cleaned(name: str) -> str:
    letters = [letter if letter.isalnum() or letter in "-_." else "_" for letter in unicodedata.normalize("NFC", name)]
    text = "".join(letters).strip("._-")
    return _cut(text, LONGEST)


def _marked(clean: str, name: str) -> str:
    mark = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{_cut(clean, LONGEST - 9) or 'user'}-{mark}"


def _cut(text: str, size: int) -> str:
    """At most so many bytes, whole letters."""
    return text.encode("utf-8", "replace")[:size].decode("utf-8", "ignore").rstrip("._-")
