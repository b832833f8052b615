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
        outputs: tuple[Tensor, ...] = _Linears.apply(x, meta, *tensors)  # type: ignore[no-untyped-call]
        return outputs
    with torch.autocast(x.device.type, enabled=False):
        flat = x.reshape(-1, x.shape[-1])
        results, _, _ = forward(flat, unpack(meta, tensors, x.dtype))
    return tuple(shaped_like(x, result) for result in results)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on for x's device, else the dtype of x."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def unpack(meta: Sequence[tuple[float, float]], tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Operand]:
    """Operands in one dtype from the flat list that autograd wants."""
    cast = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
    fours = zip(cast[0::4], cast[1::4], cast[2::4], cast[3::4], meta, strict=True)
    return [Operand(W, b, A, B, scale, p) for W, b, A, B, (scale, p) in fours]


def stack_A(sites: Sequence[Operand]) -> Tensor | None:
    """All A of a call on top of each other: (R, i)."""
    found = [site.A for site in sites if site.A is not None]
    return None if not found else found[0] if len(found) == 1 else torch.cat(found)


def forward(
    x: Tensor, sites: Sequence[Operand], spend: bool = False
) -> tuple[list[Tensor], Tensor | None, list[Tensor]]:
    """Products without autograd.

    Args:
        x: (T, i), dtype of all operands.
        spend: nobody needs x any more, so that dropout may write into it. One site only.

    Returns:
        outputs (T, o) by site, the thin product x Aᵀ (T, R) or None, and what dropout drew by site (empty without).
    """
    masks = [dropping.draw(x, site.p) if site.p and site.A is not None else None for site in sites]
    drawn = [mask for mask in masks if mask is not None]
    if spend and drawn:
        return _forward_spending(x, sites[0], drawn)
    thin = _thin_product(x, sites, masks)
    outputs = [_output(x, part, site) for part, site in zip(columns(thin, sites), sites, strict=True)]
    return outputs, thin, drawn


def _forward_spending(
    x: Tensor, site: Operand, drawn: list[Tensor]
) -> tuple[list[Tensor], Tensor | None, list[Tensor]]:
    """`forward` of one site with dropout: the base's product first, then x is dropped in place."""
    assert site.A is not None and site.B is not None and site.W is not None
    out = F.linear(x, site.W, site.b)
    thin = torch.mm(dropping.drop_(x, drawn[0]), site.A.t())
    return [out.addmm_(thin, site.B.t(), alpha=site.scale / (1 - site.p))], thin, drawn


def columns(wide: Tensor | None, sites: Sequence[Operand]) -> list[Tensor | None]:
    """The columns (T, r) of a (T, R) that belong to each site; None for a site without an update."""
    ranks = [0 if site.A is None else site.A.shape[0] for site in sites]
    if wide is None:
        return [None] * len(sites)
    parts = torch.split(wide, ranks, dim=1)
    return [part if rank else None for rank, part in zip(ranks, parts, strict=True)]


def _output(x: Tensor, part: Tensor | None, site: Operand) -> Tensor:
    """(T, o): the update first, the base's product added to it: a pass over the output less than the other way round."""
    if part is None or site.B is None:
        assert site.W is not None
        return F.linear(x, site.W, site.b)
    alpha = site.scale / (1 - site.p)
    if site.b is None:
        out = torch.mm(part, site.B.t() if alpha == 1 else site.B.t() * alpha)
    else:
        out = torch.addmm(site.b, part, site.B.t(), alpha=alpha)
    return out if site.W is None else out.addmm_(x, site.W.t())


def _thin_product(x: Tensor, sites: Sequence[Operand], masks: Sequence[Tensor | None]) -> Tensor | None:
    """x Aᵀ of all sites, each with its own dropout: (T, R)."""
    stacked = stack_A(sites)
    if stacked is None:
        return None
    if all(mask is None for mask in masks):
        return torch.mm(x, stacked.t())
    thin = x.new_empty(x.shape[0], stacked.shape[0])
    for part, site, mask in zip(columns(thin, sites), sites, masks, strict=True):
        if part is not None and site.A is not None:
            torch.mm(x if mask is None else dropping.drop(x, mask), site.A.t(), out=part)
    return thin


