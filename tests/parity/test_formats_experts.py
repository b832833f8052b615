"""Adapters of mixtures of experts from before transformers 5 stacked the experts: as PEFT converts them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import weft
from tests.models import tiny_mixtral
from tests.parity import formats_cases as cases
from tests.tolerances import Tolerance, assert_close
from weft.errors import KeysError
from weft.formats.experts import stack_experts

CLOSE = Tolerance(3e-5, 1e-5, "float32 through a few layers, with updates as large as the weights")


def old_mixtral(at: Path, *, parts: tuple[str, ...] = ("w1", "w2", "w3"), experts: int = 4) -> Path:
    """What PEFT wrote for Mixtral on transformers 4."""
    tensors: dict[str, Tensor] = {}

    def pair(path: str, d_in: int, d_out: int) -> None:
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(2, d_in) * 0.5
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(d_out, 2) * 0.5

    for layer in range(2):
        pair(f"model.layers.{layer}.self_attn.q_proj", 32, 32)
        for expert in range(experts):
            for part in parts:
                pair(
                    f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}",
                    *((24, 32) if part == "w2" else (32, 24)),
                )
    at.mkdir()
    save_file(tensors, at / "adapter_model.safetensors")
    (at / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj", *parts]})
    )
    return at


def outputs(base: nn.Module, adapter: weft.Adapter, batch: dict[str, Tensor]) -> Tensor:
    with weft.attach(copy.deepcopy(base), {}) as bank:
        bank.load("old", adapter)
        bank.use("old")
        return cases.logits(bank.model.eval(), batch)


def test_as_peft_converts_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="compares with peft, which is not installed")
    base = tiny_mixtral()
    folder = old_mixtral(tmp_path / "old")
    adapter = weft.load(folder, base=base)
    assert adapter.factors["model.layers.1.mlp.experts.gate_up_proj"].A.shape == (4, 4, 32)
    assert any("were stacked" in note for note in adapter.provenance.notes)
    batch = cases.inputs(base)
    with cases.quiet():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    assert_close(outputs(base, adapter, batch), cases.logits(theirs.eval(), batch), CLOSE, "outputs")
    adapter.save(tmp_path / "new")
    assert_close(
        cases.logits(cases.load(base, tmp_path / "new"), batch), outputs(base, adapter, batch), CLOSE, "saved again"
    )


def test_a_part_of_the_experts(tmp_path: Path) -> None:
    """What PEFT refuses: one half of gate_up_proj, and fewer experts than there are."""
    base = tiny_mixtral()
    plain = weft.load(old_mixtral(tmp_path / "old", parts=("w3",), experts=3))
    adapter = stack_experts(plain, base)
    delta = adapter.delta("model.layers.0.mlp.experts.gate_up_proj")
    assert not delta[:, :24].any()
    assert not delta[3].any()
    torch.testing.assert_close(delta[2, 24:], plain.delta("model.layers.0.block_sparse_moe.experts.2.w3"))


def test_experts_that_the_model_has_not(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="an update for expert 4"):
        weft.load(old_mixtral(tmp_path / "old", experts=5), base=tiny_mixtral())


def test_other_adapters_stay_as_they_are(tmp_path: Path) -> None:
    base = cases.tiny_llama()
    with weft.attach(base, weft.LoraSpec(rank=2, targets=["q_proj"])) as bank:
        adapter = bank.adapter()
    assert stack_experts(adapter, base) is adapter
