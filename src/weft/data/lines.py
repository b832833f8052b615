"""JSON lines, JSON lists and plain text to rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from weft.data.files import beginning, ending, opened, text_lines
from weft.data.sources import Table
from weft.errors import DataError, some_names

__all__ = ["read_json", "read_text"]

_HINTS = (
    (re.compile(r"^\s*//|^\s*#"), "JSON has no comments"),
    (re.compile(r",\s*[}\]]\s*$"), "a comma before the closing bracket"),
    (re.compile(r"^\s*\{\s*'"), "JSON wants double quotes"),
    (re.compile(r"[:,\[]\s*(None|True|False)\b"), "JSON writes null, true and false"),
    (re.compile(r"\}\s*\{"), "several objects in one line; put each on a line of its own"),
    (re.compile(r"^\s*\{?\s*$"), "an object must stand in one line; this looks like JSON that is spread over several"),
)


def read_json(path: Path, limit: int | None) -> Table:
    """JSON lines, or one JSON list of objects: what the first character says.

    Raises:
        DataError: names file and line, shows the line's beginning and what is wrong with it.
    """
    with opened(path) as stream:
        head = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"["):
        return _read_list(path, limit)
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    for number, line in text_lines(path):
        if not line.strip():
            continue
        row = _parse(path, number, line)
        if not isinstance(row, dict):
            raise DataError(
                f'{path}, line {number}: expected an object such as {{"prompt": …}}, got {_json_type(row)}: {beginning(line)}'
            )
        rows.append(row)
        numbers.append(number)
        if limit is not None and len(rows) >= limit:
            break
    return Table(rows, numbers, str(path), "line")


def _parse(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line.rstrip("\r\n"))
    except RecursionError as error:
        raise DataError(f"{path}, line {number}: nested too deep: {beginning(line)}") from error
    except ValueError as error:  # JSONDecodeError, and numbers with more digits than Python converts
        if number == 1 and ending(path) == ".json":
            _refuse_one_object(path)
        what = (
            f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"
            if isinstance(error, json.JSONDecodeError)
            else str(error)
        )
        hint = next((f" ({hint})" for pattern, hint in _HINTS if pattern.search(line)), "")
        if "\r" in line.rstrip("\r\n"):
            hint = " (its lines end in CR alone; convert them to LF)"
        raise DataError(f"{path}, line {number}: invalid JSON: {what}{hint}: {beginning(line)}") from error


def _refuse_one_object(path: Path) -> None:
    """A file that is one object over several lines gets a message of its own."""
    with opened(path) as stream:
        content = stream.read()
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError):
        return
    if isinstance(whole, dict):
        lists = [
            key for key, value in whole.items() if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        inside = f"; its {lists[0]!r} is such a list: save that alone" if lists else ""
        raise DataError(
            f"{path}: one object with the keys {some_names(whole)}; expected a list of objects, or one object a line{inside}"
        )


def _read_list(path: Path, limit: int | None) -> Table:
    text = "".join(line for _, line in text_lines(path))
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        line = text.split("\n")[error.lineno - 1]
        raise DataError(
            f"{path}, line {error.lineno}: invalid JSON: {error.msg.removesuffix(' at')} at character {error.colno}: {beginning(line)}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: invalid JSON: {error}") from error
    for number, row in enumerate(rows[:limit], 1):
        if not isinstance(row, dict):
            shown = beginning(json.dumps(row, ensure_ascii=False))
            raise DataError(f"{path}, row {number} of the list: expected an object, got {_json_type(row)}: {shown}")
    rows = rows[:limit]
    return Table(rows, list(range(1, len(rows) + 1)), str(path), "row")


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}
    return names.get(type(value), type(value).__name__)


def read_text(path: Path, limit: int | None) -> Table:
    """Plain text: a row ``{"text"}`` for each block of lines, blocks being parted by blank lines."""
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    block: list[str] = []
    for _, line in text_lines(path):
        if line.strip():
            block.append(line.rstrip("\r\n"))
            continue
        _end_block(block, rows, numbers)
        if limit is not None and len(rows) >= limit:
            break
    if limit is None or len(rows) < limit:
        _end_block(block, rows, numbers)
    return Table(rows, numbers, str(path), "block", ("each block between blank lines is one example",))


def _end_block(block: list[str], rows: list[dict[str, Any]], numbers: list[int]) -> None:
    if block:
        rows.append({"text": "\n".join(block)})
        numbers.append(len(rows))
        block.clear()
