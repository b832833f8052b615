"""What happens at the sites in one optimizer step, in numbers: sizes of ΔW and of its change, of factors and gradients, effective rank.

Sites of one shape are computed together, from Gram matrices of the factors (r × r); the dense ΔW is never made. Nothing is written
into the model. Shapes: n blocks of a site (experts, groups), r rank, i columns, o rows; a leading s: sites of one shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft.core.bank import Bank
from weft.core.resizing import blocks_of, rank_of
from weft.core.site import Site
from weft.core.slots import Slot
from weft.errors import ShapeError

__all__ = ["Before", "bank_of", "site_numbers", "trained_slots", "weight_norms"]

Slots = Mapping[str, tuple[Site, Slot]]


def bank_of(model: Any) -> Bank | None:
    """The bank on a model, wrapped or not; None: there is none."""
    modules = model.modules() if hasattr(model, "modules") else ()
    return next((module.__dict__["_weft_bank"] for module in modules if "_weft_bank" in module.__dict__), None)


def trained_slots(bank: Bank | None) -> dict[str, tuple[Site, Slot]]:
    """The sites of the adapter that is in use, where it is one that is trained; empty otherwise."""
    if bank is None or bank.current is None:
        return {}
    member = bank._member(bank.current)
    if not all(isinstance(slot, Slot) for slot in member.sites.values()):
        return {}
    found = bank.slots(bank.current)
    return {path: pair for path, pair in found.items() if pair[1].lora_B.requires_grad}


class Before:
    """The factors before a step, and the sizes of their gradients.

    Args:
        zeros: count gradients that are exactly zero too.
    """

    @torch.no_grad()
    def __init__(self, slots: Slots, zeros: bool = False) -> None:
        self.groups = {key: (paths, *_stacked(slots, paths)) for key, paths in _by_shape(slots).items()}
        leaves = [leaf for _, slot in slots.values() for leaf in (slot.lora_A, slot.lora_B)]
        grads = [torch.zeros(1) if leaf.grad is None else leaf.grad.detach() for leaf in leaves]
        norms = [float(norm) for norm in torch.stack(_norms(grads)).tolist()]
        self.gradients = dict(zip(slots, zip(norms[::2], norms[1::2], strict=True), strict=True))
        self.zeros: dict[str, float] = {}
        if zeros:
            of_B = grads[1::2]  # that of A is zero by itself until B moves
            counts = [1.0 - float(torch.count_nonzero(grad)) / grad.numel() for grad in of_B]
            self.zeros = dict(zip(slots, counts, strict=True))


@torch.no_grad()
def site_numbers(slots: Slots, before: Before) -> dict[str, dict[str, float]]:
    """Numbers by site after a step, see `weft.diagnosis.record`; floats of six digits."""
    found: dict[str, dict[str, float]] = {}
    for paths, A, B in before.groups.values():
        new_A, new_B = _stacked(slots, paths)
        if new_A.shape != A.shape:
            continue  # ranks changed in between
        columns = _columns(A, B, new_A, new_B)
        for index, path in enumerate(paths):
            site, slot = slots[path]
            scale = abs(slot.scale)
            delta, update, size_A, size_B, effective = (column[index] for column in columns)
            grad_A, grad_B = before.gradients[path]
            row = {"delta": scale * delta, "update": scale * update, "A": size_A, "B": size_B, "gradient_A": grad_A, "gradient_B": grad_B,
                   "rank": rank_of(site, slot), "effective_rank": effective}  # fmt: skip
            if path in before.zeros:
                row["gradient_zero"] = before.zeros[path]
            found[path] = {
                name: value if isinstance(value, int) else float(f"{value:.6g}") for name, value in row.items()
            }
    return {path: found[path] for path in slots if path in found}


@torch.no_grad()
def weight_norms(slots: Slots) -> dict[str, float]:
    """Frobenius norms of the weights that are adapted, where they are there and not packed."""
    found = {}
    for path, (site, _) in slots.items():
        weight = site.weight.detach()
        if weight.device.type == "meta" or not weight.is_floating_point():
            continue
        try:
            site.oriented(weight)
        except ShapeError:
            if site.groups == 1:
                continue
        wide = torch.promote_types(weight.dtype, torch.float32)
        found[path] = float(f"{float(torch.linalg.vector_norm(weight, dtype=wide)):.6g}")
    return found


def _by_shape(slots: Slots) -> dict[Any, list[str]]:
    groups: dict[Any, list[str]] = {}
    for path, (_, slot) in slots.items():
        A, B = slot.lora_A, slot.lora_B
        groups.setdefault(
            (A.shape, B.shape, A.dtype, A.device, slots[path][0].groups, slots[path][0].transposed), []
        ).append(path)
    return groups


def _stacked(slots: Slots, paths: list[str]) -> tuple[Tensor, Tensor]:
    """A (s, n, r, i) and B (s, n, o, r), copied."""
    pairs = [blocks_of(*slots[path]) for path in paths]
    return torch.stack([A for A, _ in pairs]), torch.stack([B for _, B in pairs])


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    devices = {tensor.device for tensor in tensors}
    if len(devices) == 1:
        return [norm.float() for norm in torch._foreach_norm(tensors)]
    return [tensor.norm().float().cpu() for tensor in tensors]


def _columns(A: Tensor, B: Tensor, new_A: Tensor, new_B: Tensor) -> tuple[list[float], ...]:
    """‖BA‖, ‖B'A' − BA‖, ‖A'‖, ‖B'‖ and effective rank, a list over the sites each.

    B'A' − BA is (B' − B)A' + B(A' − A), the product of two factors of twice the rank: nothing large cancels.
    """
    inner, outer = _gram(new_A), _gram(new_B.mT)
    left = torch.cat([(new_B - B).mT, B.mT], dim=-2)
    right = torch.cat([new_A, new_A - A], dim=-2)
    update = (_gram(left) * _gram(right)).sum((-3, -2, -1)).clamp_min(0).sqrt()
    values = _singular_values(inner, outer)
    delta = values.square().sum((-2, -1)).sqrt()
    size_A, size_B = (gram.diagonal(dim1=-2, dim2=-1).sum((-2, -1)).clamp_min(0).sqrt() for gram in (inner, outer))
    return tuple(column.tolist() for column in torch.stack([delta, update, size_A, size_B, _effective(values)]).cpu())


def _gram(rows: Tensor) -> Tensor:
    """(…, r, r) products of rows, in float64; multiplied in at least float32."""
    wide = rows if rows.dtype == torch.float64 else rows.float()
    return (wide @ wide.mT).double()


def _singular_values(inner: Tensor, outer: Tensor) -> Tensor:
    """(s, n, r) singular values of BA from A Aᵀ and Bᵀ B: those under a 3000th of the largest are rounding; NaN where a factor is."""
    finite = (torch.isfinite(inner).all(-1) & torch.isfinite(outer).all(-1)).all(-1)[..., None, None]
    values, vectors = torch.linalg.eigh(torch.where(finite, inner, 0.0))
    half = vectors * values.clamp_min(0).sqrt()[..., None, :]
    product = half.mT @ torch.where(finite, outer, 0.0) @ half
    finite = finite & torch.isfinite(product).flatten(-2).all(-1)[..., None, None]
    found = torch.linalg.eigvalsh(torch.where(finite, product, 0.0)).clamp_min(0).sqrt()
    return torch.where(finite[..., 0], found, math.nan)


def _effective(values: Tensor) -> Tensor:
    """(s,) the exponential of the entropy of the singular values, a mean over blocks; 0 of a zero update."""
    total = values.sum(-1, keepdim=True)
    shares = (values / total).nan_to_num(0.0)
    return (torch.special.entr(shares).sum(-1).exp() * (total[..., 0] > 0)).mean(-1)
