"""The numbers of a site against dense matrices in float64, for every kind of layer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import ARCHITECTURES, tiny_bert, tiny_cnn, tiny_llama
from weft.adapter import Adapter
from weft.core.factors import Factors
from weft.core.merge import merge
from weft.diagnosis import adapter_numbers
from weft.diagnosis.adapter_numbers import measure_adapter
from weft.errors import KeysError
from weft.models.attach import attach
from weft.spec import LoraSpec

TARGETS: dict[str, dict[str, Any]] = {
    "mixtral": {"targets": "all-linear", "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "attention": {"targets": ["embed", "attn", "head"], "target_parameters": ["mix"]},
    "cnn": {"targets": ["conv1", "linear"]},
    "llama": {"targets": ["q_proj", "down_proj", "embed_tokens"]},
}


def random_adapter(model: nn.Module, **spec: Any) -> Adapter:
    """Factors with no zeros in them, for a spec's sites."""
    with attach(model, {"a": LoraSpec(**{"rank": 4, "alpha": 2.0, "targets": "all-linear", **spec})}) as bank:
        start = bank.adapter("a")
    size = {path: 0.3 * torch.rand(()).item() + 0.1 for path in start.factors}
    return dataclasses.replace(
        start,
        factors={
            path: dataclasses.replace(item, A=torch.randn_like(item.A) * size[path], B=torch.randn_like(item.B))
            for path, item in start.factors.items()
        },
        modules={},
    )


def intruders(before: Tensor, after: Tensor) -> int:
    """As the paper defines them, by dense SVDs."""
    U, V = torch.linalg.svd(before).U[:, : min(before.shape)], torch.linalg.svd(after).U
    return sum(float((U.mT @ V[:, j]).abs().max()) < 0.5 for j in range(min(10, *after.shape)))


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_every_kind_of_layer_against_dense_matrices(name: str) -> None:
    model = ARCHITECTURES[name](dtype=torch.float64)
    adapter = random_adapter(model, **TARGETS.get(name, {}))
    kinds = {item.kind for item in adapter.factors.values()}
    assert kinds >= {"mixtral": {"parameter"}, "attention": {"attention", "embedding"}, "cnn": {"conv"}}.get(
        name, set()
    )
    merged, _ = merge(model, adapter)
    before, after = dict(model.named_parameters()), dict(merged.named_parameters())
    total = sum(item.norm() ** 2 for item in adapter.factors.values())
    for site in measure_adapter(adapter, model):
        item, own = adapter.factors[site.path], site.path if site.path in before else f"{site.path}.weight"
        delta = item.delta().double()
        stack = delta if delta.dim() == 3 else delta[None]
        values = torch.linalg.svdvals(stack)[..., : item.rank]
        together = values.square().mean(0).sqrt()
        assert site.norm == pytest.approx(float(delta.norm()))
        assert site.spectrum[: len(together)] == pytest.approx(together.tolist())
        assert site.share == pytest.approx(site.norm**2 / total)
        shares = values.square().cumsum(-1) / values.square().sum(-1, keepdim=True)
        assert site.directions == max(int((row < 0.99).sum()) + 1 for row in shares)
        assert site.moved
        W, new = before[own].detach(), after[own].detach()
        flipped = W.shape != stack.shape[-2:] and W.dim() == 2 and tuple(W.shape) != tuple(delta.shape)
        W, new = (
            t.flatten(1)
            if item.kind == "conv"
            else t.mT
            if flipped or name == "gpt2" or item.kind == "embedding"
            else t
            for t in (W, new)
        )
        W, new = (t if t.dim() == 3 else t[None] for t in (W, new))
        assert site.base is not None
        assert site.base.weight_norm == pytest.approx(float(W.norm()))
        assert site.base.size == pytest.approx(float((new - W).norm() / W.norm()), rel=1e-6)
        tops = [float(torch.linalg.svdvals(b - a)[0] / torch.linalg.svdvals(a)[0]) for a, b in zip(W, new, strict=True)]
        assert site.base.turn == pytest.approx(max(tops), rel=1e-6)
        assert site.base.intruders == max(intruders(a, b) for a, b in zip(W, new, strict=True))


