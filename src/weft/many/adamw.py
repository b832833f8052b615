"""AdamW over stacked factors: every line of a matrix belongs to an adapter, which has its own rate, step count and clipping.

A few operations a matrix, however many adapters it holds. `reference_adamw` is the slow, obvious form: torch's AdamW for each
adapter's lines by themselves.

Shapes: R lines, d columns, S slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

__all__ = ["BETAS", "EPSILON", "Lines", "Rates", "clip_", "move_", "norms_by_slot", "reference_adamw"]

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Those of `transformers.TrainingArguments`."""


@dataclass(frozen=True)
class Lines:
    """One stacked matrix and what its optimizer needs.

    Attributes:
        value, grad, first, second: (R, d): the factors, their gradient, and Adam's moments.
        owner: (R,) slot of each line.
        part: ``"A"``, ``"B"``, ``"magnitude"`` or ``"bias"``.
    """

    value: Tensor
    grad: Tensor
    first: Tensor
    second: Tensor
    owner: Tensor
    part: str


@dataclass(frozen=True)
class Rates:
    """What every slot's step is: (S,) float64 each.

    Attributes:
        rate: learning rate, 0 for a slot that is not moved. ratio: of B's rate over it.
        decay: weight decay. steps: how many steps it will have done after this one.
    """

    rate: Tensor
    ratio: Tensor
    decay: Tensor
    steps: Tensor


def norms_by_slot(lines: Sequence[Lines], slots: int) -> Tensor:
    """The norm of each slot's whole gradient: (S,), at least float32."""
    if not lines:
        return torch.zeros(slots)
    wide = torch.promote_types(lines[0].grad.dtype, torch.float32)
    squares = torch.zeros(slots, dtype=wide, device=lines[0].grad.device)
    for item in lines:
        squares.index_add_(0, item.owner, torch.linalg.vector_norm(item.grad, dim=1, dtype=wide).square_())
    return squares.sqrt_()


def clip_(lines: Sequence[Lines], norms: Tensor, clips: Tensor) -> None:
    """Scale each slot's gradient to its largest norm, as `torch.nn.utils.clip_grad_norm_` does for one.

    Args:
        norms, clips: (S,); a clip of 0 scales nothing.
    """
    factor = torch.where(clips > 0, clips.to(norms.dtype) / (norms + 1e-6), torch.ones_like(norms)).clamp_(max=1.0)
    if bool((factor == 1).all()):
        return
    columns = _Columns(factor)
    for item in lines:
        item.grad.mul_(columns(item.owner).to(item.grad.dtype))


@torch.no_grad()
def move_(lines: Sequence[Lines], rates: Rates) -> None:
    """One step of AdamW. Slots with a rate of 0 and no gradient stay as they are.

    Where all slots that move have the same rates, decay and count of steps, which is the usual case, torch's fused kernel makes one
    pass over everything; else the columns of `_move_apart` do.
    """
    moving = rates.rate > 0
    same = all(len(set(values[moving].tolist())) <= 1 for values in (rates.rate, rates.ratio, rates.decay, rates.steps))
    if not same or not bool(moving.any()) or not _all_move(lines, moving):
        _move_apart(lines, rates)
        return
    rate, ratio, decay, steps = (
        float(values[moving][0]) for values in (rates.rate, rates.ratio, rates.decay, rates.steps)
    )
    for part_rate, part_decay, parts in (
        (rate, decay, ("A",)),
        (rate * ratio, decay, ("B",)),
        (rate, 0.0, ("magnitude", "bias")),
    ):
        some = [item for item in lines if item.part in parts]
        if some:
            adamw(
                [item.value for item in some], [item.grad for item in some], [item.first for item in some], [item.second for item in some],
                [], [torch.tensor(steps - 1, device=item.value.device) for item in some], fused=True, amsgrad=False, beta1=BETAS[0],
                beta2=BETAS[1], lr=part_rate, weight_decay=part_decay, eps=EPSILON, maximize=False,
            )  # fmt: skip


def _all_move(lines: Sequence[Lines], moving: Tensor) -> bool:
    """Whether every line belongs to a slot that moves."""
    known: dict[int, bool] = {}
    for item in lines:
        if item.owner.data_ptr() not in known:
            known[item.owner.data_ptr()] = bool(moving[item.owner].all())
    return all(known.values())


@torch.no_grad()
def _move_apart(lines: Sequence[Lines], rates: Rates) -> None:
    """AdamW with columns of rates: each line has its own.

    Source:
        Loshchilov and Hutter 2019, arXiv:1711.05101; operation by operation `torch.optim.AdamW`.
    """
    first_bias = 1 - BETAS[0] ** rates.steps
    second_bias = (1 - BETAS[1] ** rates.steps).sqrt()
    plain, raised = rates.rate, rates.rate * rates.ratio
    tables = {
        part: (
            _Columns(1 - rate * (rates.decay if decays else 0.0)),
            _Columns(rate / first_bias),
            _Columns(second_bias),
        )
        for part, rate, decays in (
            ("A", plain, True),
            ("B", raised, True),
            ("magnitude", plain, False),
            ("bias", plain, False),
        )
    }
    for item in lines:
        shrink, stride, scale = (table(item.owner).to(item.value.dtype) for table in tables[item.part])
        item.first.lerp_(item.grad, 1 - BETAS[0])
        item.second.mul_(BETAS[1]).addcmul_(item.grad, item.grad, value=1 - BETAS[1])
        item.value.mul_(shrink)
        spread = item.second.sqrt().div_(scale).add_(EPSILON)
        item.value.sub_(spread.reciprocal_().mul_(item.first).mul_(stride))


class _Columns:
    """Values of slots as columns (R, 1) for lines; each set of owners is looked up once."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._known: dict[int, Tensor] = {}

    def __call__(self, owner: Tensor) -> Tensor:
        found = self._known.get(owner.data_ptr())
        if found is None or len(found) != len(owner):
            found = self._known[owner.data_ptr()] = self.values[owner][:, None]
        return found


def reference_adamw(
    lines: Sequence[Lines], rates: Rates, clips: Mapping[int, float], states: dict[int, torch.optim.AdamW]
) -> None:
    """The same by torch's own AdamW, slot by slot. For tests.

    Args:
        states: of earlier calls, by slot; empty at the first.
    """
    for slot, clip in clips.items():
        if slot not in states:
            groups = [{"params": [torch.nn.Parameter(item.value[item.owner == slot].clone())]} for item in lines]
            states[slot] = torch.optim.AdamW(groups, betas=BETAS, eps=EPSILON)
        optimizer = states[slot]
        parameters = [group["params"][0] for group in optimizer.param_groups]
        for parameter, group, item in zip(parameters, optimizer.param_groups, lines, strict=True):
            parameter.grad = item.grad[item.owner == slot].clone()
            ratio = float(rates.ratio[slot]) if item.part == "B" else 1.0
            group["lr"] = float(rates.rate[slot]) * ratio
            group["weight_decay"] = float(rates.decay[slot]) if item.part in ("A", "B") else 0.0
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        for parameter, item in zip(parameters, lines, strict=True):
            item.value[item.owner == slot] = parameter.detach()
