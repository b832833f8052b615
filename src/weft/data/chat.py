"""Conversations to tokens and loss masks through a tokenizer's chat template.

Two ways to find what the assistant said, by what the template offers: its own ``{% generation %}`` blocks, or rendered
prefixes: the conversation before each answer, with the generation prompt, must be the beginning of the whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.data.affixes import tokenise
from weft.errors import DataError

__all__ = ["Conversation", "Template"]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Messages = Sequence[Mapping[str, Any]]


def _refusals(jinja2: Any) -> tuple[type[Exception], ...]:
    """What a template can raise: its own refusals, and operations that this conversation's values don't allow."""
    return (jinja2.TemplateError, ValueError, TypeError, KeyError, IndexError)


@dataclass(frozen=True)
class Conversation:
    """A conversation for a template.

    Attributes:
        where: for messages: ``"chat.jsonl, line 3"``.
    """

    messages: Messages
    tools: Any = None
    where: str = "conversation"


class Template:
    """A chat template with its tokenizer.

    Args:
        template: Jinja text, or a path that ends in .jinja; None: the tokenizer's own.

    Attributes:
        has_generation: the template marks what the assistant says.
        merged: answers so far whose beginning shares a token with what stands before them.

    Raises:
        DataError: there is no template.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        if template is not None and str(template).endswith(".jinja"):
            path = Path(template).expanduser()
            if not path.is_file():
                raise DataError(f"{path}: no such chat template")
            template = path.read_text(encoding="utf-8")
        if template is None and not getattr(tokenizer, "chat_template", None):
            name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
            raise DataError(
                f"the tokenizer {name} has no chat template, so {{messages}} can't be written as text. Give one "
                "(chat_template= a Jinja text or a .jinja file; the model's tuned relative usually has one), or write the "
                "examples as {prompt, completion}"
            )
        self.template = template
        self.merged = 0
        self.has_generation = bool(_GENERATION.search(self._text()))
        special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        self._special = special - {tokenizer.unk_token_id}

    def _text(self) -> str:
        if self.template is not None:
            return self.template
        own = self.tokenizer.chat_template
        return str(own.get("default", next(iter(own.values())))) if isinstance(own, dict) else str(own)

    def render(self, talk: Conversation, messages: Messages | None = None, *, prompt: bool = False) -> str:
        """A conversation as text.

        Args:
            messages: instead of all of the conversation's.
            prompt: end with what opens an answer of the assistant.

        Raises:
            DataError: the template refuses the conversation; quotes its reason.
        """
        chosen = [dict(message) for message in (talk.messages if messages is None else messages)]
        return str(self._apply(talk, chosen, add_generation_prompt=prompt, tokenize=False))

    def _apply(self, talk: Conversation, messages: list[dict[str, Any]], **options: Any) -> Any:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=talk.tools, chat_template=self.template, **options
            )
        except _refusals(jinja2) as error:
            raise self._refused(talk, messages, error) from error

    def _refused(self, talk: Conversation, messages: Messages, error: Exception) -> DataError:
        roles = ", ".join(str(message["role"]) for message in messages)
        return DataError(f"{talk.where}: the chat template refuses this conversation (roles {roles}): {error}")

    def encode(self, talks: Sequence[Conversation], only_last: bool) -> list[tuple[list[int], list[bool]]]:
        """Tokens of conversations, and which of them the assistant said.

        Args:
            only_last: count only the last answer of each.

        Raises:
            DataError: the template is not prefix-stable, see `_spans`; or it refuses a conversation.
        """
        if self.has_generation and not only_last:
            found_spans = [self._generation_spans(talk) for talk in talks]
            texts, spans = [text for text, _ in found_spans], [span for _, span in found_spans]
        else:
            texts = [self.render(talk) for talk in talks]
            spans = [self._spans(talk, text, only_last) for talk, text in zip(talks, texts, strict=True)]
        found: list[tuple[list[int], list[bool]]]
        if self.tokenizer.is_fast:
            pairs = tokenise(self.tokenizer, texts, return_offsets_mapping=True)
            found = [(ids, self._covered(offsets, span)) for (ids, offsets), span in zip(pairs, spans, strict=True)]
        else:
            found = [self._by_prefixes(*entry) for entry in zip(talks, texts, spans, strict=True)]
        return [self._ended(ids, said) for ids, said in found]

    def _generation_spans(self, talk: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text and the character ranges of the template's ``{% generation %}`` blocks.

        `apply_chat_template(return_assistant_tokens_mask=True)` gives the same as a mask of tokens, but marks
        everything up to the end of the conversation where a block's last character is in no token; hence the ranges.
        """
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                conversations=[[dict(message) for message in talk.messages]],
                tools=talk.tools,
                chat_template=self.tokenizer.get_chat_template(self.template, talk.tools),
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except _refusals(jinja2) as error:
            raise self._refused(talk, talk.messages, error) from error
        texts, spans = rendered
        return texts[0], [(int(start), int(end)) for start, end in spans[0]]

    def _spans(self, talk: Conversation, text: str, only_last: bool) -> list[tuple[int, int]]:
        """Character ranges of the answers in the whole text.

        An answer begins where the conversation before it, with the generation prompt, ends: just where generation will
        begin. It ends where the conversation up to and including it ends.
        """
        turns = [index for index, message in enumerate(talk.messages) if message["role"] == "assistant"]
        found = []
        for index in turns[-1:] if only_last else turns:
            before = self.render(talk, talk.messages[:index], prompt=True)
            last = index + 1 == len(talk.messages)
            through = text if last else self.render(talk, talk.messages[: index + 1])
            if not text.startswith(before):
                raise self._unstable(talk, index, before, text)
            if not text.startswith(through):
                raise self._unstable(talk, index, through, text)
            found.append((len(before), len(through)))
        return found

    def _unstable(self, talk: Conversation, index: int, part: str, text: str) -> DataError:
        same = next(
            (at for at, (one, two) in enumerate(zip(part, text, strict=False)) if one != two), min(len(part), len(text))
        )
        return DataError(
            f"{talk.where}: this chat template is not prefix-stable: up to message {index + 1} it writes "
            f"{part[max(0, same - 20) : same + 30]!r} where the whole conversation has {text[max(0, same - 20) : same + 30]!r}, so "
            "the assistant's words can't be found exactly. Ways out: learn the last answer only (learn='last'), give a "
            "template with {% generation %} blocks (chat_template=), or split the conversation into rows of one answer each"
        )

    def _covered(self, offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
        """Tokens that begin inside of a span. One that reaches over its beginning belongs to what is before."""
        said = [False] * len(offsets)
        at = 0
        for start, end in spans:
            while at < len(offsets) and offsets[at][0] < start:
                at += 1
            self.merged += at > 0 and offsets[at - 1][1] > start
            while at < len(offsets) and offsets[at][0] < end:
                said[at] = True
                at += 1
        return said

    def _by_prefixes(
        self, talk: Conversation, text: str, spans: Sequence[tuple[int, int]]
    ) -> tuple[list[int], list[bool]]:
        """For tokenizers without character offsets: tokens of a prefix must begin the tokens of the whole."""
        ids = tokenise(self.tokenizer, [text])[0]
        said = [False] * len(ids)
        for start, end in spans:
            sizes = []
            for part in tokenise(self.tokenizer, [text[:start], text[:end]]):
                if ids[: len(part)] != part:
                    raise DataError(
                        f"{talk.where}: this tokenizer has no character offsets, and its tokens of a part are not part of its tokens "
                        "of the whole; use a fast tokenizer (use_fast=True)"
                    )
                sizes.append(len(part))
            said[sizes[0] : sizes[1]] = [True] * (sizes[1] - sizes[0])
        return ids, said

    def _ended(self, ids: list[int], said: list[bool]) -> tuple[list[int], list[bool]]:
        """Let every answer end with the token at which generation stops.

        What a template writes behind the end-of-text token (a line end, mostly) is not learned; a last answer that ends
        without any special token gets the end-of-text token.
        """
        eos = self.tokenizer.eos_token_id
        said = list(said)
        for start, end in _runs(said):
            stop = next((at for at in range(end - 1, start - 1, -1) if ids[at] == eos), None)
            if stop is not None:
                said[stop + 1 : end] = [False] * (end - stop - 1)
            elif end == len(ids) and eos is not None and not self._special.intersection(ids[max(start, end - 3) : end]):
                return [*ids, eos], [*said, True]
        return ids, said

    def stops(self, ids: Sequence[int], said: Sequence[bool]) -> bool:
        """Whether the last answer ends with a special token that is learned: what generation stops at."""
        runs = _runs(said)
        return not runs or bool(self._special.intersection(ids[max(runs[-1][0], runs[-1][1] - 3) : runs[-1][1]]))


def _runs(said: Sequence[bool]) -> list[tuple[int, int]]:
    """Ranges of True."""
    edges = [at for at in range(len(said) + 1) if (at < len(said) and said[at]) != (at > 0 and said[at - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))
