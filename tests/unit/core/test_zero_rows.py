"""DoRA on a base with rows of zeros, as a pruned one has: such a row has no direction, and stays zero."""

from __future__ import annotations

import torch
from torch import nn

import weft
from tests.tolerances import assert_close
from tests.unit.compose.support import adapter_of


def pruned() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)).double()
    with torch.no_grad():
        model[0].weight[2:4] = 0.0
    return model


def test_training_starts_finite_and_leaves_zero_rows() -> None:
    model, x = pruned(), torch.randn(4, 6, dtype=torch.float64)
    wanted = model(x)
    with weft.attach(model, {"mine": weft.LoraSpec(rank=2, targets="all-linear", dora=True)}) as bank:
        assert_close(model(x), wanted)
        optimizer = torch.optim.SGD([factor for _, factor in bank.named_parameters("mine")], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            assert all(bool(torch.isfinite(factor.grad).all()) for _, factor in bank.named_parameters("mine"))
            optimizer.step()
        trained = bank.adapter("mine")
    merged, _ = weft.merge(model, trained)
    assert not merged[0].weight[2:4].any()
    assert bool((merged[0].weight[:2] != model[0].weight[:2]).all())


def test_a_mixture_there_is_the_sum_of_its_parts() -> None:
    model = pruned()
    with weft.attach(model, {"mine": weft.LoraSpec(rank=2, targets="all-linear", dora=True)}) as bank:
        with torch.no_grad():
            for name, factor in bank.named_parameters("mine"):
                if not name.endswith("magnitude"):
                    factor.copy_(0.2 * torch.randn_like(factor))
                    factor[2:4] *= float(not name.startswith("0.") or not name.endswith("lora_B"))
        dora = bank.adapter("mine")
    plain = adapter_of(model, 3, rank=2)
    mixed = weft.combine([(dora, 0.5), (plain, 1.0)], base=model)
    weights = [weft.merge(model, one)[0].state_dict() for one in (mixed, dora, plain)]
    before = model.state_dict()
    for name in ("0.weight", "1.weight"):
        got, first, second = (found[name] - before[name] for found in weights)
        assert_close(got, 0.5 * first + second)
