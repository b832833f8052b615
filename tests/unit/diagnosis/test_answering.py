"""Runs that answer by themselves: back to the last good checkpoint, half of the learning rate, and on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import weft
from tests.unit.diagnosis.support import GOOD, KNOWN, KNOWN_HELD
from tests.unit.train.support import same
from weft.errors import NotFiniteError
from weft.train import answering
from weft.train.answering import MOST
from weft.train.run import Folder

ACT = GOOD | {"on_trouble": "act", "learning_rate": 0.16, "warmup_steps": 10, "eval_every": 5, "patience": 0}
Given = dict[str, Any]


@pytest.fixture(scope="module")
def given(skilled: tuple[nn.Module, Any]) -> Given:
    return {"base": skilled, "data": KNOWN, "eval_data": KNOWN_HELD, "progress": False}


@pytest.fixture(scope="module")
def answered(given: Given, tmp_path_factory: pytest.TempPathFactory) -> weft.Run:
    return weft.train(**given, recipe=weft.Recipe.from_dict(ACT), out=tmp_path_factory.mktemp("act") / "run")


def plain(run: weft.Run) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if "second" not in key and "runtime" not in key} for row in run.log
    ]


def test_it_goes_back_halves_the_rate_and_says_so(answered: weft.Run) -> None:
    rows = [row for row in answered.log if row.get("of") == "trouble"]
    assert 1 <= len(rows) <= MOST
    assert [row["factor"] for row in rows] == [0.5**time for time in range(1, len(rows) + 1)]
    assert all(row["seen"] > row["step"] for row in rows)
    lines = {row["step"]: row["learning_rate"] for row in answered.log if "of" not in row and "loss" in row}
    assert sorted(lines) == list(range(1, 41)), "one line a step: what was taken back is gone"
    peak = ACT["learning_rate"]
    last = rows[-1]["step"]
    for step, rate in lines.items():
        if step > last:
            assert rate <= peak * rows[-1]["factor"] * 1.0001
    said = {item.rule: item for item in weft.diagnose(answered.path)}
    assert said["rolled-back"].severity == "medium"
    assert "rolled-back" in answered.report.text()
    assert (answered.path / "report.md").read_text().count("went back to a checkpoint") == 1


def test_it_is_deterministic(answered: weft.Run, given: Given, tmp_path: Path) -> None:
    again = weft.train(**given, recipe=weft.Recipe.from_dict(ACT), out=tmp_path / "run")
    assert same(again.adapter, answered.adapter)
    assert plain(again) == plain(answered)


def test_without_it_the_run_is_worse_than_its_base(answered: weft.Run, given: Given, tmp_path: Path) -> None:
    """The same recipe left alone; that the answered one is better is what the answer is for."""
    recipe = weft.Recipe.from_dict(ACT | {"on_trouble": "say", "best": False})
    alone = weft.train(**given, recipe=recipe, out=tmp_path / "run")
    assert "worse-than-base" in {item.rule for item in weft.diagnose(alone.path)}
    assert answered.report.adapter["loss"] < alone.report.adapter["loss"]


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_killed_while_it_goes_back(
    answered: weft.Run, given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Before anything is taken back, between checkpoints and log, and after: resumed, it is the run without the break."""

    class Killed(BaseException):
        pass

    def die(*args: Any, **kwargs: Any) -> Any:
        raise Killed

    go_back, write = answering.go_back, answering.write_beside

    def died(*args: Any, **kwargs: Any) -> Any:
        go_back(*args, **kwargs)
        raise Killed

    recipe = weft.Recipe.from_dict(ACT)
    with monkeypatch.context() as patch:
        if moment == "between":
            patch.setattr(answering, "write_beside", die)
        else:
            patch.setattr("weft.train.session.go_back", die if moment == "before" else died)
        with pytest.raises(Killed):
            weft.train(**given, recipe=recipe, out=tmp_path / "run")
    assert answering.write_beside is write
    resumed = weft.train(
        base=given["base"], data=KNOWN, eval_data=KNOWN_HELD, out=tmp_path / "run", resume=True, progress=False
    )
    assert same(resumed.adapter, answered.adapter)
    assert plain(resumed) == plain(answered)


def test_not_finite_is_answered_until_it_is_enough(given: Given, tmp_path: Path) -> None:
    """A rate that three halves don't make good ends with the error, and a log that says what was tried."""
    fields = {"learning_rate": 1e25, "optimizer": "sgd", "clip": 0.0, "warmup_steps": 20, "on_trouble": "act"}
    with pytest.raises(NotFiniteError, match="loss is"):
        weft.train(**given, recipe=weft.Recipe.from_dict(GOOD | fields), out=tmp_path / "run")
    rows = [row for row in Folder(tmp_path / "run").read_log() if row.get("of") == "trouble"]
    assert len(rows) == MOST
    assert {row["rule"] for row in rows} == {"not-finite"}
    said = {item.rule for item in weft.diagnose(tmp_path / "run")}
    assert {"not-finite", "rolled-back"} <= said


@pytest.mark.slow
def test_kill_minus_nine(answered: weft.Run, given: Given, tmp_path: Path) -> None:
    """A real one, at the first step after it went back."""
    code = (
        "import os, signal, sys\n"
        "import weft\n"
        "from pathlib import Path\n"
        "from weft.train import session\n"
        "from tests.unit.diagnosis.support import KNOWN, KNOWN_HELD\n"
        "go_back = session.go_back\n"
        "def killed(*args):\n"
        "    go_back(*args)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "session.go_back = killed\n"
        "weft.train(base=sys.argv[1], data=KNOWN, eval_data=KNOWN_HELD, recipe=weft.Recipe.load(sys.argv[2]), out=sys.argv[3], progress=False)\n"
    )
    model, tokenizer = given["base"]
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    weft.Recipe.from_dict(ACT).save(tmp_path / "recipe.yaml")
    source = str(Path(weft.__file__).parents[1])
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "base"), str(tmp_path / "recipe.yaml"), str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([source, root])}, timeout=200, check=False, capture_output=True,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    resumed = weft.train(
        base=tmp_path / "base", data=KNOWN, eval_data=KNOWN_HELD, out=tmp_path / "run", resume=True, progress=False
    )
    assert same(resumed.adapter, answered.adapter)
