"""Bars and lines for the user, on stderr. Costs nothing to import."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

__all__ = ["counted", "counter", "progress_bar", "say"]

_T = TypeVar("_T")


def say(*lines: str) -> None:
    """Lines for the user, to stderr."""
    for line in lines:
        print(line, file=sys.stderr, flush=True)  # noqa: T201


def progress_bar() -> Any:
    """weft's bar, on stderr; its tasks have a field ``note``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    return RichProgress(*columns, console=Console(stderr=True), transient=False)


@contextlib.contextmanager
def counter(what: str, total: int, mode: bool | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal for anything that can be counted; silence elsewhere. Gives a function that advances it."""
    if mode is not None or not sys.stderr.isatty():
        yield lambda count: None
        return
    bar = progress_bar()
    task = bar.add_task(what, total=total, note="")
    with bar:
        yield lambda count: bar.update(task, advance=count)


def counted(items: Iterable[_T], advance: Callable[[int], None]) -> Iterator[_T]:
    """The items, each counted when the next one is asked for: when it is done."""
    for item in items:
        yield item
        advance(1)
