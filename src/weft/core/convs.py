"""An adapted convolution as one autograd function: the base's product, and a thin convolution followed by a 1 × 1 one.

    u = conv(x, A)    y = conv(x, W) + b + s · conv₁ₓ₁(u, B)

A has the layer's kernel, stride, padding and dilation; B has its groups. Kept for the backward: x and u.

A thin convolution costs far more than its products: as much as one of 16 channels, and x is laid out anew for each call. On a CPU, where
nothing is rounded away by it (float32, float64), the base's weight and the update are therefore one weight for y and for the gradient of
x: ``W + s B A``, made for the call. A layer with few outputs has its factors' gradients from that weight's; then u isn't needed at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.core import dropout as dropping
from weft.core import ops
from weft.core.slots import Slot

__all__ = ["Geometry", "convolve", "reference_convolve"]

_CONVS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where a convolution looks: one number a spatial dimension, and groups of W and B."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """The convolution itself."""
        return _CONVS[len(self.stride)](x, weight, bias, self.stride, self.padding, self.dilation, groups)

    def grads(
        self, grad: Tensor, x: Tensor, weight: Tensor, groups: int, needs: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor]:
        """(dX, dW) of the convolution, None where not needed."""
        zeros = [0] * len(self.stride)
        dX, dW, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, self.stride, self.padding, self.dilation, False, zeros, groups, [*needs, False]
        )
        return dX, dW

    def pointwise(self) -> Geometry:
        """The 1 × 1 convolution with B."""
        ones, zeros = (1,) * len(self.stride), (0,) * len(self.stride)
        return Geometry(ones, zeros, ones, self.groups)


def convolve(module: nn.Module, slot: Slot, x: Tensor, bias: Tensor | None, *, alone: bool = False) -> Tensor:
    """An adapted convolution layer without what follows it (magnitude, B's bias).

    Args:
        module: a Conv1d, Conv2d or Conv3d.
        slot: lora_A (r, in, *kernel), lora_B (out, r / groups, 1 …).
        x: (N, C, *size) or (C, *size).
        bias: the base's bias, or None to leave it out.
        alone: the update without the base's product, for layers that compute that in a way of their own.
    """
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    batched = x.dim() == len(module.kernel_size) + 2
    x = x if batched else x.unsqueeze(0)
    around = module._reversed_padding_repeated_twice
    padding = tuple(around[::-2])
    if module.padding_mode != "zeros" or padding != tuple(around[-2::-2]):
        x = F.pad(x, around, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
        padding = (0,) * len(module.kernel_size)
    where = Geometry(tuple(module.stride), padding, tuple(module.dilation), module.groups)
    p = slot.dropout if module.training else 0.0
    A, B = _pair(slot, len(module.kernel_size))
    W = None if alone else module.weight
    compute = reference_convolve if ops.use_plain(x) or torch.is_autocast_enabled(x.device.type) else _Conv.apply
    out: Tensor = compute(x, W, bias, A, B, slot.scale, p, where)
    return out if batched else out.squeeze(0)


def _pair(slot: Slot, dimensions: int) -> tuple[Tensor, Tensor]:
    """A (r, in, *kernel) and B (out, r / groups, 1 …), a starting product appended."""
    A, B = slot.lora_A, slot.lora_B
    assert isinstance(A, Tensor) and isinstance(B, Tensor)
    if isinstance(slot.start_A, Tensor) and isinstance(slot.start_B, Tensor):
        A = torch.cat([A, slot.start_A.to(A.dtype)], dim=0)
        B = torch.cat([B, -slot.start_B.to(B.dtype)], dim=1)
    return A, B.reshape(*B.shape[:2], *(1,) * dimensions)


def reference_convolve(
    x: Tensor, W: Tensor | None, b: Tensor | None, A: Tensor, B: Tensor, scale: float, p: float, where: Geometry
) -> Tensor:
    """The slow, obvious form."""
    return _by_autograd(x, F.dropout(x, p) if p else x, W, b, A, B, scale, where)


def _by_autograd(
    x: Tensor, inner: Tensor, W: Tensor | None, b: Tensor | None, A: Tensor, B: Tensor, scale: float, where: Geometry
) -> Tensor:
    """By operations that autograd knows; ``inner`` is x as dropout left it."""
    thin = where.apply(inner, A.to(x.dtype), None, 1)
    update = where.pointwise().apply(thin, B.to(x.dtype), None, where.groups) * scale
    return update if W is None else where.apply(x, W, b, where.groups) + update


LANES = 16
"""Channels that a CPU's convolution computes at once."""
FEW = 2.5
"""Outputs, in channels that A costs, below which the weight's gradient is cheaper than two thin convolutions."""


def _joins(x: Tensor, W: Tensor, A: Tensor, where: Geometry) -> bool:
    """Whether one weight is exact enough, and cheaper: there must be more positions than making it costs."""
    exact = x.device.type == "cpu" and x.dtype == W.dtype and x.dtype in (torch.float32, torch.float64)
    positions = x.numel() // max(1, x.shape[1]) // math.prod(where.stride)
    return exact and where.groups == 1 and positions >= LANES * len(A)


def _joined(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W + s B A, in W's shape."""
    return torch.addmm(W.flatten(1), B.flatten(1).to(W.dtype), A.flatten(1).to(W.dtype), alpha=scale).view_as(W)


def _joined_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, W, _, A, B, thin, _ = ctx.saved_tensors
    where, scale, needs = ctx.where, ctx.scale, ctx.needs_input_grad
    dX, _ = where.grads(grad, x, _joined(W, A, B, scale), 1, (True, False)) if needs[0] else (None, None)
    whole = needs[1] or (ctx.few and (needs[3] or needs[4]))
    _, dW = where.grads(grad, x, W, 1, (False, True)) if whole else (None, None)
    if ctx.few:
        rows = None if dW is None else dW.flatten(1) * scale
        dA = (B.flatten(1).to(rows.dtype).T @ rows).view_as(A) if rows is not None and needs[3] else None
        dB = (rows @ A.flatten(1).to(rows.dtype).T).view_as(B) if rows is not None and needs[4] else None
    else:
        inner, dB = where.pointwise().grads(grad, thin, B.to(x.dtype) * scale, 1, (needs[3], needs[4]))
        dB = None if dB is None else dB.mul_(scale)
        dA = where.grads(inner, x, A.to(x.dtype), 1, (False, True))[1] if needs[3] else None
    db = grad.sum([0, *range(2, grad.dim())]) if needs[2] else None
    factors = (None if found is None else found.to(like.dtype) for found, like in ((dA, A), (dB, B)))
    return dX, dW if needs[1] else None, db, *factors, None, None, None


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor | None, b: Tensor | None, A: Tensor, B: Tensor, scale: float, p: float,
        where: Geometry,
    ) -> Tensor:  # fmt: skip
        ctx.scale, ctx.where = scale / (1 - p), where
        if W is not None and not p and _joins(x, W, A, where):
            few = len(W) < FEW * -(-len(A) // LANES) * LANES
            thin = None if few or not any(ctx.needs_input_grad) else where.apply(x, A.to(x.dtype), None, 1)
            ctx.save_for_backward(x, W, b, A, B, thin, None)
            ctx.joined, ctx.few = True, few
            return where.apply(x, _joined(W, A, B, scale), b, 1)
        drawn = dropping.draw(x, p) if p else None
        thin = where.apply(x if drawn is None else dropping.drop(x, drawn), A.to(x.dtype), None, 1)
        out = where.pointwise().apply(thin, B.to(x.dtype), None, where.groups).mul_(scale / (1 - p))
        if W is not None:
            out = where.apply(x, W, b, where.groups).add_(out)
        ctx.save_for_backward(x, W, b, A, B, thin, drawn)
        ctx.joined = False
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W, b, A, B, thin, drawn = ctx.saved_tensors
        where: Geometry = ctx.where
        needs = ctx.needs_input_grad
        source = x if drawn is None else dropping.drop(x, drawn)
        if torch.is_grad_enabled():
            out = _by_autograd(x, source, W, b, A, B, ctx.scale, where)
            return *ops.differentiable((out,), (grad,), (x, W, b, A, B), needs[:5]), None, None, None
        if ctx.joined:
            return _joined_backward(ctx, grad)
        inner, dB = where.pointwise().grads(grad * ctx.scale, thin, B.to(x.dtype), where.groups, (True, needs[4]))
        dX, dA = where.grads(inner, source, A.to(x.dtype), 1, (needs[0], needs[3]))
        if dX is not None and drawn is not None:
            dX = dropping.drop_(dX.contiguous(), drawn)
        dW = None
        if W is not None and (needs[0] or needs[1]):
            base, dW = where.grads(grad, x, W, where.groups, (needs[0], needs[1]))
            dX = None if base is None else base.add_(dX)
        db = grad.sum([0, *range(2, grad.dim())]) if needs[2] else None
        return (
            dX,
            dW,
            db,
            None if dA is None else dA.to(A.dtype),
            None if dB is None else dB.to(B.dtype),
            None,
            None,
            None,
        )
