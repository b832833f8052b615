"""The exact mixture on running models: its logits are those of the base with the sum of the updates, for every kind of site."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.models import ARCHITECTURES, batch_for, tiny_attention, tiny_cnn, tiny_gpt2, tiny_llama, tiny_mixtral
from tests.tolerances import assert_close
from tests.unit.compose.support import adapter_of, change_of, delta, three
from weft.adapter import Adapter
from weft.compose import Mixture, combine
from weft.errors import MixError, UnsupportedError
from weft.formats import load
from weft.formats.peft import problem_for_peft

WEIGHTS = (0.7, -0.5, 1.2)


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(**batch)
    found = out.logits if hasattr(out, "logits") else out
    assert isinstance(found, Tensor)
    return found


def summed(model: nn.Module, adapters: list[Adapter], weights: tuple[float, ...], batch: dict[str, Tensor]) -> Tensor:
    """Logits of the base, into whose weights ``Σ weight · change`` is written by hand."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    changes = [change_of(model, adapter) for adapter in adapters]
    state = {
        name: (value.double() + sum(w * change[name] for w, change in zip(weights, changes, strict=True))).to(value.dtype)
        if value.is_floating_point() else value
        for name, value in before.items()
    }  # fmt: skip
    model.load_state_dict(state)
    try:
        return logits(model, batch)
    finally:
        model.load_state_dict(before)


def applied(model: nn.Module, adapter: Adapter, batch: dict[str, Tensor]) -> Tensor:
    with weft.attach(model, {}) as bank:
        bank.load("mixed", adapter)
        bank.use("mixed")
        return logits(model, batch)


def check(model: nn.Module, adapters: list[Adapter], weights: tuple[float, ...] = WEIGHTS, **settings: Any) -> Mixture:
    batch = batch_for(model, labels=False)
    wanted = summed(model, adapters, weights, batch)
    assert float((wanted - logits(model, batch)).abs().max()) > 1e-3, "the mixture does something"
    mixed = combine(list(zip(adapters, weights, strict=True)), **settings)
    assert_close(applied(model, mixed, batch), wanted)
    return mixed


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ("cnn", "t5")])
def test_different_ranks_alphas_and_rslora_on_every_architecture(name: str) -> None:
    model = ARCHITECTURES[name](dtype=torch.float64)
    mixed = check(model, three(model))
    assert mixed.report.relative_error == 0.0
    assert {item.rank for item in mixed.factors.values()} == {12}


def cnn() -> nn.Module:
    return tiny_cnn(dtype=torch.float64)


KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "convolutions, one with groups": (cnn, {"targets": ["conv1", "conv2", "linear"]}),
    "embeddings": (lambda: tiny_llama(dtype=torch.float64), {"targets": ["embed_tokens", "q_proj"]}),
    "GPT-2's Conv1D": (lambda: tiny_gpt2(dtype=torch.float64), {"targets": ["c_attn", "c_proj"]}),
    "stacked experts": (lambda: tiny_mixtral(dtype=torch.float64), {"targets": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "attention and a bare matrix": (lambda: tiny_attention(dtype=torch.float64), {"targets": ["attn", "embed"], "target_parameters": ["mix"]}),
    "biases of B": (lambda: tiny_llama(dtype=torch.float64, attention_bias=True), {"targets": ["q_proj", "v_proj"], "lora_bias": True}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_site_adds(kind: str, tmp_path: Path) -> None:
    make, spec = KINDS[kind]
    model = make()
    adapters = [
        adapter_of(model, 1, rank=2, **spec),
        adapter_of(model, 2, rank=4, alpha=1, **spec),
        adapter_of(model, 3, rank=6, **spec),
    ]
    mixed = combine(list(zip(adapters, WEIGHTS, strict=True))) if "groups" in kind else check(model, adapters)
    for path in mixed.sites:
        assert_close(mixed.delta(path), sum(w * delta(one, path) for w, one in zip(WEIGHTS, adapters, strict=True)))
    again = load(mixed.save(tmp_path / "mixed", for_peft=problem_for_peft(adapters[0]) is None))
    assert again.digest == mixed.digest


def test_a_convolution_with_groups_adds_in_its_output() -> None:
    """No plain weight holds its update, which reads across groups: the outputs are compared."""
    model = cnn()
    adapters = [adapter_of(model, seed, rank=2 * seed, targets=["conv2"]) for seed in (1, 2, 3)]
    mixed = combine(list(zip(adapters, WEIGHTS, strict=True)))
    layer, x, outs = model.get_submodule("conv2"), torch.randn(2, 8, 7, 7, dtype=torch.float64), []
    with weft.attach(model, {}) as bank, torch.no_grad():
        plain = layer(x)
        for adapter in (*adapters, mixed):
            bank.load("one", adapter)
            bank.use("one")
            outs.append(layer(x) - plain)
            bank.drop("one")
    assert_close(outs[3], sum(weight * out for weight, out in zip(WEIGHTS, outs, strict=False)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["svd", "linear", "ties", "dare", "knots"])
def test_every_kind_of_site_is_approximated_with_a_true_error(kind: str, method: str) -> None:
    make, spec = KINDS[kind]
    model = make()
    adapters = [adapter_of(model, 1, rank=4, **spec), adapter_of(model, 2, rank=4, alpha=1, **spec)]
    options: dict[str, Any] = (
        {"rank": 4} if method == "svd" else {} if method == "linear" else {"density": 0.5, "rank": 4}
    )
    mixed = combine([(adapters[0], 1.0), (adapters[1], 0.5)], method=method, **options)
    exact = combine([(adapters[0], 1.0), (adapters[1], 0.5)])
    for site in mixed.report.sites:
        total = exact.delta(site.path)
        assert site.from_sum == pytest.approx(float((mixed.delta(site.path) - total).norm() / total.norm()), abs=1e-7)
        assert site.relative_error < 1
        assert site.relative_error > 0 or min(exact.factors[site.path].B.shape[-2], exact.factors[site.path].d_in) <= 4
        assert site.rank <= 4
    full = combine(
        [(adapters[0], 1.0), (adapters[1], 0.5)],
        method=method,
        **({**options, "rank": 1000} if "rank" in options else options),
    )
    if method != "linear":
        assert full.report.relative_error < 1e-7
    applied(model, mixed, batch_for(model, labels=False))


def test_different_sites_are_all_in_the_mixture() -> None:
    model = tiny_llama(dtype=torch.float64)
    adapters = [
        adapter_of(model, 1, targets=["q_proj", "v_proj"]),
        adapter_of(model, 2, targets=["v_proj", "down_proj"], layers=[1]),
        adapter_of(model, 3, targets=["lm_head"]),
    ]
    mixed = check(model, adapters)
    assert set(mixed.sites) == {path for adapter in adapters for path in adapter.sites}
    assert {site.path: site.parents for site in mixed.report.sites}["model.layers.1.self_attn.v_proj"] == 2


def test_biases_of_the_base_are_summed_where_it_is_given() -> None:
    model = tiny_llama(dtype=torch.float64, attention_bias=True)
    adapters = [adapter_of(model, seed, targets=["q_proj"], bias="lora_only") for seed in (1, 2, 3)]
    check(model, adapters, base=model)
    path = "model.layers.0.self_attn.q_proj.bias"
    by_layer = combine([(adapters[0], {r"layers\.0\..*": 2.0, "default": 0.0}), (adapters[1], 1.0)], base=model)
    b = model.get_parameter(path)
    assert_close(by_layer.biases[path], b + 2 * (adapters[0].biases[path] - b) + (adapters[1].biases[path] - b))
    with pytest.raises(MixError, match=r"bias .*q_proj.bias.*different numbers.*whole='average'"):
        combine(adapters)


# DoRA


DORA: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (lambda: tiny_llama(dtype=torch.float64), {"targets": "all-linear"}),
    "Conv1D": (lambda: tiny_gpt2(dtype=torch.float64), {"targets": ["c_attn", "c_proj"]}),
    "convolution": (cnn, {"targets": ["conv1", "linear"]}),
    "embedding": (lambda: tiny_llama(dtype=torch.float64), {"targets": ["embed_tokens", "v_proj"]}),
}


@pytest.mark.parametrize("kind", DORA)
def test_dora_and_plain_adapters_add_exactly_on_their_base(kind: str, tmp_path: Path) -> None:
    """The sum is a DoRA adapter again: nothing dense, nothing lost."""
    make, spec = DORA[kind]
    model = make()
    adapters = [
        adapter_of(model, 1, rank=2, dora=True, **spec),
        adapter_of(model, 2, rank=3, alpha=5, **spec),
        adapter_of(model, 3, rank=4, dora=True, rslora=True, **spec),
    ]
    weights = (0.4, -0.7, 0.5)  # of the DoRA adapters positive, of a sum below 1: no row of the base can cancel
    mixed = check(model, adapters, weights, base=model)
    assert mixed.spec.dora
    assert mixed.report.relative_error == 0.0
    assert {item.rank for item in mixed.factors.values()} == {9}
    assert load(mixed.save(tmp_path / "mixed")).digest == mixed.digest, "PEFT's files hold it"


def test_dora_with_a_bias_of_b() -> None:
    model = tiny_llama(dtype=torch.float64, attention_bias=True)
    settings: dict[str, Any] = {"targets": ["q_proj"], "dora": True, "lora_bias": True}
    adapters = [adapter_of(model, seed, **settings) for seed in (1, 2)]
    batch = batch_for(model, labels=False)
    mixed = combine([(adapters[0], 0.4), (adapters[1], 0.6)], base=model)
    outs = []
    site = model.get_submodule("model.layers.0.self_attn.q_proj")
    x = torch.randn(5, 32, dtype=torch.float64)
    with weft.attach(model, {}) as bank, torch.no_grad():
        plain = site(x)
        for adapter in (*adapters, mixed):
            bank.load("one", adapter)
            bank.use("one")
            outs.append(site(x) - plain)
            bank.drop("one")
    assert_close(outs[2], 0.4 * outs[0] + 0.6 * outs[1])
    assert batch


def test_dora_without_its_base_is_refused_by_site_and_name() -> None:
    model = tiny_llama()
    adapters = [adapter_of(model, 1, dora=True), adapter_of(model, 2)]
    with pytest.raises(MixError, match=r"model\.layers\.0\.self_attn\.q_proj: .* is a DoRA adapter.*base="):
        combine(adapters)
    with pytest.raises(MixError, match="DoRA"):
        combine([(adapters[0], 0.5)])
    with pytest.raises(MixError, match="DoRA"):
        combine([adapters[0]], method="svd", rank=1)


def test_a_dora_adapter_alone_with_weight_1_is_itself() -> None:
    model = tiny_llama(dtype=torch.float64)
    adapter = adapter_of(model, 1, dora=True)
    mixed = combine([adapter])
    assert {name: tensor.sum() for name, tensor in mixed.tensors().items()} == {
        name: tensor.sum() for name, tensor in adapter.tensors().items()
    }
    batch = batch_for(model, labels=False)
    assert_close(applied(model, mixed, batch), applied(model, adapter, batch))


def test_dora_and_plain_at_different_sites_without_the_base(tmp_path: Path) -> None:
    """Each site is one adapter's, so that the sum needs no base; PEFT's files can't hold both kinds, and say so."""
    model = tiny_llama(dtype=torch.float64)
    adapters = [adapter_of(model, 1, targets=["q_proj"], dora=True), adapter_of(model, 2, targets=["v_proj"])]
    mixed = check(model, adapters, (1.0, -0.5))
    with pytest.raises(UnsupportedError, match="for_peft=False"):
        mixed.save(tmp_path / "a")
    assert load(mixed.save(tmp_path / "b", for_peft=False)).digest == mixed.digest
    for_peft = check(model, adapters, (1.0, -0.5), base=model)
    assert load(for_peft.save(tmp_path / "c")).digest == for_peft.digest


@pytest.mark.parametrize("method", ["svd", "ties"])
def test_approximations_of_dora_measure_the_whole_update(method: str) -> None:
    model = tiny_llama(dtype=torch.float64)
    adapters = [adapter_of(model, 1, rank=4, dora=True), adapter_of(model, 2, rank=4)]
    options: dict[str, Any] = {"rank": 3} if method == "svd" else {"rank": 3, "density": 1.0}
    mixed = combine([(adapters[0], 0.7), (adapters[1], 0.3)], method=method, base=model, **options)
    changes = [change_of(model, adapter) for adapter in (*adapters, mixed)]
    for site in mixed.report.sites:
        first, second, got = (change[f"{site.path}.weight"] for change in changes)
        total = 0.7 * first + 0.3 * second
        assert site.from_sum == pytest.approx(float((got - total).norm() / total.norm()), rel=1e-6)
        if method == "svd":
            assert site.norm == pytest.approx(float(total.norm()))
            assert site.relative_error == pytest.approx(site.from_sum, rel=1e-6)


def test_a_row_that_cancels_is_refused_by_name() -> None:
    model = tiny_llama(dtype=torch.float64)
    adapter = adapter_of(model, 1, targets=["q_proj"], dora=True, layers=[0])
    path = adapter.sites[0]
    item = adapter.factors[path]
    assert item.magnitude is not None
    from weft.core.layers import row_norms

    W = model.get_submodule(path).weight.detach()
    magnitude = item.magnitude.clone()
    magnitude[5] = 0.5 * row_norms(W, item.A, item.B, item.scale)[5]  # m / n is a half there
    halved = adapter.replace(factors={path: type(item)(item.A, item.B, item.scale, magnitude=magnitude)})
    with pytest.raises(MixError, match=rf"{path}: .* row 5 .* cancels"):
        combine([(halved, 2.0)], base=model)


# as an adapter


def test_a_mixture_is_an_adapter_everywhere(tmp_path: Path) -> None:
    model = tiny_llama(dtype=torch.float64)
    adapters = three(model)
    mixed = combine(list(zip(adapters, WEIGHTS, strict=True)))
    assert isinstance(mixed, Adapter)
    assert repr(mixed).startswith("Mixture(14 sites, rank 12")
    assert len(repr(mixed)) < 200
    assert mixed.provenance.base == adapters[0].provenance.base
    assert [parent["digest"] for parent in mixed.provenance.parents] == [adapter.digest for adapter in adapters]
    assert [parent["weight"] for parent in mixed.provenance.parents] == list(WEIGHTS)
    again = load(mixed.save(tmp_path / "mixed"))
    assert again == mixed
    assert again.provenance.mixture is not None
    assert again.provenance.mixture["method"] == "exact"
    assert again.provenance.parents == mixed.provenance.parents
    assert type(mixed.map(lambda tensor: tensor.float())) is Mixture
    assert not mixed.proof
    twice = combine([(again, 2.0), (adapters[0], -1.4)])
    path = mixed.sites[0]
    assert_close(twice.delta(path), 2 * mixed.delta(path) - 1.4 * adapters[0].delta(path))


def test_added_to_a_running_model_and_taken_back_exactly() -> None:
    """The weight manager: add, list, combine, apply, take back."""
    model = tiny_llama(dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapters = three(model)
    batch = batch_for(model, labels=False)
    plain = logits(model, batch)
    with weft.attach(model, {}) as bank:
        for number, adapter in enumerate(adapters):
            bank.load(f"skill {number}", adapter)
        assert bank.names == ("skill 0", "skill 1", "skill 2")
        bank.load("mix", combine([(bank.adapter("skill 0"), 0.5), (bank.adapter("skill 2"), 0.5)]))
        bank.use("mix")
        assert not torch.equal(logits(model, batch), plain)
        bank.drop("mix")
        assert torch.equal(logits(model, batch), plain)
    assert torch.equal(logits(model, batch), plain)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_route_with_weights_is_the_same_mixture_without_being_built() -> None:
    model = tiny_llama(dtype=torch.float64)
    adapters = three(model)
    batch = batch_for(model, labels=False)
    built = applied(model, combine([(adapters[0], 0.7), (adapters[2], -0.3)]), batch)
    with weft.attach(model, {}) as bank:
        for name, adapter in zip("abc", adapters, strict=True):
            bank.load(name, adapter)
        with bank.route([{"a": 0.7, "c": -0.3}] * len(batch["input_ids"])):
            assert_close(logits(model, batch), built)
