"""Linear sites of a mixed batch: rows of different adapters in one pass, forward and backward.

    y_i[n] = x[n] W_iᵀ + b_i + (x[n] A_i[u]ᵀ ∘ s_i[u]) B_i[u]        u: the unit of row n

A batch is rows of equally many tokens (in a packed batch every token is a row). Which of them are computed by one product, and how, is for
`weft.core.units`; rows in no block get the base alone. `reference_blocks` is the slow, obvious form:
a loop over the units.

Shapes: N rows, L tokens a row, U units of a block, c rows of a unit, i = d_in, o = d_out, R = sum of the ranks of the sites of a call.
This module does not know modules, slots or routes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.core import dropout as dropping
from weft.core import ops
from weft.core.units import Block, Loaded, add_product, by_row, outer, product, units

__all__ = ["Masks", "gated", "reference_blocks", "routed_linears", "turned"]


LONG = 256
"""From so many tokens on, the base's product is added to the update, which saves a pass over the output; below, calls count more."""

WIDE = 1024
"""Above so many outputs a batched product with many tokens is twice as fast with B turned round, also when that is done each time."""


Masks = Callable[[Tensor], list[Tensor | None]]
"""What dropout draws for (T, i): by site positions or a mask, see `weft.core.dropout.draw`; None where nothing is dropped."""


def reference_blocks(
    x: Tensor, bases: Sequence[tuple[Tensor | None, Tensor | None]], blocks: Sequence[Loaded],
    drawn: Sequence[Tensor | None] = (),
) -> list[Tensor]:  # fmt: skip
    """The slow, obvious form: one unit after another, by operations that autograd knows.

    Args:
        x: (N, L, i).
        bases: W (o, i) and bias (o,) by site; W None: the update alone.
        blocks: rows and factors. drawn: by site what dropout drew for (N * L, i), not rescaled.

    Returns:
        by site (N, L, o).
    """
    results = []
    for site, (W, b) in enumerate(bases):
        mask = drawn[site] if drawn else None
        inner = x if mask is None else dropping.drop(x.reshape(-1, x.shape[-1]), mask).view(x.shape)
        found: dict[int, Tensor] = {}
        turned = next((B for item in blocks if (B := item.B[site]) is not None), None)
        assert W is not None or turned is not None
        width = W.shape[0] if W is not None else turned.shape[2]  # type: ignore[union-attr]
        for item in blocks:
            B = item.B[site]
            if B is None:
                continue
            first = sum(item.block.ranks[:site])
            columns = slice(first, first + item.block.ranks[site])
            numbers = _numbers(item.block.rows, x.shape[0])
            for unit, mine in enumerate(item.block.slices()):
                for row in numbers[mine]:
                    thin = F.linear(inner[row], item.A[unit, columns])
                    thin = thin if item.scale is None else thin * item.scale[unit, :, columns]
                    found[row] = thin @ B[unit]
        none = x.new_zeros(x.shape[1], width)
        update = torch.stack([found.get(row, none) for row in range(x.shape[0])])
        results.append(update if W is None else F.linear(x, W, b) + update)
    return results


def _numbers(rows: tuple[int, int] | Tensor | None, count: int) -> list[int]:
    if rows is None:
        return list(range(count))
    return list(range(*rows)) if isinstance(rows, tuple) else rows.tolist()


