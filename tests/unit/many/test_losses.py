"""Losses of a mixed batch: block by block, they are those of the whole logits."""

from __future__ import annotations

import pytest
import torch

from tests.models import tiny_gpt2, tiny_llama
from tests.tolerances import assert_close
from weft.core.bank import attach
from weft.many import losses
from weft.many.losses import _HeadLoss, find_head, head_losses, model_losses, reference_head_losses
from weft.spec import LoraSpec


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_the_head_in_blocks_is_the_head(dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(losses.BLOCK, "cpu", 33 * 20)
    n, d, vocabulary = 50, 12, 33
    hidden, weight = torch.randn(n, d, dtype=dtype), torch.randn(vocabulary, d, dtype=dtype)
    offset = torch.randn(vocabulary, dtype=dtype) if bias else None
    targets, weights = torch.randint(vocabulary, (n,)), torch.rand(n, dtype=dtype)
    results = []
    for function in (reference_head_losses, _HeadLoss.apply):
        leaf = hidden.clone().requires_grad_()
        total, values = function(leaf, weight, offset, targets, weights)
        (3 * total).backward()
        results.append((total, values, leaf.grad))
    for expected, found in zip(*results, strict=True):
        assert_close(found, expected, dtype)


def test_no_learned_position_is_no_error() -> None:
    hidden = torch.randn(0, 4, requires_grad=True)
    total, values = _HeadLoss.apply(hidden, torch.randn(5, 4), None, torch.zeros(0, dtype=torch.long), torch.zeros(0))
    total.backward()
    assert (float(total.detach()), len(values)) == (0.0, 0)


def test_one_rows_nan_stays_in_its_row() -> None:
    hidden = torch.randn(6, 4)
    hidden[2] = float("nan")
    hidden.requires_grad_()
    total, values = _HeadLoss.apply(hidden, torch.randn(5, 4), None, torch.randint(5, (6,)), torch.ones(6))
    total.backward()
    assert hidden.grad is not None
    assert (
        torch.isfinite(values).tolist()
        == torch.isfinite(hidden.grad).all(1).tolist()
        == [True, True, False, True, True, True]
    )


@pytest.mark.parametrize("factory", [tiny_llama, tiny_gpt2])
def test_body_and_head_give_what_the_model_gives(factory: object) -> None:
    model = factory().requires_grad_(False)  # type: ignore[operator]
    head = find_head(model)
    assert head is not None
    ids = torch.randint(3, 64, (3, 9))
    labels = ids.masked_fill(torch.rand(3, 9) < 0.4, -100)
    inputs, weights = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.rand(3)
    with torch.no_grad():
        found, expected = head_losses(head, inputs, labels, weights), model_losses(model, inputs, labels, weights)
    for left, right in zip(found[:2], expected[:2], strict=True):
        assert_close(left, right)
    assert torch.equal(found[2], expected[2])


def test_logits_that_are_more_than_the_heads_product_are_left_to_the_model() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        final_logit_softcapping=0.5,
    )  # fmt: skip
    assert find_head(Gemma2ForCausalLM(config).eval().requires_grad_(False)) is None


def test_an_adapted_head_is_left_to_the_model() -> None:
    model = tiny_llama().requires_grad_(False)
    with attach(model, {"a": LoraSpec(rank=2, targets=["lm_head"])}):
        assert find_head(model) is None
    assert find_head(model) is not None
