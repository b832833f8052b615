"""An adapted convolution as one autograd function: the base's product, and a thin convolution followed by a 1 × 1 one.

    u = conv(x, A)    y = conv(x, W) + b + s · conv₁ₓ₁(u, B)

A has the layer's kernel, stride, padding and dilation; B has its groups. Kept for the backward: x and u.
"""

from __future__ import annotations

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


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor | None, b: Tensor | None, A: Tensor, B: Tensor, scale: float, p: float,
        where: Geometry,
    ) -> Tensor:  # fmt: skip
        drawn = dropping.draw(x, p) if p else None
        thin = where.apply(x if drawn is None else dropping.drop(x, drawn), A.to(x.dtype), None, 1)
        out = where.pointwise().apply(thin, B.to(x.dtype), None, where.groups).mul_(scale / (1 - p))
        if W is not None:
            out = where.apply(x, W, b, where.groups).add_(out)
        ctx.save_for_backward(x, W, b, A, B, thin, drawn)
        ctx.scale, ctx.where = scale / (1 - p), where
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
