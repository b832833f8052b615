"""The forward of an adapted layer: Linear and GPT-2's Conv1D, convolutions, embeddings.

Each is a mixin that `weft.core.slots.place` puts before the layer's own class; without an active slot the layer's own
forward runs. Products are in `weft.core.ops` and `weft.core.convs`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.core import ops
from weft.core.convs import convolve
from weft.core.factors import Kind
from weft.core.ops import Operand
from weft.core.slots import Placed, Slot, State
from weft.core.tree import has_plain_forward

__all__ = [
    "ConvSite",
    "EmbeddingSite",
    "LinearSite",
    "adapted_linear",
    "mixin_for",
    "operand",
    "row_norms",
]

if TYPE_CHECKING:
    from torch.nn import Module as _Base
else:
    _Base = object


class LinearSite(_Base):
    """Linear, its subclasses, and transformers' Conv1D."""

    _weft: State

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """(..., d_in) -> (..., d_out); the argument is called ``input``, or ``x`` in Conv1D."""
        placed = self._weft.sites["weight"]
        slot = placed.active
        if slot is None:
            return super().forward(*args, **kwargs)  # type: ignore[no-any-return]
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        if placed.group is not None and not torch.compiler.is_compiling():
            return placed.group(placed, x)  # type: ignore[no-any-return]
        if not is_ours(self, placed):
            base: Tensor = super().forward(*args, **kwargs)
            return _beside(self, placed, slot, x, base)
        return adapted_linear(self, placed, x)


def is_ours(module: nn.Module, placed: Placed) -> bool:
    """Whether the layer's own forward is the plain product that ours replaces (a quantised one isn't)."""
    state: State = module.__dict__["_weft"]
    known: bool | None = state.extra.get("plain")
    if known is None:
        known = state.extra["plain"] = has_plain_forward(state.original)
    return known


def operand(module: nn.Module, placed: Placed, with_bias: bool = True) -> Operand:
    """The weights of a linear site as `ops` wants them; without an active slot the base alone."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    weight = weight.t() if placed.site.transposed else weight
    bias: Tensor | None = module.bias if with_bias else None  # type: ignore[assignment]
    slot = placed.active
    if slot is None:
        return Operand(weight, bias, None, None)
    return Operand(weight, bias, *slot.pair(), slot.scale, slot.dropout if module.training else 0.0)


def adapted_linear(module: nn.Module, placed: Placed, x: Tensor) -> Tensor:
    """An adapted linear layer by itself."""
    slot = placed.active
    assert slot is not None
    if slot.plain:
        return ops.linear(x, operand(module, placed))
    out = ops.linear(x, operand(module, placed, with_bias=slot.magnitude is None))
    out = _add_own_bias(out, slot)
    if slot.magnitude is None:
        return out
    weight: Tensor = module.weight  # type: ignore[assignment]
    factor = magnitude_factor(placed, slot, weight.t() if placed.site.transposed else weight).to(out.dtype)
    bias = module.bias
    return out * factor if bias is None else out * factor + bias.to(out.dtype)  # type: ignore[operator]


def _beside(module: nn.Module, placed: Placed, slot: Slot, x: Tensor, base: Tensor) -> Tensor:
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
    return slot.magnitude / norms.to(slot.magnitude.dtype)


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


class ConvSite(_Base):
    """Conv1d, Conv2d, Conv3d with stride, padding (also ``"same"`` and non-zero modes), dilation and groups."""

    _weft: State
    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, *size) or (C, *size) -> the layer's own output shape."""
        placed = self._weft.sites["weight"]
        slot = placed.active
        if slot is None:
            return super().forward(input)  # type: ignore[no-any-return]
        bias = self.bias
        ours = is_ours(self, placed)
        if ours and slot.plain:
            return convolve(self, slot, input, bias)
        channels = (-1, *(1 for _ in placed.site.kernel))
        out = convolve(self, slot, input, bias if slot.magnitude is None else None, alone=not ours)
        out = out if ours else out + super().forward(input)
        if slot.bias is not None:
            out = out + (slot.scale * slot.bias).to(out.dtype).view(channels)
        if slot.magnitude is not None:
            out = out * magnitude_factor(placed, slot, self.weight).to(out.dtype).view(channels)
            out = out if bias is None else out + bias.view(channels)
        return out


class EmbeddingSite(_Base):
    """Embedding: the update of row t is ``scale · B A[:, t]``; also embeddings that scale their output."""

    _weft: State
    weight: Tensor
    padding_idx: int | None
    scale_grad_by_freq: bool

    def forward(self, input: Tensor) -> Tensor:
        """(...) of ids -> (..., width)."""
        placed = self._weft.sites["weight"]
        slot = placed.active
        base: Tensor = super().forward(input)
        if slot is None:
            return base
        A, B = slot.pair()
        thin = F.embedding(input, A.t(), padding_idx=self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        update = F.linear(thin, B) * slot.scale
        multiplier = getattr(self, "embed_scale", 1.0)
        update = update * (multiplier.to(update.dtype) if isinstance(multiplier, Tensor) else multiplier)
        if slot.magnitude is None:
            return base + update.to(base.dtype)
        return (base + update.to(base.dtype)) * magnitude_factor(placed, slot, self.weight.t()).to(base.dtype)


_MIXINS: dict[Kind, type] = {"linear": LinearSite, "conv": ConvSite, "embedding": EmbeddingSite}


def mixin_for(kind: Kind) -> type | None:
    """The mixin of a kind of layer; None for attention and parameters, which have modules of their own."""
    return _MIXINS.get(kind)
