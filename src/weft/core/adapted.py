"""One adapter at a linear site: base product, update, DoRA's magnitude, biases, also beside products that aren't ours.

This module does not know which slot is in use: it is told.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weft.core import ops
from weft.core.ops import Operand
from weft.core.slots import Placed, Slot, State
from weft.core.tree import has_plain_forward

__all__ = ["adapted_linear", "beside", "is_ours", "magnitude_factor", "magnitude_share", "operand", "row_norms"]


def is_ours(module: nn.Module, placed: Placed) -> bool:
    """Whether the layer's own forward is the plain product that ours replaces (a quantised one isn't)."""
    state: State = module.__dict__["_weft"]
    known: bool | None = state.extra.get("plain")
    if known is None:
        known = state.extra["plain"] = has_plain_forward(state.original)
    return known


def operand(module: nn.Module, placed: Placed, slot: Slot | None, with_bias: bool = True) -> Operand:
    """The weights of a linear site as `ops` wants them; without a slot the base alone."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    weight = weight.t() if placed.site.transposed else weight
    bias: Tensor | None = module.bias if with_bias else None  # type: ignore[assignment]
    if slot is None:
        return Operand(weight, bias, None, None)
    return Operand(weight, bias, *slot.pair(), slot.scale, slot.dropout if module.training else 0.0)


def adapted_linear(module: nn.Module, placed: Placed, slot: Slot, x: Tensor) -> Tensor:
    """An adapted linear layer by itself."""
    if slot.plain:
        return ops.linear(x, operand(module, placed, slot))
    out = ops.linear(x, operand(module, placed, slot, with_bias=slot.magnitude is None))
    out = _add_own_bias(out, slot)
    if slot.magnitude is None:
        return out
    weight: Tensor = module.weight  # type: ignore[assignment]
    factor = magnitude_factor(placed, slot, weight.t() if placed.site.transposed else weight).to(out.dtype)
    bias = module.bias
    return out * factor if bias is None else out * factor + bias.to(out.dtype)  # type: ignore[operator]


def beside(module: nn.Module, placed: Placed, slot: Slot, x: Tensor, base: Tensor) -> Tensor:
    """The update beside a base product that isn't ours."""
    A, B = slot.pair()
    update = ops.low_rank(x, A, B, slot.scale, slot.dropout if module.training else 0.0)
    update = _add_own_bias(update, slot)
    if slot.magnitude is None:
        return base + update.to(base.dtype)
    weight = module.weight.dequantize() if hasattr(module.weight, "dequantize") else module.weight  # type: ignore[operator]
    factor = magnitude_factor(placed, slot, weight).to(base.dtype)  # type: ignore[arg-type]
    bias = module.bias if module.bias is not None else 0.0
    return (base - bias + update.to(base.dtype)) * factor + bias  # type: ignore[operator]


def _add_own_bias(out: Tensor, slot: Slot) -> Tensor:
    return out if slot.bias is None else out + (slot.scale * slot.bias).to(out.dtype)


def magnitude_factor(placed: Placed, slot: Slot, weight: Tensor) -> Tensor:
    """DoRA's ``m / ‖W + ΔW‖`` by output: (d_out,). The norm is a constant for the gradient, as in the paper.

    Source:
        Liu et al. 2024, DoRA, arXiv:2402.09353, sections 4.1 and 4.3.
    """
    A, B = (tensor.detach() for tensor in slot.pair())
    norms = row_norms(weight.detach(), A, B, slot.scale, placed.site.groups)
    assert slot.magnitude is not None
    return magnitude_share(slot.magnitude, norms)


def magnitude_share(magnitude: Tensor, norms: Tensor) -> Tensor:
    """``m / ‖W + ΔW‖`` by row; 0 where the row is zero, as in a pruned base: it has no direction, and stays zero."""
    norms = norms.to(magnitude.dtype)
    return torch.where(norms > 0, magnitude / norms.where(norms > 0, 1.0), 0.0)


def row_norms(weight: Tensor, A: Tensor, B: Tensor, scale: float, groups: int = 1) -> Tensor:
    """‖W + scale · B A‖ by row without building B A: (d_out,), at least float32.

    Args:
        weight: (d_out, ...), flattened to (d_out, d_in).
        A: (r, ...), flattened to (r, d_in); B: (d_out, r), further dimensions of size 1.
        groups: must be 1: a grouped convolution's update has no rows that match its weight's.
    """
    assert groups == 1
    wide = torch.promote_types(weight.dtype, torch.float32)
    W, A, B = weight.flatten(1).to(wide), A.flatten(1).to(wide), B.flatten(1).to(wide)
    own = W.square().sum(1)
    cross = (B * (W @ A.mT)).sum(1)
    inner = (B * (B @ (A @ A.mT))).sum(1)
    return (own + 2 * scale * cross + scale**2 * inner).clamp_min(0).sqrt()
