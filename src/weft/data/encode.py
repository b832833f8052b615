"""Examples to tokens and loss masks.

What each kind becomes (``prefix`` is what the tokenizer puts before a text by itself, often a beginning-of-text
token; ``end`` is its end-of-text token; neither is doubled where the text has it already):

    completion      prefix + prompt + completion + end. Prompt and completion are tokenised apart, so that the tokens
                    before the completion are the very ones that generation starts from. Learned: completion and end.
    chat            the chat template's text, which brings its own special tokens. Learned: what the assistant says,
                    through the token that ends its turn.
    text            prefix + text + end. Learned: all but the first token, which nothing predicts.
    classification  as the tokenizer does it, with its own prefix and suffix. Learned: the class.

Too long (more than ``max_length`` tokens):

    completion      the prompt loses its beginning, for the question mostly stands at its end; but at least half of
                    the room (or the whole prompt, if shorter) stays the prompt's. What then is too long of the
                    completion is cut from its end, and no ``end`` follows: a cut answer must not teach to stop there.
    chat            the end is cut.
    text            split into several sequences that overlap by one token: each token is still learned exactly once.
    classification  the end of the text is cut, special tokens stay.

Everything that is truncated, split or dropped is counted in the `Account`. Does not know models or training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.data.account import Account
from weft.data.affixes import Affixes, affixes, tokenise
from weft.data.chat import Conversation, Template
from weft.data.encoded import Encoded, Features
from weft.data.examples import Examples
from weft.errors import DataError, did_you_mean, some_names

__all__ = ["encode"]

_LEARN = ("all", "last")


@dataclass(frozen=True)
class _Job:
    """What all encoders need."""

    examples: Examples
    tokenizer: Any
    affixes: Affixes
    max_length: int
    mask_prompt: bool
    separator: str
    learn: str
    template: str | None
    features: Features

    @property
    def account(self) -> Account:
        return self.features.account

    @property
    def room(self) -> int:
        """Tokens beside the prefix."""
        return self.max_length - len(self.affixes.prefix)

    def number(self, row: int) -> int:
        return self.examples.numbers[row]


def encode(
    examples: Examples,
    tokenizer: Any,
    *,
    max_length: int,
    labels: Sequence[str] | None = None,
    mask_prompt: bool = True,
    separator: str = "",
    learn: str = "all",
    chat_template: str | None = None,
) -> Encoded:
    r"""Encode examples; the module says how, kind by kind.

    Args:
        tokenizer: of transformers.
        max_length: no sequence gets more tokens.
        labels: for classification, the training set's label names; None: the examples' own.
        mask_prompt: learn completions (and answers of the assistant) only; False: every token.
        separator: stands between prompt and completion and belongs to the prompt, such as ``"\n"``. Empty: the two
            follow each other as they are in the data.
        learn: ``"all"`` answers of a conversation, or the ``"last"`` one only.
        chat_template: Jinja text or a .jinja file; None: the tokenizer's own.

    Returns:
        The features, with their `Account`.

    Raises:
        DataError: no chat template, or one that can't be learned from; an unknown label; nothing is left to learn.
    """
    if learn not in _LEARN:
        raise DataError(f"learn={learn!r}: expected one of {some_names(_LEARN)}.{did_you_mean(learn, _LEARN)}")
    around = affixes(tokenizer)
    least = len(around.prefix) + len(around.suffix) + 2
    if max_length < least:
        raise DataError(f"max_length={max_length}: expected at least {least} tokens with this tokenizer")
    features = Features(Account(examples=len(examples), unit=examples.unit))
    job = _Job(examples, tokenizer, around, max_length, mask_prompt, separator, learn, chat_template, features)
    names = None
    if examples.kind == "classification":
        names = _classification(job, labels)
    else:
        _ENCODERS[examples.kind](job)
        if not around.end and examples.kind != "chat":
            job.account.notes.append("the tokenizer has no end-of-text token: generation won't learn where to stop")
    return features.finish(examples.kind, max_length, names, examples.source)


def _completion(job: _Job) -> None:
    rows = job.examples.rows
    prompts = tokenise(job.tokenizer, [row["prompt"] + job.separator for row in rows])
    completions = tokenise(job.tokenizer, [row["completion"] for row in rows])
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not rows[index]["completion"].strip() or not completion:
            job.account.empty.add(job.number(index))
            continue
        before, after = _fitted(job, index, job.affixes.before(prompt), job.affixes.with_end(completion))
        mask = [not job.mask_prompt] * len(before) + [True] * len(after)
        if not job.features.add(index, [*before, *after], mask):
            job.account.masked.add(job.number(index))


def _fitted(job: _Job, index: int, before: list[int], after: list[int]) -> tuple[list[int], list[int]]:
    """Prompt and completion, cut to ``max_length``; counts what was cut."""
    if len(before) + len(after) <= job.max_length:
        return before, after
    size = len(job.affixes.prefix)
    prompt = before[size:]
    kept = after[: job.room - min(len(prompt), job.room // 2)]
    start = max(0, len(prompt) - (job.room - len(kept)))
    number = job.number(index)
    job.account.truncated.add(number)
    if start:
        job.account.prompt_cut.add(number)
    if len(kept) < len(after):
        job.account.completion_cut.add(number)
    return [*before[:size], *prompt[start:]], kept


def _text(job: _Job) -> None:
    around = job.affixes
    prefix, size = list(around.prefix), len(around.prefix)
    texts = [row["text"] for row in job.examples.rows]
    for index, ids in enumerate(tokenise(job.tokenizer, texts)):
        if not texts[index].strip() or not ids:
            job.account.empty.add(job.number(index))
            continue
        body = around.with_end(around.without_prefix(ids))
        added = job.features.add(index, prefix + body[: job.room], [False] * size + [True] * min(len(body), job.room))
        for start in range(job.room - 1, len(body) - 1, job.room - 1):
            piece = body[start : start + job.room]
            added |= job.features.add(index, prefix + piece, [False] * (size + 1) + [True] * (len(piece) - 1))
        if len(body) > job.room:
            job.account.split.add(job.number(index))
        if not added:
            job.account.masked.add(job.number(index))


def _chat(job: _Job) -> None:
    template = Template(job.tokenizer, job.template)
    talks, indices = [], []
    for index, row in enumerate(job.examples.rows):
        answers = [message for message in row["messages"] if message["role"] == "assistant"]
        if not row["messages"] or (answers and not any(_says_something(message) for message in answers)):
            job.account.empty.add(job.number(index))
        elif not answers and job.mask_prompt:
            job.account.masked.add(job.number(index))
        else:
            talks.append(Conversation(row["messages"], row.get("tools"), job.examples.where(index)))
            indices.append(index)
    open_ended = 0
    for index, (ids, said) in zip(indices, template.encode(talks, job.learn == "last") if talks else [], strict=True):
        mask = said if job.mask_prompt else [True] * len(ids)
        if len(ids) > job.max_length:
            job.account.truncated.add(job.number(index))
            job.account.completion_cut.add(job.number(index))
        if not job.features.add(index, ids[: job.max_length], mask[: job.max_length]):
            job.account.masked.add(job.number(index))
        open_ended += not template.stops(ids, said)
    if template.merged:
        job.account.notes.append(
            f"{template.merged:,} answers begin inside of a token of what stands before them, which is not learned: let the template "
            "end what opens an answer with a line end or a special token"
        )
    if open_ended:
        job.account.notes.append(
            f"{open_ended:,} conversations teach no token that ends the assistant's turn (put it inside of the template's "
            "{% generation %} blocks): generation may not stop"
        )


def _says_something(message: Mapping[str, Any]) -> bool:
    return bool(str(message.get("content") or "").strip() or message.get("tool_calls"))


def _classification(job: _Job, labels: Sequence[str] | None) -> tuple[str, ...]:
    names = tuple(labels if labels is not None else job.examples.labels or ())
    ids_of = {name: number for number, name in enumerate(names)}
    if len(ids_of) < len(names):
        raise DataError(f"labels: a name stands twice in {some_names(names, 20)}")
    around = job.affixes
    room = job.max_length - len(around.prefix) - len(around.suffix)
    rows = job.examples.rows
    for index, ids in enumerate(tokenise(job.tokenizer, [row["text"] for row in rows])):
        label = rows[index]["label"]
        if label not in ids_of:
            raise DataError(
                f"{job.examples.where(index)}: unknown label {label!r}; the training set has {some_names(names, 12)}."
                f"{did_you_mean(label, names)}"
            )
        if not rows[index]["text"].strip() or not ids:
            job.account.empty.add(job.number(index))
            continue
        if len(ids) > room:
            job.account.truncated.add(job.number(index))
            job.account.completion_cut.add(job.number(index))
        job.features.add_class(index, [*around.prefix, *ids[:room], *around.suffix], ids_of[label])
    return names


_ENCODERS: Mapping[str, Callable[[_Job], None]] = {"completion": _completion, "chat": _chat, "text": _text}
