"""What is seen while a run goes on."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest

import weft
from weft.train.progress import counter
from weft.train.recipe import Recipe

RECIPE = Recipe(max_steps=4, learning_rate=1e-2, eval_every=2, spec=weft.LoraSpec(rank=2))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_say_what_was_recognised_and_chosen(
    tmp_path: Path, base_dir: Path, task: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    weft.train(
        base=base_dir,
        data=task[0],
        eval_data=task[1],
        recipe=RECIPE.replace(learning_rate=None),
        out=tmp_path / "run",
        progress=True,
    )
    said = capsys.readouterr()
    assert said.out == ""
    for part in (
        "32 examples",
        "prompt, completion",
        "numbers to train; 4 steps",
        "x full fine-tuning's",
        "step 4/4: loss",
        "tokens/s",
        "s left",
        "eval loss",
    ):
        assert part in said.err, part


def test_silence(tmp_path: Path, base_dir: Path, task: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    weft.train(base=base_dir, data=task[0], eval_data=task[1], recipe=RECIPE, out=tmp_path / "run", progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_with_loss_speed_and_time_left(
    tmp_path: Path, base_dir: Path, task: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    weft.train(base=base_dir, data=task[0], eval_data=task[1], recipe=RECIPE, out=tmp_path / "run")
    shown = terminal.getvalue()
    for part in ("training", "4/4", "loss", "tokens/s", "left"):
        assert part in shown, part
    assert re.search(r"\d:\d\d:\d\d", shown)
    with counter("answers", 3, None) as tick:
        tick(3)
    assert "3/3" in terminal.getvalue()
