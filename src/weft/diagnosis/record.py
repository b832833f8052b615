"""`Record`: the numbers of a run, as rules see them: lines of its log, and facts that were known before the first step.

Every line is a mapping with ``step``. What `weft.train` writes (a `weft.Watch` in another trainer writes what it can know)::

    {"step": 40, "loss": 2.1, "loss_high": 2.6, "learning_rate": 3e-4, "grad_norm": 0.8, "grad_norm_high": 1.3, "clipped": 0.4,
     "padding": 0.12, "seconds_waiting": 0.02, "seconds": 3.1, "tokens": 8192, …}
                     since the line before: mean and highest loss of a step, highest gradient norm, share of the steps that were
                     clipped, share of the positions that hold padding, seconds in which training waited for batches. With fp16
                     also "skipped": steps that were left out because gradients overflowed
    {"step": 0, "of": "base", "eval_loss": 2.9}               the base on the evaluation data
    {"step": 40, "eval_loss": 2.2}                            an evaluation
    {"step": 40, "of": "general", "general_loss": 3.1}        loss on the recipe's general text; at step 0 the base's
    {"step": 0, "of": "weights", "weights": {path: ‖W‖}}      Frobenius norms of the weights that are adapted, where they can be read
    {"step": 40, "of": "sites", "sites": {path: {"delta": ‖ΔW‖, "update": ‖change of ΔW in this one step‖, "A": ‖A‖, "B": ‖B‖,
     "gradient_A": …, "gradient_B": …, "rank": 8, "effective_rank": 3.2}}}
                     after the step, at about ten steps of a run and at the first; gradients as the optimizer gets them (clipped).
                     In 16 bits also "gradient_zero": share of the numbers in B's gradient that are exactly zero
    {"step": 41, "of": "not-finite", "what": "loss" | "gradient" | "factors", "site": path, "where": "in words"}
    {"step": 40, "of": "trouble", "rule": …, "seen": 57, "evidence": …, "factor": 0.5}
                     the run went back from step ``seen`` to ``step``, and on with ``factor`` times the recipe's learning rate
    {"step": 40, "of": "finding", "rule": …, "severity": …, "evidence": …, "advice": …, "began": 31, …}     what was said while it ran

The facts stand in environment.json under ``"facts"``, see `weft.train.facts`. This module does not know torch or files.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Record", "number"]

Row = Mapping[str, Any]


def number(row: Row, name: str) -> float | None:
    """A number of a line; NaN and infinity stand there as text. None: it isn't there, or is no number."""
    value = row.get(name)
    if value is None or isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


@dataclass(frozen=True)
class Record:
    """What is known of a run, now or at its end.

    Attributes:
        rows: the lines of its log, in order.
        facts: what was known before the first step; any of it may be missing.
        ended: nothing will come any more.
    """

    rows: Sequence[Row]
    facts: Mapping[str, Any] = field(default_factory=dict)
    ended: bool = False

    @functools.cached_property
    def lines(self) -> list[Row]:
        """Lines of training steps with a finite loss."""
        return [row for row in self.rows if "of" not in row and _finite(number(row, "loss"))]

    @functools.cached_property
    def evaluations(self) -> list[tuple[int, float]]:
        """(step, loss) of the evaluations, without the base's."""
        return self._series("eval_loss", None)

    @functools.cached_property
    def base_loss(self) -> float | None:
        """The base's loss on the evaluation data."""
        found = [number(row, "eval_loss") for row in self.rows if row.get("of") == "base"]
        return found[0] if found and _finite(found[0]) else None

    @functools.cached_property
    def general(self) -> list[tuple[int, float]]:
        """(step, loss) on the general text; the first is the base's."""
        return self._series("general_loss", "general")

    @functools.cached_property
    def weights(self) -> dict[str, float]:
        """‖W‖ by site."""
        found: Any = next((row["weights"] for row in self.rows if row.get("of") == "weights"), {})
        return {path: float(value) for path, value in dict(found).items()}

    @functools.cached_property
    def sites(self) -> list[tuple[int, dict[str, Row]]]:
        """(step, numbers by site), oldest first."""
        return [(int(row["step"]), dict(row["sites"])) for row in self.rows if row.get("of") == "sites"]

    def of(self, kind: str) -> list[Row]:
        """Lines of one kind."""
        return [row for row in self.rows if row.get("of") == kind]

    def column(self, name: str) -> list[tuple[int, float]]:
        """(step, number) of the training lines that have it."""
        found = ((int(row["step"]), number(row, name)) for row in self.lines)
        return [(step, value) for step, value in found if value is not None and math.isfinite(value)]

    def fact(self, *path: str) -> Any:
        """A fact by its path, as in ``fact("data", "train", "examples")``; None where it is not known."""
        found: Any = self.facts
        for name in path:
            found = found.get(name) if isinstance(found, Mapping) else None
        return found

    @property
    def steps(self) -> int:
        """Optimizer steps that the run is to have; those that it had where that is not known."""
        return int(self.fact("steps") or max((int(row["step"]) for row in self.lines), default=0))

    @property
    def step(self) -> int:
        """The last step that is known of."""
        return max((int(row.get("step", 0)) for row in self.rows if row.get("of") != "trouble"), default=0)

    def _series(self, name: str, kind: str | None) -> list[tuple[int, float]]:
        found = ((int(row["step"]), number(row, name)) for row in self.rows if row.get("of") == kind)
        return [(step, value) for step, value in found if _finite(value) and value is not None]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
