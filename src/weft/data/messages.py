"""Conversations: lists of {role, content}, checked before any template sees them.

Does not know tokenizers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from weft.errors import DataError, some_names

__all__ = ["SHAREGPT", "check_messages", "check_roles", "last_answer"]

SHAREGPT = {"human": "user"} | dict.fromkeys(("gpt", "chatgpt", "bing", "bot", "model"), "assistant")


def check_roles(where: str, messages: Any, names: Mapping[str, str]) -> None:
    """Refuse what is not a list of objects, and objects without the two keys.

    Args:
        names: how the keys ``role`` and ``content`` are called here.

    Raises:
        DataError: says what was found, and how other keys are mapped.
    """
    if not isinstance(messages, list | tuple):
        raise DataError(f"{where}: 'messages' is a {type(messages).__name__}; expected a list of {{role, content}}")
    role, content = names.get("role", "role"), names.get("content", "content")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise DataError(
                f"{where}: message {number} is a {type(message).__name__}; expected an object {{{role}, {content}}}"
            )
        if message.get(role) is None:
            hint = ""
            if "from" in message and "value" in message:
                hint = '; map them: columns={"role": "from", "content": "value"} (command line: --columns role=from,content=value)'
            raise DataError(
                f"{where}: message {number} has the keys {some_names(message)}; expected {role!r} and {content!r}{hint}"
            )


def check_messages(
    where: str, messages: Sequence[Mapping[str, Any]], names: Mapping[str, str], check_text: Callable[[Any], str]
) -> list[dict[str, Any]]:
    """Messages with the keys ``role`` and ``content``; keys without a value are left out.

    Raises:
        DataError: a content that is not text (a message with ``tool_calls`` needs none).
    """
    role, content = names.get("role", "role"), names.get("content", "content")
    checked = []
    for number, message in enumerate(messages, 1):
        rest = {key: value for key, value in message.items() if key not in (role, content) and value is not None}
        who = check_text(message[role])
        if names:  # keys were mapped: the names of speakers that come with such files are translated too
            who = SHAREGPT.get(who, who)
        said = message.get(content)
        if said is None:
            if "tool_calls" not in rest:
                raise DataError(f"{where}: message {number} ({who}) has no {content!r}; expected text")
            checked.append({"role": who, **rest})
            continue
        checked.append({"role": who, "content": check_text(_flat(where, number, said)), **rest})
    return checked


def _flat(where: str, number: int, said: Any) -> Any:
    """Content that is a list of text parts, as one text."""
    if not isinstance(said, list | tuple):
        return said
    for part in said:
        if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            what = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise DataError(f"{where}: message {number} has a part of type {what!r}; only text is trained on")
    return "".join(part["text"] for part in said)


def last_answer(messages: Sequence[Mapping[str, Any]]) -> int | None:
    """Index of the last message of the assistant that has text, or None."""
    for index in range(len(messages) - 1, -1, -1):
        if messages[index]["role"] == "assistant" and messages[index].get("content"):
            return index
    return None
