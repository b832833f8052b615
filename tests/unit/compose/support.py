"""What the tests of mixing share: adapters with random factors on tiny models, and dense float64 references."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from weft.adapter import Adapter
from weft.core.merge import merge
from weft.models.attach import attach
from weft.spec import LoraSpec

__all__ = ["adapter_of", "change_of", "delta", "three"]


def adapter_of(model: nn.Module, seed: int = 0, *, size: float = 0.2, **spec: Any) -> Adapter:
    """An adapter whose every number is random: factors, magnitudes, biases, whole modules."""
    generator = torch.Generator().manual_seed(seed)
    settings = {"rank": 3, "targets": "all-linear"} | spec
    with attach(model, {"made": LoraSpec(**settings)}, seed=seed) as bank:
        with torch.no_grad():
            for name, parameter in bank.named_parameters("made"):
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                if name.endswith(("lora_A", "lora_B")):
                    parameter.copy_(size * noise)
                else:
                    parameter.add_(0.1 * noise)
        return bank.adapter("made")


def three(model: nn.Module, **spec: Any) -> list[Adapter]:
    """Adapters of different ranks and alphas, the last one rank-stabilised."""
    return [
        adapter_of(model, 1, rank=2, alpha=6, **spec),
        adapter_of(model, 2, rank=4, alpha=3, **spec),
        adapter_of(model, 3, rank=6, alpha=2, rslora=True, **spec),
    ]


def delta(adapter: Adapter, path: str) -> Tensor | float:
    """Dense ΔW of a site in float64; 0.0 where the adapter has no such site."""
    return adapter.factors[path].map(Tensor.double).delta() if path in adapter.factors else 0.0


def change_of(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """What an adapter adds to each parameter of the base, by merging: also DoRA's magnitudes and biases."""
    merged, _ = merge(model, adapter)
    before, after = model.state_dict(), merged.state_dict()
    return {name: after[name].double() - before[name].double() for name in before}
