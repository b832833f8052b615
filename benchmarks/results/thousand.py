"""1,000 users through a bank of 32 slots: tinyshakespeare in thousand shares, some of them broken, on stories260k."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import psutil  # type: ignore[import-untyped]

import weft
from weft.many.rounds import Rounds

__all__ = ["measure", "users"]

USERS, SLOTS, ALONE = 1000, 32, 5
BROKEN, WILD = 97, 143
"""Every so manieth user has data that can't be read, or a learning rate that explodes."""


def users(text: str) -> tuple[dict[str, Any], dict[str, weft.Recipe]]:
    """Data and recipe by user: 1 to 7 speeches, ranks 1 to 8, 2 to 7 steps."""
    speeches = [block.partition("\n")[2].strip() for block in re.split(r"\n\s*\n", text.strip())]
    speeches = [speech for speech in speeches if speech]
    data: dict[str, Any] = {}
    recipes: dict[str, weft.Recipe] = {}
    at = 0
    for number in range(USERS):
        name, count = f"user-{number:04}", 1 + number % 7
        rows: list[dict[str, Any]] = [{"text": speech} for speech in speeches[at : at + count]]
        at += count
        data[name] = [{"text": None}] if number % BROKEN == BROKEN - 1 else rows
        recipe = weft.Recipe(
            weft.LoraSpec(rank=1 + number % 8), kind="text", max_steps=2 + number % 6, batch_size=2, learning_rate=5e-3, max_length=48, seed=number
        )  # fmt: skip
        wild = {"learning_rate": 1e30, "clip": 0.0, "schedule": "constant", "warmup_ratio": 0.0, "max_steps": 6}
        recipes[name] = recipe.replace(**wild) if number % WILD == WILD - 1 else recipe
    return data, recipes


def measure(shared: Path, folder: Path) -> dict[str, Any]:
    """Train all, watch the bank, and compare some users with themselves alone."""
    data, recipes = users((shared / "data/text/tinyshakespeare.txt").read_text(encoding="utf-8"))
    base = shared / "models/stories260k"
    most, resident, done = [0], [0], Rounds.round
    process = psutil.Process()

    def watched(self: Rounds) -> None:
        most[0] = max(most[0], len(self.engine.bank.names))
        done(self)
        if self.number == SLOTS:
            resident[0] = process.memory_info().rss

    with tempfile.TemporaryDirectory() as place, mock.patch.object(Rounds, "round", watched):
        common: dict[str, Any] = {"base": base, "progress": False}
        runs = weft.train_many(**common, data=data, recipe=recipes, slots=SLOTS, out=Path(place) / "runs")
        grown = process.memory_info().rss - resident[0]
        report = runs.report
        alone = list(runs)[:: len(runs) // ALONE][:ALONE]
        errors = {
            name: _furthest(runs[name].adapter, weft.train(**common, data=data[name], recipe=recipes[name], out=Path(place) / name).adapter)
            for name in alone
        }  # fmt: skip
        ranks = Counter(recipe.spec.rank for recipe in recipes.values() if recipe.spec)
        reasons = Counter(
            "data" if not row["steps"] and "loss" not in row["reason"] else "loss" for row in report.failed
        )
        size = sum(file.stat().st_size for file in (Path(place) / "runs").rglob("*") if file.is_file())
    steps = sum(row["steps"] for row in report.rows)
    expected = {
        "data": sum(rows == [{"text": None}] for rows in data.values()),
        "loss": sum(recipe.learning_rate == 1e30 for recipe in recipes.values()),
    }
    return {
        "title": "1,000 users through a bank of 32 slots",
        "settings": (
            f"tinyshakespeare in {USERS:,} shares of 1 to 7 speeches on stories260k; ranks {min(ranks)} to {max(ranks)}, 2 to 7 steps; {expected['data']} of "
            f"them with data that can't be read, {expected['loss']} with a learning rate of 1e30; one process, one thread"
        ),
        "columns": ["what", "count"],
        "rows": [
            ["adapters that were trained", f"{len(runs):,}"],
            ["stopped because of their data", f"{reasons['data']} of {expected['data']}"],
            ["stopped because their loss or gradient was not finite", f"{reasons['loss']} of {expected['loss']}"],
            ["most adapters in the bank at once", most[0]],
            ["rounds (one after another would be the next line)", f"{report.rounds:,}"],
            ["optimizer steps of all", f"{steps:,}"],
            ["tokens", f"{report.tokens:,}"],
            ["seconds, files of a run folder each in it", f"{report.seconds:.0f}"],
            [f"memory of the process, grown from round {SLOTS} to the end", f"{grown / 2**20:.0f} MiB"],
            ["run folders", f"{size / 2**20:.0f} MiB"],
            [f"{ALONE} of them trained alone by `weft.train`: largest difference of a factor, over its largest", f"{max(errors.values()):.1e}"],
        ],
        "summary": f"{len(runs)} of {USERS} trained, {len(report.failed)} stopped, at most {most[0]} at once, {report.rounds} rounds, off by {max(errors.values()):.1e}",
    }  # fmt: skip


def _furthest(found: weft.Adapter, expected: weft.Adapter) -> float:
    """The largest difference of a factor over the largest factor."""
    here, there = found.tensors(), expected.tensors()
    largest = max(float(tensor.abs().max()) for tensor in there.values())
    return max(float((here[name] - tensor).abs().max()) for name, tensor in there.items()) / largest
