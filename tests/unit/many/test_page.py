"""The report's page: everything in one file, and nothing of the data is taken for markup."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from weft.many.page import page, sparkline
from weft.many.report import ManyReport

HOSTILE = "<script>alert(1)</script>\"'&\u202e"


def row(name: str, status: str = "end", **more: Any) -> dict[str, Any]:
    return {
        "name": name, "folder": "x", "status": status, "reason": "", "warnings": [], "examples": 3, "tokens": 50, "steps": 4, "base": {"loss": 2.0},
        "adapter": {"loss": 1.5}, "curve": [[1, 2.0], [2, 1.5]], "rank": 4, "learning_rate": 1e-3, "first_loss": 2.0, "last_loss": 1.5, **more,
    }  # fmt: skip


class Outline(HTMLParser):
    """Which tags there are, whether they are closed in order, and the text of all cells."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.cells: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "input", "polyline", "circle", "rect", "line"):
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("polyline", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.cells[-1] += data


def test_names_and_reasons_of_the_data_are_text() -> None:
    rows = [
        row(HOSTILE, "failed", reason=HOSTILE, folder=HOSTILE, adapter={}, base={}, curve=[]),
        row(HOSTILE, warnings=[HOSTILE], folder="a b/<c>"),
    ]
    outline = Outline()
    outline.feed(page(ManyReport(tuple(rows), 100, 2.0, 4, 8, (HOSTILE,)), HOSTILE))
    assert outline.open == []
    assert outline.tags.count("script") == 1, "only the page's own"
    assert outline.tags.count("tr") == 3
    assert outline.cells.count(HOSTILE) == 4
    assert all(not link.startswith(("http", "//")) for link in outline.links), "no network"
    assert outline.links == ["a%20b/%3Cc%3E/report.md"], "what failed has no report to go to"


def test_numbers_that_are_none_are_shown_as_what_they_are() -> None:
    rows = [
        row("a", adapter={"loss": "nan"}, base={"loss": 2.0}),
        row("b", adapter={}, base={}, first_loss=None, last_loss=None, curve=[]),
    ]
    outline = Outline()
    outline.feed(page(ManyReport(tuple(rows)), "x"))
    assert "nan" in outline.cells
    assert "-0.5000" not in outline.cells


def test_a_sparkline_is_as_large_as_a_word() -> None:
    assert sparkline([]) == sparkline([[1, 2.0]]) == sparkline([[1, float("nan")], [2, float("inf")]]) == ""
    picture = sparkline([[step, 2.0 / step] for step in range(1, 200)])
    assert "training loss from 2.000 to 0.010" in picture
    assert "nan" not in sparkline([[1, 1.0], [2, 1.0]])
