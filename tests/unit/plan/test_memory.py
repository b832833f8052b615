"""Bytes of a step: exact where they can be computed by hand, the short model against the whole one, and against the allocator."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from benchmarks.results.plan import allocated, planned, run_once
from weft.plan.memory import Gauge
from weft.plan.skeleton import find_config, skeleton
from weft.plan.subject import Subject
from weft.plan.tape import Tape
from weft.spec import LoraSpec
from weft.train import Recipe

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
GEMMA3 = LLAMA | {
    "model_type": "gemma3_text", "num_hidden_layers": 7, "head_dim": 8, "sliding_window": 8, "tie_word_embeddings": True,
    "layer_types": [*(["sliding_attention", "sliding_attention", "full_attention"] * 2), "sliding_attention"],
}  # fmt: skip
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 3}
T5: dict[str, Any] = {
    "model_type": "t5", "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 5, "num_heads": 4, "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu", "is_encoder_decoder": True, "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
VIT: dict[str, Any] = {
    "model_type": "vit", "image_size": 16, "patch_size": 8, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5,
    "num_attention_heads": 4, "architectures": ["ViTForImageClassification"],
}  # fmt: skip


def gauge(config: dict[str, Any], spec: LoraSpec | None, length: int = 16, **more: Any) -> Gauge:
    return Gauge(Subject(find_config(config), spec), length, **more)


def test_weights_factors_gradients_and_adams_state_are_exact() -> None:
    rank, heads = random.randint(1, 9), random.choice([1, 2, 4])
    config = LLAMA | {"num_key_value_heads": heads, "num_hidden_layers": 2}
    recipe = Recipe(accumulation=2, batch_size=2)
    measured = gauge(config, LoraSpec(rank=rank, targets="all-linear"))
    memory, counts = measured.memory(recipe), measured.counts(recipe)
    d, h, kv = 32, 48, 8 * heads
    layer = 2 * d * d + 2 * kv * d + 3 * d * h + 2 * d
    assert counts.base == 2 * 64 * d + 2 * layer + d
    factors = 2 * rank * ((d + d) * 2 + (d + kv) * 2 + (d + h) * 3)
    assert counts.trained == factors
    assert counts.sites == 14
    frequencies = 2 * 4 * 4  # rotary embeddings' buffers: two of 4 float32
    assert memory.weights == 4 * counts.base + frequencies
    assert memory.factors == memory.gradients == 4 * factors
    assert memory.optimizer == 2 * 4 * factors + 4 * 28  # two moments, and a float32 count a tensor
    assert memory.total == memory.own + memory.overhead == sum(memory.parts.values())


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_weights_take_what_bitsandbytes_makes_of_them(kind: str) -> None:
    """As closed sums, and as the library's own tensors."""
    pytest.importorskip("bitsandbytes")
    from weft.train.quantized import quantise

    config = LLAMA | {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}
    measured = gauge(config, LoraSpec(rank=2))
    memory = measured.memory(Recipe(quantize=kind))
    d, h, kv = 64, 128, 32
    numbers, rows = 2 * (2 * d * d + 2 * kv * d + 3 * d * h), 2 * (3 * d + 2 * kv + 2 * h)
    held = numbers + 4 * rows if kind == "int8" else numbers // 2 + numbers // 64 + numbers // 4096
    rest = 4 * (2 * 64 * d + 5 * d) + 2 * 4 * 8
    assert memory.weights == held + rest
    model = type(skeleton(find_config(config)))._from_config(find_config(config))  # type: ignore[attr-defined]
    quantise(model, kind)
    found: dict[int, int] = {}
    for module in model.modules():
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            state = getattr(tensor, "quant_state", None)
            parts = [tensor, getattr(tensor, "SCB", None)]
            parts += [] if state is None else [state.absmax, state.state2.absmax]
            found |= {part.data_ptr(): part.untyped_storage().nbytes() for part in parts if part is not None}
    assert memory.weights == pytest.approx(sum(found.values()), rel=0.01)


@pytest.mark.parametrize(
    ("config", "changes"),
    [(LLAMA, {}), (LLAMA, {"gradient_checkpointing": 3}), (GEMMA3, {"dtype": "bfloat16"}), (LLAMA, {"freeze_below": 2, "accumulation": 2})],
    ids=["llama", "three layers recompute", "two kinds of layers", "frozen low layers"],
)  # fmt: skip
def test_one_layer_of_each_kind_gives_what_all_layers_give(config: dict[str, Any], changes: dict[str, Any]) -> None:
    recipe = Recipe(batch_size=random.randint(1, 3)).replace(**changes)
    spec = LoraSpec(rank=random.randint(1, 9), targets="all-linear")
    length = random.randint(12, 40)
    short, whole = (gauge(config, spec, length, whole=whole).memory(recipe) for whole in (False, True))
    assert (short.parts | {"overhead": 0}) == (whole.parts | {"overhead": 0})
    assert (short.flops, short.kept, short.when) == (whole.flops, whole.kept, whole.when)


def test_all_weights_trained_the_short_way_and_the_long_way() -> None:
    recipe = Recipe(batch_size=2)
    short, whole = (gauge(LLAMA, None, whole=whole).memory(recipe) for whole in (False, True))
    assert (short.own, short.flops) == (whole.own, whole.flops)
    assert short.factors == 0
    assert short.optimizer > 2 * short.weights * 0.99


@pytest.mark.parametrize("config", [MIXTRAL, T5, VIT], ids=["experts", "encoder and decoder", "images"])
def test_other_architectures_are_followed(config: dict[str, Any]) -> None:
    memory = gauge(config, LoraSpec(rank=4, targets="default")).memory(Recipe(batch_size=2))
    assert min(memory.activations, memory.factors, memory.flops) > 0


def test_products_are_counted_as_torch_counts_them() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = find_config(LLAMA)
    model = type(skeleton(config))._from_config(config).requires_grad_(False)  # type: ignore[attr-defined]
    ids = torch.zeros(2, 16, dtype=torch.long)
    with Tape() as tape:
        model(input_ids=ids)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    attention = 6 * 2 * 2 * (2 * 4 * 16 * 16 * 8)  # of the CPU's kernel, which torch doesn't count
    assert tape.flops == counter.get_total_flops() + attention


def test_the_peak_of_a_real_training_is_the_planned_one() -> None:
    config = LLAMA | {"hidden_size": 96, "intermediate_size": 256, "vocab_size": 1024}
    case = {"name": "test", "config": config, "rows": 2, "seq": 48, "rank": random.randint(2, 16)}
    run_once({**case, "seq": 8})  # loads what is loaded late
    real = allocated(lambda: run_once(case))
    assert planned(case)["bytes"] == pytest.approx(real, rel=0.1)
