"""Packing: rows are full, and no example sees its neighbour, or the model is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.unit.data.conftest import byte_tokenizer
from weft.data import IGNORED, collator, encode, load_examples, pack, require_packing
from weft.data.packing import fit
from weft.errors import DataError

TOKENIZER = byte_tokenizer()
SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def sharp(model):
    """A model whose attention matters: random weights of the usual start attend to all alike."""
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model.eval()


def llama(attention="sdpa"):
    return sharp(LlamaForCausalLM(LlamaConfig(**SMALL, attn_implementation=attention)))


MODELS = {
    "llama sdpa": llama,
    "llama eager": lambda: llama("eager"),
    "gpt2": lambda: sharp(GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64))),
    "sliding": lambda: sharp(MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4))),
    "experts": lambda: sharp(
        Qwen2MoeForCausalLM(
            Qwen2MoeConfig(**SMALL, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4)
        )
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_packed_logits_and_loss_are_those_of_separate_examples(name):
    model = MODELS[name]()
    require_packing(model)
    assert not any(module.training for module in model.modules())
    rows = [{"prompt": "p" * (n % 7), "completion": "abcdefgh"[: n % 5 + 1]} for n in range(12)]
    encoded = encode(load_examples(rows), TOKENIZER, max_length=24)
    packed = pack(encoded, 26)
    assert len(packed) < len(encoded)
    batch = collator(TOKENIZER, "completion", packed=True)(packed[:])
    logits = model(**batch).logits
    piece = 0
    for row in range(len(packed)):
        starts = [*(batch["position_ids"][row] == 0).nonzero().flatten().tolist(), logits.shape[1]]
        for start in starts[:-1]:
            if piece == len(packed.rows) or start >= len(packed[row]["input_ids"]):
                continue
            alone = encoded[int(packed.rows[piece])]
            size = len(alone["input_ids"])
            expected = model(input_ids=torch.from_numpy(alone["input_ids"])[None]).logits[0]
            torch.testing.assert_close(logits[row, start : start + size], expected, rtol=1e-4, atol=2e-4)
            piece += 1
    assert piece == len(encoded)
    separate = collator(TOKENIZER, "completion")(encoded[:])
    torch.testing.assert_close(model(**batch).loss, model(**separate).loss, rtol=1e-4, atol=1e-4)
    assert int((batch["labels"] != IGNORED).sum()) == int((separate["labels"] != IGNORED).sum())


def test_a_cache_would_mix_examples_up():
    """Why batches say ``use_cache=False``: with a cache, transformers does not look at the positions."""
    model = llama()
    ids = torch.randint(300, (1, 10))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]])
    alone = model(ids[:, 5:]).logits
    assert (model(ids, position_ids=positions, use_cache=False).logits[:, 5:] - alone).abs().max() < 1e-3
    assert (model(ids, position_ids=positions, use_cache=True).logits[:, 5:] - alone).abs().max() > 1e-2


def test_models_without_positions_are_refused():
    mamba = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=1))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    for model in (mamba, t5):
        with pytest.raises(DataError, match="takes no position_ids"):
            require_packing(model)


def test_models_that_see_their_neighbour_are_refused():
    size = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    bert = sharp(BertForMaskedLM(BertConfig(**size)))
    with pytest.raises(DataError, match="see its neighbour"):
        require_packing(bert)

    class Shifted(LlamaForCausalLM):
        """Ignores that positions begin again."""

        def forward(self, input_ids, position_ids=None, **rest):
            return super().forward(input_ids, position_ids=torch.arange(input_ids.shape[1])[None], **rest)

    with pytest.raises(DataError, match="see its neighbour"):
        require_packing(sharp(Shifted(LlamaConfig(**SMALL))))


def test_the_trial_leaves_the_model_as_it_was():
    model = llama().train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    require_packing(model)
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_half_precision_and_flat_models_pass():
    require_packing(llama().to(torch.bfloat16))
    require_packing(LlamaForCausalLM(LlamaConfig(**SMALL)))


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
def test_first_fit_decreasing(lengths, capacity):
    rows = fit(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= capacity for row in rows)
    expected: list[int] = []
    for length in sorted(lengths, reverse=True):
        at = next((at for at, used in enumerate(expected) if used + length <= capacity), None)
        if at is None:
            expected.append(length)
        else:
            expected[at] += length
    assert [sum(lengths[index] for index in row) for row in rows] == expected


def test_packing_fills_the_rows():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 200, (3000,), generator=generator).tolist()
    assert sum(lengths) / (len(fit(lengths, 512)) * 512) > 0.99


def test_classification_is_not_packed():
    encoded = encode(load_examples([{"text": "a", "label": 0}]), TOKENIZER, max_length=8)
    with pytest.raises(DataError, match="can't be packed"):
        pack(encoded)
