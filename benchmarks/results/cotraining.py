"""Tokens a second and memory of a step against the number of users, at as many tokens a step for all; beside peft."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cotraining import curve

__all__ = ["measure"]

TOTAL, ROUNDS = 512, 3
WIDTH, HEIGHT = 400, 340
COLORS = {"weft": "#0f766e", "peft": "#9ca3af"}
MODEL = {"layers": 8, "width": 512, "dtype": "float32"}


def measure(shared: Path, folder: Path) -> dict[str, Any]:
    """Measure in this process, interleaved; one thread."""
    import torch

    torch.set_num_threads(1)
    found = curve(ROUNDS, TOTAL, **MODEL)
    rows = []
    for users, item in found.items():
        speed, memory = item["tokens_per_second"], item["mebibytes"]
        rows.append(
            [
                users,
                TOTAL // users,
                round(speed["weft"]),
                round(speed["peft"]),
                speed["weft"] / speed["peft"],
                round(memory["weft"]),
                round(memory["peft"]),
            ]
        )
    (folder / "cotraining.svg").write_text(draw(rows), encoding="utf-8")
    return {
        "title": "Training many users: speed and memory against their number",
        "settings": (
            f"a Llama of {MODEL['layers']} layers × {MODEL['width']}, rank 16, all linear layers, {TOTAL} tokens a step over all users, optimizer in it; "
            f"one thread, medians of {ROUNDS} interleaved rounds; peft trains one user after another on one adapter. MiB: what a step holds beyond "
            "factors and moments, gradients in it"
        ),
        "columns": ["users", "tokens each", "weft tokens/s", "peft tokens/s", "ratio", "weft MiB", "peft MiB"],
        "rows": rows,
        "picture": "results/cotraining.svg",
        "caption": "Tokens a second of all users together, and what a step holds: in all, and by user.",
        "summary": ", ".join(f"{row[0]} users {row[4]:.2f} ×" for row in rows),
    }


def draw(rows: Sequence[Sequence[float]]) -> str:
    """The rows of the table as three panels side by side: speed, memory of a step, memory by user."""
    users = [int(row[0]) for row in rows]
    panels = [
        _panel(users, {"weft": [row[2] for row in rows], "peft": [row[3] for row in rows]}, "tokens/s", 0),
        _panel(users, {"weft": [row[5] for row in rows], "peft": [row[6] for row in rows]}, "MiB of a step", 1),
        _panel(users, {"weft": [row[5] / row[0] for row in rows]}, "MiB of a step by user (peft has one at a time)", 2),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {3 * WIDTH} {HEIGHT}" width="{3 * WIDTH}" font-family="system-ui, sans-serif">\n'
        f'<rect width="{3 * WIDTH}" height="{HEIGHT}" fill="white"/>\n' + "\n".join(panels) + "\n</svg>\n"
    )


def _round_step(least: float) -> float:
    """The smallest distance between two marks that is at least this, and a round number."""
    power: float = 10 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 1.5, 2, 2.5, 3, 4, 5, 7.5, 10) if power * factor >= least)


def _panel(users: Sequence[int], lines: Mapping[str, Sequence[float]], title: str, number: int) -> str:
    """Lines over the number of users, which doubles from mark to mark; y from zero."""
    left, right, bottom, top = number * WIDTH + 52, 46, 50, 34
    step = _round_step(max(max(values) for values in lines.values()) / 4)
    most = 4 * step

    def place(count: float, value: float) -> tuple[float, float]:
        share = math.log2(count / users[0]) / max(1.0, math.log2(users[-1] / users[0]))
        return left + share * (WIDTH - 52 - right), HEIGHT - bottom - value / most * (HEIGHT - bottom - top)

    end = place(users[-1], 0)[0]
    parts = [f'<text x="{left - 40}" y="18" font-size="13" fill="#374151">{title}</text>']
    for index in range(5):
        value = step * index
        y = place(users[0], value)[1]
        parts.append(f'<line x1="{left}" x2="{end:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e5e7eb"/>')
        parts.append(
            f'<text x="{left - 8}" y="{y + 4:.1f}" font-size="12" text-anchor="end" fill="#374151">{value:,.0f}</text>'
        )
    for count in users:
        x = place(count, 0)[0]
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - bottom + 18}" font-size="12" text-anchor="middle" fill="#374151">{count}</text>'
        )
    for name, values in lines.items():
        color = COLORS[name]
        points = [place(count, value) for count, value in zip(users, values, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in points]
        parts.append(
            f'<text x="{points[-1][0] + 8:.1f}" y="{points[-1][1] + 4:.1f}" font-size="13" fill="{color}">{name}</text>'
        )
    parts.append(
        f'<text x="{(left + end) / 2:.0f}" y="{HEIGHT - 8}" font-size="12" text-anchor="middle" fill="#6b7280">users in the batch</text>'
    )
    return "\n".join(parts)
