"""The account of an encoding: how many examples there were, what happened to them, and to which first."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Account", "Tally"]

SHOWN = 5


@dataclass
class Tally:
    """A count, and the row numbers of the first examples that were counted."""

    count: int = 0
    first: list[int] = field(default_factory=list)

    def add(self, number: int) -> None:
        """Count one example of this row."""
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(number)

    def words(self, unit: str) -> str:
        """``"12 (line 3, 7, 19 …)"``."""
        listed = ", ".join(map(str, self.first))
        return f"{self.count:,} ({unit} {listed}{' …' if self.count > len(self.first) else ''})"


@dataclass
class Account:
    """What happened to the examples.

    Attributes:
        examples: how many were given.
        kept: how many are encoded.
        features: how many sequences they became (a long text becomes several).
        tokens: all of them.
        loss_tokens: those that are learned; labels for classification.
        truncated: examples that lost tokens: at their prompt's beginning (`prompt_cut`), or at their end
            (`completion_cut`; a text to classify or a conversation is cut there too).
        split: long texts that became several sequences; nothing of them is lost.
        empty: dropped, because there is nothing to learn in the example itself.
        masked: dropped, because no token is left to learn after masking and truncation.
        broken: dropped, because an image of theirs can't be read; `reasons` has the first ones.
        unit: what the numbers in the tallies count in the source.
        notes: what is worth knowing besides.
    """

    examples: int = 0
    kept: int = 0
    features: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    truncated: Tally = field(default_factory=Tally)
    prompt_cut: Tally = field(default_factory=Tally)
    completion_cut: Tally = field(default_factory=Tally)
    split: Tally = field(default_factory=Tally)
    empty: Tally = field(default_factory=Tally)
    masked: Tally = field(default_factory=Tally)
    broken: Tally = field(default_factory=Tally)
    reasons: list[str] = field(default_factory=list)
    unit: str = "row"
    notes: list[str] = field(default_factory=list)

    def drop_image(self, number: int, reason: str) -> None:
        """Count an example whose image can't be read."""
        self.broken.add(number)
        if len(self.reasons) < SHOWN:
            self.reasons.append(reason)

    @property
    def dropped(self) -> int:
        """How many examples are not encoded."""
        return self.empty.count + self.masked.count + self.broken.count

    def summary(self) -> str:
        """One line for people."""
        share = (
            f", {self.loss_tokens / self.tokens:.0%} of them learned"
            if self.tokens > self.loss_tokens > self.features
            else ""
        )
        size = f": {self.tokens:,} tokens{share}" if self.tokens else ""
        parts = [f"{self.kept:,} of {self.examples:,} examples kept{size}"]
        if self.truncated.count:
            places = [
                f"{tally.count:,} at {place}"
                for tally, place in ((self.prompt_cut, "the prompt's beginning"), (self.completion_cut, "the end"))
                if tally.count
            ]
            parts.append(f"truncated {self.truncated.words(self.unit)}: {', '.join(places)}")
        if self.split.count:
            parts.append(f"split into several sequences {self.split.words(self.unit)}")
        if self.empty.count:
            parts.append(f"dropped as empty {self.empty.words(self.unit)}")
        if self.masked.count:
            parts.append(f"dropped without a token to learn {self.masked.words(self.unit)}")
        if self.broken.count:
            parts.append(f"dropped for an image that can't be read {self.broken.words(self.unit)}: {self.reasons[0]}")
        return "; ".join((*parts, *self.notes))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)
