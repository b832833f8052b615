"""A base that never learned its end token: the user is told, unless the head is adapted."""

from __future__ import annotations

import pytest
import torch

from weft.models.load import load_base
from weft.train.ends import same_rows, unlearned_end


def test_rows_that_are_one_row() -> None:
    weight = torch.randn(30, 8)
    assert same_rows(weight, 4) == 0
    weight[[7, 29]] = weight[4] * (1 + 1e-4)
    assert same_rows(weight, 4) == 2


def test_a_base_that_knows_its_end_is_fine() -> None:
    model, tokenizer = load_base()
    assert unlearned_end(model, tokenizer, ["model.layers.0.self_attn.q_proj"]) is None


def test_a_base_that_does_not_is_told_with_the_way_out() -> None:
    model, tokenizer = load_base()
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        weight[5:9] = weight[tokenizer.eos_token_id]
    said = unlearned_end(model, tokenizer, ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"])
    assert said is not None
    assert "4 other tokens" in said
    assert "targets=[q_proj,lm_head]" in said
    assert unlearned_end(model, tokenizer, ["lm_head"]) is None
    assert unlearned_end(model, tokenizer, [], ["lm_head"]) is None


@pytest.mark.parametrize("model", [torch.nn.Linear(3, 3)])
def test_a_model_without_a_head_has_none(model: torch.nn.Module) -> None:
    assert unlearned_end(model, load_base()[1], []) is None
