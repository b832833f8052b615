"""What a tokenizer puts around a text by itself, found by asking it. The same for training and generation.

Does not know examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from weft.errors import DataError

__all__ = ["Affixes", "affixes", "tokenise"]

_CHUNK = 1000
_PROBES = ("a", "the", "1", "一")


@dataclass(frozen=True)
class Affixes:
    """Special tokens around a text.

    Attributes:
        prefix: what the tokenizer puts before a text: often the beginning-of-text token, or nothing.
        suffix: what it puts behind one.
        end: what ends a training example so that generation learns to stop: the end-of-text token, or else `suffix`;
            empty where a tokenizer has neither.
        start: stands in for a prompt of no tokens where there is no prefix, so that generation has something to start
            from.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    end: tuple[int, ...]
    start: tuple[int, ...]

    def before(self, prompt: Sequence[int]) -> list[int]:
        """A prompt's tokens with what stands before them; a prefix that is in the text already isn't doubled."""
        body = self.without_prefix(prompt)
        return [*(self.prefix if body or self.prefix else self.start), *body]

    def without_prefix(self, ids: Sequence[int]) -> Sequence[int]:
        """Tokens without a prefix that was written into the text."""
        size = len(self.prefix)
        return ids[size:] if size and tuple(ids[:size]) == self.prefix else ids

    def with_end(self, ids: Sequence[int]) -> list[int]:
        """Tokens with the end; one that is in the text already isn't doubled."""
        size = len(self.end)
        return list(ids) if size and tuple(ids[-size:]) == self.end else [*ids, *self.end]


def affixes(tokenizer: Any) -> Affixes:
    """Ask a tokenizer what it puts around a text.

    Raises:
        DataError: the tokens of a text are not to be found among those with special tokens.
    """
    for probe in _PROBES:
        bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
        full = tokenizer(probe)["input_ids"]
        if not bare:
            continue
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
                suffix = tuple(full[start + len(bare) :])
                end = suffix if eos is None else (eos,)
                opening = next(((token,) for token in (bos, eos) if token is not None), ())
                return Affixes(tuple(full[:start]), suffix, end, opening)
    raise DataError(
        f"the tokenizer {type(tokenizer).__name__} gives no tokens for {_PROBES[0]!r}, or other ones with special tokens than "
        "without; weft can't find where a text begins in what it makes"
    )


def tokenise(tokenizer: Any, texts: Sequence[str], **options: Any) -> Any:
    """Tokens of many texts, without special tokens, in batches that keep all of a tokenizer's threads busy.

    Returns:
        A list of lists of ids, equal texts sharing one list: don't write into them; with
        ``return_offsets_mapping=True`` a list of (ids, offsets).
    """
    distinct = list(dict.fromkeys(texts))
    found: dict[str, Any] = {}
    for start in range(0, len(distinct), _CHUNK):
        chunk = distinct[start : start + _CHUNK]
        out = tokenizer(chunk, add_special_tokens=False, return_attention_mask=False, verbose=False, **options)
        ids = out["input_ids"]
        made = zip(ids, out["offset_mapping"], strict=True) if "offset_mapping" in out else ids
        found.update(zip(chunk, made, strict=True))
    return [found[text] for text in texts]
