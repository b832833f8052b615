"""The picture of the sweeps of ranks: held-out loss over the lowest of the task, a line a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from weft.drawing import document

__all__ = ["plot"]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 64, 210, 44, 52
COLORS = ("#0f766e", "#c2410c", "#1d4ed8", "#a21caf", "#65a30d", "#111827")
INK, GRID = "#374151", "#e5e7eb"
CEILING = 20.0


def plot(curves: Mapping[str, Mapping[int, float]], advised: Mapping[str, int], best: Mapping[str, int]) -> str:
    """An SVG document.

    Args:
        curves: by task, by rank: mean loss. advised, best: rank by task; a ring is the advice, a square the best.
    """
    ranks = sorted({rank for curve in curves.values() for rank in curve})

    def x(rank: int) -> float:
        return LEFT + ranks.index(rank) / max(1, len(ranks) - 1) * (WIDTH - LEFT - RIGHT)

    def y(percent: float) -> float:
        return HEIGHT - BOTTOM - min(percent, CEILING) / CEILING * (HEIGHT - TOP - BOTTOM)

    body = [
        f'<text x="{LEFT}" y="26" font-size="16" fill="{INK}">Held-out loss above the lowest of the sweep, in %</text>'
    ]
    for percent in range(0, int(CEILING) + 1, 5):
        shown = f"{percent}" if percent < CEILING else f"≥ {percent}"
        body.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(percent):.1f}" y2="{y(percent):.1f}" stroke="{GRID}"/>'
        )
        body.append(
            f'<text x="{LEFT - 8}" y="{y(percent) + 4:.1f}" font-size="12" text-anchor="end" fill="{INK}">{shown}</text>'
        )
    for rank in ranks:
        body.append(
            f'<text x="{x(rank):.1f}" y="{HEIGHT - BOTTOM + 20}" font-size="12" text-anchor="middle" fill="{INK}">{rank}</text>'
        )
    body.append(
        f'<text x="{LEFT}" y="{HEIGHT - 10}" font-size="12" fill="{INK}">rank; square: the best, ring: what weft recommends</text>'
    )
    for number, (name, curve) in enumerate(curves.items()):
        body += _curve(number, name, curve, advised[name], best[name], (x, y))
    return document(body, WIDTH, HEIGHT)


def _curve(number: int, name: str, curve: Mapping[int, float], advised: int, best: int, places: Sequence) -> list[str]:  # type: ignore[type-arg]
    x, y = places
    color, lowest = COLORS[number % len(COLORS)], min(curve.values())
    above = {rank: 100 * (loss / lowest - 1) for rank, loss in sorted(curve.items())}
    path = " ".join(f"{x(rank):.1f},{y(percent):.1f}" for rank, percent in above.items())
    parts = [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>']
    parts += [
        f'<circle cx="{x(rank):.1f}" cy="{y(percent):.1f}" r="3" fill="{color}"/>' for rank, percent in above.items()
    ]
    if advised in above:
        parts.append(
            f'<circle cx="{x(advised):.1f}" cy="{y(above[advised]):.1f}" r="{8 + 2 * number}" fill="none" stroke="{color}" stroke-width="2"/>'
        )
    left, top = x(best) - 6, y(above[best]) - 6
    parts.append(
        f'<rect x="{left:.1f}" y="{top:.1f}" width="12" height="12" fill="none" stroke="{color}" stroke-width="2"/>'
    )
    place = TOP + 20 * number
    parts.append(f'<rect x="{WIDTH - RIGHT + 24}" y="{place - 4}" width="14" height="4" fill="{color}"/>')
    parts.append(f'<text x="{WIDTH - RIGHT + 46}" y="{place + 2}" font-size="12" fill="{INK}">{escape(name)}</text>')
    return parts
