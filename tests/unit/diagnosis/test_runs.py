"""Each rule on a run that really has the fault; and a healthy run, on which none of high or medium severity speaks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weft
from tests.unit.diagnosis.support import GOOD, HELD, TRAIN, words
from weft.diagnosis import RULES, Finding
from weft.train.inputs import Features
from weft.train.run import Folder

Spoilt = Callable[[str], Path]


def found(path: Path) -> dict[str, Finding]:
    return {item.rule: item for item in weft.diagnose(path)}


def test_a_healthy_run(spoilt: Spoilt) -> None:
    said = weft.diagnose(spoilt("healthy"))
    assert [str(item) for item in said if item.severity != "low"] == []


@pytest.mark.parametrize(
    ("run", "rule", "severities"),
    [
        ("explosion", "loss-explosion", "high"),
        ("not-finite", "not-finite", "high"),
        ("low rate", "learning-rate-too-low", "medium"),
        ("low rate", "stagnation", "medium"),
        ("high rate", "learning-rate-too-high", "medium"),
        ("overfitting", "overfitting", "high medium"),
        ("clipped", "always-clipped", "low medium"),
        ("no warm-up", "no-warm-up", "medium low"),
        ("rank 2", "rank-too-small", "low"),
        ("rank 32", "rank-too-large", "low"),
        ("one site", "one-site-dominates", "medium"),
        ("forgetting", "forgetting", "high medium low"),
        ("swinging", "oscillation", "medium"),
        ("float16", "underflow", "high medium"),
    ],
)
def test_the_fault_is_found(spoilt: Spoilt, run: str, rule: str, severities: str) -> None:
    said = found(spoilt(run))
    assert rule in said, sorted(said)
    assert said[rule].severity in severities.split()
    assert any(char.isdigit() for char in said[rule].evidence)
    assert rule not in found(spoilt("healthy")), "and not where it isn't"


def test_explosion_says_the_right_thing(spoilt: Spoilt) -> None:
    """Raising the threshold of the clipping is what is often said, and wrong."""
    said = found(spoilt("explosion"))["loss-explosion"]
    assert "lower learning_rate" in said.advice
    assert "don't raise clip" in said.advice
    assert said.step is not None
    assert 1 < said.step < 40
    assert said.numbers["highest"] > said.numbers["limit"] > said.numbers["usual"]


def test_not_finite_names_the_site_that_was_first(spoilt: Spoilt) -> None:
    path = spoilt("not-finite")
    rows = Folder(path).read_log()
    row = next(row for row in rows if row.get("of") == "not-finite")
    said = found(path)["not-finite"]
    assert said.step == row["step"]
    assert said.site in next(row["weights"] for row in rows if row.get("of") == "weights")
    assert said.site is not None
    assert said.site in said.evidence


def test_overfitting_says_when_it_began(spoilt: Spoilt) -> None:
    path = spoilt("overfitting")
    evaluations = [
        (row["eval_loss"], row["step"])
        for row in Folder(path).read_log()
        if row.get("of") is None and "eval_loss" in row
    ]
    assert found(path)["overfitting"].step == min(evaluations)[1]


def test_dead_sites(tmp_path: Path, skilled: tuple[nn.Module, Any]) -> None:
    """Modules that the forward never comes to."""
    model, _tokenizer = skilled
    model.model.layers[0].mlp.spare = nn.Linear(32, 32, bias=False)
    try:
        recipe = weft.Recipe.from_dict(GOOD | {"max_steps": 10, "targets": ["q_proj", "v_proj", "spare"]})
        run = weft.train(base=skilled, data=TRAIN, eval_data=HELD, recipe=recipe, out=tmp_path / "run", progress=False)
    finally:
        del model.model.layers[0].mlp.spare
    said = found(run.path)["dead-sites"]
    assert said.site == "model.layers.0.mlp.spare"
    assert said.severity == "medium"


DATA: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "evaluation-in-training": ({"eval_data": TRAIN[:20] + HELD[:4]}, {}, "high"),
    "copies": ({"data": TRAIN[:40] * 3}, {}, "medium"),
    "truncated": ({}, {"max_length": 8}, "medium high"),
    "empty-answers": ({"data": TRAIN[:40] + [{**row, "completion": " "} for row in TRAIN[40:60]]}, {}, "medium"),
    "one-answer": ({"data": [{**row, "completion": "aa"} for row in TRAIN]}, {}, "high"),
    "prompt-learned": ({}, {"mask_prompt": False}, "medium"),
}  # fmt: skip


@pytest.mark.parametrize("rule", DATA)
def test_faults_of_data(tmp_path: Path, skilled: tuple[nn.Module, Any], rule: str) -> None:
    given, fields, severities = DATA[rule]
    recipe = weft.Recipe.from_dict(GOOD | {"max_steps": 1} | fields)
    given = {"data": TRAIN, "eval_data": HELD} | given
    run = weft.train(base=skilled, recipe=recipe, out=tmp_path / "run", progress=False, **given)
    said = found(run.path)
    assert said[rule].severity in severities.split()


def test_a_label_that_is_always_the_same(tmp_path: Path, skilled: tuple[nn.Module, Any]) -> None:
    for part in skilled:
        part.save_pretrained(tmp_path / "base")
    rows = [{"text": row["prompt"], "label": "yes"} for row in words(60, 5)]
    rows[0]["label"] = "no"
    recipe = weft.Recipe.from_dict(GOOD | {"max_steps": 1, "kind": "classification"})
    run = weft.train(base=tmp_path / "base", data=rows, recipe=recipe, out=tmp_path / "run", progress=False)
    said = found(run.path)["one-answer"]
    assert "label is 'yes' in 98%" in said.evidence


def test_padding_and_waiting(tmp_path: Path, skilled: tuple[nn.Module, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "ab" * (1 if i % 8 else 24) + f"{i}?", "completion": "bb"} for i in range(96)]
    one = Features.__getitem__

    def slow(self: Features, index: int) -> Any:
        time.sleep(0.01)
        return one(self, index)

    monkeypatch.setattr(Features, "__getitem__", slow)
    recipe = weft.Recipe.from_dict(GOOD | {"max_steps": 12, "batching": "random"})
    run = weft.train(base=skilled, data=rows, recipe=recipe, out=tmp_path / "run", progress=False)
    said = found(run.path)
    assert "batching='length'" in said["padding"].advice
    assert 0.3 < said["padding"].numbers["share"] < 0.95
    assert "workers=2" in said["data-waits"].advice


def test_no_rule_is_left_out() -> None:
    """Every rule is met in this file on a run that has the fault."""
    text = Path(__file__).read_text()
    towers = (Path(__file__).parent / "test_towers.py").read_text()
    assert [name for name in RULES if name not in text + towers] == []


def test_live_and_afterwards_are_the_same(spoilt: Spoilt) -> None:
    """The same rules on the same numbers: what the report has is what is found in the folder."""
    for name in ("healthy", "high rate", "overfitting"):
        report = json.loads((spoilt(name) / "report.json").read_text())
        live = {item["rule"]: item for item in report["findings"]}
        after = found(spoilt(name))
        for rule, item in live.items():
            assert after[rule].to_dict() == item
        assert set(after) - set(live) <= {
            "turned-away",
            "update-too-large",
            "update-too-small",
            "magnitude-drift",
            "untrained",
        }


def test_what_is_said_while_it_runs_stands_in_the_log(spoilt: Spoilt) -> None:
    rows = [row for row in Folder(spoilt("high rate")).read_log() if row.get("of") == "finding"]
    assert {row["rule"] for row in rows} >= {"learning-rate-too-high"}
    assert all(row["severity"] in ("high", "medium") for row in rows)


def test_rolled_back_is_said(tmp_path: Path) -> None:
    """`rolled-back` and `worse-than-base` are on runs in test_answering.py."""
    assert {"rolled-back", "worse-than-base"} <= set(RULES)


def test_recorded_numbers_are_those_of_dense_matrices(spoilt: Spoilt) -> None:
    """‖ΔW‖ and effective rank of the last look, against the adapter of the same step."""
    path = spoilt("rank 32")
    run = weft.Run.open(path)
    rows = [row for row in run.log if row.get("of") == "sites" and row["step"] == run.report.best_step]
    if not rows:
        pytest.skip("the best checkpoint is of a step whose sites were not looked at")
    for site, row in rows[-1]["sites"].items():
        values = torch.linalg.svdvals(run.adapter.delta(site).double())
        assert row["delta"] == pytest.approx(float(values.norm()), rel=1e-4)
        shares = values / values.sum()
        assert row["effective_rank"] == pytest.approx(float(torch.special.entr(shares).sum().exp()), rel=2e-2)
