"""Patterns over dotted paths: names and suffixes, expressions, layer indices. They remember what matched.

This module does not know modules or specs: only text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from weft.errors import SpecError

__all__ = ["Layers", "Names", "unmatched_patterns"]


class Names:
    """Names or dotted suffixes (a tuple), or one regular expression over whole paths (a string).

    `find` is a lookup by the last part of a path, so that the number of names doesn't matter. The caller says with
    `hit` and `miss` what came of a match; an entry without a `hit` is in `unmatched`.

    Args:
        field: the spec's field, for messages.
        patterns: see above; an empty string or tuple matches nothing.
    """

    def __init__(self, field: str, patterns: str | tuple[str, ...]) -> None:
        self.field = field
        self.regex: re.Pattern[str] | None = None
        self.entries = (patterns,) if isinstance(patterns, str) and patterns else tuple(dict.fromkeys(patterns))
        self._tails: dict[str, list[str]] = {}
        self._hits: set[str] = set()
        self._reasons: dict[str, str] = {}
        if isinstance(patterns, str) and patterns:
            self.regex = re.compile(patterns)
        else:
            for entry in self.entries:
                self._tails.setdefault(entry.rpartition(".")[2], []).append(entry)

    def __bool__(self) -> bool:
        return bool(self.entries)

    def find(self, path: str) -> list[str]:
        """The entries that match a path."""
        if self.regex is not None:
            return [self.regex.pattern] if self.regex.fullmatch(path) else []
        near = self._tails.get(path.rpartition(".")[2])
        return [entry for entry in near if path == entry or path.endswith(f".{entry}")] if near else []

    def hit(self, entry: str) -> None:
        """An entry yielded something."""
        self._hits.add(entry)

    def miss(self, found: Mapping[str, str], why: str) -> None:
        """Entries matched these paths, but for a reason nothing came of it; the first reason is kept."""
        for entry, path in found.items():
            self._reasons.setdefault(entry, f"{path!r} {why}")

    def unmatched(self) -> list[str]:
        """Entries that yielded nothing."""
        return [entry for entry in self.entries if entry not in self._hits]

    def reason(self, entry: str) -> str:
        """Why an entry yielded nothing; empty if it matched nothing at all."""
        return self._reasons.get(entry, "")


class Layers:
    """A choice of layers by index: the first number of a path, or the number behind ``pattern``.

    Raises:
        SpecError: a pattern without indices, or one that is no regular expression.
    """

    def __init__(self, indices: tuple[int, ...] | None, pattern: str | None) -> None:
        if pattern and indices is None:
            raise SpecError(f"LoraSpec.layers_pattern={pattern!r} without layers: say which ones, layers=[…]")
        try:
            self._number = re.compile(
                rf"(?:^|.*?\.)(?:{pattern})\.(\d+)(?:\.|$)" if pattern else r"(?:^|.*?\.)(\d+)(?:\.|$)"
            )
        except re.error as problem:
            raise SpecError(f"LoraSpec.layers_pattern={pattern!r} is no regular expression: {problem}") from None
        self._wanted = None if indices is None else frozenset(indices)
        self._found: set[int] = set()
        self.seen: set[int] = set()

    def allow(self, path: str) -> bool:
        """Whether a path lies in one of the layers; remembers its index."""
        if self._wanted is None:
            return True
        match = self._number.match(path)
        if match is None:
            return False
        self.seen.add(int(match[1]))
        return int(match[1]) in self._wanted

    def count(self, path: str) -> None:
        """A site stands at ``path``: its layer has a use."""
        match = self._number.match(path) if self._wanted is not None else None
        if match is not None:
            self._found.add(int(match[1]))

    def missing(self) -> list[int]:
        """Wanted layers without a site."""
        return sorted((self._wanted or frozenset()) - self._found)


def unmatched_patterns(patterns: Mapping[str, float], paths: Iterable[str]) -> list[str]:
    """Keys of a rank or alpha pattern that match the end of no path. Plain names take a lookup, not a search."""
    if not patterns:
        return []
    known = list(paths)
    suffixes = {".".join(parts[start:]) for parts in (path.split(".") for path in known) for start in range(len(parts))}
    lost = [key for key in patterns if key not in suffixes]
    return [key for key in lost if not any(re.match(rf"(.*\.)?({key})$", path) for path in known)]
