"""Adapters that weft made on a running base, saved: PEFT gives the same outputs from the directory."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weft
from tests.models import tiny_attention, tiny_bert, tiny_cnn, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_t5, tiny_vit
from tests.parity import formats_cases as cases
from tests.tolerances import Tolerance, assert_close
from weft.adapter import Adapter

pytest.importorskip("peft", reason="compares with peft, which is not installed")

CLOSE = Tolerance(3e-5, 1e-5, "float32 through a few layers, with updates as large as the weights")

Born = tuple[str, Callable[[], nn.Module], dict[str, Any]]
BORN: list[Born] = [
    ("all linear layers", tiny_llama, {"targets": "all-linear"}),
    ("all linear layers, Conv1D", tiny_gpt2, {"targets": "all-linear", "bias": "all"}),
    ("all linear layers of T5", tiny_t5, {"targets": "all-linear"}),
    ("an expression", tiny_vit, {"targets": r".*\.layers?\.1\..*(query|q_proj|dense|fc1)"}),
    ("layers", tiny_llama, {"targets": ["q_proj", "down_proj"], "layers": [1]}),
    ("excluded", tiny_llama, {"targets": "all-linear", "exclude": ["v_proj", "layers.0.mlp.up_proj"]}),
    ("patterns", tiny_llama, {"targets": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 2}, "alpha_pattern": {r"layers\.0\..*": 3.5}}),
    ("rslora", tiny_llama, {"targets": "all-linear", "rslora": True, "rank_pattern": {"q_proj": 3}}),
    ("dora", tiny_llama, {"targets": ["q_proj", "up_proj", "embed_tokens"], "dora": True}),
    ("dora on convolutions", cases.grouped, {"targets": ["conv1", "linear"], "dora": True}),
    ("B's bias", tiny_bert, {"targets": ["query", "dense"], "lora_bias": True}),
    ("biases of sites", tiny_bert, {"targets": ["query"], "bias": "lora_only", "save_modules": ["classifier"]}),
    ("all biases", tiny_bert, {"targets": ["query"], "bias": "all", "save_modules": ["classifier"]}),
    ("all biases around an attention", tiny_attention, {"targets": ["attn", "embed"], "bias": "all"}),
    ("a head", tiny_llama, {"targets": ["q_proj"], "save_modules": ["lm_head"]}),
    ("a tied embedding", lambda: tiny_llama(tie=True), {"targets": ["embed_tokens", "q_proj"]}),
    ("convolutions", cases.grouped, {"targets": ["conv1", "conv2"]}),
    ("one and three dimensions", cases.convs, {"targets": ["one", "one_grouped", "three", "three_grouped"]}),
    ("one convolution of a name", tiny_cnn, {"targets": ["conv1"]}),
    ("a name at two depths, one of them", cases.holder, {"targets": "conv1"}),
    ("the other of them", cases.holder, {"targets": "deep.conv1"}),
    ("attention", tiny_attention, {"targets": ["attn"]}),
    ("attention's in_proj", tiny_attention, {"targets": ["attn.in_proj_weight", "head"]}),
    ("attention's out_proj", tiny_attention, {"targets": ["attn.out_proj", "embed"]}),
    ("attention with two ranks", tiny_attention, {"targets": ["attn"], "rank_pattern": {"out_proj": 2}, "alpha_pattern": {"out_proj": 4.0}}),
    ("experts", tiny_mixtral, {"targets": "all-linear", "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    ("one expert parameter", tiny_mixtral, {"targets": ["q_proj"], "target_parameters": ["experts.down_proj"], "rank_pattern": {"layers.0.mlp.experts.down_proj": 2}}),
    ("layers that PEFT takes for experts", cases.tiny_qwen3_moe, {"targets": "all-linear"}),
    ("such layers beside experts", cases.tiny_qwen3_moe, {"targets": "all-linear", "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "gate.weight"],
                                                          "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"mlp.*": 3.0}}),
    ("matrices", cases.holder, {"targets": ["inner"], "target_parameters": ["body.first", "body.second"]}),
    ("pissa", tiny_llama, {"targets": ["q_proj", "up_proj"], "init": "pissa"}),
    ("olora", tiny_llama, {"targets": ["q_proj", "up_proj"], "init": "olora"}),
    ("orthogonal", tiny_llama, {"targets": ["q_proj"], "init": "orthogonal"}),
]  # fmt: skip


def born(base: nn.Module, spec: dict[str, Any]) -> tuple[Adapter, torch.Tensor, dict[str, Any]]:
    """An adapter with random numbers, and what weft's running model gives."""
    model = copy.deepcopy(base)
    with weft.attach(model, {"mine": weft.LoraSpec(**{"rank": 4, "alpha": 8, **spec})}, seed=0) as bank:
        with torch.no_grad():
            for name, parameter in bank.named_parameters("mine"):
                noise = torch.randn_like(parameter)
                parameter.mul_(1 + 0.1 * noise) if name.endswith("magnitude") else parameter.add_(0.2 * noise)
        batch = cases.inputs(base)
        return bank.adapter("mine"), cases.logits(model.eval(), batch), batch


@pytest.mark.parametrize(("make", "spec"), [pytest.param(*case[1:], id=case[0]) for case in BORN])
def test_saved_for_peft(make: Callable[[], nn.Module], spec: dict[str, Any], tmp_path: Path) -> None:
    base = make()
    adapter, expected, batch = born(base, spec)
    adapter.save(tmp_path / "a")
    assert weft.load(tmp_path / "a").digest == adapter.digest
    found = cases.logits(cases.load(base, tmp_path / "a"), batch)
    assert_close(found, expected, CLOSE, "what PEFT makes of it")
    assert not torch.allclose(cases.logits(base, batch), expected, atol=1e-3)


@pytest.mark.parametrize(
    "spec",
    [
        {"targets": "all-linear"},
        {"targets": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 2}, "rslora": True},
        {"targets": ["q_proj"], "layers": [1]},
    ],
    ids=["plain", "patterns and rslora", "layers"],
)
def test_for_servers(spec: dict[str, Any], tmp_path: Path) -> None:
    base = tiny_llama()
    adapter, expected, batch = born(base, spec)
    weft.convert(adapter, to="vllm", out=tmp_path / "a")
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert said["r"] == said["lora_alpha"]
    assert not any("." in name for name in said["target_modules"])
    with cases.quiet():
        import peft

        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a")
    assert_close(cases.logits(model.eval(), batch), expected, CLOSE, "what PEFT makes of the served form")
