"""What is printed, and how: results on stdout, remarks on stderr, JSON for programs.

In a training of several processes only the first one prints.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = [
    "as_json",
    "command",
    "common",
    "heading",
    "number",
    "pairs",
    "piece",
    "progress",
    "remark",
    "result",
    "size",
    "table",
]


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def result(text: str = "") -> None:
    """Print a part of the result."""
    if _is_first():
        print(text, flush=True)


def piece(text: str) -> None:
    """Print a part of a line, at once."""
    if _is_first():
        print(text, end="", flush=True)


def heading(number: str, text: str) -> None:
    """Print the heading of a step; bold on a terminal."""
    line = f"{number}. {text}"
    bold = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    result(f"\n\033[1m{line}\033[0m" if bold else f"\n{line}")
    result("─" * len(line))


def remark(text: str, quiet: bool = False) -> None:
    """Say something that is not the result."""
    if _is_first() and not quiet:
        print(text, file=sys.stderr, flush=True)


def as_json(value: Any, indent: int | None = 2) -> None:
    """Print plain data as JSON; NaN and infinity, which JSON has not, as text."""
    result(json.dumps(_plain(value), ensure_ascii=False, indent=indent, allow_nan=False))


def progress(quiet: bool) -> bool | None:
    """What the API's ``progress`` is to be."""
    return False if quiet else None


def command(*words: str | None) -> str:
    """A command line to type, quoted where it has to be; None words are left out."""
    return shlex.join(word for word in words if word is not None)


def pairs(rows: Iterable[tuple[str, str]], *, lines: int | None = None) -> None:
    """Print names and values, the values wrapped beside their names.

    Args:
        rows: name and value.
        lines: how much of a long value is shown; None: all.
    """
    rows = list(rows)
    left = max((len(name) for name, _ in rows), default=0) + 2
    width = max(20, shutil.get_terminal_size((80, 24)).columns - left)
    for name, value in rows:
        wrapped = [part for line in str(value).splitlines() or [""] for part in textwrap.wrap(line, width) or [""]]
        if lines is not None and len(wrapped) > lines:
            wrapped = [
                *wrapped[: lines - 1],
                textwrap.shorten(" ".join(wrapped[lines - 1 :]), width - 2, placeholder="") + " …",
            ]
        for index, line in enumerate(wrapped):
            result(f"{name if not index else '':{left}}{line}".rstrip())


def size(count: int) -> str:
    """Bytes for people: ``"1.5 MB"``."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.{1 if value < 100 else 0}f} {unit}"
        value /= 1000
    raise AssertionError


def number(count: int, one: str) -> str:
    """A count and its noun: ``"1 version"``, ``"2 versions"``."""
    return f"{count:,} {one}" if count == 1 else f"{count:,} {one}s"


def common(paths: Sequence[str]) -> str:
    """What all dotted paths start with, up to a dot: it is said once, above a table."""
    parts = [path.split(".")[:-1] for path in paths]
    same = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))
    return "".join(f"{names[0]}." for names in same) if len(paths) > 1 else ""


def table(columns: Iterable[tuple[str, str]], rows: Iterable[Iterable[str]]) -> None:
    """Print a table.

    Args:
        columns: heading and ``"left"`` or ``"right"``.
        rows: cells, as many as columns.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading, side in columns:
        shown.add_column(
            heading, justify="right" if side == "right" else "left", overflow="fold", no_wrap=side == "right"
        )
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))
    if _is_first():
        Console(highlight=False).print(shown)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)
