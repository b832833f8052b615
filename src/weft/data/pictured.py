"""What rows with images mean: image and class, or a conversation with images in it.

    "classify-images"  {"image", "label"}
    "image-text"       {"messages"} with parts {"type": "image", "image": PATH}; or {"messages", "image" or "images"}: the
                       images stand where the messages have parts {"type": "image"} or the word <image>, else before the
                       first message of the user; or {"image", "prompt", "completion"}; or {"image", "text"}: a caption

An image is a path, or the bytes of a file. Does not open images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from weft.data import kinds
from weft.data.kinds import Recognised
from weft.data.messages import SHAREGPT, check_roles
from weft.data.sources import Table
from weft.errors import DataError, some_names

__all__ = ["IMAGE_KINDS", "image_kind", "recognise_images"]

IMAGE_KINDS = ("classify-images", "image-text")
PLACE = "<image>"
_SHAPES = {
    "classify-images": "{image, label}",
    "image-text": "{messages} with images, {image, messages}, {image, prompt, completion} or {image, text}",
}


def image_kind(table: Table, columns: Mapping[str, str] | None) -> str | None:
    """The kind that these rows have by themselves; None: one without images, or one that has to be said."""
    names = {name for row in table.rows[:100] for name, value in row.items() if value is not None}
    names |= set(columns or ())
    pictured = "image" in names or "images" in names
    if pictured and "label" in names and "text" not in names:
        return "classify-images"
    if pictured and ("messages" in names or {"prompt", "completion"} <= names):
        return "image-text"
    talks = [row.get("messages") for row in table.rows[:100]]
    return "image-text" if any(_has_image_part(messages) for messages in talks) else None


def _has_image_part(messages: Any) -> bool:
    messages = messages if isinstance(messages, list | tuple) else ()
    contents = (message.get("content") for message in messages if isinstance(message, Mapping))
    parts = (part for content in contents if isinstance(content, list | tuple) for part in content)
    return any(isinstance(part, Mapping) and part.get("type") == "image" for part in parts)


def recognise_images(
    table: Table, columns: Mapping[str, str] | None, kind: str, labels: Sequence[str] | None
) -> Recognised:
    """Give rows with images their meaning.

    Raises:
        DataError: columns that this kind needs are not there, a value of the wrong type, an unknown label.
    """
    table, roles, notes = kinds.rename(table, columns or {})
    rows: list[dict[str, Any]] = []
    present = kinds.columns_present(table.rows)
    if kind == "classify-images" and not {"image", "label"} <= present.keys():
        raise _unclear(table, kind, present)
    for index, row in enumerate(table.rows):
        if kind == "classify-images":
            made = {
                "image": _reference(table, index, row.get("image")),
                "label": kinds.label_of(table, index, row.get("label")),
            }
        else:
            made = _talk(table, index, row, roles, present)
        rows.append(made)
    indices = list(range(len(rows)))
    names = kinds.number_labels(table, rows, indices, labels) if kind == "classify-images" else None
    used = ("image", "label") if names else ("messages", "image", "images", "prompt", "completion", "text")
    extra = [name for name in present if name not in used]
    notes += [f"ignored columns: {some_names(extra)}"] if extra else []
    return Recognised(kind, rows, indices, names, tuple(notes))


def _unclear(table: Table, kind: str, present: Mapping[str, int]) -> DataError:
    return DataError(
        f"{table.name}: read as {kind!r} it needs {_SHAPES[kind]}, it has {some_names(present, 12)}. Other names are mapped: "
        'columns={"image": "…"} (command line: --columns image=…)'
    )


def _reference(table: Table, index: int, value: Any) -> Any:
    """A path, bytes or pixels; an empty text where there is none, which is counted later."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is None:
        return ""
    if isinstance(value, str | bytes) or hasattr(value, "__array_interface__"):
        return value
    raise DataError(f"{table.where(index)}: the image is of type {type(value).__name__}; expected a path or bytes")


def _talk(
    table: Table, index: int, row: Mapping[str, Any], roles: Mapping[str, str], present: Mapping[str, int]
) -> dict[str, Any]:
    """``{"messages": [{"role", "content": [parts]}], "images": [references]}``."""
    where = table.where(index)
    several = row.get("images") if row.get("images") is not None else row.get("image")
    outside = [_reference(table, index, one) for one in (several if isinstance(several, list | tuple) else [several])]
    outside = [] if several is None else outside
    messages = row.get("messages")
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: 'messages' is a text that is not JSON: {error}") from error
    if messages is None:
        messages, roles = _as_messages(table, index, row, present), {}
    check_roles(where, messages, roles)
    talk: list[dict[str, Any]] = []
    inside: list[Any] = []
    for number, message in enumerate(messages, 1):
        who = message[roles.get("role", "role")]
        said = message.get(roles.get("content", "content"))
        parts = [_part(table, index, number, part, inside) for part in _parts(where, number, said, len(outside))]
        talk.append({"role": SHAREGPT.get(who, who) if roles else who, "content": [part for part in parts if part]})
    return {"messages": talk, "images": _placed(where, talk, inside, outside)}


def _as_messages(table: Table, index: int, row: Mapping[str, Any], present: Mapping[str, int]) -> list[dict[str, Any]]:
    if "prompt" in present and "completion" in present:
        asked, answer = row.get("prompt") or "", row.get("completion") or ""
    elif "text" in present:
        asked, answer = "", row.get("text") or ""
    else:
        raise _unclear(table, "image-text", present)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _parts(where: str, number: int, said: Any, outside: int) -> list[Any]:
    """The content as a list; the word <image> in a text is an image where there are images for it."""
    if said is None:
        return []
    if isinstance(said, list | tuple):
        return list(said)
    if not isinstance(said, str):
        raise DataError(f"{where}: message {number} is of type {type(said).__name__}; expected text or a list of parts")
    if not outside or PLACE not in said:
        return [{"type": "text", "text": said}]
    pieces = [[{"type": "text", "text": piece.strip("\n")}, {"type": "image"}] for piece in said.split(PLACE)]
    return [part for pair in pieces for part in pair][:-1]


def _part(table: Table, index: int, number: int, part: Any, inside: list[Any]) -> dict[str, Any] | None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]} if part["text"] else None
    if kind == "image":
        own = [part[name] for name in ("image", "path", "url", "bytes") if part.get(name) is not None]
        inside.append(_reference(table, index, own[0]) if own else None)
        return {"type": "image"}
    raise DataError(
        f"{table.where(index)}: message {number} has a part of type {kind or type(part).__name__!r}; expected "
        '{"type": "text", "text": …} or {"type": "image", "image": PATH}'
    )


def _placed(where: str, talk: list[dict[str, Any]], inside: list[Any], outside: list[Any]) -> list[Any]:
    """The images in the order in which the messages show them."""
    bare = sum(reference is None for reference in inside)
    if bare == 0 and outside and not inside:
        first = next((message for message in talk if message["role"] == "user"), None)
        if first is None:
            raise DataError(f"{where}: images, and no message of the user to stand in")
        first["content"][:0] = [{"type": "image"} for _ in outside]
        return outside
    if bare != len(outside):
        raise DataError(
            f"{where}: the messages have places for {bare} images, the row has {len(outside)}; they must agree"
        )
    rest = iter(outside)
    return [next(rest) if reference is None else reference for reference in inside]
