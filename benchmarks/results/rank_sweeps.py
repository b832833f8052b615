"""Sweeps of ranks 1 … 64 on real tasks, all ranks and seeds of a task in one pass; and of learning rates.

Knows nothing of what weft would have recommended; that is for `benchmarks.results.ranks`.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import weft
from benchmarks.results.sst2 import base_path
from weft.many.combinations import combinations, label, read_grid
from weft.many.sweeping import sweep
from weft.train.schedule import learning_rate_for

__all__ = ["ALPHA", "RANKS", "RATES", "TASKS", "Task", "best_rank", "run_ranks", "run_rates", "run_sites"]

RANKS, SEEDS, ALPHA = (1, 2, 4, 8, 16, 32, 64), (0, 1), 32.0
NEAR = 0.01


@dataclass(frozen=True)
class Task:
    """One task: what is trained on what, for how long.

    Attributes:
        developed: the rules were looked at with this task; the others check them.
        examples, held: rows for training and for evaluation.
    """

    name: str
    base: str
    data: str
    held_data: str
    examples: int
    held: int
    recipe: Mapping[str, Any] = field(default_factory=dict)
    developed: bool = False

    def base_in(self, shared: Path) -> Path | None:
        """Where the base is; None: the embedded one."""
        if self.base == "MiniLM":
            return base_path()
        return shared / "models" / self.base if self.base != "embedded" else None

    def rows(self, shared: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """(training, evaluation) rows, evenly out of the files."""
        if self.data.endswith(".txt"):
            pieces = _pieces((shared / "data" / self.data).read_text(encoding="utf-8"))
            held = [{"text": text} for text in pieces[::10]]
            train = [{"text": text} for index, text in enumerate(pieces) if index % 10]
            return _evenly(train, self.examples), _evenly(held, self.held)
        train, held = ([json.loads(line) for line in (shared / "data" / name).read_text(encoding="utf-8").split("\n") if line]
                       for name in (self.data, self.held_data))  # fmt: skip
        return _evenly(train, self.examples), _evenly(held, self.held)

    def settings(self) -> weft.Recipe:
        """The recipe of all runs; evaluated at their end."""
        return weft.Recipe(**{"eval_every": self.recipe["max_steps"], "eval_batch_size": 32, **self.recipe})


TASKS = (
    Task("e2e", "stories260k", "e2e/train.jsonl", "e2e/valid.jsonl", 1000, 60,
         {"batch_size": 8, "max_length": 320, "max_steps": 40}, developed=True),
    Task("sst2", "MiniLM", "sst2/train.jsonl", "sst2/dev.jsonl", 320, 150,
         {"batch_size": 8, "max_length": 40, "max_steps": 40}),
    Task("tinyshakespeare", "embedded", "text/tinyshakespeare.txt", "", 1000, 60,
         {"batch_size": 4, "max_length": 96, "max_steps": 40, "kind": "text"}, developed=True),
    Task("gsm8k", "embedded", "gsm8k/train.jsonl", "gsm8k/test.jsonl", 1000, 30,
         {"batch_size": 4, "max_length": 160, "max_steps": 24}, developed=True),
    Task("e2e, 64 examples", "stories260k", "e2e/train.jsonl", "e2e/valid.jsonl", 64, 60,
         {"batch_size": 8, "max_length": 320, "max_steps": 32}, developed=True),
    Task("medical_zh", "embedded", "medical_zh/train.jsonl", "medical_zh/valid.jsonl", 1000, 30,
         {"batch_size": 4, "max_length": 112, "max_steps": 24}),
)  # fmt: skip

RATES = (0.25, 1.0, 4.0)
"""Learning rates that are tried, times the rule's."""

RATE_RANKS = (2, 64)


