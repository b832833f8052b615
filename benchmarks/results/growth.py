"""Growth from rank 2 against fixed ranks: tinyshakespeare on stories260k, the same steps, data and learning rate for all."""

from __future__ import annotations

import math
import random
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import weft

__all__ = ["measure"]

RANKS, SEEDS = (2, 4, 8, 16, 24, 32, 64), (0, 1, 2)
TRAIN, EVAL = 2000, 96
GROW = weft.GrowOnPlateau(max_rank=24, patience=1, min_change=0.06)
"""Impatient: on this base every rank lowers the loss at once, so growth has to come early. Chosen with seed 0 among ten settings."""
RECIPE = {
    "kind": "text",
    "max_length": 64,
    "max_steps": 240,
    "learning_rate": 3e-3,
    "batch_size": 8,
    "eval_batch_size": 48,
    "eval_every": 3,
    "patience": 0,
    "warmup_ratio": 0.05,
}
ALPHA = 32


def measure(shared: Path, folder: Path, ranks: Sequence[int] = RANKS, seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """Train every rank and the growth with every seed; the evaluation texts are held out for all."""
    data = texts((shared / "data/text/tinyshakespeare.txt").read_text(encoding="utf-8"))
    base = shared / "models/stories260k"
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:
        for name, rank, adaptive in (*((f"rank {rank}", rank, None) for rank in ranks), ("growth", 2, GROW)):
            found.setdefault(name, []).append(_one(base, data, rank, adaptive, seed))
            print(f"seed {seed}, {name}: {found[name][-1]['loss']:.4f}", flush=True)
    means = {name: statistics.fmean(run["loss"] for run in runs) for name, runs in found.items()}
    best = min((name for name in means if name != "growth"), key=lambda name: means[name])
    numbers = {name: round(statistics.fmean(run["numbers"] for run in runs)) for name, runs in found.items()}
    (folder / "growth.svg").write_text(_plot(found), encoding="utf-8")
    rows = [
        [
            name, *(run["loss"] for run in runs), means[name], numbers[name], numbers[name] / numbers[best],
            statistics.fmean(run["mean_numbers"] for run in runs) / numbers[best],
            "; ".join(dict.fromkeys(run["ranks"] for run in runs)),
        ]
        for name, runs in found.items()
    ]  # fmt: skip
    gap = means["growth"] - means[best]
    spread = statistics.stdev(run["loss"] for run in found[best]) if len(seeds) > 1 else math.nan
    return {
        "title": "Growth from rank 2 against fixed ranks: tinyshakespeare on stories260k",
        "settings": (
            f"{TRAIN} speeches, loss in nats a token on {EVAL} held-out ones, of the best of the evaluations; {RECIPE}, alpha {ALPHA}, all linear layers; "
            f"growth: {GROW}. Numbers: of the adapter at the end, and on average over the steps, against those of the best fixed rank"
        ),
        "columns": ["", *(f"seed {seed}" for seed in seeds), "mean", "numbers", "of the best's", "over the run", "ranks at the end"],
        "rows": rows,
        "picture": "results/growth.svg",
        "caption": "Mean loss over seeds against the numbers of the adapter; bars from the lowest to the highest seed. The diamond is the growth.",
        "summary": (
            f"best fixed: {best} at {means[best]:.4f} (seeds differ by {spread:.4f}); growth {means['growth']:.4f} ({gap:+.4f}) with "
            f"{numbers['growth'] / numbers[best]:.0%} of its numbers"
        ),
    }  # fmt: skip


def texts(text: str) -> dict[str, list[dict[str, str]]]:
    """Speeches of 60 to 160 letters in a fixed random order."""
    blocks = [block.strip() for block in re.split(r"\n\s*\n", text) if 60 < len(block.strip()) < 160]
    random.Random(0).shuffle(blocks)
    rows = [{"text": block} for block in blocks[: EVAL + TRAIN]]
    return {"eval": rows[:EVAL], "train": rows[EVAL:]}


def _one(
    base: Path, data: Mapping[str, Any], rank: int, adaptive: weft.GrowOnPlateau | None, seed: int
) -> dict[str, Any]:
    recipe = weft.Recipe(spec=weft.LoraSpec(rank=rank, alpha=ALPHA), seed=seed, adaptive=adaptive, **RECIPE)
    with tempfile.TemporaryDirectory() as place:
        run = weft.train(
            base=base,
            data=data["train"],
            eval_data=data["eval"],
            recipe=recipe,
            out=Path(place) / "run",
            progress=False,
        )
    per_rank = sum(item.d_in + item.d_out for item in run.adapter.factors.values())
    sizes, steps = [(0, rank)], run.report.steps
    for change in run.report.ranks.get("changes", []):
        sizes.append((change["step"], max(after for _, after in change["ranks"].values())))
    ends = [step for step, _ in sizes[1:]] + [steps]
    mean = sum(size * (end - step) for (step, size), end in zip(sizes, ends, strict=True)) / steps
    held = sorted({item.rank for item in run.adapter.factors.values()})
    return {
        "loss": run.report.adapter["loss"],
        "numbers": run.adapter.num_parameters,
        "mean_numbers": mean * per_rank,
        "ranks": " and ".join(map(str, held)),
    }


def _plot(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Loss over numbers, the numbers on a logarithmic axis."""
    width, height, left, bottom, top = 640, 360, 70, 50, 30
    points = {
        name: (statistics.fmean(run["numbers"] for run in runs), [run["loss"] for run in runs])
        for name, runs in found.items()
    }
    low, high = min(min(y) for _, y in points.values()), max(max(y) for _, y in points.values())
    first, last = min(x for x, _ in points.values()), max(x for x, _ in points.values())
    pad = 0.06 * (high - low) or 0.01

    def at(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / first) / math.log(last / first) if last > first else 0.5
        up = (y - low + pad) / (high - low + 2 * pad)
        return left + 20 + across * (width - left - 60), height - bottom - up * (height - bottom - top)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="18" font-size="14" fill="#374151">held-out loss against the numbers of the adapter</text>',
    ]
    for k in range(5):
        value = low + (high - low) * k / 4
        y = at(first, value)[1]
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{width - 20}" y2="{y:.1f}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#374151">{value:.3f}</text>')
    fixed = [(x, statistics.fmean(y)) for name, (x, y) in points.items() if name != "growth"]
    line = " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in fixed)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#9aa5b1" stroke-width="2"/>')
    for name, (numbers, losses) in points.items():
        grows = name == "growth"
        color = "#6d28d9" if grows else "#374151"
        x, y = at(numbers, statistics.fmean(losses))
        parts.append(
            f'<line x1="{x:.1f}" y1="{at(numbers, min(losses))[1]:.1f}" x2="{x:.1f}" y2="{at(numbers, max(losses))[1]:.1f}" stroke="{color}"/>'
        )
        shape = (
            f'<path d="M{x:.1f},{y - 7:.1f} l7,7 l-7,7 l-7,-7 z" fill="{color}"/>'
            if grows
            else f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>'
        )
        side = y + 22 if grows else y - 10
        parts.append(f'{shape}<text x="{x:.1f}" y="{side:.1f}" text-anchor="middle" fill="{color}">{name}</text>')
        if not grows:
            parts.append(
                f'<text x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle" fill="#374151">{numbers / 1000:.3g}k</text>'
            )
    parts.append(
        f'<text x="{(left + width) / 2:.0f}" y="{height - 10}" text-anchor="middle" fill="#374151">numbers in the adapter</text></svg>'
    )
    return "\n".join(parts) + "\n"
