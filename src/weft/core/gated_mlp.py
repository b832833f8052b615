"""A whole SwiGLU MLP as one autograd function: ``down(silu(gate(x)) * up(x))`` with an update on any of the three.

Kept for the backward: x, gate(x), up(x) and the thin products. The activation and the product are computed again there: a
frozen block that autograd differentiates keeps one wide tensor more. Same shapes and rules as `weft.core.ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.core import ops
from weft.core.ops import Needs, Operand

__all__ = ["gated_mlp", "reference_gated_mlp"]


def reference_gated_mlp(x: Tensor, gate: Operand, up: Operand, down: Operand) -> Tensor:
    """The slow, obvious form: (..., i) -> (..., o).

    Source:
        Shazeer 2020, GLU Variants Improve Transformer, arXiv:2002.05202 (SwiGLU).
    """
    hidden = F.silu(ops.reference_linear(x, gate)) * ops.reference_linear(x, up)
    return ops.reference_linear(hidden, down)


def gated_mlp(x: Tensor, gate: Operand, up: Operand, down: Operand) -> Tensor:
    """One SwiGLU MLP: (..., i) -> (..., o) in the compute dtype."""
    if ops.use_plain(x):
        return reference_gated_mlp(x, gate, up, down)
    x = x.to(ops.compute_dtype(x))
    sites = (gate, up, down)
    tensors = [tensor for site in sites for tensor in (site.W, site.b, site.A, site.B)]
    meta = tuple((site.scale, site.p) for site in sites)
    result: Tensor = _GatedMLP.apply(x, meta, *tensors)  # type: ignore[no-untyped-call]
    return result


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, meta: tuple[tuple[float, float], ...], *tensors: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            sites = ops.unpack(meta, tensors, x.dtype)
            flat = x.reshape(-1, x.shape[-1])
            (gate, up), thin_x, drawn_x = ops.forward(flat, sites[:2])
            hidden = F.silu(gate).mul_(up)
            (out,), thin_h, drawn_h = ops.forward(hidden, sites[2:], spend=True)
        ctx.save_for_backward(x, gate, up, thin_x, thin_h, *tensors, *drawn_x, *drawn_h)
        ctx.meta, ctx.drawn = meta, len(drawn_x)
        return ops.shaped_like(x, out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, thin_x, thin_h, *rest = ctx.saved_tensors
        tensors, drawn = rest[:12], rest[12:]
        needs = ctx.needs_input_grad
        with torch.autocast(x.device.type, enabled=False):
            sites = ops.unpack(ctx.meta, tensors, x.dtype)
            if torch.is_grad_enabled():
                gate, up = ops.by_autograd(x, sites[:2], drawn[: ctx.drawn])
                outputs = ops.by_autograd(F.silu(gate) * up, sites[2:], drawn[ctx.drawn :])
                return ops.differentiable(outputs, (grad,), (x, None, *tensors), needs)
            dgate, dup, found_h = _through_down(sites[2], grad, gate, up, thin_h, drawn[ctx.drawn :], needs)
            flat = x.reshape(-1, x.shape[-1])
            dX, found_x = ops.backward(
                flat, sites[:2], (dgate, dup), thin_x, drawn[: ctx.drawn], Needs.of(needs[:10], 2)
            )
        shaped = None if dX is None else dX.view(x.shape)
        return (shaped, None, *ops.as_parameters([*found_x, *found_h], tensors))


def _through_down(
    down: Operand,
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    thin: Tensor | None,
    drawn: list[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Gradients of gate(x) and up(x), each (T, i_down), and those of the down projection's tensors."""
    activated = F.silu(gate)
    hidden = activated * up
    wanted = Needs(True, needs[10:11], needs[11:12], needs[12])
    dhidden, found = ops.backward(hidden, (down,), (grad,), thin, drawn, wanted, spend=True)
    del hidden
    assert dhidden is not None
    dup = activated.mul_(dhidden)
    dgate = torch.ops.aten.silu_backward(dhidden.mul_(up), gate)
    return dgate, dup, found
