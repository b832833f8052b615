"""``weft plan --data`` and ``--sites``: the advice, a recipe by site, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from weft.cli.app import run
from weft.train.recipe import Recipe


def _data(folder: Path) -> str:
    path = folder / "d.jsonl"
    rows = [{"prompt": f"What is {n} plus one? ", "completion": f"It is {n + 1}."} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


SHORT = ("--set", "layers=[0]", "--set", "batch_size=4", "--set", "max_length=32", "--brief", "--quiet")


def test_a_budget_by_site_becomes_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "r.yaml"
    assert run(["plan", "--data", _data(tmp_path), "--sites", "40KiB", "--save", str(saved), "--json", *SHORT]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [rule["name"] for rule in found["advice"]["rules"]] == ["thumb", "capacity", "spectrum"]
    ranks = found["sites"]["ranks"]
    spec = Recipe.load(saved).spec
    assert spec is not None
    assert {path: spec.rank_at(path) for path in ranks} == ranks
    assert found["sites"]["bytes"] <= 40 * 1024


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sites", "8MiB"], "--data"),
        (["--data", "DATA", "--sites", "8MiB", "--rank", "4"], "one of them"),
        (["--data", "DATA", "--sites", "8 elephants"], "unknown unit"),
        (["--data", "DATA", "--sites", "100"], "rank 1 at all 7 sites takes 12,800 bytes"),
        (["--data", "EMPTY"], "the file is empty"),
    ],
)
def test_what_is_wrong_is_said(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    named = {"DATA": _data(tmp_path), "EMPTY": str(tmp_path / "empty.jsonl")}
    assert run(["plan", *(named.get(option, option) for option in options), *SHORT]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert said in err
    assert "Traceback" not in err
