"""``weft plan``: what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import weft
from weft.train import Recipe

TINY: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "max_position_embeddings": 64, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
    return folder


def test_a_plan_says_what_it_takes_and_as_json_the_same(base: Path, tmp_path: Path) -> None:
    target = tmp_path / "recipe.yaml"
    line = f"plan --base {base} --rank 4 --targets q_proj,v_proj --seq 16 --batch 2 --device cuda --brief"
    done = weft(f"{line} --json --fit 8GiB --save {target}")
    parts = ("weights", "factors", "gradients", "optimizer", "activations", "logits", "temporary", "overhead")
    assert done.json["bytes"]["total"] == sum(done.json["bytes"][part] for part in parts)
    assert done.json["counts"]["trained"] == 4 * 4 * 32
    assert done.json["fits"] is True
    assert Recipe.load(target).spec.rank == 4  # type: ignore[union-attr]


def test_a_budget_that_can_not_be_met_says_by_how_much(base: Path) -> None:
    done = weft(f"plan --base {base} --seq 16 --batch 1 --device cuda --brief --fit 100MiB", ok=False)
    assert done.status == 1
    assert "can't be met" in done.err
    assert "too much" in done.err
    assert "What would help most" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--fit 24Bananas", "unknown unit"),
        ("--fit much", "is no size"),
        ("--dtype float31", "float31"),
        ("--targets nowhere_proj", "nowhere_proj"),
        ("--seq 1", "seq_len=1"),
        ("--seq 4096", "goes up to 64"),
        ("--device tpu", "device='tpu'"),
        ("--set gradient_checkpointing=maybe", "gradient_checkpointing"),
    ],
)
def test_what_can_not_be_planned_is_refused(base: Path, words: str, message: str) -> None:
    done = weft(f"plan --base {base} {words}", ok=False)
    assert done.status == 2
    assert message in done.err
    assert "Traceback" not in done.err


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    done = weft(f"plan --base {tmp_path}", ok=False)
    assert done.status == 2
    assert "config.json" in done.err


def test_fit_and_resume_contradict_each_other(tmp_path: Path) -> None:
    done = weft(f"train --resume {tmp_path} --fit 8GiB", ok=False)
    assert done.status == 2
    assert "--fit" in done.err
