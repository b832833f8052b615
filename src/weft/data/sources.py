"""Where rows come from: `read_table` turns any source into a list of dicts with row numbers, and nothing more.

Does not know what a row means; that is `weft.data.kinds`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from weft.data.files import ENDINGS, beginning, check_file, ending, missing
from weft.errors import DataError, some_names

__all__ = ["Table", "read_table"]


@dataclass(frozen=True)
class Table:
    """Rows as they stand in a source.

    Attributes:
        rows: one dict a row, from column to value.
        numbers: for people: the line, row or block that each row is.
        name: of the source, for messages.
        unit: what is counted: ``"line"``, ``"row"`` or ``"block"``; all count from 1.
        notes: what the reader decided and should say.
        class_names: names of integer classes by column, where the source declares them.
    """

    rows: list[dict[str, Any]]
    numbers: list[int]
    name: str
    unit: str = "row"
    notes: tuple[str, ...] = ()
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def where(self, index: int) -> str:
        """Where a row stands: ``"train.jsonl, line 18"``."""
        return f"{self.name}, {self.unit} {self.numbers[index]}"


def read_table(source: Any, limit: int | None = None) -> Table:
    """Read rows.

    Args:
        source: see `weft.data.load_examples`; or a table, which is its own.
        limit: read only so many rows from the beginning.

    Raises:
        DataError: the source can't be found or read, or has no rows; names the file, the line and the way out.
        MissingDependencyError: a library that this source needs is not installed.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit}: expected at least 1 row, or None for all")
    if isinstance(source, Table):
        return source if limit is None else replace(source, rows=source.rows[:limit], numbers=source.numbers[:limit])
    try:
        table = _read_text(source, limit) if isinstance(source, str | Path) else _read_object(source, limit)
    except OSError as error:  # a folder on the way that may not be entered, a name that no file system takes
        raise DataError(f"{beginning(str(source), 200)}: can't be read: {error.strerror or error}") from error
    if not table.rows:
        raise DataError(f"{table.name}: no rows in it; expected one example a {table.unit}")
    return table


def _read_text(source: str | Path, limit: int | None) -> Table:
    from weft.data import hub

    text = str(source)
    if not text.strip():
        raise DataError("the data source is an empty text; expected a file, a folder or a hub data set 'org/name'")
    if "\n" in text or "\0" in text:
        raise DataError(
            f"the data source is not the name of a file: {beginning(text)}; give texts as a list: [{{'text': …}}]"
        )
    path = Path(text).expanduser()
    if path.is_dir():
        from weft.data.folders import holds_images, read_image_folder

        return read_image_folder(path, limit) if holds_images(path) else hub.read_folder(path, None, limit)
    file, _, part = text.rpartition("@")
    array = path if path.suffix == ".npz" else Path(file).expanduser() if file.endswith(".npz") else None
    if array is not None and array.is_file():
        from weft.data.arrays import read_arrays

        return read_arrays(array, None if array is path else part, limit)
    if path.exists():
        return _read_file(path, limit)
    folder, _, split = text.rpartition("@")
    if folder and Path(folder).expanduser().is_dir():
        return hub.read_folder(Path(folder).expanduser(), split, limit)
    address = None if isinstance(source, Path) or _looks_like_file(text) else hub.parse(text)
    if address is None:
        raise missing(
            path, "" if "/" in text or ending(path) in ENDINGS else " A data set on the hub is written 'org/name'."
        )
    return hub.read_hub(address, limit)


def _looks_like_file(text: str) -> bool:
    path = Path(text)
    return (
        ending(path) in ENDINGS
        or text.startswith((".", "/", "~"))
        or text.count("/") > 1
        or (path.parent.name != "" and path.parent.is_dir())
    )


def _read_file(path: Path, limit: int | None) -> Table:
    from weft.data import lines, tables

    readers = {
        ".jsonl": lines.read_json, ".ndjson": lines.read_json, ".json": lines.read_json, ".txt": lines.read_text,
        ".csv": tables.read_csv, ".tsv": tables.read_csv, ".parquet": tables.read_parquet,
    }  # fmt: skip
    reader = readers.get(ending(path))
    if reader is None:
        raise DataError(
            f"{path}: no reader for a file that ends in {path.suffix!r}; expected one of {', '.join(ENDINGS)} (all but "
            ".parquet also with .gz)"
        )
    if ending(path) == ".parquet" and path.suffix.lower() == ".gz":
        raise DataError(f"{path}: Parquet is compressed by itself; unpack it with gunzip")
    check_file(path)
    return reader(path, limit)


def _read_object(source: Any, limit: int | None) -> Table:
    if type(source).__module__.partition(".")[0] == "datasets":
        from weft.data import hub

        return hub.read_dataset(source, "data set", limit)
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        hint = "; a data frame is given as df.to_dict('records')" if hasattr(source, "to_dict") else ""
        raise DataError(
            f"no reader for a {type(source).__name__}; expected a path, a hub data set 'org/name', a datasets.Dataset or a "
            f"list of dicts{hint}"
        )
    if hasattr(source, "iloc"):
        raise DataError("no reader for a data frame; give df.to_dict('records')")
    rows = list(itertools.islice(source, limit))
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise DataError(f"row {number} of the list is a {type(row).__name__}; expected a dict from column to value")
        wrong = [key for key in row if not isinstance(key, str)]
        if wrong:
            raise DataError(f"row {number} of the list: names of columns are text, got {some_names(map(str, wrong))}")
    return Table([dict(row) for row in rows], list(range(1, len(rows) + 1)), f"list of {len(rows):,} rows")
