"""Each rule on an adapter that was really trained to have the fault, beside one that was trained without it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapter import Adapter
from weft.core.factors import Factors
from weft.diagnosis.adapters import diagnose_adapter
from weft.models.attach import attach
from weft.spec import LoraSpec

WIDTH = 32


def stack(layers: int = 4) -> nn.Module:
    """Linear layers that mix and keep the size of what passes, spectra as trained weights have."""
    model = nn.Sequential()
    for number in range(layers):
        layer = nn.Linear(WIDTH, WIDTH, bias=False)
        U, _, Vh = torch.linalg.svd(torch.randn(WIDTH, WIDTH))
        with torch.no_grad():
            layer.weight.copy_(U @ torch.diag(2.0 * 0.9 ** torch.arange(float(WIDTH))) @ Vh)
        model.add_module(f"layer{number}", layer)
    return model.requires_grad_(False)


def changed(model: nn.Module, rank: int, size: float = 0.3) -> Callable[[Tensor], Tensor]:
    """The same layers with updates of a rank and a flat spectrum: what an adapter is to learn."""
    weights = []
    for layer in model.children():
        U, _, Vh = torch.linalg.svd(torch.randn(WIDTH, WIDTH))
        weights.append(layer.weight + size * U[:, :rank] @ Vh[:rank])  # type: ignore[operator, union-attr]
    return lambda x: apply(weights, x)


def changed_by(model: nn.Module, times: float) -> Callable[[Tensor], Tensor]:
    """The same layers, each so many times as large."""
    weights = [times * layer.weight for layer in model.children()]  # type: ignore[operator]
    return lambda x: apply(weights, x)


def apply(weights: list[Tensor], x: Tensor) -> Tensor:
    for weight in weights:
        x = x @ weight.mT
    return x


def trained(
    model: nn.Module, target: Callable[[Tensor], Tensor], *, steps: int = 150, rate: float = 5e-3, **spec: Any
) -> Adapter:
    """An adapter after Adam on random inputs."""
    settings = {"rank": 4, "alpha": 4, "targets": [r"layer\d"], **spec}
    settings["targets"] = [name for name, _ in model.named_children()] if "targets" not in spec else spec["targets"]
    with attach(model, {"a": LoraSpec(**settings)}) as bank:
        bank.use("a")
        optimizer = torch.optim.Adam([p for _, p in bank.named_parameters("a")], lr=rate)
        for _ in range(steps):
            x = torch.randn(64, WIDTH)
            loss = (model(x) - target(x)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return bank.adapter("a")


def rules(adapter: Adapter, model: nn.Module | None = None) -> dict[str, str]:
    return {found.rule: found.severity for found in diagnose_adapter(adapter, model)}


def test_a_healthy_adapter_has_no_finding() -> None:
    model = stack()
    adapter = trained(model, changed(model, 6), rank=8)
    assert rules(adapter, model) == {}
    assert rules(adapter) == {}


def test_rank_too_small() -> None:
    model = stack()
    adapter = trained(model, changed(model, 12), rank=3)
    (found,) = diagnose_adapter(adapter)
    assert (found.rule, found.severity) == ("rank-too-small", "low")
    assert found.numbers["effective_share"] >= 0.95
    assert "Try rank 6" in found.advice
    assert rules(trained(model, changed(model, 12), rank=1)) == {}  # of which nothing can be told


def test_rank_too_large() -> None:
    model = stack()
    adapter = trained(model, changed(model, 1, 1.0), rank=16, steps=300)
    (found,) = diagnose_adapter(adapter)
    assert (found.rule, found.severity) == ("rank-too-large", "low")
    assert found.numbers["effective_rank"] < 8
    assert "weft shrink" in found.advice


def test_sites_that_no_gradient_reaches() -> None:
    model = stack()
    model.add_module("unused", nn.Linear(WIDTH, WIDTH))
    model.forward = lambda x: apply_modules(model, x)  # type: ignore[method-assign]
    (found,) = diagnose_adapter(trained(model, changed(stack(), 6), rank=8, rate=5e-3))
    assert (found.rule, found.severity, found.site) == ("dead-sites", "medium", "unused")
    assert "1 of 5 sites" in found.evidence


def apply_modules(model: nn.Module, x: Tensor) -> Tensor:
    for name, layer in model.named_children():
        x = layer(x) if name != "unused" else x
    return x


def test_sites_that_hardly_moved() -> None:
    model = stack()
    adapter = trained(model, changed(model, 6), rank=8)
    weak = dataclasses.replace(adapter.factors["layer2"], scale=1e-3)
    (found,) = diagnose_adapter(adapter.replace(factors={**adapter.factors, "layer2": weak}))
    assert (found.rule, found.site) == ("dead-sites", "layer2")
    assert "at most 1 %" in found.evidence


def test_an_adapter_that_was_never_trained() -> None:
    model = stack()
    assert rules(trained(model, changed(model, 4), steps=0), model) == {"untrained": "high"}


def test_one_site_dominates() -> None:
    model = stack()
    adapter = trained(model, changed(model, 6), rank=8, alpha_pattern={"layer1": 512}, steps=20, rate=1e-3)
    by_rule = {found.rule: found for found in diagnose_adapter(adapter)}
    found = by_rule["one-site-dominates"]
    assert (found.severity, found.site) == ("medium", "layer1")
    assert found.numbers["times"] > 10
    assert found.numbers["scale"] == 64


def test_update_too_large() -> None:
    model = stack()
    large = changed_by(model, 3.0)  # an update of twice the base, of which rank 12 reaches more than the base's size
    adapter = trained(model, large, rate=0.02, rank=12, alpha=12)
    assert rules(adapter, model)["update-too-large"] == "medium"
    assert "update-too-large" not in rules(adapter)  # which needs the base


def test_update_that_drowns_the_base() -> None:
    model = stack()
    noise = torch.Generator().manual_seed(1)
    adapter = trained(model, lambda x: 3 * torch.randn(x.shape, generator=noise), rate=0.5, rank=8, alpha=32)
    assert rules(adapter, model)["update-too-large"] == "high"


def test_turned_away() -> None:
    model = stack()
    noise = torch.Generator().manual_seed(1)
    adapter = trained(model, lambda x: 3 * torch.randn(x.shape, generator=noise), rate=0.5, rank=8, alpha=32)
    (found,) = [item for item in diagnose_adapter(adapter, model) if item.rule == "turned-away"]
    assert found.severity == "medium"
    assert found.numbers["intruders"] >= 0.5


def test_update_too_small() -> None:
    model = stack()
    assert rules(trained(model, changed(model, 6), rate=1e-6, rank=8, steps=20), model)["update-too-small"] == "low"


def test_magnitude_drift() -> None:
    model = stack()
    noise = torch.Generator().manual_seed(1)
    wild = trained(model, lambda x: 3 * torch.randn(x.shape, generator=noise), rate=0.2, dora=True)
    calm = trained(model, changed(model, 4), rate=5e-3, dora=True)
    assert rules(wild, model)["magnitude-drift"] == "medium"
    assert "magnitude-drift" not in rules(calm, model)


def test_not_finite_after_a_rate_that_explodes() -> None:
    model = stack()
    adapter = trained(model, lambda x: x * 1e20, rate=1e20, steps=4)
    first = diagnose_adapter(adapter, model)[0]
    assert (first.rule, first.severity) == ("not-finite", "high")
    assert first.site is not None
    whole = Adapter(LoraSpec(rank=1), {}, {"head": {"weight": torch.tensor([1.0, math.nan])}})
    assert "head.weight" in diagnose_adapter(whole)[0].evidence


def test_parts_of_a_base_are_judged_by_themselves() -> None:
    model = stack()
    small = trained(model, changed(model, 12), rank=3)
    dead = Adapter(small.spec, {path: item.map(torch.zeros_like) for path, item in small.factors.items()})
    found = diagnose_adapter(Adapter.of_towers({"text": small, "vision": dead}))
    assert {(item.rule, item.evidence.partition(":")[0]) for item in found} == {
        ("untrained", "vision"),
        ("rank-too-small", "text"),
    }


def test_findings_are_plain_data_worst_first() -> None:
    A = torch.randn(8, 16)
    sites = {f"s{i}": Factors(A, torch.randn(16, 8) * (i > 0), 1.0) for i in range(5)}
    sites["s4"] = dataclasses.replace(sites["s4"], B=sites["s4"].B * math.inf)
    found = diagnose_adapter(Adapter(LoraSpec(rank=8), sites))
    assert [item.severity for item in found][:2] == ["high", "medium"]
    assert all(type(item).from_dict(item.to_dict()) == item for item in found)
