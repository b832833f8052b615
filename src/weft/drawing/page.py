"""An HTML page that needs no network: a head, a style, a body."""

from __future__ import annotations

from weft.drawing.svg import clean

__all__ = ["html_page"]


def html_page(title: str, style: str, body: str, *, script: str = "") -> str:
    """A complete page.

    Args:
        title: of the window; escaped.
        style, body, script: as they are; what comes from data is escaped by who made them.
    """
    run = f"<script>{script}</script>" if script else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{clean(title)}</title><style>{style}</style></head><body>\n{body}{run}</body></html>\n"
    )
