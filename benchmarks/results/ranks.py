"""The recommended rank against the best of a sweep, on real tasks; ranks by site against one rank; learning rates by rank and alpha.

Sweeps that an earlier call made with the same settings are not made again; recommendations are always computed anew.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.results.rank_plot import plot
from benchmarks.results.rank_sweeps import (
    ALPHA,
    RANKS,
    RATE_RANKS,
    SEEDS,
    TASKS,
    Task,
    best_rank,
    run_ranks,
    run_rates,
    run_sites,
)
from weft.plan.ranks import RankAdvice, recommend_rank

__all__ = ["measure"]

SITES_TASK, SITES_RANK = TASKS[0], 4


def measure(shared: Path, folder: Path) -> dict[str, Any]:
    """All tasks; writes after each, so that a call that is stopped goes on where it was."""
    kept = folder / "ranks.json"
    known = json.loads(kept.read_text(encoding="utf-8")).get("sweeps", {}) if kept.exists() else {}

    def once(key: str, make: Callable[[], Any]) -> Any:
        if key not in known:
            known[key] = make()
            kept.write_text(
                json.dumps(_figures(known, {}, folder), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        return known[key]

    advice = {}
    for task in TASKS:
        once(key_of(task), lambda task=task: run_ranks(task, shared))
        advice[task.name] = _advice(task, shared)
        print(
            f"{task.name}: recommended {advice[task.name].rank}, best {best_rank(known[key_of(task)]['losses'])[0]}",
            flush=True,
        )
    chosen = advice[SITES_TASK.name]
    spent = chosen.spend(4 * chosen.numbers * SITES_RANK)
    losses = once("sites", lambda: run_sites(SITES_TASK, shared, spent.spec(chosen.spec), SITES_RANK))
    known["sites"] = {
        **losses,
        "bytes": spent.bytes,
        "captured": spent.captured,
        "uniform_captured": spent.uniform_captured,
    }
    once("rates", lambda: run_rates(SITES_TASK, shared))
    return _figures(known, advice, folder)


def key_of(task: Task) -> str:
    """What a sweep depends on."""
    return f"{task!r} {RANKS} {SEEDS} {ALPHA}"


def _advice(task: Task, shared: Path) -> RankAdvice:
    return recommend_rank(task.base_in(shared), task.rows(shared)[0], recipe=task.settings())


def _figures(sweeps: Mapping[str, Any], advice: Mapping[str, RankAdvice], folder: Path) -> dict[str, Any]:
    curves, best, rows = {}, {}, []
    for task in TASKS:
        if key_of(task) not in sweeps or task.name not in advice:
            continue
        found = sweeps[key_of(task)]
        means = {int(rank): statistics.mean(values) for rank, values in found["losses"].items()}
        curves[task.name], (best[task.name], margin) = means, best_rank(found["losses"])
        rows.append(_row(task, means, best[task.name], margin, found["base"], advice[task.name]))
    hits = sum(row[-2] == "yes" for row in rows)
    misses = [
        _miss(name, sweeps, means) for (name, means), row in zip(curves.items(), rows, strict=True) if row[-2] == "no"
    ]
    if curves:
        advised = {name: advice[name].rank for name in curves}
        (folder / "ranks.svg").write_text(plot(curves, advised, best), encoding="utf-8")
    return {
        "title": "Which rank: three rules against sweeps of ranks 1 to 64",
        "settings": (
            f"alpha {ALPHA:g}, learning rate by weft's rule, all linear sites, seeds {', '.join(map(str, SEEDS))}, all ranks and seeds of a task in one pass. Best: the "
            "smallest rank whose mean held-out loss is within one standard error (of the difference, over seeds) or 1 % of the lowest. "
            "Tasks with * are those with which the rules were developed; the others check them. Runs are short, 24 to 40 steps"
        ),
        "columns": ["task", "base's loss", "lowest loss", "margin", "thumb", "capacity", "spectrum", "recommended", "best", "within a factor of 2", "loss given up"],
        "rows": rows,
        "examples": [_sites_example(sweeps["sites"]), *_rate_examples(sweeps["rates"])] if "sites" in sweeps and "rates" in sweeps else [],
        **({"picture": "results/ranks.svg", "caption": " ".join(["Square: the best; ring: recommended.", *misses])} if curves else {}),
        "summary": f"recommended within a factor of two of the best on {hits} of {len(rows)} tasks",
        "sweeps": dict(sweeps),
    }  # fmt: skip


def _miss(name: str, sweeps: Mapping[str, Any], means: Mapping[int, float]) -> str:
    """What the numbers say about a miss."""
    losses = next(sweeps[key_of(task)]["losses"] for task in TASKS if task.name == name)
    spread = max(means.values()) / min(means.values()) - 1
    seeds = max(max(values) / min(values) - 1 for values in losses.values())
    why = "which rank is best is mostly chance here" if seeds >= spread else "the rules are wrong here"
    return f"Missed: {name}. All ranks lie within {spread:.1%} of each other, two seeds of one rank up to {seeds:.1%} apart: {why}."


def _row(
    task: Task, means: Mapping[int, float], best: int, margin: float, base: float, advice: RankAdvice
) -> list[Any]:
    rules = [rule.rank for rule in advice.rules]
    near = best / 2 <= advice.rank <= best * 2
    nearest = min(means, key=lambda rank: abs(rank - advice.rank))
    given = means[nearest] / min(means.values()) - 1
    return [f"{task.name}{' *' if task.developed else ''} ({task.base})", base, min(means.values()), margin, *rules, advice.rank, best,
            "yes" if near else "no", f"{given:.1%}"]  # fmt: skip


def _sites_example(found: Mapping[str, Any]) -> dict[str, Any]:
    """Ranks by site and one rank everywhere, at equal bytes."""
    return {
        "ranks by site": f"{SITES_TASK.name}, a budget of rank {SITES_RANK} everywhere, {found['bytes']:,} bytes used",
        "loss, by site": ", ".join(f"{loss:.4f}" for loss in found["by site"]),
        "loss, one rank": ", ".join(f"{loss:.4f}" for loss in found["everywhere"]),
        "energy held": f"{found['captured']:.1%} by site, {found['uniform_captured']:.1%} with one rank",
    }  # fmt: skip


def _rate_examples(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Losses at the rule's learning rate and around it, by rank and alpha."""
    found = []
    for rank in RATE_RANKS:
        for alpha in sorted({row["alpha"] for row in rows if row["rank"] == rank}):
            group = [row for row in rows if row["rank"] == rank and row["alpha"] == alpha]
            found.append({"learning rate": f"rank {rank}, alpha {alpha:g}"}
                         | {f"{row['times']:g} x the rule's ({row['rate']:.2g})": f"{row['loss']:.4f}" for row in group})  # fmt: skip
    return found