def _pieces(text: str, size: int = 240) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def _evenly(rows: Sequence[Any], count: int) -> list[Any]:
    return list(rows[:: max(1, len(rows) // count)][:count])


def run_ranks(task: Task, shared: Path) -> dict[str, Any]:
    """Held-out loss by rank and seed."""
    spec = weft.LoraSpec(rank=8, alpha=ALPHA)
    found, seconds, base = _sweep(task, shared, {"rank": list(RANKS), "seed": list(SEEDS)}, spec, task.settings())
    losses = {str(rank): [loss for settings, loss in found if settings["rank"] == rank] for rank in RANKS}
    return {"losses": losses, "base": base, "seconds": round(seconds)}


def run_rates(task: Task, shared: Path, steps: int = 24) -> list[dict[str, Any]]:
    """Held-out loss by rank, alpha and learning rate, the rule's times `RATES`: with alpha 32, and with alpha = rank."""
    model, _ = weft.load_base(task.base_in(shared))
    width, family = int(model.config.hidden_size), str(model.config.model_type)
    runs: dict[str, tuple[dict[str, Any], weft.LoraSpec, weft.Recipe]] = {}
    for rank, alpha, times in itertools.product(RATE_RANKS, (ALPHA, None), RATES):
        spec = weft.LoraSpec(rank=rank, alpha=alpha)
        rate = times * learning_rate_for(width, family, steps, spec.scale_at("") * rank)[0]
        recipe = task.settings().replace(max_steps=steps, eval_every=steps, learning_rate=rate)
        known = {"rank": rank, "alpha": spec.alpha, "times": times, "rate": rate}
        runs[f"{rank} {spec.alpha:g} {times:g}"] = (known, spec, recipe)
    losses = _together(task, shared, {name: (spec, recipe) for name, (_, spec, recipe) in runs.items()})
    return [known | {"loss": losses[name]} for name, (known, _, _) in runs.items()]


def run_sites(task: Task, shared: Path, spec: weft.LoraSpec, uniform: int) -> dict[str, list[float]]:
    """Held-out loss by seed: ranks by site, and one rank everywhere.

    Args:
        spec: with ranks by site. uniform: the rank that takes as many bytes.
    """
    specs = {"by site": spec, "everywhere": weft.LoraSpec(rank=uniform, alpha=ALPHA)}
    runs = {
        f"{name} {seed}": (chosen, task.settings().replace(seed=seed))
        for name, chosen in specs.items()
        for seed in SEEDS
    }
    losses = _together(task, shared, runs)
    return {name: [losses[f"{name} {seed}"] for seed in SEEDS] for name in specs}


def _together(task: Task, shared: Path, runs: Mapping[str, tuple[weft.LoraSpec, weft.Recipe]]) -> dict[str, float]:
    """Held-out loss by name, all on the task's data, in one pass."""
    train, held = task.rows(shared)
    with tempfile.TemporaryDirectory() as place:
        done = weft.train_many(
            base=task.base_in(shared), data=dict.fromkeys(runs, train), eval_data=dict.fromkeys(runs, held),
            spec={name: spec for name, (spec, _) in runs.items()}, recipe={name: recipe for name, (_, recipe) in runs.items()},
            out=Path(place) / "runs", progress=False,
        )  # fmt: skip
        return {str(row["name"]): float(row["adapter"]["loss"]) for row in done.report.rows}


def _sweep(
    task: Task, shared: Path, grid: Mapping[str, Any], spec: weft.LoraSpec, recipe: weft.Recipe
) -> tuple[list[tuple[dict[str, Any], float]], float, float]:
    """(settings, loss) of each run in the order of the grid; seconds; the base's loss."""
    train, held = task.rows(shared)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        runs = sweep(
            base=task.base_in(shared), data=train, eval_data=held, grid=grid, halving=1, spec=spec, recipe=recipe,
            out=Path(place) / "runs", progress=False,
        )  # fmt: skip
        rows = {str(row["name"]): row for row in runs.report.rows}
    found = []
    for settings in combinations(read_grid(grid), None, recipe.seed):
        row = rows[label(settings)]
        found.append((settings, float(row["adapter"]["loss"])))
    return found, time.perf_counter() - began, float(next(iter(rows.values()))["base"]["loss"])


def best_rank(losses: Mapping[str, Sequence[float]]) -> tuple[int, float]:
    """The smallest rank whose mean loss is within one standard error, or 1 %, of the lowest; and that margin.

    The standard error is of the difference to the lowest, over seeds.
    """
    means = {int(rank): statistics.mean(values) for rank, values in losses.items()}
    lowest = min(means, key=lambda rank: means[rank])

    def margin(rank: int) -> float:
        gaps = [mine - best for mine, best in zip(losses[str(rank)], losses[str(lowest)], strict=True)]
        error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
        return max(error, NEAR * means[lowest])

    rank = min(rank for rank in means if means[rank] <= means[lowest] + margin(rank))
    return rank, margin(rank)