def test_groups_of_a_convolution() -> None:
    model = tiny_cnn(dtype=torch.float64)
    adapter = random_adapter(model, targets=["conv2"])
    item = adapter.factors["conv2"]
    (site,) = measure_adapter(adapter, model)
    assert site.base is not None
    weight = model.conv2.weight.detach()  # type: ignore[union-attr, operator]
    W = torch.zeros(2, 6, 2, weight[0].numel(), dtype=torch.float64)
    for group in range(2):
        W[group, :, group] = weight.flatten(1)[6 * group : 6 * group + 6]
    W = W.view(12, -1)
    assert site.base.size == pytest.approx(item.norm() / float(weight.norm()))
    assert site.base.turn == pytest.approx(float(torch.linalg.svdvals(item.delta())[0] / torch.linalg.svdvals(W)[0]))
    assert site.base.intruders == intruders(W, W + item.delta())


def test_dora_counts_the_whole_change_and_the_drift() -> None:
    model = tiny_llama(dtype=torch.float64)
    adapter = random_adapter(model, targets=["q_proj"], dora=True)
    moved = {
        path: dataclasses.replace(item, magnitude=item.magnitude * (1 + 0.4 * torch.rand_like(item.magnitude)))
        for path, item in adapter.factors.items()
        if item.magnitude is not None
    }
    adapter = adapter.replace(factors=moved)
    merged, _ = merge(model, adapter)
    for site in measure_adapter(adapter, model):
        W, new = (dict(m.named_parameters())[f"{site.path}.weight"].detach() for m in (model, merged))
        magnitude = moved[site.path].magnitude
        assert site.base is not None
        assert magnitude is not None
        assert site.base.size == pytest.approx(float((new - W).norm() / W.norm()))
        tops = torch.linalg.svdvals(new - W)[0] / torch.linalg.svdvals(W)[0]
        assert site.base.turn == pytest.approx(float(tops), rel=2e-2)  # randomised: from below
        assert site.base.turn <= float(tops) * (1 + 1e-9)
        assert site.base.intruders == intruders(W, new)
        assert site.base.drift == pytest.approx(float((magnitude / W.norm(dim=1) - 1).abs().mean()))


def test_a_large_weight_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_bert()
    with torch.no_grad():
        weight = model.get_parameter("bert.encoder.layer.0.attention.self.query.weight")
        U, _, Vh = torch.linalg.svd(weight)
        weight.copy_(U @ torch.diag(0.8 ** torch.arange(32.0)) @ Vh)
    adapter = random_adapter(model, targets=["layer.0.attention.self.query"])
    (exact,) = measure_adapter(adapter, model)
    monkeypatch.setattr(adapter_numbers, "_EXACT_UP_TO", 8)
    (sampled,) = measure_adapter(adapter, model)
    assert exact.base is not None
    assert sampled.base is not None
    assert sampled.base.turn == pytest.approx(exact.base.turn, rel=1e-3)
    assert sampled.base.intruders == exact.base.intruders
    assert measure_adapter(adapter, model) == [sampled]  # the same every time


def test_the_base_is_read_only_and_may_have_a_bank_on_it() -> None:
    model = tiny_llama()
    adapter = random_adapter(model, targets=["q_proj", "v_proj"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    alone = measure_adapter(adapter, model)
    with attach(model, {"other": LoraSpec(rank=2, targets="all-linear")}):
        assert measure_adapter(adapter, model) == alone
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_not_finite_and_what_never_moved() -> None:
    A, B = torch.randn(3, 8), torch.randn(6, 3)
    bad = B.clone()
    bad[2, 1] = math.nan
    sites = measure_adapter(
        Adapter(LoraSpec(rank=3), {"a": Factors(A, B, 1.0), "b": Factors(A, bad, 1.0), "c": Factors(A, B * 0, 1.0)})
    )
    assert [site.not_finite for site in sites] == [(), ("lora_B",), ()]
    assert math.isnan(sites[1].norm)
    assert [site.share for site in sites] == [1.0, 0.0, 0.0]
    assert [site.moved for site in sites] == [True, True, False]
    assert (sites[2].effective_rank, sites[2].directions, sites[2].norm) == (0.0, 0, 0.0)


def test_another_base_is_refused() -> None:
    adapter = random_adapter(tiny_llama(), targets=["q_proj"])
    with pytest.raises(KeysError):
        measure_adapter(adapter, tiny_bert())


def test_weights_of_zero() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    nn.init.zeros_(model[0].weight)
    (site,) = measure_adapter(
        Adapter(LoraSpec(rank=3), {"0": Factors(torch.randn(3, 8), torch.randn(6, 3), 1.0)}), model
    )
    assert site.base is not None
    assert (site.base.size, site.base.turn) == (math.inf, math.inf)
