"""One case for every feature that PEFT's files can hold: a tiny model and the PEFT configuration of it."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.models import batch_for, randomise, tiny_attention, tiny_bert, tiny_cnn, tiny_gpt2, tiny_llama, tiny_mixtral


class Convs(nn.Module):
    """A Conv1d and a grouped one, a Conv3d and a grouped one."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(6, 8, 3, stride=2, padding=1)
        self.one_grouped = nn.Conv1d(8, 12, 2, groups=4)
        self.three = nn.Conv3d(3, 6, (2, 3, 1), padding=(1, 1, 0))
        self.three_grouped = nn.Conv3d(6, 4, 2, groups=2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(rows, 6, 9) and (rows, 3, 4, 4, 4) -> (rows, 16)."""
        x = self.one_grouped(torch.tanh(self.one(x)))
        y = self.three_grouped(torch.tanh(self.three(y)))
        return torch.cat([x.mean(2), y.mean((2, 3, 4))], dim=1)


class Grouped(nn.Module):
    """Two convolutions, the second with groups; no dilation, which PEFT's updates don't have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 12, (3, 2), stride=2, padding=(2, 1), groups=2)
        self.linear = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 3, 8, 8) -> (rows, 3)."""
        return self.linear(torch.tanh(self.conv2(torch.tanh(self.conv1(x)))).mean((2, 3)))


class Matrices(nn.Module):
    """A module that holds bare matrices and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Parameter(torch.empty(6, 8))
        self.first = nn.Parameter(torch.empty(8, 10))
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 10) -> (rows, 6)."""
        return self.inner(torch.tanh(torch.tanh(x @ self.first.T) @ self.second.T))


class Holder(nn.Module):
    """`Matrices`, one level down."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Matrices()
        self.conv1 = nn.Linear(6, 6)
        self.deep = nn.ModuleDict({"conv1": nn.Linear(6, 4)})

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 10) -> (rows, 4)."""
        return self.deep["conv1"](torch.tanh(self.conv1(self.body(x))))


def tiny_qwen3_moe() -> nn.Module:
    """Qwen3-MoE: a dense layer whose linear layers have the names of experts, and a layer of stacked experts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_experts=4, num_experts_per_tok=2, max_position_embeddings=64, mlp_only_layers=[0], head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return randomise(Qwen3MoeForCausalLM(config))


def convs() -> nn.Module:
    """`Convs` with random weights."""
    return randomise(Convs())


def grouped() -> nn.Module:
    """`Grouped` with random weights."""
    return randomise(Grouped())


def holder() -> nn.Module:
    """`Holder` with random weights."""
    return randomise(Holder())


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """Random inputs for any model of this file."""
    if isinstance(model, Convs):
        return {"x": torch.randn(3, 6, 9), "y": torch.randn(3, 3, 4, 4, 4)}
    if isinstance(model, Grouped):
        return {"x": torch.randn(3, 3, 8, 8)}
    if isinstance(model, Holder):
        return {"x": torch.randn(3, 10)}
    return batch_for(model, labels=False)


