"""Prompts for generation: the tokens that stand before an answer in training, and the answers that would be right.

Does not know models; it only says what generation starts from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.data.affixes import affixes, tokenise
from weft.data.chat import Conversation, Template
from weft.data.examples import Examples
from weft.data.messages import last_answer
from weft.errors import DataError

__all__ = ["Prompt", "encode_prompts", "prompts"]


@dataclass(frozen=True)
class Prompt:
    """Something to answer.

    Attributes:
        prompt: a text, or the messages of a conversation.
        references: right answers; none where nobody knows.
        row: index of the first example with this prompt.
        tools: for the chat template, where the conversation has any.
    """

    prompt: str | Sequence[Mapping[str, Any]]
    references: tuple[str, ...] = ()
    row: int = 0
    tools: Any = None


def prompts(examples: Examples, limit: int | None = None) -> list[Prompt]:
    """Distinct prompts in the order of their first example, each with the answers of all its examples.

    Where an example has ``references``, they count instead of its completion. Of a conversation, the prompt is what
    stands before the last answer. Examples without an answer are left out.

    Args:
        limit: at most so many prompts.

    Raises:
        DataError: texts and texts with labels have no prompts.
    """
    if examples.kind not in ("completion", "chat"):
        raise DataError(
            f"{examples.source}: {examples.kind} examples have no prompts to answer; expected {{prompt, completion}} or {{messages}}"
        )
    found: dict[str, Prompt] = {}
    answers: dict[str, dict[str, None]] = {}
    for index, (row, key) in enumerate(zip(examples.rows, examples._asked, strict=True)):
        asked, right = _asked(examples.kind, row)
        if asked is None or not right:
            continue
        if key not in found:
            found[key] = Prompt(asked, (), index, row.get("tools"))
        answers.setdefault(key, {}).update(dict.fromkeys(right))
    chosen = list(found.items())[:limit]
    return [Prompt(prompt.prompt, tuple(answers[key]), prompt.row, prompt.tools) for key, prompt in chosen]


def _asked(kind: str, row: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """Prompt and right answers of a row."""
    if kind == "completion":
        right = row.get("references") or [row["completion"]]
        return row["prompt"], [answer for answer in right if answer.strip()]
    end = last_answer(row["messages"])
    if not end:
        return None, []
    return list(row["messages"][:end]), list(row.get("references") or [row["messages"][end]["content"]])


def encode_prompts(
    prompts: Sequence[Prompt | str | Sequence[Mapping[str, Any]]],
    tokenizer: Any,
    *,
    max_length: int,
    separator: str = "",
    chat_template: str | None = None,
) -> list[list[int]]:
    """Tokens of prompts, just as they stand before the answer in training with the same settings.

    Args:
        max_length: longer prompts are cut from the left; a prefix of the tokenizer stays.

    Raises:
        DataError: no chat template for messages; a prompt of no tokens with a tokenizer that has nothing to start from.
    """
    if max_length < 1:
        raise DataError(f"max_length={max_length}: no room for a prompt; expected at least 1 token")
    asked = [
        prompt if isinstance(prompt, Prompt) else Prompt(prompt, (), index) for index, prompt in enumerate(prompts)
    ]
    around = affixes(tokenizer)
    template: Template | None = None
    texts = []
    for number, prompt in enumerate(asked, 1):
        if isinstance(prompt.prompt, str):
            texts.append(prompt.prompt + separator)
            continue
        template = template or Template(tokenizer, chat_template)
        talk = Conversation(prompt.prompt, prompt.tools, f"prompt {number}")
        texts.append(template.render(talk, prompt=True))
    found = []
    for number, (prompt, ids) in enumerate(zip(asked, tokenise(tokenizer, texts), strict=True), 1):
        plain = isinstance(prompt.prompt, str)
        whole = around.before(ids) if plain else list(ids)
        if not whole:
            raise DataError(
                f"prompt {number} has no tokens, and this tokenizer has no token that a text begins with; write something"
            )
        head = whole[: min(len(around.prefix), max_length - 1)] if plain and len(whole) > max_length else []
        found.append([*head, *whole[len(whole) - (max_length - len(head)) :]] if len(whole) > max_length else whole)
    return found
