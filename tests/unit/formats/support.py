"""Adapter directories made by hand, as old and odd tools leave them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from weft.adapter import Adapter
from weft.core.factors import Factors
from weft.spec import LoraSpec

PREFIX = "base_model.model."
SMALLEST = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def pair(path: str, *, rank: int = 4, d_in: int = 6, d_out: int = 5, prefix: str = PREFIX) -> dict[str, Tensor]:
    """Random factors of one linear site."""
    return {
        f"{prefix}{path}.lora_A.weight": torch.randn(rank, d_in),
        f"{prefix}{path}.lora_B.weight": torch.randn(d_out, rank),
    }


def folder(
    at: Path,
    tensors: Mapping[str, Tensor] | None,
    config: Mapping[str, Any] | None = SMALLEST,
    *,
    pickled: bool = False,
) -> Path:
    """A directory with these tensors and this config."""
    at.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (at / "adapter_config.json").write_text(json.dumps(config))
    if tensors is not None and pickled:
        torch.save(dict(tensors), at / "adapter_model.bin")
    elif tensors is not None:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, at / "adapter_model.safetensors")
    return at


def linear(
    *,
    rank: int = 4,
    d_in: int = 6,
    d_out: int = 5,
    scale: float = 2.0,
    dtype: torch.dtype = torch.float32,
    **parts: Tensor,
) -> Factors:
    """Random factors."""
    return Factors(torch.randn(rank, d_in, dtype=dtype), torch.randn(d_out, rank, dtype=dtype), scale, **parts)


def simple(**changes: Any) -> Adapter:
    """A small adapter of two linear sites."""
    sites = {f"model.layers.{index}.q_proj": linear() for index in range(2)}
    return Adapter(LoraSpec(rank=4, alpha=8, targets=("q_proj",)), sites).replace(**changes)
