"""A base that never learned its end token is said once for all users, and in each one's report."""

from __future__ import annotations

from pathlib import Path

import torch

import weft


def test_a_base_that_can_not_stop_is_told(tmp_path: Path) -> None:
    model, tokenizer = weft.load_base()
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        weight[5:9] = weight[tokenizer.eos_token_id]
    rows = [{"prompt": "Who?\n", "completion": "Oscar."}] * 2
    runs = weft.train_many(
        base=(model, tokenizer), data={"a": rows, "b": rows}, spec=weft.LoraSpec(rank=2, targets=["q_proj"]),
        recipe=weft.Recipe(max_steps=1, batch_size=2), out=tmp_path / "runs", progress=False,
    )  # fmt: skip
    assert sum("end token" in note for note in runs.report.notes) == 1
    assert any("targets=[q_proj,lm_head]" in note for note in runs["a"].report.notes)
