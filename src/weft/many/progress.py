"""What is seen of a many-run while it goes on: users done, tokens a second, and who failed."""

from __future__ import annotations

import sys
import time
from typing import Any

from weft.many.rounds import Rounds
from weft.train.progress import progress_bar, say

__all__ = ["ManyProgress"]

EVERY = 5.0
"""Seconds between two plain lines."""


class ManyProgress:
    """A bar on a terminal, plain lines elsewhere.

    Args:
        total: users of this process.
        mode: as in `weft.train.progress.Progress`.
        speaks: this process says something at all.
    """

    def __init__(self, total: int, mode: bool | None, speaks: bool = True) -> None:
        self.total, self.speaks = total, speaks and mode is not False
        self._bar: Any = progress_bar() if self.speaks and mode is None and sys.stderr.isatty() else None
        self._task = self._bar.add_task("training", total=total, note="") if self._bar is not None else None
        self._said = time.monotonic()
        if self._bar is not None:
            self._bar.start()

    def update(self, rounds: Rounds, left: int, failed: int) -> None:
        """After a round."""
        if not self.speaks:
            return
        speed = rounds.tokens / max(rounds.seconds, 1e-9)
        bad = f"  {failed} failed" if failed else ""
        if self._bar is not None:
            note = f"{len(rounds.active)} at once  {speed:,.0f} tokens/s{bad}"
            self._bar.update(self._task, completed=left, note=note)
        elif time.monotonic() - self._said > EVERY:
            self._said = time.monotonic()
            say(
                f"{left}/{self.total} users done, {len(rounds.active)} in the batch, round {rounds.number:,}, {speed:,.0f} tokens/s{bad}"
            )

    def tell(self, text: str) -> None:
        """A line of its own."""
        if self.speaks and self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self.speaks:
            say(text)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
