"""docs/results.md from the figures of all parts: written by the command, never by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["write"]

_HEAD = """# Results on real weights

Written by `make results`; do not edit. Every figure is on held-out data.
"""


def write(path: Path, folder: Path) -> None:
    """Write the page from docs/results/*.json."""
    parts = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    path.write_text("\n".join([_HEAD, *(_part(part) for part in parts)]), encoding="utf-8")


def _part(part: dict[str, Any]) -> str:
    lines = [
        f"## {part['title']}\n",
        f"{part['settings']}.\n",
        _row(part["columns"]),
        _row(["---"] * len(part["columns"])),
    ]
    lines += [_row(row) for row in part["rows"]]
    if "picture" in part:
        lines += ["", f"![{part['title']}]({part['picture']})", "", part.get("caption", "")]
    for example in part.get("examples", []):
        lines += ["", "```", *(f"{name}: {value}" for name, value in example.items()), "```"]
    return "\n".join([*lines, ""])


def _row(cells: list[Any]) -> str:
    shown = (f"{cell:.4g}" if isinstance(cell, float) else "" if cell is None else _inline(str(cell)) for cell in cells)
    return f"| {' | '.join(shown)} |"


def _inline(text: str) -> str:
    """Text in a cell of a table: no line break, no bar."""
    return text.replace("\n", " / ").replace("|", "\\|")
