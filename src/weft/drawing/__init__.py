"""Pictures and pages out of nothing but text: SVG elements, ticks and scales, grids of sites, one HTML page.

Knows numbers and names, not what they mean. Every text goes in escaped.
"""

from weft.drawing.grid import axes_of, place_of
from weft.drawing.page import html_page
from weft.drawing.svg import clean, document, element, line, number, short, smooth, text, thinned, ticks

__all__ = [
    "axes_of",
    "clean",
    "document",
    "element",
    "html_page",
    "line",
    "number",
    "place_of",
    "short",
    "smooth",
    "text",
    "thinned",
    "ticks",
]
