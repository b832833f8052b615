"""A matrix as a picture, drawn with nothing but text."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from weft.drawing import document

__all__ = ["heatmap"]

CELL, LEFT, TOP = 18, 150, 150
STOPS = ((13, 110, 100), (247, 247, 240), (170, 60, 20))


def heatmap(names: Sequence[str], matrix: Sequence[Sequence[float]]) -> str:
    """Values below 0 greenish, 0 pale, above 0 reddish; the scale ends at the 95th percentile of what is above 0."""
    above = sorted(value for row in matrix for value in row if value > 0)
    most = above[int(0.95 * (len(above) - 1))] if above else 1.0
    size = CELL * len(names)
    parts = []
    for row, values in enumerate(matrix):
        y = TOP + row * CELL
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + 13}" font-size="10" text-anchor="end" fill="#374151">{escape(names[row])}</text>'
        )
        for column, value in enumerate(values):
            title = f"{escape(names[row])} with {escape(names[column])}: {value:+.3f}"
            parts.append(
                f'<rect x="{LEFT + column * CELL}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" fill="{_color(value / most)}"><title>{title}</title></rect>'
            )
        parts.append(
            f'<rect x="{LEFT + row * CELL}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" fill="none" stroke="#111827"/>'
        )
    for column, name in enumerate(names):
        x = LEFT + column * CELL + 12
        parts.append(
            f'<text transform="translate({x},{TOP - 6}) rotate(-60)" font-size="10" fill="#374151">{escape(name)}</text>'
        )
    y = TOP + size + 24
    for index in range(81):
        share = -0.25 + 1.25 * index / 80
        parts.append(f'<rect x="{LEFT + index * 4}" y="{y}" width="4" height="10" fill="{_color(share)}"/>')
    for share in (-0.25, 0.0, 0.5, 1.0):
        x = LEFT + (share + 0.25) / 1.25 * 324
        parts.append(
            f'<text x="{x:.0f}" y="{y + 24}" font-size="10" text-anchor="middle" fill="#374151">{share * most:+.2f}</text>'
        )
    width, height = LEFT + size + 90, y + 40
    return document(parts, width, height, size=f'width="{width}"')


def _color(share: float) -> str:
    """-1 … 0 … 1 to green … pale … red."""
    share = max(-1.0, min(1.0, share))
    low, middle, high = STOPS
    end = high if share >= 0 else low
    return "#" + "".join(f"{round(a + (b - a) * abs(share)):02x}" for a, b in zip(middle, end, strict=True))