@dataclass(frozen=True)
class Case:
    """A feature.

    Attributes:
        config: of `peft.LoraConfig`.
        needs_base: reading needs the base.
    """

    name: str
    model: Callable[[], nn.Module]
    config: dict[str, Any]
    needs_base: bool = False
    spec: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("linear", tiny_llama, {"target_modules": ["q_proj", "down_proj"]}),
    Case("linear by expression", tiny_llama, {"target_modules": r".*layers\.1\.(self_attn\.v|mlp\.up)_proj"}),
    Case("all-linear", tiny_bert, {"target_modules": "all-linear"}),
    Case("excluded", tiny_llama, {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.v_proj"]}),
    Case("layers", tiny_llama, {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    Case("one layer", tiny_llama, {"target_modules": ["q_proj"], "layers_to_transform": 0}),
    Case("rank and alpha patterns", tiny_llama, {
        "target_modules": ["q_proj", "v_proj", "up_proj"], "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 5}, "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 3},
    }),
    Case("rslora", tiny_llama, {"target_modules": ["k_proj", "gate_proj"], "use_rslora": True, "rank_pattern": {"gate_proj": 3}}),
    Case("Conv1D", tiny_gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    Case("dora", tiny_llama, {"target_modules": ["o_proj", "up_proj"], "use_dora": True}),
    Case("dora on Conv1D", tiny_gpt2, {"target_modules": ["c_fc"], "use_dora": True, "fan_in_fan_out": True}),
    Case("dora on an embedding", tiny_llama, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    Case("dora on a convolution", tiny_cnn, {"target_modules": ["conv1", "linear"], "use_dora": True}),
    Case("embedding", tiny_gpt2, {"target_modules": ["wte", "wpe", "c_attn"], "fan_in_fan_out": True}),
    Case("embedding that is copied", tiny_llama, {"target_modules": ["embed_tokens", "v_proj"]}),
    Case("head", tiny_llama, {"target_modules": ["lm_head", "v_proj"]}),
    Case("Conv2d", grouped, {"target_modules": ["conv1", "conv2"]}),
    Case("Conv1d and Conv3d", convs, {"target_modules": ["one", "one_grouped", "three", "three_grouped"]}),
    Case("lora_bias", tiny_bert, {"target_modules": ["query", "dense"], "lora_bias": True}),
    Case("lora_bias on convolutions", grouped, {"target_modules": ["conv1", "conv2", "linear"], "lora_bias": True}),
    Case("bias all", tiny_bert, {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]}),
    Case("bias lora_only", tiny_gpt2, {"target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True}),
    Case("modules_to_save", tiny_bert, {"target_modules": ["query", "value"], "modules_to_save": ["classifier", "pooler"]}),
    Case("classification", tiny_bert, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    Case("attention", tiny_attention, {"target_modules": ["attn", "embed"]}),
    Case("attention with patterns", tiny_attention, {"target_modules": ["attn"], "rank_pattern": {"attn": 3}, "alpha_pattern": {"attn": 5}}),
    Case("experts", tiny_mixtral, {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]}),
    Case("one expert parameter", tiny_mixtral, {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"], "rank_pattern": {"layers.0.mlp.experts.down_proj": 2}}),
    Case("experts that PEFT renames", tiny_qwen3_moe, {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}),
    Case("matrix", holder, {"target_modules": ["inner", "body.conv1"], "target_parameters": ["body.first"]}),
    Case("matrices", holder, {"target_modules": ["inner"], "target_parameters": ["first", "body.second"]}, needs_base=True),
    Case("weight of a linear layer", tiny_llama, {"target_modules": [], "target_parameters": ["q_proj.weight"]}),
    Case("a name at two depths", holder, {"target_modules": r"conv1"}),
    Case("pissa", tiny_llama, {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "pissa"}, needs_base=True),
    Case("olora", tiny_llama, {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "olora"}, needs_base=True),
    Case("orthogonal", tiny_llama, {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
    Case("gaussian", tiny_llama, {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
]  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT warns about much that is fine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def peft_model(base: nn.Module, config: dict[str, Any], *, dtype: torch.dtype | None = None) -> Any:
    """A PEFT model on a copy of the base, with every trained number redrawn."""
    import peft

    with quiet():
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return (model if dtype is None else model.to(dtype)).eval()


def save(model: Any, directory: Path) -> Path:
    """What PEFT writes."""
    with quiet():
        model.save_pretrained(directory)
    return directory


def load(base: nn.Module, directory: Path) -> Any:
    """What PEFT makes of a directory; every tensor of the file has to find its place, and every place its tensor."""
    import peft
    from peft.utils.save_and_load import load_peft_weights

    with quiet():
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), directory)
        result = model.load_adapter(directory, adapter_name="default")
        wanted = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    assert not result.unexpected_keys, result.unexpected_keys
    assert not result.missing_keys, result.missing_keys
    in_file = set(load_peft_weights(str(directory), device="cpu"))
    wanted = {name for name in wanted if not re.search(r"original_module|modules_to_save", name)}
    assert wanted - in_file == set() or not any("lora_" in name for name in wanted - in_file), sorted(wanted - in_file)
    return model.eval()


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The first output."""
    with torch.no_grad():
        found = model(**batch)
    return found.logits if hasattr(found, "logits") else found


def delta_weights(model: Any) -> dict[str, Tensor]:
    """PEFT's own ΔW as (d_out, ...) by weft's site path."""
    from peft.tuners.lora import layer as lora

    found: dict[str, Tensor] = {}
    for name, module in model.base_model.model.named_modules():
        path = re.sub(r"\.base_layer(?=\.|$)", "", name)
        if isinstance(module, lora.ParamWrapper):
            delta = module.get_delta_weight("default")
            found[f"{path}.{module.parameter_name}"] = delta
        elif isinstance(module, lora.MultiheadAttention):
            found[f"{path}.in_proj_weight"] = module.get_delta_weight("default")
        elif isinstance(module, lora.LoraLayer):
            if getattr(module.get_base_layer(), "groups", 1) > 1:
                continue  # PEFT's fails
            delta = module.get_delta_weight("default")
            transposed = getattr(module, "fan_in_fan_out", False) or isinstance(module, lora.Embedding)
            found[path] = delta.T if transposed else delta
    return found