def routed_linears(
    x: Tensor, bases: Sequence[tuple[Tensor | None, Tensor | None]], blocks: Sequence[Loaded], masks: Masks | None = None,
    widths: Sequence[int] = (),
) -> tuple[Tensor, ...]:  # fmt: skip
    """Several linear maps of one mixed batch.

    Args:
        x: (N, L, i) in the compute dtype, contiguous.
        bases: W (o, i) and bias (o,) by site; W None: the update alone.
        blocks: rows and factors, in the compute dtype. A row is in one block at most.
        masks: draws dropout, or None. Its rescaling belongs to the factors' scale.
        widths: o by site.

    Returns:
        by site (N, L, o).
    """
    factors = [tensor for item in blocks for tensor in (item.A, item.scale, *item.B)]
    given = [tensor for pair in bases for tensor in pair]
    wants = torch.is_grad_enabled() and (
        x.requires_grad or any(t is not None and t.requires_grad for t in (*factors, *given))
    )
    if wants:
        meta = (tuple(item.block for item in blocks), tuple(widths), masks)
        outputs: tuple[Tensor, ...] = _Routed.apply(x, meta, *given, *factors)  # type: ignore[no-untyped-call]
        return outputs
    with torch.autocast(x.device.type, enabled=False):
        drawn = masks(x.view(-1, x.shape[-1])) if masks is not None else []
        return tuple(forward(x, bases, blocks, widths, drawn)[0])


