"""What is added up between two lines of a log, at next to no cost: a Python number or an unread tensor a step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Tally"]


@dataclass
class Tally:
    """Sums since the last line.

    Attributes:
        clip: the largest norm that a gradient may have; 0: any.
    """

    clip: float = 0.0
    losses: list[float] = field(default_factory=list)
    norms: list[Any] = field(default_factory=list)
    positions: int = 0
    tokens: int = 0
    skipped: int = 0
    waited: float = 0.0
    _step: int = -1

    def loss(self, step: int, value: float) -> None:
        """The loss of a forward; those of one optimizer step add up."""
        if step == self._step:
            self.losses[-1] += value
        else:
            self.losses.append(value)
        self._step = step

    def take(self, tokens: int) -> dict[str, float]:
        """The numbers for a line, and begin anew.

        Args:
            tokens: that the run has read until now, without padding.
        """
        found: dict[str, float] = {}
        if self.losses:
            found["loss_high"] = max(self.losses)
        norms = self._norms()
        if norms:
            found["grad_norm_high"] = max(norms, key=lambda norm: norm if math.isfinite(norm) else math.inf)
            if self.clip > 0:
                found["clipped"] = round(sum(not norm <= self.clip for norm in norms) / len(norms), 4)
        if self.positions and tokens > self.tokens:
            found["padding"] = round(max(0.0, 1.0 - (tokens - self.tokens) / self.positions), 4)
        if self.skipped:
            found["skipped"] = self.skipped
        if self.waited:
            found["seconds_waiting"] = round(self.waited, 4)
        self.losses, self.norms, self.positions, self.tokens, self.skipped, self.waited = [], [], 0, tokens, 0, 0.0
        self._step = -1
        return found

    def _norms(self) -> list[float]:
        if any(isinstance(norm, Tensor) for norm in self.norms):
            self.norms = torch.stack([torch.as_tensor(norm).detach().float().cpu() if not isinstance(norm, Tensor) else norm.detach().float()
                                      for norm in self.norms]).tolist()  # fmt: skip
        return [float(norm) for norm in self.norms]

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as plain data."""
        return {
            "losses": self.losses,
            "norms": self._norms(),
            "positions": self.positions,
            "tokens": self.tokens,
            "skipped": self.skipped,
        }

    def load(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self.losses, self.norms = list(state["losses"]), list(state["norms"])
        self.positions, self.tokens, self.skipped = (int(state[name]) for name in ("positions", "tokens", "skipped"))
        self.waited, self._step = 0.0, -1
