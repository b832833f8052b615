"""Who trains on what: files, columns, mappings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from weft.data import load_examples
from weft.errors import DataError
from weft.many.shares import shares

ROWS = [
    {"prompt": f"p{i}", "completion": f"c{i}", "user": name} for i, name in enumerate(["ann", "bob", "ann", 7, "bob"])
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("ann", "bob"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "p", "completion": name}) + "\n")
    (tmp_path / "all.json").write_text(json.dumps(ROWS))
    return tmp_path


def test_one_user_a_file(folder: Path) -> None:
    found = shares([folder / "ann.jsonl", folder / "bob.jsonl"], 0.1)
    assert [(share.name, share.eval_data) for share in found] == [("ann", 0.1), ("bob", 0.1)]
    by_pattern = shares(str(folder / "*.jsonl"))
    assert [share.name for share in by_pattern] == ["ann", "bob"]
    assert load_examples(by_pattern[1].data)[0]["completion"] == "bob"


def test_files_of_one_stem_are_told_apart(tmp_path: Path) -> None:
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "train.jsonl").write_text("{}\n")
    (tmp_path / "c.jsonl.gz").write_bytes(b"")
    found = shares([tmp_path / "a/train.jsonl", tmp_path / "b/train.jsonl", tmp_path / "c.jsonl.gz"])
    assert [share.name for share in found] == ["a/train.jsonl", "b/train.jsonl", "c"]


def test_rows_by_a_column_know_where_they_stand(folder: Path) -> None:
    found = shares(folder / "all.json", by="user")
    assert [share.name for share in found] == ["ann", "bob", "7"]
    examples = load_examples(found[1].data)
    assert [row["prompt"] for row in examples] == ["p1", "p4"]
    assert "all.json, row 5" in examples.where(1)
    assert "ignored" not in examples.summary(), "the column itself is no surprise"
    assert [share.name for share in shares(ROWS, by="user")] == ["ann", "bob", "7"]


def test_evaluation_data_by_name(folder: Path) -> None:
    held = [{"prompt": "q", "completion": "a", "user": "bob"}]
    found = {share.name: share.eval_data for share in shares(ROWS, held, by="user")}
    assert found["ann"] is None
    assert len(load_examples(found["bob"])) == 1
    mapped = shares({"ann": ROWS, "bob": ROWS}, {"ann": held})
    assert [share.eval_data for share in mapped] == [held, None]


@pytest.mark.parametrize(
    ("data", "held", "by", "message"),
    [
        (None, None, None, "no training data"),
        ([], None, None, "the list is empty"),
        ("no/such*.jsonl", None, None, "no file matches"),
        (ROWS, None, None, "expected paths"),
        (ROWS, None, "usr", "Did you mean 'user'"),
        ([*ROWS, {"prompt": "x", "completion": "y"}], None, "user", "row 6.*nobody knows whose"),
        ([{**ROWS[0], "user": [1]}], None, "user", "nobody knows whose"),
        ({"a": ROWS}, None, "user", "mapping from names already"),
        ({1: ROWS}, None, None, "not the name of a user"),
        ({"ann": ROWS}, {"anne": ROWS}, None, "Did you mean 'ann'"),
    ],
)
def test_what_can_not_be_parted(data: object, held: object, by: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        shares(data, held, by)
