"""Names out of data become folders that are safe on any file system."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.many.names import LONGEST, folder_names

HOSTILE = [
    "../x", "..", ".", "", "/etc/passwd", "a/b", "a\\b", "a:b", "CON", "con.txt", "nul", "-rf", ".hidden", "x" * 500, "日" * 300, "a\0b",
    "a\nb", "ｅ", "e\u0301", "é", "É", "\ud800", "a b", "a_b", "report.html", "Report.HTML", "🙂", "‮abc",
]  # fmt: skip


def check(names: list[str], found: dict[str, str], reserved: tuple[str, ...] = ()) -> None:
    assert list(found) == names
    folders = [folder.casefold() for folder in found.values()]
    assert len(set(folders)) == len(names), "two users in one folder"
    for folder in found.values():
        assert folder
        assert Path(folder).name == folder
        assert not set(folder) & set('/\\:*?"<>|\0\n')
        assert folder[0] not in ".-"
        assert folder[-1] not in ". "
        assert len(folder.encode()) <= LONGEST
        assert folder.casefold() not in {name.casefold() for name in reserved}


def test_hostile_names() -> None:
    found = folder_names(HOSTILE, ["report.html", "checkpoints"])
    check(HOSTILE, found, ("report.html", "checkpoints"))
    assert found["a_b"] == "a_b", "a name that is safe stays as it is, whatever else there is"


@given(st.lists(st.text(), unique=True, max_size=20))
def test_any_names(names: list[str]) -> None:
    found = folder_names(names, ["users.json"])
    check(names, found, ("users.json",))
    assert folder_names(names[::-1], ["users.json"]) == found, "the order doesn't matter"


@pytest.mark.parametrize(
    ("name", "folder"),
    [("alice", "alice"), ("First Citizen", "First_Citizen"), ("../x", "x"), ("Zoë.2", "Zoë.2"), ("王", "王")],
)
def test_harmless_names_are_readable(name: str, folder: str) -> None:
    assert folder_names([name]) == {name: folder}
