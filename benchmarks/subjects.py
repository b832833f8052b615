"""What is compared: one Llama configuration three times, with nothing, weft's and peft's adapters on it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SUFFIXES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Setting:
    """One row's model and batch."""

    layers: int
    width: int
    rows: int
    length: int
    dtype: str
    dropout: float = 0.0
    rank: int = 16
    device: str = "cpu"

    def __str__(self) -> str:
        dropout = f", dropout {self.dropout:g}" if self.dropout else ", no dropout"
        return f"{self.layers} layers × {self.width}, {self.rows} × {self.length} tokens, {self.dtype}{dropout}"


def frozen_base(setting: Setting) -> nn.Module:
    """A randomly initialised Llama, frozen, in training mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=setting.width,
        intermediate_size=setting.width * 11 // 4 // 64 * 64,
        num_hidden_layers=setting.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=setting.length,
    )
    model = LlamaForCausalLM(config).to(setting.device, getattr(torch, setting.dtype)).train()
    return model.requires_grad_(False)


def base_with_activation_gradients(base: nn.Module) -> nn.Module:
    """The limit: the frozen base whose backward reaches the embeddings, as any adapter needs it to."""
    model = copy.deepcopy(base)
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_(True))
    return model


def with_weft(base: nn.Module, setting: Setting) -> nn.Module:
    """weft's adapter on a copy, factors random and not zero."""
    import weft

    model = copy.deepcopy(base)
    weft.attach(model, {"bench": weft.LoraSpec(rank=setting.rank, targets=SUFFIXES, dropout=setting.dropout)})
    return randomise(model)


def with_peft(base: nn.Module, setting: Setting) -> nn.Module:
    """peft's adapter on a copy, the same sites and rank."""
    import peft

    config = peft.LoraConfig(
        r=setting.rank, lora_alpha=setting.rank, target_modules=SUFFIXES, lora_dropout=setting.dropout
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return randomise(peft.get_peft_model(copy.deepcopy(base), config))


def randomise(model: nn.Module) -> nn.Module:
    """Random numbers into all that is trained: with B = 0 some products would be for nothing."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    return model


def subjects(setting: Setting) -> dict[str, nn.Module]:
    """base, weft and peft with the same weights."""
    torch.manual_seed(0)
    base = frozen_base(setting)
    return {
        "base": base_with_activation_gradients(base),
        "weft": with_weft(base, setting),
        "peft": with_peft(base, setting),
    }


def training_step(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    """Forward, loss and backward; gradients are dropped."""

    def run() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    return run


def batch(setting: Setting) -> Tensor:
    """Random tokens (rows, length)."""
    return torch.randint(0, 1024, (setting.rows, setting.length), device=setting.device)
