"""Forward and backward of linear sites: one autograd function for one site or for several that share their input.

    y_i = x W_iᵀ + b_i + s_i (x A_iᵀ) B_iᵀ
    dX  = Σ dY_i W_i + g A        g_i = s_i dY_i B_i        dA = gᵀ x        dB_i = s_i dY_iᵀ (x A_iᵀ)

Kept for the backward: x itself (no copy, no cast of it), x Aᵀ (r / d_in of it), and what dropout drew. The thin products of
sites that share x are one product, and so is their part of dX. `reference_linear` is the slow, obvious form of the same.

Shapes: T all leading dimensions of x flattened, i = d_in, o = d_out, r = rank, R = sum of ranks of the sites of a call.
This module does not know modules, slots or banks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.core import dropout as dropping

__all__ = ["Operand", "linear", "linears", "low_rank", "reference_linear", "use_plain"]


@dataclass(frozen=True, slots=True)
class Operand:
    """One site's weights in a call.

    Attributes:
        W: (o, i) base weight, also as a transposed view; None: only the update is computed.
        b: (o,) base bias or None.
        A: (r, i) or None: the base alone.
        B: (o, r) or None.
        scale: number.
        p: dropout probability of this call, 0 when not training.
    """

    W: Tensor | None
    b: Tensor | None
    A: Tensor | None
    B: Tensor | None
    scale: float = 1.0
    p: float = 0.0


def use_plain(x: Tensor) -> bool:
    """Whether plain operations are to be used: a compiler or a function transform does its own bookkeeping."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def reference_linear(x: Tensor, site: Operand) -> Tensor:
    """The slow, obvious form; any dtype mix; also what `torch.compile` sees.

    Args:
        x: (..., i).

    Returns:
        (..., o) in the dtype that ``F.linear(x, W)`` has.

    Source:
        Hu et al. 2021, LoRA, arXiv:2106.09685, equation 3.
    """
    base = None if site.W is None else F.linear(x, site.W, site.b)
    if site.A is None or site.B is None:
        assert base is not None
        return base
    inner = F.dropout(x, site.p) if site.p else x
    update = F.linear(F.linear(inner, site.A.to(x.dtype)), site.B.to(x.dtype)) * site.scale
    return update if base is None else base + update


def linear(x: Tensor, site: Operand) -> Tensor:
    """One adapted linear map: (..., i) -> (..., o)."""
    return linears(x, (site,))[0]


def low_rank(x: Tensor, A: Tensor, B: Tensor, scale: float, p: float = 0.0) -> Tensor:
    """The update alone, for layers whose base product is not ours (quantised weights): (..., i) -> (..., o)."""
    return linears(x, (Operand(None, None, A, B, scale, p),))[0]


def linears(x: Tensor, sites: Sequence[Operand]) -> tuple[Tensor, ...]:
    """Several adapted linear maps of one input; the thin products are shared.

    Args:
        x: (..., i), any strides.
        sites: one `Operand` a map.

    Returns:
        one (..., o) a site, in the compute dtype: autocast's where it is on, else that of x.
    """
    if use_plain(x):
        return tuple(reference_linear(x, site) for site in sites)
    x = x.to(compute_dtype(x))
    tensors = [tensor for site in sites for tensor in (site.W, site.b, site.A, site.B)]
    meta = tuple((site.scale, site.p) for site in sites)
    wants_grad = torch.is_grad_enabled() and (
        x.requires_grad or any(t is not None and t.requires_grad for t in tensors)
    )
    if wants_grad:
        outputs: tuple[Tensor, ...] = _Linears.apply(x, meta, *tensors)
        return outputs
    with torch.autocast(x.device.type, enabled=False):
        flat = x.reshape(-1, x.shape[-1])
        results, _, _ = forward(flat, unpack(meta, tensors, x.dtype))
    return tuple(result.view(*x.shape[:-1], result.shape[-1]) for result in results)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on for x's device, else the dtype of x."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def unpack(meta: Sequence[tuple[float, float]], tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Operand]:
    """Operands in one dtype from the flat list that autograd wants."""
    cast = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
    return [Operand(*cast[4 * k : 4 * k + 4], scale, p) for k, (scale, p) in enumerate(meta)]