def backward(
    x: Tensor,
    sites: Sequence[Operand],
    grads: Sequence[Tensor | None],
    thin: Tensor | None,
    drawn: Sequence[Tensor],
    needs: Needs,
    spend: bool = False,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients without autograd.

    Args:
        x: (T, i); sites, thin, drawn: as `forward` had and gave them.
        grads: (T, o) by site; None where an output was not used.
        needs: which gradients are wanted.
        spend: nobody needs x any more, as in `forward`.

    Returns:
        dX (T, i) or None, and the flat list dW, db, dA, dB by site, None where it is not needed.
    """
    grads = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
    waiting = iter(drawn)
    masks = [next(waiting) if site.p and site.A is not None else None for site in sites]
    inner = _inner_grads(sites, grads, thin)
    dX = _dX(x, sites, grads, inner, masks) if needs.x else None
    dW = [torch.mm(g.t(), x) if need and g is not None else None for g, need in zip(grads, needs.W, strict=True)]
    db = [g.sum(0) if need and g is not None else None for g, need in zip(grads, needs.b, strict=True)]
    dA = _dA(x, sites, inner, masks, spend) if needs.A else [None] * len(sites)
    dB = [_dB(site, g, part) for site, g, part in zip(sites, grads, columns(thin, sites), strict=True)]
    flat = [gradient for of_site in zip(dW, db, dA, dB, strict=True) for gradient in of_site]
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


def _inner_grads(sites: Sequence[Operand], grads: Sequence[Tensor | None], thin: Tensor | None) -> Tensor | None:
    """g (T, R): the gradient of x Aᵀ, scale and dropout's rescaling included."""
    if thin is None:
        return None
    inner = torch.empty_like(thin)
    for part, site, grad in zip(columns(inner, sites), sites, grads, strict=True):
        if part is None or site.B is None:
            continue
        if grad is None:
            part.zero_()
        else:
            alpha = site.scale / (1 - site.p)
            torch.mm(grad, site.B if alpha == 1 else site.B * alpha, out=part)
    return inner


def _dX(
    x: Tensor,
    sites: Sequence[Operand],
    grads: Sequence[Tensor | None],
    inner: Tensor | None,
    masks: Sequence[Tensor | None],
) -> Tensor:
    """Gradient of x (T, i): through the updates first, the base's products are added to it."""
    dX: Tensor | None = None
    stacked = stack_A(sites)
    if inner is not None and stacked is not None and all(mask is None for mask in masks):
        dX = torch.mm(inner, stacked)
    elif inner is not None:
        for part, site, mask in zip(columns(inner, sites), sites, masks, strict=True):
            if part is not None and site.A is not None:
                own = torch.mm(part, site.A)
                own = own if mask is None else dropping.drop_(own, mask)
                dX = own if dX is None else dX.add_(own)
    for site, grad in zip(sites, grads, strict=True):
        if grad is not None and site.W is not None:
            dX = torch.mm(grad, site.W) if dX is None else dX.addmm_(grad, site.W)
    return torch.zeros_like(x) if dX is None else dX


def _dA(
    x: Tensor, sites: Sequence[Operand], inner: Tensor | None, masks: Sequence[Tensor | None], spend: bool
) -> list[Tensor | None]:
    """Gradients of A (r, i) by site; without dropout they are one product."""
    if inner is None:
        return [None] * len(sites)
    if all(mask is None for mask in masks):
        whole = torch.mm(inner.t(), x)
        return [None if part is None else part.t() for part in columns(whole.t(), sites)]
    drop = dropping.drop_ if spend else dropping.drop
    found: list[Tensor | None] = []
    for part, mask in zip(columns(inner, sites), masks, strict=True):
        found.append(None if part is None else torch.mm(part.t(), x if mask is None else drop(x, mask)))
    return found


def _dB(site: Operand, grad: Tensor | None, part: Tensor | None) -> Tensor | None:
    """Gradient of B (o, r); as a transposed product, which is the faster way round."""
    if grad is None or part is None:
        return None
    return torch.mm(part.t(), grad).mul_(site.scale / (1 - site.p)).t()


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
        return tuple(shaped_like(x, out) for out in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.spent = True  # results that nobody asked for yet can't be used any more
        x, thin, *rest = ctx.saved_tensors
        count = len(ctx.meta)
        tensors, drawn = rest[: 4 * count], rest[4 * count :]
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled():
                outputs = by_autograd(x, unpack(ctx.meta, tensors, x.dtype), drawn)
                return differentiable(outputs, grads, (x, None, *tensors), ctx.needs_input_grad)
            flat = x.reshape(-1, x.shape[-1])
            sites = unpack(ctx.meta, tensors, x.dtype)
            dX, found = backward(flat, sites, grads, thin, drawn, Needs.of(ctx.needs_input_grad, count))
        return (None if dX is None else dX.view(x.shape), None, *as_parameters(found, tensors))


def shaped_like(x: Tensor, out: Tensor) -> Tensor:
    """(T, o) as (..., o). Not a view: autograd forbids in-place changes of a view that a function returns."""
    return out if x.dim() == 2 else torch.ops.aten._unsafe_view(out, [*x.shape[:-1], out.shape[-1]])


def by_autograd(x: Tensor, sites: Sequence[Operand], drawn: Sequence[Tensor]) -> list[Tensor]:
    """The outputs (..., o) by operations that autograd knows, with what dropout drew in the forward."""
    waiting, flat = iter(drawn), x.reshape(-1, x.shape[-1])
    outputs = []
    for site in sites:
        out = None if site.W is None else F.linear(flat, site.W, site.b)
        if site.A is not None and site.B is not None:
            inner = dropping.drop(flat, next(waiting)) if site.p else flat
            update = F.linear(F.linear(inner, site.A), site.B) * (site.scale / (1 - site.p))
            out = update if out is None else out + update
        assert out is not None
        outputs.append(out.view(*x.shape[:-1], out.shape[-1]))
    return outputs


def differentiable(
    outputs: Sequence[Tensor], grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated again (``create_graph=True``), by autograd itself.

    Args:
        outputs: computed again from ``inputs``; ``grads``: theirs.
        needs: which inputs want one.
    """
    used = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None and out.requires_grad]
    wanted = [tensor for tensor, need in zip(inputs, needs, strict=True) if need and tensor is not None]
    found = iter(torch.autograd.grad([out for out, _ in used], wanted, [grad for _, grad in used],
                                     create_graph=True, allow_unused=True))  # fmt: skip
    return tuple(
        next(found) if need and tensor is not None else None for tensor, need in zip(inputs, needs, strict=True)
    )


def as_parameters(found: Sequence[Tensor | None], tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients in the dtypes of what they are gradients of."""
    return [
        None if grad is None or tensor is None else grad.to(tensor.dtype)
        for grad, tensor in zip(found, tensors, strict=True)
    ]
