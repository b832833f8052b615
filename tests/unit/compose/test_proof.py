"""Golden prompts of a mixture: where the base is given, those of the parents with what the mixture says."""

from __future__ import annotations

import torch

import weft
from tests.models import tiny_llama
from tests.unit.compose.support import adapter_of
from weft.adapter import Adapter
from weft.train.proof import PROMPTS, prove


def prompted(adapter: Adapter, seed: int, length: int) -> Adapter:
    ids = torch.randint(3, 20, (3, length), generator=torch.Generator().manual_seed(seed))
    return adapter.replace(proof={"input_ids": ids, "logits": torch.zeros(3, 4)})


def test_a_mixture_on_its_base_proves_itself() -> None:
    model = tiny_llama()
    a, b = (prompted(adapter_of(model, seed, size=0.5), seed, 4 + seed) for seed in (1, 2))
    mixed = weft.combine([(a, 0.7), (b, -0.3)], base=model)
    assert mixed.proof["input_ids"].shape == (PROMPTS, 5)
    assert torch.equal(mixed.proof["input_ids"][0], a.proof["input_ids"][0])
    assert torch.equal(mixed.proof["input_ids"][1], b.proof["input_ids"][0][:5])
    assert prove(mixed, model).ok
    assert not prove(a.replace(proof=mixed.proof), model).ok
    assert "_weft_bank" not in model.__dict__


def test_no_proof_where_it_says_nothing() -> None:
    model = tiny_llama()
    a, b = (prompted(adapter_of(model, seed), seed, 4) for seed in (1, 2))
    assert not weft.combine([a, b]).proof
    assert not weft.combine([a, b], base=model, allow_other_base=True).proof
    assert not weft.combine([a.replace(proof={}), b.replace(proof={})], base=model).proof