def forward(
    x: Tensor, bases: Sequence[tuple[Tensor | None, Tensor | None]], blocks: Sequence[Loaded], widths: Sequence[int],
    drawn: Sequence[Tensor | None],
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Products without autograd: outputs by site, and the (scaled) thin products (U, c * L, R) by block."""
    thins = [_thin(x, item, drawn) for item in blocks]
    whole = len(blocks) == 1 and blocks[0].block.rows is None
    outputs, firsts = [], [0] * len(blocks)
    for number, ((W, b), width) in enumerate(zip(bases, widths, strict=True)):
        parts = []
        for index, (item, thin) in enumerate(zip(blocks, thins, strict=True)):
            rank = item.block.ranks[number]
            parts.append(thin if rank == thin.shape[2] else thin[:, :, firsts[index] : firsts[index] + rank])
            firsts[index] += rank
        B = blocks[0].B[number] if whole else None
        if B is not None and W is not None and b is None and x.shape[0] * x.shape[1] >= LONG:
            outputs.append(_update_first(x, W, blocks[0].block, parts[0], B))
            continue
        out = F.linear(x, W, b) if W is not None else x.new_zeros(*x.shape[:2], width)
        for item, part in zip(blocks, parts, strict=True):
            mine = item.B[number]
            if mine is not None:
                add_product(out, item.block, part, mine)
        outputs.append(out)
    return outputs, thins


def _update_first(x: Tensor, W: Tensor, block: Block, part: Tensor, B: Tensor) -> Tensor:
    """The update of all rows, and the base's product added to it: a pass over the output less than the other way round."""
    out = product(block, part, turned(B)).view(*x.shape[:2], B.shape[2])
    out.view(-1, B.shape[2]).addmm_(x.view(-1, x.shape[2]), W.t())
    return out


def turned(B: Tensor) -> Tensor:
    """B (U, r, o) in the order of memory in which a batched product with many tokens is fast: turned round where o is large."""
    return B.mT.contiguous().mT if B.shape[2] > WIDE else B


def _thin(x: Tensor, item: Loaded, drawn: Sequence[Tensor | None]) -> Tensor:
    """(U, c * L, R): x Aᵀ, scaled; each site with its own dropout."""
    block = item.block
    if not any(mask is not None for mask in drawn):
        thin = product(block, units(x, block), item.A.mT)
    else:
        flat = x.view(-1, x.shape[-1])
        parts, first = [], 0
        for mask, rank in zip(drawn, block.ranks, strict=True):
            if rank:
                inner = x if mask is None else dropping.drop(flat, mask).view(x.shape)
                parts.append(product(block, units(inner, block), item.A[:, first : first + rank].mT))
            first += rank
        thin = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return thin if item.scale is None else thin.mul_(by_row(block, item.scale))


class _Routed(torch.autograd.Function):
    """`forward` and its backward as autograd wants them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, meta: Any, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        blocks, widths, masks = meta
        bases, loaded = _unpack(blocks, len(widths), tensors)
        with torch.autocast(x.device.type, enabled=False):
            drawn = masks(x.view(-1, x.shape[-1])) if masks is not None else [None] * len(widths)
            outputs, thins = forward(x, bases, loaded, widths, drawn)
        ctx.save_for_backward(x, *tensors, *thins, *drawn)
        ctx.blocks, ctx.widths = blocks, widths
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.spent = True
        x, *rest = ctx.saved_tensors
        sites, count = len(ctx.widths), len(rest) - len(ctx.blocks) - len(ctx.widths)
        tensors, thins, drawn = rest[:count], rest[count : count + len(ctx.blocks)], rest[count + len(ctx.blocks) :]
        bases, loaded = _unpack(ctx.blocks, sites, tensors)
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled():
                outputs = reference_blocks(x, bases, loaded, drawn)
                return ops.differentiable(outputs, grads, (x, None, *tensors), ctx.needs_input_grad)
            return _backward(x, bases, loaded, thins, drawn, grads, ctx.needs_input_grad)


def _unpack(blocks: Sequence[Block], sites: int, tensors: Sequence[Tensor | None]) -> tuple[Any, list[Loaded]]:
    bases = list(zip(tensors[0 : 2 * sites : 2], tensors[1 : 2 * sites : 2], strict=True))
    loaded, at = [], 2 * sites
    for block in blocks:
        A, scale, *B = tensors[at : at + 2 + sites]
        assert A is not None
        loaded.append(Loaded(block, A, tuple(B), scale))
        at += 2 + sites
    return bases, loaded


def _backward(
    x: Tensor, bases: Sequence[tuple[Tensor | None, Tensor | None]], blocks: Sequence[Loaded], thins: Sequence[Tensor],
    drawn: Sequence[Tensor | None], grads: Sequence[Tensor | None], needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dX, None, then W, b by site, then A, scale, B… by block."""
    grads = [None if grad is None else grad.contiguous() for grad in grads]
    flats = [None if grad is None else grad.view(-1, grad.shape[-1]) for grad in grads]
    flat = x.view(-1, x.shape[-1])
    found: list[Tensor | None] = []
    for site, grad in enumerate(flats):
        found.append(torch.mm(grad.t(), flat) if needs[2 + 2 * site] and grad is not None else None)
        found.append(grad.sum(0) if needs[3 + 2 * site] and grad is not None else None)
    dropped = [None if mask is None else dropping.drop(flat, mask).view(x.shape) for mask in drawn]
    inners, rest = [], []
    for item, thin in zip(blocks, thins, strict=True):
        inner, dB = _inner_grads(item, thin, grads)
        inners.append(inner)
        rest += [_dA(x, item, inner, dropped), None, *dB]
    dX = _dX(x, bases, blocks, inners, flats, drawn) if needs[0] else None
    return (dX, None, *found, *rest)


def _dX(
    x: Tensor, bases: Sequence[tuple[Tensor | None, Tensor | None]], blocks: Sequence[Loaded], inners: Sequence[Tensor],
    flats: Sequence[Tensor | None], drawn: Sequence[Tensor | None],
) -> Tensor:  # fmt: skip
    """Gradient of x: through the updates first where they are of all rows, the base's products are added to it."""
    total: Tensor | None = None
    plain = all(mask is None for mask in drawn)
    first = plain and len(blocks) == 1 and blocks[0].block.rows is None
    if first:
        total = product(blocks[0].block, inners[0], turned(blocks[0].A)).view(-1, x.shape[2])
    for (W, _), grad in zip(bases, flats, strict=True):
        if grad is not None and W is not None:
            total = torch.mm(grad, W) if total is None else total.addmm_(grad, W)
    dX = torch.zeros_like(x) if total is None else total.view(x.shape)
    for item, inner in zip(() if first else blocks, () if first else inners, strict=True):
        if plain:
            add_product(dX, item.block, inner, item.A)
            continue
        for mask, columns in zip(drawn, _columns(item.block), strict=True):
            if columns.stop == columns.start:
                continue
            if mask is None:
                add_product(dX, item.block, inner[:, :, columns], item.A[:, columns])
            else:
                own = torch.zeros_like(x)
                add_product(own, item.block, inner[:, :, columns], item.A[:, columns])
                dX += dropping.drop_(own.view(-1, x.shape[-1]), mask).view(x.shape)
    return dX


def _columns(block: Block) -> list[slice]:
    """Columns of a thin product by site."""
    ends = list(itertools.accumulate(block.ranks))
    return [slice(end - rank, end) for end, rank in zip(ends, block.ranks, strict=True)]


def _inner_grads(item: Loaded, thin: Tensor, grads: Sequence[Tensor | None]) -> tuple[Tensor, list[Tensor | None]]:
    """The gradient of x Aᵀ (U, c * L, R), scaled, and those of the B's."""
    block = item.block
    inner = torch.empty_like(thin)
    dB: list[Tensor | None] = []
    for grad, B, columns in zip(grads, item.B, _columns(block), strict=True):
        if B is None:
            dB.append(None)
        elif grad is None:
            inner[:, :, columns] = 0
            dB.append(None)
        else:
            mine = units(grad, block)
            inner[:, :, columns] = product(block, mine, B.mT)
            dB.append(outer(block, thin[:, :, columns], mine))
    if item.scale is not None:
        inner.mul_(by_row(block, item.scale))
    return inner, dB


def _dA(x: Tensor, item: Loaded, inner: Tensor, dropped: Sequence[Tensor | None]) -> Tensor:
    """Gradient of A (U, R, i)."""
    block = item.block
    if all(without is None for without in dropped):
        return outer(block, inner, units(x, block))
    dA = torch.empty_like(item.A)
    for without, columns in zip(dropped, _columns(block), strict=True):
        if columns.stop > columns.start:
            dA[:, columns] = outer(block, inner[:, :, columns], units(x if without is None else without, block))
    return dA


def gated(
    gate: Tensor, up: Tensor, base: tuple[Tensor, Tensor | None], blocks: Sequence[Loaded], masks: Masks | None, width: int
) -> Tensor:  # fmt: skip
    """``down(silu(gate) * up)`` of a mixed batch: (N, L, i), (N, L, i) -> (N, L, o). What is between is computed again in the backward."""
    factors = [tensor for item in blocks for tensor in (item.A, item.scale, *item.B)]
    meta = (tuple(item.block for item in blocks), (width,), masks)
    result: Tensor = _Gated.apply(gate, up, meta, *base, *factors)  # type: ignore[no-untyped-call]
    return result


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, meta: Any, *tensors: Tensor | None) -> Tensor:
        blocks, widths, masks = meta
        bases, loaded = _unpack(blocks, 1, tensors)
        with torch.autocast(gate.device.type, enabled=False):
            hidden = F.silu(gate).mul_(up)
            drawn = masks(hidden.view(-1, hidden.shape[-1])) if masks is not None else [None]
            outputs, thins = forward(hidden, bases, loaded, widths, drawn)
        ctx.save_for_backward(gate, up, *tensors, *thins, *drawn)
        ctx.blocks = blocks
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, *rest = ctx.saved_tensors
        count = len(rest) - len(ctx.blocks) - 1
        tensors, thins, drawn = rest[:count], rest[count:-1], rest[-1:]
        bases, loaded = _unpack(ctx.blocks, 1, tensors)
        needs = ctx.needs_input_grad
        with torch.autocast(gate.device.type, enabled=False):
            if torch.is_grad_enabled():
                outputs = reference_blocks(F.silu(gate) * up, bases, loaded, drawn)
                return ops.differentiable(outputs, (grad,), (gate, up, None, *tensors), needs)
            activated = F.silu(gate)
            found = _backward(activated * up, bases, loaded, thins, drawn, (grad,), (True, False, *needs[3:]))
            inside = found[0]
            assert inside is not None
            dup = activated.mul_(inside)
            dgate = torch.ops.aten.silu_backward(inside.mul_(up), gate)
        return (dgate, dup, None, *found[2:])
