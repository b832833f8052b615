"""The picture of a comparison: one panel for each pair and measure, kinds of sites down, layers across. SVG, as text.

Knows what a `Comparison` holds, not how it came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from weft.drawing import axes_of, document, place_of

if TYPE_CHECKING:
    from weft.compose.comparing import Comparison, SiteComparison

__all__ = ["heat_map"]

INK, PALE, EMPTY = "#374151", "#6b7280", "#f3f4f6"
UNRELATED = 1 - 0.5**0.5
"""Conflict of two independent updates of one size."""
CELL_HEIGHT, GAP, TOP, HEAD, FOOT = 20, 28, 56, 40, 48
TITLES = {"cosine": "cosine", "overlap_in": "overlap, input", "overlap_out": "overlap, output", "conflict": "conflict"}
COLD, WARM, DEEP = (37, 99, 235), (194, 65, 12), (15, 118, 110)


def heat_map(found: Comparison) -> str:
    """A complete SVG document; every cell says its numbers when it is pointed at."""
    kinds, layers = axes_of([site.path for site in found.sites])
    left = 24 + max([7 * len(kind) for kind in kinds] or [0])
    cell = max(14, min(46, 300 // max(1, len(layers))))
    wide, high = cell * max(1, len(layers)), CELL_HEIGHT * max(1, len(kinds))
    width = left + len(TITLES) * (wide + GAP) + 8
    height = TOP + len(found.pairs) * (HEAD + high + FOOT) + 24
    body = [_text(16, 28, f"{len(found.names)} adapters, site by site", size=16)]
    scales = {name: _scale(found, name) for name in TITLES}
    for index, pair in enumerate(found.pairs):
        top = TOP + index * (HEAD + high + FOOT)
        body.append(_text(16, top + 4, f"{_short(pair[0])}  and  {_short(pair[1])}", size=13, bold=True))
        sites = found.of(pair)
        body += [
            _text(left - 8, top + HEAD + CELL_HEIGHT * row + 14, kind, size=11, anchor="end")
            for row, kind in enumerate(kinds)
        ]
        for column, name in enumerate(TITLES):
            x = left + column * (wide + GAP)
            body.append(_text(x, top + HEAD - 8, TITLES[name], size=12))
            if not column and len(layers) > 1:
                across = f"layers {layers[0]} to {[layer for layer in layers if layer][-1]} →"
                body.append(_text(left - 8, top + HEAD + high + 14, across, size=10, anchor="end", fill=PALE))
            body += _panel(sites, name, kinds, layers, (x, top + HEAD), cell, scales[name])
            body += _legend(name, scales[name], (x, top + HEAD + high + 6), wide)
    if not found.sites:
        body.append(_text(16, TOP + 20, "no site is in two of them"))
    said = f"conflict: what cancels when both are added; unrelated updates of one size: {UNRELATED:.2f}"
    body.append(_text(16, height - 12, said, size=10, fill=PALE))
    return document(body, width, height, size=f'width="{width}" height="{height}"', font="sans-serif")


def _panel(
    sites: Sequence[SiteComparison], name: str, kinds: list[str], layers: list[str], corner: tuple[float, float], cell: float,
    largest: float,
) -> list[str]:  # fmt: skip
    parts = [
        f'<rect x="{corner[0]}" y="{corner[1]}" width="{cell * len(layers)}" height="{CELL_HEIGHT * len(kinds)}" fill="{EMPTY}"/>'
    ]
    for site in sites:
        kind, layer = place_of(site.path)
        value = getattr(site, name)
        x, y = corner[0] + cell * layers.index(layer), corner[1] + CELL_HEIGHT * kinds.index(kind)
        said = f"{site.path}: cosine {site.cosine:.3f}, overlap in {site.overlap_in:.3f} (chance {site.chance_in:.3f}), " \
               f"out {site.overlap_out:.3f} (chance {site.chance_out:.3f}), conflict {site.conflict:.3f}"  # fmt: skip
        share = value / largest if largest else 0.0
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell - 1:.1f}" height="{CELL_HEIGHT - 1}" fill="{_colour(share, name)}">'
            f"<title>{escape(said)}</title></rect>"
        )
        if cell >= 32:
            ink = "white" if abs(share) > 0.55 else INK
            parts.append(_text(x + cell / 2, y + 13, f"{value:z.2f}", size=10, anchor="middle", fill=ink))
    return parts


def _scale(found: Comparison, name: str) -> float:
    """What has the full colour: the largest value; of conflict at least twice that of unrelated updates, which are no alarm."""
    largest = max((abs(getattr(site, name)) for site in found.sites), default=0.0) or 1.0
    return max(largest, 2 * UNRELATED) if name == "conflict" else largest


def _legend(name: str, largest: float, corner: tuple[float, float], wide: float) -> list[str]:
    low = -largest if name == "cosine" else 0.0
    steps, bar = 12, min(wide, 120)
    parts = [
        f'<rect x="{corner[0] + bar * step / steps:.1f}" y="{corner[1]}" width="{bar / steps + 0.5:.1f}" height="6" '
        f'fill="{_colour((low + (largest - low) * (step + 0.5) / steps) / largest, name)}"/>'
        for step in range(steps)
    ]
    ends = ((corner[0], "start", low), (corner[0] + bar, "end", largest))
    return parts + [
        _text(x, corner[1] + 17, f"{value:.2f}", size=10, anchor=side, fill=PALE) for x, side, value in ends
    ]


def _colour(share: float, name: str) -> str:
    """White for 0; for a cosine blue below it and orange above."""
    end = (WARM if share > 0 else COLD) if name == "cosine" else WARM if name == "conflict" else DEEP
    part = min(1.0, abs(share))
    return "#" + "".join(f"{round(255 + (channel - 255) * part):02x}" for channel in end)


def _short(name: str) -> str:
    return name if len(name) <= 60 else f"…{name[-58:]}"


def _text(
    x: float, y: float, text: str, *, size: int = 12, anchor: str = "start", fill: str = INK, bold: bool = False
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"{weight}>{escape(text)}</text>'
