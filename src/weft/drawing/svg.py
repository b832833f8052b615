"""Elements of SVG as text, and what every plot needs: round ticks, a smoothed line, fewer points than there are pixels."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any

__all__ = ["Point", "clean", "document", "element", "line", "number", "short", "smooth", "text", "thinned", "ticks"]

Point = tuple[float, float]

_UNSAFE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
_TURNS = re.compile("[\u202a-\u202e\u2066-\u2069]")
"""Marks that turn the direction of what follows, also of what is not theirs."""


def clean(value: object) -> str:
    """Text from data for HTML and SVG: escaped, without control characters, and unable to turn the text around it."""
    return escape(_TURNS.sub("\u2423", _UNSAFE.sub("\ufffd", str(value))), quote=True)


def number(value: float) -> str:
    """A coordinate or a small label: at most one decimal place, none where it is whole."""
    return f"{value:.1f}".removesuffix(".0")


def short(value: float) -> str:
    """Two digits for people: 0.0031, 0.25, 12, 940, 27,000; beyond a million as a power."""
    return (
        f"{value:.2g}"
        if abs(value) < 99.5 or not math.isfinite(value)
        else f"{value:,.0f}"
        if abs(value) < 1e6
        else f"{value:.1e}"
    )


def element(name: str, content: str = "", *, title: str | None = None, **attributes: Any) -> str:
    """One element.

    Args:
        name: of the element.
        content: SVG or HTML that stands in it, as it is.
        title: shown when it is pointed at; escaped.
        attributes: ``_`` at the end of a name is dropped (``class_``), inside it is a hyphen; None leaves one out.
    """
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{number(value) if isinstance(value, float) else clean(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = (f"<title>{clean(title)}</title>" if title is not None else "") + content
    return f"<{name}{said}>{inside}</{name}>" if inside else f"<{name}{said}/>"


def text(
    x: float,
    y: float,
    said: object,
    *,
    size: int = 12,
    anchor: str | None = None,
    fill: str | None = None,
    **more: Any,
) -> str:
    """Text at a place; escaped."""
    return element("text", clean(said), x=float(x), y=float(y), font_size=size, text_anchor=anchor, fill=fill, **more)


def line(points: Sequence[Point], **attributes: Any) -> str:
    """A polyline."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return element("polyline", points=path, fill="none", stroke_linejoin="round", **attributes)


def document(
    body: Sequence[str], width: float, height: float, *, size: str = "", font: str = "system-ui, sans-serif"
) -> str:
    """A complete SVG on white, to be read by itself.

    Args:
        body: its elements.
        width, height: of the view box. size: further attributes of the root, as ``width="720"``.
        font: the family.
    """
    more = f" {size}" if size else ""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"{more} font-family="{font}">'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="white"/>', *body, "</svg>"]) + "\n"


def ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Round numbers that enclose the range."""
    span = max(high - low, 1.0 if whole else abs(high) * 0.01 or 0.01)
    unit = 10 ** math.floor(math.log10(span / most))
    step = next(unit * factor for factor in (1, 2, 5, 10, 20) if span / (unit * factor) <= most)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step), math.ceil(high / step)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def smooth(points: Sequence[Point], keep: float = 0.85) -> list[Point]:
    """Exponential mean with its start corrected."""
    smoothed, mean, weight = [], 0.0, 0.0
    for x, y in points:
        mean, weight = keep * mean + (1 - keep) * y, keep * weight + (1 - keep)
        smoothed.append((x, mean / weight))
    return smoothed


def thinned(points: Sequence[Point], most: int = 500) -> list[Point]:
    """At most ``most`` points that look the same: of each stretch the lowest and the highest, in their order."""
    if len(points) <= most:
        return list(points)
    stretch = 2 * len(points) / most
    found: list[Point] = []
    for index in range(most // 2):
        part = points[int(index * stretch) : int((index + 1) * stretch)]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])} if part else set()
        found += sorted(ends)
    return found
