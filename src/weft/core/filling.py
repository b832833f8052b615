"""Slots from initialisations and from adapters, and back: a layer's forward wants A and B in its own shapes, a value has matrices.

This module doesn't place anything in a model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.core.adapted import row_norms
from weft.core.factors import Factors, compact_groups, spread_groups
from weft.core.members import FixedSlot
from weft.core.site import Site
from weft.core.slots import Slot
from weft.core.starts import Start
from weft.spec import LoraSpec

__all__ = ["loaded_slot", "snapshot", "start_slot", "to_cpu"]


def to_cpu(tensor: Tensor) -> Tensor:
    """A copy on the CPU that nothing else holds."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def start_slot(site: Site, spec: LoraSpec, start: Start) -> Slot:
    """A trainable slot from an initialisation."""
    A, B = _native(site, start.A, start.B)
    magnitude = _norms(site).to(A.dtype) if spec.dora else None
    bias = B.new_zeros(site.d_out) if spec.lora_bias else None
    pair = None
    if start.start_A is not None and start.start_B is not None:
        pair = _native(site, start.start_A, start.start_B)
    scale = start.scale
    return Slot(A, B, scale, magnitude=magnitude, bias=bias, dropout=spec.dropout, start=pair)


def loaded_slot(site: Site, factors: Factors, dropout: float, trainable: bool, dtype: torch.dtype) -> Slot:
    """A slot with a copy of an adapter's tensors, on the device of the site's weight."""
    moved = factors.map(lambda tensor: tensor.detach().to(site.weight.device, dtype, copy=True))
    A, B = _native(site, moved.A, moved.B)
    return Slot(
        A,
        B,
        factors.scale,
        magnitude=moved.magnitude,
        bias=moved.bias,
        dropout=dropout,
        trainable=trainable,
    )


def _native(site: Site, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    if site.kind != "conv":
        return (A[None], B[None]) if site.experts and A.dim() == 2 else (A, B)
    return A.reshape(A.shape[0], -1, *site.kernel), compact_groups(B, site.groups)


def snapshot(site: Site, slot: Slot | FixedSlot) -> Factors:
    """A snapshot of a slot; a starting product becomes part of the factors (rank 2r)."""
    A, B = (to_cpu(tensor) for tensor in slot.pair())
    if site.kind == "conv":
        A, B = A.flatten(1), spread_groups(B.flatten(1), site.groups)
    magnitude, bias = slot.magnitude, slot.bias
    return Factors(
        A, B, slot.scale, "attention" if site.host is not None else site.kind, site.kernel,
        None if magnitude is None else to_cpu(magnitude),
        None if bias is None else to_cpu(bias),
        site.groups,
    )  # fmt: skip


def _norms(site: Site) -> Tensor:
    """‖W‖ by output: DoRA's magnitude at the start."""
    weight = site.weight.detach()
    weight = weight.t() if site.transposed else weight
    zero = weight.new_zeros(1, 1)
    return row_norms(weight, zero.expand(1, weight.flatten(1).shape[1]), zero.expand(weight.shape[0], 1), 1.0)
