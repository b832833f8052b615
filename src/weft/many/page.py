"""report.html: one page, no network; a row an adapter, sortable, failed ones first.

Every text that came from data is escaped. Knows the report, not how it came about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from weft.drawing import html_page
from weft.many.report import ManyReport, losses_of

__all__ = ["page", "sparkline"]

WIDTH, HEIGHT = 96, 26

_COLUMNS = (
    ("adapter", "text"), ("status", "text"), ("examples", "number"), ("tokens", "number"), ("steps", "number"),
    ("training loss", "number"), ("before", "number"), ("after", "number"), ("change", "number"), ("rank", "number"),
    ("learning rate", "number"), ("remarks", "text"),
)  # fmt: skip

_STATUS = {"end": "done", "early": "stopped early", "halved": "given up", "failed": "failed"}

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --paper: #fff; --good: #0f766e; --bad: #b91c1c; --mark: #fef2f2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --soft: #9ca3af; --line: #374151; --paper: #111827; --good: #5eead4; --bad: #fca5a5; --mark: #3b1d1d; } }
body { font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto; max-width: 1600px; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } p { color: var(--soft); margin: .15rem 0; }
.scroll { overflow-x: auto; margin-top: 1.25rem; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .45rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: middle; white-space: nowrap; }
th { position: sticky; top: 0; background: var(--paper); font-weight: 600; } th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--good); }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
td.number, th.number { text-align: right; } td.name { max-width: 13rem; overflow: hidden; text-overflow: ellipsis; } td.remarks { white-space: normal; min-width: 15rem; color: var(--soft); }
tr.failed td { background: var(--mark); } tr.failed .state { color: var(--bad); font-weight: 600; } .good { color: var(--good); } .bad { color: var(--bad); }
pre { overflow-x: auto; } a { color: inherit; } svg { display: block; } input { font: inherit; padding: .3rem .5rem; margin-top: 1rem; width: 16rem; }
"""

_SCRIPT = """
const table = document.querySelector("table"), body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
const rows = [...body.rows], value = (row, at) => { const cell = row.cells[at], key = cell.dataset.key; return key === undefined ? cell.textContent : key; };
heads.forEach((head, at) => head.querySelector("button").addEventListener("click", () => {
  const up = head.getAttribute("aria-sort") !== "ascending", numbers = head.classList.contains("number");
  heads.forEach(other => other.removeAttribute("aria-sort")); head.setAttribute("aria-sort", up ? "ascending" : "descending");
  rows.sort((a, b) => { let x = value(a, at), y = value(b, at);
    if (numbers) { if (x === "" || y === "") return (x === "") - (y === ""); return up ? x - y : y - x; }
    return up ? x.localeCompare(y) : y.localeCompare(x); });
  body.append(...rows); }));
document.querySelector("input").addEventListener("input", event => { const text = event.target.value.toLowerCase();
  rows.forEach(row => row.hidden = !row.textContent.toLowerCase().includes(text)); });
"""


def page(report: ManyReport, title: str, picture: str = "", table: str = "") -> str:
    """The page.

    Args:
        report: its rows are shown in their order.
        title: headline, the run's name.
        picture: an SVG to show above the rows; table: plain text beside it.
    """
    failed = len(report.failed)
    speed = report.tokens / report.seconds if report.seconds else 0.0
    facts = [
        f"{len(report.rows):,} adapters, {failed:,} failed; {report.tokens:,} tokens in {report.seconds:,.0f} s ({speed:,.0f} tokens/s); "
        f"{report.rounds:,} rounds with up to {report.slots} adapters at once",
        "Losses are nats a token on each adapter's own evaluation data, without and with the adapter; without evaluation data, the training loss at first and at last.",
        *report.notes,
    ]
    heads = "".join(f'<th class="{kind}"><button type="button">{escape(name)}</button></th>' for name, kind in _COLUMNS)
    body = "\n".join(_row(row) for row in report.rows)
    said = (
        f"<h1>{escape(title)}</h1>\n"
        + "\n".join(f"<p>{escape(fact)}</p>" for fact in facts)
        + (f"\n{picture}" if picture else "")
        + (f"\n<pre>{escape(table)}</pre>" if table else "")
        + '\n<input type="search" placeholder="filter" aria-label="filter rows">'
        + f'\n<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>\n{body}\n</tbody></table></div>\n'
    )
    return html_page(title, _STYLE, said, script=_SCRIPT)


def _row(row: Mapping[str, Any]) -> str:
    before, after = losses_of(row)
    change = after - before if _known(before) and _known(after) else None  # type: ignore[operator]
    failed = row["status"] == "failed"
    name = escape(str(row["name"]))
    link = name if failed else f'<a href="{quote(str(row["folder"]))}/report.md">{name}</a>'
    remarks = [row["reason"]] if row["reason"] else []
    remarks += row["warnings"]
    shade = "" if change is None or failed else "good" if change < 0 else "bad"
    cells = [
        f'<td class="name" title="{name}" data-key="{name}">{link}</td>',
        f'<td class="state" data-key="{0 if failed else 1}{escape(row["status"])}">{_STATUS.get(row["status"], escape(row["status"]))}</td>',
        _cell(row["examples"], f"{row['examples']:,}"), _cell(row["tokens"], f"{row['tokens']:,}"), _cell(row["steps"], f"{row['steps']:,}"),
        f'<td class="number" data-key="{_key(row.get("last_loss"))}">{sparkline(row["curve"])}</td>',
        _cell(before, _loss(before)), _cell(after, _loss(after)), _cell(change, "" if change is None else f"{change:+.4f}", shade),
        _cell(row.get("rank"), str(row.get("rank") or "")), _cell(row.get("learning_rate"), f"{row['learning_rate']:.2g}" if row.get("learning_rate") else ""),
        f'<td class="remarks">{escape("; ".join(remarks))}</td>',
    ]  # fmt: skip
    return f"<tr{' class=failed' if failed else ''}>{''.join(cells)}</tr>"


def sparkline(points: Sequence[Sequence[float]]) -> str:
    """A loss curve in the size of a word, as inline SVG; nothing where there is nothing to draw."""
    points = [(float(x), float(y)) for x, y in points if math.isfinite(float(y))]
    if len(points) < 2:
        return ""
    left, right = points[0][0], points[-1][0]
    low, high = min(y for _, y in points), max(y for _, y in points)
    wide, tall = max(right - left, 1e-9), max(high - low, 1e-9)
    places = [(3 + (x - left) / wide * (WIDTH - 6), 3 + (high - y) / tall * (HEIGHT - 6)) for x, y in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    label = f"training loss from {points[0][1]:.3f} to {points[-1][1]:.3f}"
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}"><title>{label}</title>'
        f'<polyline points="{path}" fill="none" stroke="currentColor" stroke-width="1.4" stroke-linejoin="round"/>'
        f'<circle cx="{places[-1][0]:.1f}" cy="{places[-1][1]:.1f}" r="2" fill="currentColor"/></svg>'
    )


def _known(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _key(value: Any) -> str:
    return f"{value}" if _known(value) else ""


def _loss(value: Any) -> str:
    return f"{value:.4f}" if _known(value) else "" if value is None else escape(str(value))


def _cell(value: Any, text: str, shade: str = "") -> str:
    return f'<td class="number {shade}" data-key="{_key(value)}">{text}</td>'
