"""Tokens a second and memory of a step against the number of users, at as many tokens a step for all; beside peft."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.cotraining import curve

__all__ = ["measure"]

TOTAL, ROUNDS = 512, 3
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
    (folder / "cotraining.svg").write_text(
        _plot({users: item["tokens_per_second"] for users, item in found.items()}), encoding="utf-8"
    )
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
        "caption": "Tokens a second of all users together.",
        "summary": ", ".join(f"{row[0]} users {row[4]:.2f} ×" for row in rows),
    }


def _plot(speeds: Mapping[int, Mapping[str, float]]) -> str:
    """Lines over the number of users, both axes from zero or logarithmic where they double."""
    width, height, left, bottom, top = 640, 360, 70, 50, 30
    users = list(speeds)
    most = max(max(item.values()) for item in speeds.values()) * 1.08

    def place(count: int, speed: float) -> tuple[float, float]:
        x = left + math.log2(count / users[0]) / math.log2(users[-1] / users[0]) * (width - left - 110)
        return x, height - bottom - speed / most * (height - bottom - top)

    parts = [f'<rect width="{width}" height="{height}" fill="white"/>']
    for index in range(5):
        speed = most * index / 4
        y = place(users[0], speed)[1]
        parts.append(f'<line x1="{left}" x2="{width - 100}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e5e7eb"/>')
        parts.append(
            f'<text x="{left - 8}" y="{y + 4:.1f}" font-size="12" text-anchor="end" fill="#374151">{speed:,.0f}</text>'
        )
    for count in users:
        x = place(count, 0)[0]
        parts.append(
            f'<text x="{x:.1f}" y="{height - bottom + 18}" font-size="12" text-anchor="middle" fill="#374151">{count}</text>'
        )
    for name, color in (("weft", "#0f766e"), ("peft", "#9ca3af")):
        points = [place(count, item[name]) for count, item in speeds.items()]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in points]
        parts.append(
            f'<text x="{points[-1][0] + 10:.1f}" y="{points[-1][1] + 4:.1f}" font-size="13" fill="{color}">{name}</text>'
        )
    parts.append(
        f'<text x="{(left + width - 100) / 2:.0f}" y="{height - 8}" font-size="12" text-anchor="middle" fill="#6b7280">users in the batch</text>'
    )
    parts.append(f'<text x="{left}" y="18" font-size="13" fill="#374151">tokens/s</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" font-family="system-ui, sans-serif">\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )
