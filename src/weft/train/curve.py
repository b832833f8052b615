"""The loss curve of a run as an SVG picture, drawn with nothing but text.

Knows the lines of a log, not how they came about.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from weft.drawing import document, smooth, ticks
from weft.drawing.svg import Point

__all__ = ["loss_curve"]

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 48, 48
TRAIN, EVAL, BEST, GRID, INK, RANKS = "#9aa5b1", "#c2410c", "#0f766e", "#e5e7eb", "#374151", "#6d28d9"


def loss_curve(lines: Iterable[Mapping[str, Any]], title: str, best_step: int | None = None) -> str:
    """Training loss (thin, and smoothed), evaluation loss and the best checkpoint, over steps.

    Args:
        lines: lines of a log: ``{"step", "loss"}`` and ``{"step", "eval_loss"}``; others are passed over.
        title: headline of the picture.
        best_step: step whose checkpoint was kept.

    Returns:
        A complete SVG document; it says so where there is nothing to draw.
    """
    rows = list(lines)
    train = _points(rows, "loss")
    evaluated = _points(rows, "eval_loss")
    everything = train + evaluated
    body = [f'<text x="{LEFT}" y="28" font-size="16" fill="{INK}">{escape(title)}</text>']
    if not everything:
        body.append(f'<text x="{LEFT}" y="{HEIGHT // 2}" fill="{INK}">nothing was logged</text>')
        return document(body, WIDTH, HEIGHT)
    steps = ticks(min(x for x, _ in everything), max(x for x, _ in everything), 8, whole=True)
    losses = ticks(min(y for _, y in everything), max(y for _, y in everything), 6)
    place = _scale(steps, losses)
    body += _axes(steps, losses, place)
    body += _rank_marks(rows, place)
    if train:
        body.append(_line(train, place, TRAIN, 1, 0.6))
        body.append(_line(smooth(train), place, INK, 2))
    if evaluated:
        body.append(_line(evaluated, place, EVAL, 2))
        body += [f'<circle cx="{place(p)[0]:.1f}" cy="{place(p)[1]:.1f}" r="3" fill="{EVAL}"/>' for p in evaluated]
    chosen = [point for point in evaluated if point[0] == best_step]
    body += [
        f'<circle cx="{place(p)[0]:.1f}" cy="{place(p)[1]:.1f}" r="7" fill="none" stroke="{BEST}" stroke-width="2"/>'
        for p in chosen
    ]
    changed = [row for row in rows if "change" in row]
    legend = [
        (RANKS, "ranks changed", changed),
        (INK, "training loss", train),
        (EVAL, "evaluation loss", evaluated),
        (BEST, f"kept: step {best_step}", chosen),
    ]
    shown = [(color, text) for color, text, there in legend if there]
    for i, (color, text) in enumerate(shown):
        x = WIDTH - RIGHT - (140 if len(shown) < 4 else 122) * (len(shown) - i)
        body.append(f'<rect x="{x}" y="{HEIGHT - 14}" width="14" height="4" fill="{color}"/>')
        body.append(f'<text x="{x + 20}" y="{HEIGHT - 8}" font-size="12" fill="{INK}">{escape(text)}</text>')
    return document(body, WIDTH, HEIGHT)


def _rank_marks(rows: Sequence[Mapping[str, Any]], place: Any) -> list[str]:
    """A line at each step where ranks changed; with the mean rank of the changed sites, where there is room for a number."""
    parts, last = [], -math.inf
    for row in rows:
        if "change" not in row:
            continue
        x = place((float(row["step"]), 0.0))[0]
        ranks = [after for _, after in row.get("ranks", {}).values()]
        parts.append(
            f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}" stroke="{RANKS}" stroke-dasharray="4 3">'
            f"<title>step {row['step']}: {escape(str(row['change']))}</title></line>"
        )
        if ranks and x - last >= 44:
            parts.append(
                f'<text x="{x + 3:.1f}" y="{TOP + 10}" font-size="11" fill="{RANKS}">r {sum(ranks) / len(ranks):.3g}</text>'
            )
            last = x
    return parts


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    found = [(float(row["step"]), float(row[name])) for row in rows if name in row and "step" in row]
    return [point for point in found if math.isfinite(point[1])]


def _scale(steps: list[float], losses: list[float]) -> Any:
    def place(point: Point) -> Point:
        x = (point[0] - steps[0]) / (steps[-1] - steps[0])
        y = (point[1] - losses[0]) / (losses[-1] - losses[0])
        return LEFT + x * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y * (HEIGHT - TOP - BOTTOM)

    return place


def _axes(steps: list[float], losses: list[float], place: Any) -> list[str]:
    parts = []
    for loss in losses:
        y = place((steps[0], loss))[1]
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="{GRID}"/>')
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" font-size="12" text-anchor="end" fill="{INK}">{loss:.4g}</text>'
        )
    for step in steps:
        x = place((step, losses[0]))[0]
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" font-size="12" text-anchor="middle" fill="{INK}">{step:g}</text>'
        )
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 8}" font-size="12" fill="{INK}">optimizer steps</text>')
    return parts


def _line(points: list[Point], place: Any, color: str, width: int, opacity: float = 1.0) -> str:
    path = " ".join("{:.1f},{:.1f}".format(*place(point)) for point in points)
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}" stroke-opacity="{opacity}" stroke-linejoin="round"/>'