def stack_A(sites: Sequence[Operand]) -> Tensor | None:
    """All A of a call on top of each other: (R, i)."""
    found = [site.A for site in sites if site.A is not None]
    return None if not found else found[0] if len(found) == 1 else torch.cat(found)


def forward(x: Tensor, sites: Sequence[Operand]) -> tuple[list[Tensor], Tensor | None, list[Tensor]]:
    """Products without autograd.

    Args:
        x: (T, i), dtype of all operands.

    Returns:
        outputs (T, o) by site, the thin product x Aᵀ (T, R) or None, and what dropout drew by site (empty without).
    """
    drawn = [dropping.draw(x, site.p) for site in sites if site.p and site.A is not None]
    thin = _thin_product(x, sites, drawn)
    outputs, column = [], 0
    for site in sites:
        if site.A is None or thin is None:
            assert site.W is not None
            outputs.append(F.linear(x, site.W, site.b))
            continue
        part = thin[:, column : column + site.A.shape[0]]
        column += site.A.shape[0]
        outputs.append(_update_then_base(x, part, site))
    return outputs, thin, drawn


def _update_then_base(x: Tensor, part: Tensor, site: Operand) -> Tensor:
    """(T, o): the update first, the base's product added to it: one pass over the output less than the other way round."""
    assert site.B is not None
    alpha = site.scale / (1 - site.p)
    if site.b is None:
        out = torch.mm(part, site.B.t() if alpha == 1 else site.B.t() * alpha)
    else:
        out = torch.addmm(site.b, part, site.B.t(), alpha=alpha)
    return out if site.W is None else out.addmm_(x, site.W.t())


def _thin_product(x: Tensor, sites: Sequence[Operand], drawn: list[Tensor]) -> Tensor | None:
    stacked = stack_A(sites)
    if stacked is None:
        return None
    if not drawn:
        return torch.mm(x, stacked.t())
    thin = x.new_empty(x.shape[0], stacked.shape[0])
    column, masks = 0, iter(drawn)
    for site in sites:
        if site.A is None:
            continue
        source = dropping.drop(x, next(masks)) if site.p else x
        torch.mm(source, site.A.t(), out=thin[:, column : column + site.A.shape[0]])
        column += site.A.shape[0]
    return thin


