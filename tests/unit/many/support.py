"""What the tests of many adapters share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from weft.adapter import Adapter

__all__ = ["furthest", "steps_of", "user_rows"]


def user_rows(number: int, count: int | None = None) -> list[dict[str, str]]:
    """A user's examples: repeat a letter, in that user's own way."""
    letters = "abcdefghij"[: 3 + number % 3]
    rows = [
        {
            "prompt": f"{letter * (1 + turn % (2 + number % 3))}{number}?",
            "completion": letter * (1 + (turn + number) % 4),
        }
        for turn in range(3)
        for letter in letters
    ]
    return rows if count is None else rows[:count]


def furthest(left: Adapter, right: Adapter) -> tuple[float, float]:
    """The largest difference of a factor, and the largest factor."""
    mine, theirs = left.tensors(), right.tensors()
    assert mine.keys() == theirs.keys()
    return (
        max(float((mine[name] - theirs[name]).abs().max()) for name in mine),
        max(float(tensor.abs().max()) for tensor in theirs.values()),
    )


def steps_of(log: Iterable[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """Steps of a log with what is said of them: losses, evaluations and changes of ranks, which a run alone has beside numbers by site."""
    kinds = ("loss", "eval_loss", "change")
    return [(row["step"], kind) for row in log for kind in kinds if kind in row]
