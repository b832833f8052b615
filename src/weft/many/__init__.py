"""Many adapters on one base, trained in one pass; together equals alone.

    train_many(base=…, data={"alice": …}, out=…) -> Runs        one adapter a user
    sweep(base=…, data=…, grid={"rank": [4, 8]}, out=…) -> SweepRuns   one adapter a combination, on the same data
    Runs        the runs by name, and their report

    shares      who trains on what                     names      folders for names that come out of data
    settings    one recipe a user                      member     one user's data order, schedule and progress
    pieces      which rows go through the base together
    losses      losses of a mixed batch, block by block
    engine      the slow, obvious way                  together   the fast one, over stacked factors; its optimizer is adamw
    rounds      who is in the batch, and who comes next
    desk        reading data, writing run folders      folder, state, report, page   what is written
    processes   several of them                        sweeping, halving, confidence    which recipe wins, and how sure that is

The trainer's parts (recipe, schedule, data, evaluation, run folders) are those of `weft.train`. Heavy imports happen when a
name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weft.many.report import ManyReport, Runs
    from weft.many.sweeping import SweepReport, SweepRuns, sweep
    from weft.many.training import train_many

__all__ = ["ManyReport", "Runs", "SweepReport", "SweepRuns", "sweep", "train_many"]

_HOME = {
    "ManyReport": "weft.many.report",
    "Runs": "weft.many.report",
    "SweepReport": "weft.many.sweeping",
    "SweepRuns": "weft.many.sweeping",
    "sweep": "weft.many.sweeping",
    "train_many": "weft.many.training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