def backward(
    x: Tensor,
    sites: Sequence[Operand],
    grads: Sequence[Tensor | None],
    thin: Tensor | None,
    drawn: list[Tensor],
    needs: Needs,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients without autograd.

    Args:
        x: (T, i); sites, thin, drawn: as `forward` had and gave them.
        grads: (T, o) by site; None where an output was not used.
        needs: which gradients are wanted.

    Returns:
        dX (T, i) or None, and the flat list dW, db, dA, dB by site, None where it is not needed.
    """
    grads = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
    inner = _inner_grads(x, sites, grads, thin)
    flat: list[Tensor | None] = []
    column, masks = 0, iter(drawn)
    shared = inner is not None and not drawn
    dX = _dX(x, sites, grads, inner if shared else None) if needs.x else None
    dA_all = torch.mm(inner.t(), x) if shared and inner is not None and needs.A else None
    for k, (site, grad) in enumerate(zip(sites, grads, strict=True)):
        dW = torch.mm(grad.t(), x) if needs.W[k] and grad is not None else None
        db = grad.sum(0) if needs.b[k] and grad is not None else None
        dA = dB = None
        if site.A is not None and inner is not None and thin is not None:
            rows = slice(column, column + site.A.shape[0])
            column = rows.stop
            mask = next(masks) if site.p else None
            if grad is not None:
                dB = torch.mm(thin[:, rows].t(), grad).mul_(site.scale / (1 - site.p)).t()  # this way round is faster
                dA = _dA(x, inner[:, rows], mask, None if dA_all is None else dA_all[rows], needs.A)
                if dX is not None and not shared:
                    _add_inner(dX, inner[:, rows], site.A, mask)
        flat += [dW, db, dA, dB]
    return dX, flat


@dataclass(frozen=True, slots=True)
class Needs:
    """Which gradients a backward has to make."""

    x: bool
    W: Sequence[bool]
    b: Sequence[bool]
    A: bool

    @classmethod
    def of(cls, flags: Sequence[bool], count: int) -> Needs:
        """From autograd's ``needs_input_grad``: x, meta, then W, b, A, B by site."""
        rest = flags[2:]
        return cls(flags[0], rest[0::4][:count], rest[1::4][:count], any(rest[2::4]))


def _inner_grads(
    x: Tensor, sites: Sequence[Operand], grads: Sequence[Tensor | None], thin: Tensor | None
) -> Tensor | None:
    """g (T, R): the gradient of x Aᵀ, scale and dropout's rescaling included."""
    if thin is None:
        return None
    inner = torch.empty_like(thin)
    column = 0
    for site, grad in zip(sites, grads, strict=True):
        if site.A is None or site.B is None:
            continue
        part = inner[:, column : column + site.A.shape[0]]
        column += site.A.shape[0]
        if grad is None:
            part.zero_()
        else:
            alpha = site.scale / (1 - site.p)
            torch.mm(grad, site.B if alpha == 1 else site.B * alpha, out=part)
    return inner


def _dX(x: Tensor, sites: Sequence[Operand], grads: Sequence[Tensor | None], inner: Tensor | None) -> Tensor:
    """Gradient of x: through the updates (if ``inner`` is given), then through the base's products."""
    stacked = None if inner is None else stack_A(sites)
    dX = None if inner is None or stacked is None else torch.mm(inner, stacked)
    for site, grad in zip(sites, grads, strict=True):
        if grad is not None and site.W is not None:
            dX = torch.mm(grad, site.W) if dX is None else dX.addmm_(grad, site.W)
    return torch.zeros_like(x) if dX is None else dX


def _dA(x: Tensor, inner: Tensor, mask: Tensor | None, shared: Tensor | None, needed: bool) -> Tensor | None:
    if not needed:
        return None
    if shared is not None:
        return shared
    return torch.mm(inner.t(), x if mask is None else dropping.drop(x, mask))


def _add_inner(dX: Tensor, inner: Tensor, A: Tensor, mask: Tensor | None) -> None:
    if mask is None:
        dX.addmm_(inner, A)
    else:
        dX.add_(dropping.drop_(torch.mm(inner, A), mask))


class _Linears(torch.autograd.Function):
    """`forward` and `backward` as autograd wants them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, meta: tuple[tuple[float, float], ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1])
            outputs, thin, drawn = forward(flat, unpack(meta, tensors, x.dtype))
        ctx.save_for_backward(x, thin, *tensors, *drawn)
        ctx.meta = meta
        ctx.set_materialize_grads(False)
        return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, thin, *rest = ctx.saved_tensors
        count = len(ctx.meta)
        tensors, drawn = rest[: 4 * count], rest[4 * count :]
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1])
            sites = unpack(ctx.meta, tensors, x.dtype)
            dX, found = backward(flat, sites, grads, thin, drawn, Needs.of(ctx.needs_input_grad, count))
        return (None if dX is None else dX.view(x.shape), None, *as_parameters(found, tensors))


def as_parameters(found: Sequence[Tensor | None], tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients in the dtypes of what they are gradients of."""
    return [
        None if grad is None or tensor is None else grad.to(tensor.dtype)
        for grad, tensor in zip(found, tensors, strict=True)
    ]
