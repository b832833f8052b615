"""CSV, TSV and Parquet to rows."""

from __future__ import annotations

import collections
import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weft.data.files import beginning, ending, text_lines
from weft.data.sources import Table
from weft.errors import DataError, MissingDependencyError, some_names

__all__ = ["read_csv", "read_parquet"]


def read_csv(path: Path, limit: int | None) -> Table:
    """A table with a line of names at its top; quotes as in RFC 4180.

    Raises:
        DataError: no or repeated names, a row with more or fewer cells than names, a quote that is never closed; names
            file and line.
    """
    delimiter, notes = _delimiter(path)
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the library's own limit is 128 KiB a cell
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    names: list[str] = []
    for number, cells in _records(path, delimiter):
        if not cells:
            continue
        if not names:
            names = [cell.strip() for cell in cells]
            _check_names(path, number, names)
            continue
        if len(cells) != len(names):
            raise DataError(
                f"{path}, line {number}: {len(cells)} cells, but {len(names)} columns ({some_names(names)}); quote a cell that "
                f"holds {delimiter!r} or a line end. The row begins with {beginning(delimiter.join(cells))}"
            )
        rows.append(dict(zip(names, cells, strict=True)))
        numbers.append(number)
        if limit is not None and len(rows) >= limit:
            break
    return Table(rows, numbers, str(path), "line", notes)


def _delimiter(path: Path) -> tuple[str, tuple[str, ...]]:
    if ending(path) == ".tsv":
        return "\t", ()
    first = next((line for _, line in text_lines(path)), "")
    if "," not in first:
        for other, name in ((";", "semicolons"), ("\t", "tabs")):
            if other in first:
                return other, (f"cells are parted by {name}",)
    return ",", ()


def _records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Rows with the number of the line that each begins in."""
    reader = csv.reader((line for _, line in text_lines(path)), delimiter=delimiter, strict=True)
    start = 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{path}, line {start}: {error}; a quote inside of a quoted cell is written twice"
            ) from error
        yield start, cells
        start = reader.line_num + 1


def _check_names(path: Path, number: int, names: list[str]) -> None:
    repeated = [name for name, count in collections.Counter(names).items() if count > 1]
    if repeated:
        raise DataError(f"{path}, line {number}: columns with the same name: {some_names(repeated)}")
    if "" in names and len(names) == 1:
        raise DataError(f"{path}, line {number}: expected the names of the columns")


def read_parquet(path: Path, limit: int | None) -> Table:
    """A Parquet file.

    Raises:
        DataError: the file is damaged.
        MissingDependencyError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(f"{path}: reading Parquet needs pyarrow; pip install pyarrow") from error
    rows: list[dict[str, Any]] = []
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                rows += batch.to_pylist()
                if limit is not None and len(rows) >= limit:
                    break
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from error
    rows = rows[:limit]
    return Table(rows, list(range(1, len(rows) + 1)), str(path), "row")
