"""Runs with two towers that really have the fault that a rule is about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import weft
from tests.unit.train.test_pairs import RECIPE, bases, rows
from weft.diagnosis import Finding, Record, examine

WATCHED = RECIPE.replace(max_steps=12, eval_every=None, log_every=1, best=False)


def found_in(out: Path, recipe: weft.Recipe = WATCHED, data: Any = None, towers: Any = None) -> dict[str, Finding]:
    run = weft.train(base=towers or bases(), data=data or rows(32), recipe=recipe, out=out, progress=False)
    return {item.rule: item for item in examine(Record(run.log, {"steps": recipe.max_steps}, ended=True))}


def test_a_healthy_run_has_neither(tmp_path: Path) -> None:
    assert not found_in(tmp_path / "run").keys() & {"tower-vanishing", "collapse"}


def test_a_tower_whose_units_are_saturated(tmp_path: Path) -> None:
    towers = bases()
    words = towers["text_model"][0]
    with torch.no_grad():
        words.mix.bias.copy_(torch.tensor([30.0, -30.0]).repeat(3))
    found = found_in(tmp_path / "run", towers=towers)["tower-vanishing"]
    assert "text_model" in found.evidence
    assert "two_tower.text_model.frozen" in found.advice
    assert found.numbers["norm"] < 1e-3 * found.numbers["largest"]


def test_a_tower_whose_units_are_dead(tmp_path: Path) -> None:
    towers = bases()
    with torch.no_grad():
        towers["vision_model"][0].conv2.bias.fill_(-1e3)
    found = found_in(tmp_path / "run", towers=towers)
    assert "vision_model" in found["tower-vanishing"].evidence
    assert "images" in found["collapse"].evidence
    assert found["collapse"].severity == "high"


def test_embeddings_that_fall_together_while_they_learn(tmp_path: Path) -> None:
    """A learning rate that throws all images to one side."""
    recipe = WATCHED.replace(learning_rate=1.0, clip=0, warmup_ratio=0.0, max_steps=20, schedule="constant")
    found = found_in(tmp_path / "run", recipe)
    assert found["collapse"].numbers["first"] > 0.02 > found["collapse"].numbers["spread"]
    assert found["collapse"].step is not None
