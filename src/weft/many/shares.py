"""Who trains on what: files, or the rows of one file by a column, become one share a user.

Does not know what the rows mean; that is found out user by user, so that one user's broken data stops nobody else.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.data import Table, read_table
from weft.errors import DataError, did_you_mean, some_names

__all__ = ["Share", "shares"]


@dataclass(frozen=True)
class Share:
    """One user's part of the data.

    Attributes:
        name: as the data or the caller have it.
        data: anything that `weft.data.load_examples` takes.
        eval_data: the same, a share to hold out, or None.
    """

    name: str
    data: Any
    eval_data: Any = None


def shares(data: Any, eval_data: Any = None, by: str | None = None) -> list[Share]:
    """Split data into one share a user.

    Args:
        data: a mapping from names to data; or paths (patterns as ``users/*.jsonl`` too), one user a file, called by the
            file's stem; or, with ``by``, one source (or several) whose rows are parted by that column.
        eval_data: a share to hold out of every user's rows, as 0.1; or of the form of ``data``, with the same names. A
            user without evaluation data of its own has none.
        by: the column that says whose a row is.

    Raises:
        DataError: no data; a pattern without files; an unknown column, or a row without it; names in ``eval_data`` that
            nobody trains under.
    """
    if data is None:
        raise DataError(
            "no training data: give data, one file a user, or one file and the column that says whose a row is"
        )
    parts = _parts(data, by)
    if not parts:
        raise DataError("no training data: the list is empty")
    if eval_data is None or isinstance(eval_data, float):
        return [Share(name, part, eval_data) for name, part in parts.items()]
    held = _parts(eval_data, by)
    strange = [name for name in held if name not in parts]
    if strange:
        hint = did_you_mean(strange[0], parts)
        raise DataError(f"evaluation data of {some_names(strange)}, but there is no training data of that name.{hint}")
    return [Share(name, part, held.get(name)) for name, part in parts.items()]


def _parts(data: Any, by: str | None) -> dict[str, Any]:
    if isinstance(data, Mapping):
        if by is not None:
            raise DataError(
                f"by={by!r} parts the rows of a file, and data is a mapping from names already; give one of them"
            )
        wrong = next((name for name in data if not isinstance(name, str) or not name.strip()), None)
        if wrong is not None:
            raise DataError(f"{wrong!r} is not the name of a user; expected text")
        return dict(data)
    sources = _sources(data)
    if by is not None:
        return _by_column(sources, by)
    paths = [source for source in sources if isinstance(source, str | os.PathLike)]
    if len(paths) < len(sources):
        raise DataError(
            f"data is a {type(data).__name__}: expected paths, one file a user, or a mapping from names to data, or by=COLUMN"
        )
    return _by_file(paths)


def _sources(data: Any) -> list[Any]:
    """Sources one by one, patterns expanded."""
    listed = (
        isinstance(data, Sequence)
        and not isinstance(data, str)
        and all(isinstance(item, str | os.PathLike) for item in data)
    )
    found: list[Any] = []
    for item in data if listed else [data]:
        text = os.path.expanduser(os.fspath(item)) if isinstance(item, str | os.PathLike) else ""
        if not glob.has_magic(text) or os.path.exists(text):
            found.append(item)
            continue
        matched = sorted(glob.glob(text, recursive=True))
        if not matched:
            raise DataError(f"{item}: no file matches this pattern")
        found += matched
    return found


def _by_file(paths: Iterable[str | os.PathLike[str]]) -> dict[str, Any]:
    """One user a file, called by its stem; files of one stem by as much of their path as tells them apart."""
    texts = list(dict.fromkeys(os.fspath(path) for path in paths))
    names = {text: _stem(Path(text)) for text in texts}
    counts: dict[str, int] = {}
    for name in names.values():
        counts[name] = counts.get(name, 0) + 1
    same = [text for text in texts if counts[names[text]] > 1]
    if same:
        root = os.path.commonpath([os.path.abspath(text) for text in same])
        names |= {text: os.path.relpath(os.path.abspath(text), root) for text in same}
    return {names[text]: text for text in texts}


def _stem(path: Path) -> str:
    name = path.name
    for suffix in reversed(path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:]):
        name = name.removesuffix(suffix)
    return name or path.name


def _by_column(sources: Sequence[Any], column: str) -> dict[str, Any]:
    """Rows by the value of a column, in the order in which the values appear."""
    rows: dict[str, list[tuple[Table, int]]] = {}
    for source in sources:
        table = read_table(source)
        if not any(column in row for row in table.rows):
            known = list(dict.fromkeys(name for row in table.rows[:100] for name in row))
            hint = did_you_mean(column, known)
            raise DataError(f"{table.name}: no column {column!r}.{hint} There are: {some_names(known, 12)}")
        for index, row in enumerate(table.rows):
            value = row.get(column)
            if value is None or not str(value).strip() or isinstance(value, list | dict):
                raise DataError(
                    f"{table.where(index)}: {column!r} is {value!r}, so nobody knows whose row this is; give it a name, or take the row out"
                )
            rows.setdefault(str(value), []).append((table, index))
    return {name: _table(found, column) for name, found in rows.items()}


def _table(found: list[tuple[Table, int]], column: str) -> Table:
    """Some rows of a table (or of several) that still know where they stand."""
    first = found[0][0]
    rows = [{name: value for name, value in table.rows[index].items() if name != column} for table, index in found]
    numbers = [table.numbers[index] for table, index in found]
    return Table(rows, numbers, first.name, first.unit, first.notes, first.class_names)
