"""Conditions as people write them: ``eval_loss<2 and (rank>=8 or tag.domain=health)``.

    expression  = term {"or" term}
    term        = factor {("and" | ",") factor}
    factor      = "not" factor | "(" expression ")" | comparison
    comparison  = FIELD ("<" | "<=" | ">" | ">=" | "=" | "==" | "!=") VALUE
    VALUE       = number | 'text' | "text" | word

A small language that is read here and nowhere evaluated: `weft.store.query` makes bound parameters of it. A word on the right
is text for a filter, and an alias for a promotion.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from weft.errors import StoreError

__all__ = [
    "OPERATORS",
    "And",
    "Comparison",
    "Condition",
    "Not",
    "Number",
    "Or",
    "Word",
    "comparisons",
    "parse_condition",
]

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "=": operator.eq, "!=": operator.ne,
}  # fmt: skip

MAX_LENGTH = 4096
MAX_DEPTH = 32
MAX_COMPARISONS = 64

_TOKEN = re.compile(
    r"""\s*(?:(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.-]))
    |(?P<text>'[^']*'|"[^"]*")
    |(?P<operator><=|>=|==|!=|<|>|=)
    |(?P<mark>[(),])
    |(?P<word>[A-Za-z0-9_][\w.:/@+-]*))""",
    re.VERBOSE | re.ASCII,
)


class Word(str):
    """Text that stood without quotes."""


class Number(float):
    """A number, and how it was written: digests and tags can be digits too."""

    text: str

    @classmethod
    def of(cls, text: str) -> Number:
        """The number that a text is."""
        found = cls(text)
        found.text = text
        return found


@dataclass(frozen=True)
class Comparison:
    """``field operator value``."""

    field: str
    operator: str
    value: float | str

    @property
    def text(self) -> str:
        """The value as it was written."""
        return self.value if isinstance(self.value, str) else getattr(self.value, "text", f"{self.value:g}")

    def __str__(self) -> str:
        value = (
            self.value
            if isinstance(self.value, Word)
            else repr(self.value)
            if isinstance(self.value, str)
            else f"{self.value:g}"
        )
        return f"{self.field}{self.operator}{value}"


@dataclass(frozen=True)
class Not:
    """The contrary."""

    part: Condition


@dataclass(frozen=True)
class And:
    """All of them."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True)
class Or:
    """One of them, at least."""

    parts: tuple[Condition, ...]


Condition = Comparison | Not | And | Or


def parse_condition(text: str) -> Condition:
    """Read a condition.

    Raises:
        StoreError: it can't be read; says where.
    """
    if not isinstance(text, str) or not text.strip():
        raise StoreError("an empty condition; expected something like: eval_loss<2")
    if len(text) > MAX_LENGTH:
        raise StoreError(f"a condition of {len(text):,} characters; at most {MAX_LENGTH:,} are read")
    if not text.isprintable():
        raise StoreError(f"a condition with control characters: {text[:60]!a}")
    reader = _Reader(text)
    found = reader.expression(0)
    if reader.kind:
        raise reader.problem("expected 'and', 'or' or the end")
    return found


def comparisons(condition: Condition) -> list[Comparison]:
    """All comparisons in a condition, from left to right."""
    if isinstance(condition, Comparison):
        return [condition]
    parts = (condition.part,) if isinstance(condition, Not) else condition.parts
    return [found for part in parts for found in comparisons(part)]


class _Reader:
    """Reads one token ahead."""

    def __init__(self, text: str) -> None:
        self.text, self.position, self.count = text, 0, 0
        self.kind, self.token, self.start = "", "", 0
        self.next()

    def next(self) -> None:
        rest = self.text[self.position :]
        match = _TOKEN.match(self.text, self.position)
        if match is None:
            self.kind, self.token, self.start = ("?" if rest.strip() else ""), rest.strip()[:20], self.position
            return
        self.kind = str(match.lastgroup)
        self.token, self.start, self.position = match[self.kind], match.start(self.kind), match.end()

    def problem(self, expected: str) -> StoreError:
        got = f"{self.token[:40]!a} at character {self.start + 1}" if self.kind else "its end"
        shown = self.text if len(self.text) <= 80 else f"{self.text[:80]}…"
        return StoreError(
            f"the condition {shown!r} can't be read: {expected}, got {got}. As in: eval_loss<2 and tag.domain=health"
        )

    def is_word(self, *words: str) -> bool:
        return self.kind == "word" and self.token.lower() in words

    def expression(self, depth: int) -> Condition:
        if depth > MAX_DEPTH:
            raise StoreError(f"a condition nested deeper than {MAX_DEPTH}")
        parts = [self.term(depth)]
        while self.is_word("or"):
            self.next()
            parts.append(self.term(depth))
        return parts[0] if len(parts) == 1 else Or(tuple(parts))

    def term(self, depth: int) -> Condition:
        parts = [self.factor(depth)]
        while self.is_word("and") or (self.kind, self.token) == ("mark", ","):
            self.next()
            parts.append(self.factor(depth))
        return parts[0] if len(parts) == 1 else And(tuple(parts))

    def factor(self, depth: int) -> Condition:
        if depth > MAX_DEPTH:
            raise StoreError(f"a condition nested deeper than {MAX_DEPTH}")
        if self.is_word("not"):
            self.next()
            return Not(self.factor(depth + 1))
        if (self.kind, self.token) == ("mark", "("):
            self.next()
            found = self.expression(depth + 1)
            if (self.kind, self.token) != ("mark", ")"):
                raise self.problem("expected ')'")
            self.next()
            return found
        return self.comparison()

    def comparison(self) -> Comparison:
        self.count += 1
        if self.count > MAX_COMPARISONS:
            raise StoreError(f"a condition of more than {MAX_COMPARISONS} comparisons")
        if self.kind != "word":
            raise self.problem("expected a field (a metric, tag.KEY, rank, base …)")
        field = self.token
        self.next()
        if self.kind != "operator":
            raise self.problem("expected < <= > >= = or !=")
        sign = "=" if self.token == "==" else self.token
        self.next()
        if self.kind == "number":
            value: float | str = Number.of(self.token)
            if not math.isfinite(float(self.token)):
                raise self.problem("expected a finite number")
        elif self.kind == "text":
            value = self.token[1:-1]
        elif self.kind == "word":
            value = Word(self.token)
        else:
            raise self.problem("expected a number or text")
        self.next()
        return Comparison(field, sign, value)
