"""The picture of a sweep, drawn with nothing but text: loss over one setting, a line for each value of the others.

Knows the table of a sweep only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from weft.drawing import document

__all__ = ["plot"]

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 44, 56
INK, GRID, SOFT = "#374151", "#e5e7eb", "#6b7280"
COLORS = ("#0f766e", "#c2410c", "#1d4ed8", "#a21caf", "#4d7c0f", "#b45309", "#0e7490", "#be123c")


def plot(table: Sequence[Mapping[str, Any]]) -> str:
    """An SVG document. Bars reach over nine of ten resamples; hollow points were given up before their end."""
    body = [f'<text x="{LEFT}" y="26" font-size="16" fill="{INK}">Loss on the evaluation rows</text>']
    if not table:
        return _picture([*body, f'<text x="{LEFT}" y="200" fill="{INK}">nothing was trained to an evaluation</text>'])
    across = _across(table)
    groups = _groups(table, across)
    places = _positions(table, across)
    low, high = _range(table)

    def y(loss: float) -> float:
        share = (min(max(loss, low), high) - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    body += _axes(places, across, low, high, y)
    for number, (name, rows) in enumerate(groups.items()):
        color = COLORS[number % len(COLORS)]
        points = sorted(((places[str(row["settings"][across])], row) for row in rows), key=lambda pair: pair[0])
        path = " ".join(f"{x:.1f},{y(row['loss']):.1f}" for x, row in points)
        body.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5" stroke-opacity="0.6"/>')
        for x, row in points:
            body.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y(row["low"]):.1f}" y2="{y(row["high"]):.1f}" stroke="{color}" stroke-width="1.2"/>'
            )
            fill = "white" if row["status"] == "halved" else color
            body.append(
                f'<circle cx="{x:.1f}" cy="{y(row["loss"]):.1f}" r="4" fill="{fill}" stroke="{color}" stroke-width="1.5"/>'
            )
        place = TOP + 18 * number
        body.append(f'<circle cx="{WIDTH - RIGHT + 24}" cy="{place}" r="4" fill="{color}"/>')
        body.append(
            f'<text x="{WIDTH - RIGHT + 34}" y="{place + 4}" font-size="12" fill="{INK}">{escape(name or across)}</text>'
        )
    best = table[0]
    x, top = places[str(best["settings"][across])], y(best["loss"])
    body.append(f'<circle cx="{x:.1f}" cy="{top:.1f}" r="9" fill="none" stroke="{INK}" stroke-width="1.5"/>')
    return _picture(body)


def _across(table: Sequence[Mapping[str, Any]]) -> str:
    """The setting on the x axis: numbers first, then the one with most values."""
    names = list(table[0]["settings"])
    values = {name: {str(row["settings"][name]) for row in table} for name in names}

    def worth(name: str) -> tuple[bool, int, bool]:
        column = [row["settings"][name] for row in table]
        return all(map(_is_number, column)), len(values[name]), any(isinstance(value, float) for value in column)

    found: str = max(names, key=worth)
    return found


def _groups(table: Sequence[Mapping[str, Any]], across: str) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in table:
        name = ", ".join(f"{key} {value}" for key, value in row["settings"].items() if key != across)
        found.setdefault(name, []).append(row)
    return dict(sorted(found.items(), key=lambda pair: [(len(part), part) for part in pair[0].split()]))


def _positions(table: Sequence[Mapping[str, Any]], across: str) -> dict[str, float]:
    """x by value: in their order, at even distances; many numbers by their logarithm."""
    raw = list({str(row["settings"][across]): row["settings"][across] for row in table}.values())
    numbers = all(_is_number(value) and value > 0 for value in raw)
    ordered = sorted(raw) if numbers else raw
    room = WIDTH - LEFT - RIGHT - 40
    if numbers and len(ordered) > 8:
        logs = [math.log(value) for value in ordered]
        span = max(logs[-1] - logs[0], 1e-9)
        return {str(value): LEFT + 20 + (log - logs[0]) / span * room for value, log in zip(ordered, logs, strict=True)}
    return {str(value): LEFT + 20 + (index + 0.5) * room / len(ordered) for index, value in enumerate(ordered)}


def _range(table: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Losses that are shown; those far above the middle are drawn at the upper edge."""
    finite = sorted(row["loss"] for row in table if math.isfinite(row["loss"]))
    if not finite:
        return 0.0, 1.0
    low = min(row["low"] for row in table if math.isfinite(row["low"]))
    middle = finite[len(finite) // 2]
    high = min(max(row["high"] for row in table if math.isfinite(row["high"])), low + 4 * max(middle - low, 1e-6))
    margin = 0.05 * max(high - low, 1e-6)
    return low - margin, high + margin


def _axes(places: Mapping[str, float], across: str, low: float, high: float, y: Any) -> list[str]:
    parts = []
    for index in range(5):
        loss = low + (high - low) * index / 4
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(loss):.1f}" y2="{y(loss):.1f}" stroke="{GRID}"/>')
        parts.append(
            f'<text x="{LEFT - 8}" y="{y(loss) + 4:.1f}" font-size="12" text-anchor="end" fill="{INK}">{loss:.4g}</text>'
        )
    shown = list(places.items())
    for name, x in shown if len(shown) <= 8 else [shown[0], shown[len(shown) // 2], shown[-1]]:
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" font-size="12" text-anchor="middle" fill="{INK}">{escape(name)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{HEIGHT - 14}" font-size="12" text-anchor="middle" fill="{SOFT}">{escape(across)}</text>'
    )
    return parts


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _picture(body: list[str]) -> str:
    return document(body, WIDTH, HEIGHT, size=f'width="{WIDTH}"')
