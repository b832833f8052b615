"""Printing: sizes, wrapped values, JSON that every program reads, one voice among several processes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from weft.cli import show
from weft.cli.options import Usage, columns_of


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1500, "1.5 kB"),
        (216_000, "216 kB"),
        (8_000_000, "8.0 MB"),
        (14e9, "14.0 GB"),
        (2e12, "2,000 GB"),
    ],
)
def test_size(count: float, text: str) -> None:
    assert show.size(int(count)) == text


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    show.as_json({"a": math.nan, "b": [math.inf, 1.5], "c": Path("x"), "d": ("é", None, True)})
    assert json.loads(capsys.readouterr().out) == {"a": "nan", "b": ["inf", 1.5], "c": "x", "d": ["é", None, True]}


def test_long_values_stand_beside_their_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    show.pairs([("name", "word " * 30), ("n", "short"), ("", "two\nlines")], lines=3)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 40
    assert lines[0].startswith("name  word")
    assert lines[2].endswith(" …")
    assert lines[3:] == ["n     short", "      two", "      lines"]


def test_a_table_keeps_its_width(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    show.table([("site", "left"), ("[n]", "right")], [("model.layers.*." * 6, "[red]5")])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 60
    assert "[red]5" in text  # never read as markup
    assert "\x1b" not in text


def test_only_the_first_process_speaks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    show.result("a")
    show.remark("b")
    show.piece("c")
    show.as_json({})
    show.heading("1", "d")
    show.table([("e", "left")], [("f",)])
    assert capsys.readouterr() == ("", "")


def test_a_command_can_be_typed() -> None:
    assert show.command("weft", "generate", "it's", None) == "weft generate 'it'\"'\"'s'"


def test_columns() -> None:
    assert columns_of(["prompt=q, completion=a b", "label=c"]) == {"prompt": "q", "completion": "a b", "label": "c"}
    assert columns_of(None) is None
    for wrong in ("prompt", "=q", "prompt=", "prompt=a,prompt=b"):
        with pytest.raises(Usage):
            columns_of([wrong])
