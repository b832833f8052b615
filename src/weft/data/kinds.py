"""What rows mean: recognise the kind of a table, rename its columns, check every value.

Does not know where the rows are from or what becomes of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.data.files import beginning
from weft.data.messages import check_messages, check_roles
from weft.data.sources import Table
from weft.errors import DataError, did_you_mean, some_names

__all__ = ["KINDS", "Recognised", "columns_present", "label_of", "number_labels", "recognise", "rename"]

KINDS = ("chat", "completion", "classification", "text")
"""Kinds of examples, in the order of precedence where a table could be several."""

REQUIRED: Mapping[str, tuple[str, ...]] = {
    "chat": ("messages",), "completion": ("prompt", "completion"), "classification": ("text", "label"), "text": ("text",),
}  # fmt: skip
"""Columns that a kind needs; ``references`` stand in for ``completion``."""

_OPTIONAL = {"chat": ("tools",), "completion": ("references",), "classification": (), "text": ()}
_INSIDE = ("role", "content")
_KNOWN = ("messages", "tools", "prompt", "completion", "references", "text", "label", "image", "images")
_ALIASES = {
    "messages": ("conversations", "conversation", "dialogue", "dialog", "chat", "turns"),
    "prompt": ("instruction", "question", "query", "problem", "input", "source", "context", "user", "goal"),
    "completion": ("response", "answer", "output", "target", "solution", "chosen", "reply", "assistant", "summary"),
    "text": ("sentence", "content", "document", "review", "body", "comment", "article"),
    "label": ("labels", "sentiment", "category", "class", "target", "stars", "intent"),
}  # fmt: skip


@dataclass(frozen=True)
class Recognised:
    """Rows of one kind: checked, with the columns' own names.

    Attributes:
        labels: names of the classes in the order of their ids; None for other kinds.
        indices: the row of the table that each row is from; a row with several completions gives several.
    """

    kind: str
    rows: list[dict[str, Any]]
    indices: list[int]
    labels: tuple[str, ...] | None
    notes: tuple[str, ...]


def recognise(
    table: Table, columns: Mapping[str, str] | None, kind: str | None, labels: Sequence[str] | None
) -> Recognised:
    """Give a table its meaning; see `weft.data.load_examples`.

    Raises:
        DataError: no kind fits, rows of several kinds, a value of the wrong type, an unknown label.
    """
    if kind is not None and kind not in KINDS:
        raise DataError(
            f"kind={kind!r}: expected one of {', '.join(KINDS)}, or None to recognise it.{did_you_mean(kind, KINDS)}"
        )
    table, roles, notes = rename(table, columns or {})
    present = columns_present(table.rows)
    chosen, note = _choose(table, present, kind)
    notes += note
    gaps = _Gaps(table, chosen)
    rows: list[dict[str, Any]] = []
    indices: list[int] = []
    read = {"chat": _chat, "completion": _completion, "classification": _classification, "text": _text}[chosen]
    for index, row in enumerate(table.rows):
        for made in read(table, index, row, gaps, roles):
            rows.append(made)
            indices.append(index)
    notes += gaps.notes()
    if len(rows) > len(table.rows):
        notes.append(f"{len(table.rows):,} rows with several completions each: {len(rows):,} examples")
    names = None
    if chosen == "classification":
        names = number_labels(table, rows, indices, labels)
    extra = [name for name in present if name not in (*REQUIRED[chosen], *_OPTIONAL[chosen])]
    if extra:
        notes.append(f"ignored columns: {some_names(extra)}")
    return Recognised(chosen, rows, indices, names, tuple(notes))


def rename(table: Table, columns: Mapping[str, str]) -> tuple[Table, dict[str, str], list[str]]:
    """The table with the mapping applied; keys inside of messages; notes."""
    allowed = (*_KNOWN, *_INSIDE)
    for target in columns:
        if target not in allowed:
            raise DataError(
                f"columns: {target!r} is no column of weft; expected one of {some_names(allowed, 20)} as in "
                f'columns={{"prompt": "question"}}.{did_you_mean(target, allowed)}'
            )
    roles = {name: columns[name] for name in _INSIDE if name in columns}
    outer = {name: column for name, column in columns.items() if name not in _INSIDE}
    if not outer:
        return table, roles, []
    present = columns_present(table.rows)
    parts = {name: (column,) if column in present else tuple(column.split("+")) for name, column in outer.items()}
    used = {part for several in parts.values() for part in several}
    for name, several in parts.items():
        for part in several:
            if part not in present:
                raise DataError(
                    f"{table.name}: columns={{{name!r}: {outer[name]!r}}}, but there is no column {part!r}; it has "
                    f"{some_names(present, 12)}.{did_you_mean(part, present)}"
                )
    rows = []
    for index, row in enumerate(table.rows):
        new = {key: value for key, value in row.items() if key not in used and key not in outer}
        for name, several in parts.items():
            new[name] = row.get(several[0]) if len(several) == 1 else _join(table, index, row, several)
        rows.append(new)
    classes = {
        name: table.class_names[several[0]] for name, several in parts.items() if several[0] in table.class_names
    }
    displaced = [name for name in outer if name in present and name not in used]
    notes = [f"the file's own columns {some_names(displaced)} are not used"] if displaced else []
    return (
        Table(rows, table.numbers, table.name, table.unit, table.notes, {**table.class_names, **classes}),
        roles,
        notes,
    )


def _join(table: Table, index: int, row: Mapping[str, Any], names: Sequence[str]) -> str:
    """``"instruction+input"``: the texts that are not empty, each on lines of its own."""
    texts = [_string(table, index, name, row.get(name)) for name in names if row.get(name) is not None]
    return "\n".join(text for text in texts if text.strip())


def columns_present(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Columns with at least one value, and how many values."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(name for name, value in row.items() if value is not None)
    return dict(counts)


def _fits(kind: str, present: Iterable[str]) -> bool:
    names = set(present)
    if kind == "completion" and "references" in names:
        names.add("completion")
    return names.issuperset(REQUIRED[kind])


def _choose(table: Table, present: Mapping[str, int], kind: str | None) -> tuple[str, list[str]]:
    fitting = [name for name in KINDS if _fits(name, present)]
    if kind is not None and kind not in fitting:
        raise DataError(
            f"{table.name}: read as {kind!r} it needs the columns {some_names(REQUIRED[kind])}, it has "
            f"{some_names(present, 12)}{_proposal(present, (kind,))}"
        )
    if kind is None and not fitting:
        shapes = ", ".join("{" + ", ".join(REQUIRED[name]) + "}" for name in KINDS)
        raise DataError(
            f"{table.name}: the kind of these examples is not clear: columns {some_names(present, 12)}, expected one of "
            f"{shapes}{_proposal(present, KINDS)}"
        )
    chosen = kind or fitting[0]
    _refuse_mixed(table, chosen)
    others = [name for name in fitting if name != chosen and not (chosen == "classification" and name == "text")]
    if kind is None and others:
        return chosen, [f"could also be read as {some_names(others)} (kind={others[0]!r})"]
    return chosen, []


def _proposal(present: Mapping[str, int], kinds: Iterable[str]) -> str:
    """The way out: a mapping of the columns, where their names suggest one."""
    if not present:
        return "; every value is null"
    for kind in kinds:
        mapping: dict[str, str] = {}
        for name in REQUIRED[kind]:
            known = (name, *_ALIASES[name])
            found = next((column for alias in known for column in present if column.lower() == alias), None)
            if found is None or found in mapping.values():
                break
            mapping[name] = found
        else:
            if kind == "text" and len(present) > 3:  # a lone text column in a wide table is a guess too far
                continue
            renamed = {name: column for name, column in mapping.items() if name != column}
            if "input" in present and "instruction" in mapping.values():
                renamed["prompt"] = "instruction+input"
            line = ",".join(f"{name}={column}" for name, column in renamed.items())
            return f". If so meant: columns={json.dumps(renamed)} (command line: --columns {line})"
    return '. Say which column is which: columns={"prompt": "…", "completion": "…"} (command line: --columns prompt=…)'


def _refuse_mixed(table: Table, chosen: str) -> None:
    """Rows that lack what this kind needs and have all that another needs."""
    for index, row in enumerate(table.rows):
        has = [name for name, value in row.items() if value is not None]
        if _fits(chosen, has):
            continue
        other = next((name for name in KINDS if name != chosen and _fits(name, has)), None)
        if other is not None and not (chosen == "classification" and other == "text"):
            expected = "{" + ", ".join(REQUIRED[chosen]) + "}"
            found = "{" + ", ".join(REQUIRED[other]) + "}"
            raise DataError(
                f"{table.where(index)}: rows of several kinds: this one has {found}, others have {expected}; put each kind "
                "in a file of its own"
            )


class _Gaps:
    """Values that are missing: read as empty text, which encoding drops and counts."""

    def __init__(self, table: Table, kind: str) -> None:
        self.table, self.kind = table, kind
        self.found: dict[str, list[int]] = {}

    def add(self, name: str, index: int) -> None:
        self.found.setdefault(name, []).append(self.table.numbers[index])

    def notes(self) -> list[str]:
        return [
            f"{len(numbers):,} without {name!r} (first: {self.table.unit} {numbers[0]})"
            for name, numbers in self.found.items()
        ]


_Reader = Callable[[Table, int, Mapping[str, Any], _Gaps, Mapping[str, str]], list[dict[str, Any]]]


def _string(table: Table, index: int, name: str, value: Any) -> str:
    if not isinstance(value, str):
        shown = beginning(json.dumps(value, ensure_ascii=False, default=repr))
        raise DataError(
            f"{table.where(index)}: {name!r} is {_article(value)}, expected text, got {shown}; write it in quotes, or map "
            "another column"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{table.where(index)}: {name!r} holds half of a character (a lone surrogate {value[error.start]!r} at "
            f"character {error.start + 1}), which no encoding can write; remove it"
        ) from error
    return value


def _article(value: Any) -> str:
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        dict: "an object",
        list: "a list",
        bytes: "bytes",
    }
    return names.get(type(value), f"of type {type(value).__name__}")


def _text_or_gap(table: Table, index: int, row: Mapping[str, Any], name: str, gaps: _Gaps) -> str:
    value = row.get(name)
    if value is None:
        gaps.add(name, index)
        return ""
    return _string(table, index, name, value)


def _texts(table: Table, index: int, name: str, value: Any) -> list[str]:
    return [_string(table, index, name, one) for one in (value if isinstance(value, list | tuple) else [value])]


def _completion(
    table: Table, index: int, row: Mapping[str, Any], gaps: _Gaps, roles: Mapping[str, str]
) -> list[dict[str, Any]]:
    made = dict(row)
    made["prompt"] = _text_or_gap(table, index, row, "prompt", gaps)
    references = row.get("references")
    if references is not None:
        made["references"] = _texts(table, index, "references", references)
    else:
        made.pop("references", None)
    completion = row.get("completion")
    if completion is None:
        several = made.get("references", [])
    else:
        several = _texts(table, index, "completion", completion)
    if not several:
        gaps.add("completion", index)
        several = [""]
    return [{**made, "completion": one} for one in several]


def _text(
    table: Table, index: int, row: Mapping[str, Any], gaps: _Gaps, roles: Mapping[str, str]
) -> list[dict[str, Any]]:
    return [{**row, "text": _text_or_gap(table, index, row, "text", gaps)}]


def _classification(
    table: Table, index: int, row: Mapping[str, Any], gaps: _Gaps, roles: Mapping[str, str]
) -> list[dict[str, Any]]:
    return [
        {
            **row,
            "text": _text_or_gap(table, index, row, "text", gaps),
            "label": label_of(table, index, row.get("label")),
        }
    ]


def _chat(
    table: Table, index: int, row: Mapping[str, Any], gaps: _Gaps, roles: Mapping[str, str]
) -> list[dict[str, Any]]:
    made = {key: value for key, value in row.items() if key != "tools" or value}
    for name in ("messages", "tools"):
        if isinstance(made.get(name), str):  # a table of texts holds them as JSON
            made[name] = _parse_inside(table, index, name, made[name])
    if made.get("messages") is None:
        gaps.add("messages", index)
    where = table.where(index)
    check_roles(where, made.get("messages") or [], roles)
    made["messages"] = check_messages(
        where, made.get("messages") or [], roles, lambda text: _string(table, index, "messages", text)
    )
    if "tools" in made and not (
        isinstance(made["tools"], list) and all(isinstance(tool, dict) for tool in made["tools"])
    ):
        raise DataError(f"{where}: 'tools' is {_article(made['tools'])}; expected a list of JSON schemas of functions")
    return [made]


def _parse_inside(table: Table, index: int, name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{table.where(index)}: {name!r} is a text; expected a list, or JSON of one, got {beginning(text)}"
        ) from error


def label_of(table: Table, index: int, value: Any) -> str:
    """The name of a class, whatever way a row writes it.

    Raises:
        DataError: no label, or a number that is none of the declared classes.
    """
    names = table.class_names.get("label")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of integers with gaps comes as floats
    if isinstance(value, int):
        if names is None:
            return str(value)
        if 0 <= value < len(names):
            return names[value]
        raise DataError(
            f"{table.where(index)}: label {value}, but the data set declares {len(names)} classes ({some_names(names)}); "
            "-1 usually means that the labels of this split are not public"
        )
    if isinstance(value, str) and value.strip():
        return _string(table, index, "label", value)
    if value is None or value == "" or isinstance(value, str):
        raise DataError(
            f"{table.where(index)}: no label; remove rows without one, or read all as plain text with kind='text'"
        )
    raise DataError(f"{table.where(index)}: the label is {_article(value)} ({value!r}); expected a text or an integer")


def number_labels(
    table: Table, rows: Sequence[Mapping[str, Any]], indices: Sequence[int], labels: Sequence[str] | None
) -> tuple[str, ...]:
    """Names of the classes: those given, those declared, or those that occur, sorted (numbers by value)."""
    known = tuple(labels) if labels is not None else table.class_names.get("label")
    found = {row["label"] for row in rows}
    if known is None:
        return tuple(sorted(found, key=int) if all(_is_integer(name) for name in found) else sorted(found))
    for row, index in zip(rows, indices, strict=True):
        if row["label"] not in known:
            raise DataError(
                f"{table.where(index)}: unknown label {row['label']!r}; the training set has {some_names(known, 12)}."
                f"{did_you_mean(row['label'], known)}"
            )
    return known


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isascii() and text.removeprefix("-").isdigit()
