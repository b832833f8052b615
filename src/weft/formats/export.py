"""Adapters for servers that read only ``r`` and ``lora_alpha``: vLLM, SGLang, LoRAX and their like.

They take one rank for all sites and the scale alpha / r; some ignore rsLoRA and patterns. So ranks are filled up with
zeros to the largest one, and scales are multiplied into B, with alpha = r.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from weft.adapter import Adapter
from weft.core.factors import Factors
from weft.core.towers import one_spec
from weft.errors import UnsupportedError, some_names
from weft.formats.peft_layout import padded

__all__ = ["to_vllm"]


def to_vllm(adapter: Adapter) -> Adapter:
    """The same updates with one rank everywhere and alpha = rank.

    Write it with ``weft.convert(source, to="vllm", out=…)``: then target modules are names without paths, as servers expect them.

    Args:
        adapter: of linear layers and embeddings.

    Returns:
        An adapter of rank ``max(ranks)``; every scale is 1.0. What the filling costs, and what the scales lost by rounding, is in its
        notes.

    Raises:
        UnsupportedError: what these servers don't have: DoRA, biases, modules trained whole, convolutions, attention's in_proj,
            bare parameters. Names the sites and the way out.

    Example:
        >>> weft.formats.to_vllm(weft.load("runs/mine")).save("out/for-vllm")  # doctest: +SKIP
    """
    _check(adapter)
    rank = max(item.rank for item in adapter.factors.values())
    factors: dict[str, Factors] = {}
    lost = 0.0
    for path, item in adapter.factors.items():
        B, error = _scaled(item.B, item.scale)
        lost = max(lost, error)
        factors[path] = padded(dataclasses.replace(item, B=B, scale=1.0), rank)
    before, after = (sum(item.num_parameters for item in part.values()) for part in (adapter.factors, factors))
    notes = [*adapter.provenance.notes]
    if after > before:
        notes.append(
            f"ranks {adapter.ranks()} were filled up to {rank} with zeros: {after:,} numbers in place of {before:,}, the same update"
        )
    if lost:
        notes.append(f"scales were multiplied into B, which rounded it by at most {lost:.1e} of its largest value")
    spec = one_spec(adapter.spec, adapter.sites, tuple(adapter.modules)).replace(rank=rank, alpha=float(rank), rank_pattern={}, alpha_pattern={}, rslora=False, dora=False, lora_bias=False,
                                bias="none", save_modules=(), init="kaiming")  # fmt: skip
    parents = ({"digest": adapter.digest, "weight": 1.0},)
    provenance = dataclasses.replace(adapter.provenance, notes=tuple(notes), parents=parents)
    return adapter.replace(spec=spec, factors=factors, provenance=provenance)


def _scaled(B: Tensor, scale: float) -> tuple[Tensor, float]:
    """B times scale in B's dtype, and the largest rounding error over the largest value."""
    if scale == 1.0:
        return B, 0.0
    exact = B.double() * scale
    rounded = exact.to(B.dtype)
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    if not bool(torch.isfinite(rounded).all()):
        raise UnsupportedError(
            f"the scale {scale:g} carries B beyond the range of {B.dtype}; cast the adapter first, adapter.map(lambda t: t.float())"
        )
    return rounded, float((rounded.double() - exact).abs().max()) / largest if largest else 0.0


def _check(adapter: Adapter) -> None:
    """Refuse what no server of this kind has."""
    sites = adapter.factors.items()
    merge = "merge it into the model (weft.merge) and serve that"
    refused = (
        ("DoRA", [path for path, item in sites if item.magnitude is not None], merge),
        ("a bias of B (lora_bias)", [path for path, item in sites if item.bias is not None], merge),
        (
            "updates of convolutions, bare parameters or attention's in_proj",
            [path for path, item in sites if item.kind not in ("linear", "embedding")],
            merge,
        ),
        (
            "modules trained whole",
            list(adapter.modules),
            f"{merge}; or, if they don't matter there, adapter.replace(modules={{}})",
        ),
        (
            "trained biases of the base",
            list(adapter.biases),
            f"{merge}; or, if they don't matter there, adapter.replace(biases={{}})",
        ),
    )
    for what, paths, way_out in refused:
        if paths:
            raise UnsupportedError(
                f"{what} ({some_names(paths, 3)}): servers that read r and lora_alpha alone don't have it: {way_out}"
            )
    if not adapter.factors:
        raise UnsupportedError("an adapter without factors has nothing to serve")
