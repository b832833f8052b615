"""AdamW over stacks: each slot gets the step that torch's AdamW gives it alone."""

from __future__ import annotations

import pytest
import torch

from tests.tolerances import assert_close
from weft.many.adamw import Lines, Rates, clip_, move_, norms_by_slot, reference_adamw

SLOTS = 5


def stacks(dtype: torch.dtype) -> list[Lines]:
    """Ragged lines in any order; slot 3 is empty."""
    found = []
    for part, width in (("A", 7), ("B", 4), ("A", 3), ("magnitude", 6), ("bias", 2)):
        owner = torch.tensor([0, 0, 1, 2, 2, 2, 4, 4]) if part in "AB" else torch.tensor([0, 1, 2, 4])
        owner = owner[torch.randperm(len(owner))]
        value = torch.randn(len(owner), width, dtype=dtype)
        found.append(
            Lines(value, torch.randn_like(value), torch.zeros_like(value), torch.zeros_like(value), owner, part)
        )
    return found


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_slot_moves_as_if_it_were_alone(dtype: torch.dtype, alike: bool) -> None:
    lines = stacks(dtype)
    copies = [
        Lines(*(tensor.clone() for tensor in (item.value, item.grad, item.first, item.second, item.owner)), item.part)
        for item in lines
    ]
    clips = {0: 1.0, 1: 0.0, 2: 0.1, 4: 100.0}
    states: dict[int, torch.optim.AdamW] = {}
    started = torch.tensor([0, 0, 0, 0, 0], dtype=torch.float64)
    for _ in range(20):
        for item, copy in zip(lines, copies, strict=True):
            item.grad.copy_(torch.randn_like(item.grad) * 10 ** torch.empty(1).uniform_(-3, 1).item())
            copy.grad.copy_(item.grad)
        started += 1
        rates = Rates(10 ** torch.empty(SLOTS, dtype=torch.float64).uniform_(-4, -1), torch.tensor([1, 16, 1, 1, 4.0], dtype=torch.float64),
                      torch.tensor([0.0, 0.01, 0.5, 0, 0.1], dtype=torch.float64), started)  # fmt: skip
        if alike:
            rates = Rates(
                *(values[4].expand(SLOTS).clone() for values in (rates.rate, rates.ratio, rates.decay, rates.steps))
            )
        reference_adamw(copies, rates, clips, states)
        norms = norms_by_slot(lines, SLOTS)
        clip_(lines, norms, torch.tensor([clips.get(slot, 0.0) for slot in range(SLOTS)], dtype=torch.float64))
        move_(lines, rates)
    for item, copy in zip(lines, copies, strict=True):
        assert_close(item.value, copy.value, torch.float64 if dtype == torch.float64 else "steps", item.part)


def test_a_slot_that_does_not_move_stays_as_it_is() -> None:
    lines = stacks(torch.float32)
    before = [item.value.clone() for item in lines]
    for item in lines:
        item.grad[item.owner == 2] = 0
    rate = torch.tensor([0.1, 0.1, 0.0, 0.0, 0.1]).double()
    move_(
        lines, Rates(rate, torch.ones(SLOTS).double(), torch.full((SLOTS,), 0.1).double(), torch.ones(SLOTS).double())
    )
    for item, value in zip(lines, before, strict=True):
        assert torch.equal(item.value[item.owner == 2], value[item.owner == 2])
        assert not torch.equal(item.value[item.owner == 1], value[item.owner == 1])


def test_norms_and_clipping_are_by_slot() -> None:
    """One slot's spike, or NaN, scales nobody else's step."""
    lines = stacks(torch.float32)
    lines[0].grad[lines[0].owner == 0] = float("nan")
    lines[1].grad[lines[1].owner == 1] *= 1e6
    expected = [
        torch.cat([item.grad[item.owner == slot].flatten() for item in lines]).norm() if slot != 3 else torch.zeros(())
        for slot in range(SLOTS)
    ]
    quiet = [item.grad[item.owner == 2].clone() for item in lines]
    norms = norms_by_slot(lines, SLOTS)
    for slot in (1, 2, 3, 4):
        assert_close(norms[slot], expected[slot])
    assert bool(torch.isnan(norms[0]))
    clip_(lines, norms, torch.tensor([1.0, 1.0, 1e9, 1.0, 1.0]).double())
    assert all(torch.equal(item.grad[item.owner == 2], grad) for item, grad in zip(lines, quiet, strict=True))
    assert_close(norms_by_slot(lines, SLOTS)[1], torch.tensor(1.0))
