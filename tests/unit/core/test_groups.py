"""Sites that share their input are computed together, SwiGLU blocks whole; results never depend on it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import batch_for, tiny_llama, tiny_t5
from tests.tolerances import assert_close
from tests.unit.core.support import State, fill, grads_of, made, outputs_of, spread
from weft.core import groups, ops
from weft.core.bank import Bank, attach
from weft.core.groups import PATIENCE, Group
from weft.spec import LoraSpec


class Attention(nn.Module):
    """Three projections that a test calls as it likes."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, out) for out in (4, 5, 6))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        y = x if y is None else y
        return torch.cat([self.q_proj(x), self.k_proj(y), self.v_proj(y)], -1)


def attached(**spec: Any) -> tuple[Attention, Bank]:
    model = nn.ModuleDict({"attn": Attention()})
    bank = attach(model, {"a": LoraSpec(**({"rank": 2} | spec))})
    fill(bank)
    return model["attn"], bank


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sites each product had."""
    made: list[int] = []
    real = ops.linears

    def counted(x: Tensor, sites: Any) -> Any:
        made.append(len(sites))
        return real(x, sites)

    monkeypatch.setattr(ops, "linears", counted)
    return made


def group_of(attention: Attention) -> Group | None:
    found = attention.q_proj._weft.sites["weight"].group
    assert found is None or isinstance(found, Group)
    return found


def dense_of(bank: Bank) -> Attention:
    return spread(bank.model, bank.adapter())["attn"]


def test_one_product_for_three_sites(calls: list[int]) -> None:
    attention, bank = attached()
    x = torch.randn(3, 6)
    assert_close(attention(x), dense_of(bank)(x))
    assert calls == [3]
    assert_close(attention(x), dense_of(bank)(x))
    assert calls == [3, 3]
    products: list[tuple[int, ...]] = []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        real = torch.mm
        patch.setattr(torch, "mm", lambda left, right: products.append(right.shape) or real(left, right))
        got = attention(x)
    assert_close(got, dense_of(bank)(x))
    assert products == [(6, sum(bank.adapter().factors[site].rank for site in bank.adapter().sites))]


def test_different_inputs_dissolve_the_group_at_once(calls: list[int]) -> None:
    attention, bank = attached()
    x, y = torch.randn(3, 6), torch.randn(3, 6)
    expected = dense_of(bank)
    assert_close(attention(x, y), expected(x, y))
    assert group_of(attention) is None
    assert_close(attention(x), expected(x))
    assert calls == [3, 1, 1, 1, 1, 1]
    attention(x, y).square().sum().backward()
    assert len(grads_of(bank, "a")) == 6


def test_gradients_of_cross_attention() -> None:
    attention, bank = attached()
    x, y = torch.randn(3, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    attention(x, y).square().sum().backward()
    got = grads_of(bank, "a"), x.grad.clone(), y.grad.clone()
    x.grad = y.grad = None
    for _, parameter in bank.named_parameters("a"):
        parameter.grad = None
    assert group_of(attention) is None
    attention(x, y).square().sum().backward()
    for name, expected in grads_of(bank, "a").items():
        assert_close(got[0][name], expected, what=name)
    assert_close(got[1], x.grad)
    assert_close(got[2], y.grad)


def test_an_unfinished_round_is_no_reason_to_dissolve(calls: list[int]) -> None:
    attention, bank = attached()
    expected = dense_of(bank)
    for _ in range(PATIENCE):
        attention.q_proj(torch.randn(2, 6))
    x = torch.randn(3, 6)
    assert_close(attention(x), expected(x))
    assert group_of(attention) is not None
    assert set(calls) == {3}


def test_a_member_that_is_always_called_alone_is_alone_in_the_end(calls: list[int]) -> None:
    attention, _ = attached()
    for _ in range(PATIENCE + 3):
        attention.q_proj(torch.randn(2, 6))
    assert group_of(attention) is None
    assert calls[-1] == 1


def changes() -> dict[str, Callable[[Attention, Bank, Tensor], None]]:
    def trains(attention: Attention, bank: Bank, x: Tensor) -> None:
        with torch.no_grad():
            for _, parameter in bank.named_parameters("a"):
                parameter.mul_(2)

    return {
        "x in place": lambda attention, bank, x: _add(x),
        "the factors": trains,
        "another adapter": lambda attention, bank, x: bank.use("b"),
        "the base": lambda attention, bank, x: bank.use(None),
        "mode": lambda attention, bank, x: attention.train(),
    }


def _add(x: Tensor) -> None:
    with torch.no_grad():
        x.add_(1)


@pytest.mark.parametrize("what", list(changes()))
@pytest.mark.parametrize("grad", [True, False])
def test_what_changes_between_two_calls_is_seen(what: str, grad: bool) -> None:
    attention, bank = attached(dropout=0.9)
    bank.add("b", LoraSpec(rank=3))
    fill(bank, "b")
    attention.eval()
    x = torch.randn(3, 6)
    with torch.set_grad_enabled(grad):
        first = attention.q_proj(x)
        changes()[what](attention, bank, x)
        second = attention.k_proj(x)
    if what == "mode":
        assert not torch.allclose(second, copy.deepcopy(attention).eval().k_proj(x)), "dropout is on"
        return
    fresh = copy.deepcopy(bank.model)["attn"]
    assert_close(second, fresh.k_proj(x))
    assert first.shape == (3, 4)


def test_gradient_mode_may_change_between_two_calls() -> None:
    attention, bank = attached()
    x = torch.randn(3, 6)
    with torch.no_grad():
        attention.q_proj(x)
    assert attention.k_proj(x).requires_grad
    attention.q_proj(x)
    with torch.no_grad():
        assert not attention.v_proj(x).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        attention.q_proj(x)
    assert attention.k_proj(x).dtype == torch.float32
    assert bank.current == "a"


def test_inference_tensors_have_no_versions_so_nothing_waits(calls: list[int]) -> None:
    attention, bank = attached()
    with torch.inference_mode():
        x = torch.randn(3, 6)
        attention.q_proj(x)
        x.add_(1)
        got = attention.k_proj(x).clone()
    assert_close(got, dense_of(bank).k_proj(x.clone()))
    assert calls == [1, 1]


def test_backward_between_two_calls() -> None:
    """The graph of the waiting results is gone; they are computed again."""
    attention, bank = attached()
    x = torch.randn(3, 6, requires_grad=True)
    attention.q_proj(x).sum().backward()
    attention.k_proj(x).sum().backward()
    attention.v_proj(x).sum().backward()
    got, dx = grads_of(bank, "a"), x.grad.clone()
    x.grad = None
    for _, parameter in bank.named_parameters("a"):
        parameter.grad = None
    attention(x).sum().backward()
    for name, expected in grads_of(bank, "a").items():
        assert_close(got[name], expected, what=name)
    assert_close(dx, x.grad)


def hooks() -> dict[str, Callable[[nn.Module, list[str]], Any]]:
    return {
        "forward": lambda m, log: m.register_forward_hook(lambda *_: log.append("forward")),
        "forward pre": lambda m, log: m.register_forward_pre_hook(lambda *_: log.append("forward pre")),
        "backward": lambda m, log: m.register_full_backward_hook(lambda *_: log.append("backward")),
        "backward pre": lambda m, log: m.register_full_backward_pre_hook(lambda *_: log.append("backward pre")),
        "doubling": lambda m, log: m.register_forward_hook(lambda _m, _a, out: log.append("doubling") or 2 * out),
    }


@pytest.mark.parametrize("kind", list(hooks()))
@pytest.mark.parametrize(
    "child", ["self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj", "mlp.act_fn"]
)
def test_hooks_on_children_still_fire(kind: str, child: str) -> None:
    model = tiny_llama(layers=2)
    batch = batch_for(model)
    bank = attach(model, {"a": LoraSpec(rank=2)})
    fill(bank)
    log: list[str] = []
    results = []
    for target in (spread(model, bank.adapter()), model):
        handle = hooks()[kind](target.model.layers[1].get_submodule(child), log)
        before = len(log)
        out = outputs_of(target, batch)
        if target is model or kind.startswith("forward"):
            out.sum().backward()
        results.append(out)
        handle.remove()
    assert len(log) >= 1
    assert log[before:] == [kind]
    assert_close(results[1], results[0])


def test_hooks_on_all_modules_fire_in_fused_blocks_too() -> None:
    model = tiny_llama(layers=1)
    bank = attach(model, {"a": LoraSpec(rank=2)})
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    outputs_of(model, batch_for(model))
    handle.remove()
    block = model.model.layers[0].mlp
    assert {id(block.gate_proj), id(block.up_proj), id(block.down_proj), id(block.act_fn)} <= {
        id(module) for module in seen
    }
    bank.detach()


# SwiGLU blocks


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry a block that was computed whole."""
    made: list[int] = []
    real = groups.gated_mlp

    def counted(*arguments: Any) -> Tensor:
        made.append(1)
        return real(*arguments)

    monkeypatch.setattr(groups, "gated_mlp", counted)
    return made


def test_blocks_are_computed_whole_in_training_only(fused: list[int]) -> None:
    model = tiny_llama()
    batch = batch_for(model)
    bank = attach(model, {"a": LoraSpec(rank=2, targets=["up_proj"])})
    fill(bank)
    got = outputs_of(model, batch)
    assert len(fused) == 2
    with torch.no_grad():
        assert_close(outputs_of(model, batch), got)
    assert len(fused) == 2
    bank.use(None)
    outputs_of(model, batch)
    assert len(fused) == 2


@pytest.mark.parametrize("act", ["silu", "gelu", "relu"])
def test_only_silu_is_taken_for_silu(act: str, fused: list[int]) -> None:
    model = tiny_llama(hidden_act=act, dtype=torch.float64)
    batch = batch_for(model)
    adapter = made(model, rank=2)
    with attach(model, {}) as bank:
        bank.load("a", adapter, trainable=True)
        bank.use("a")
        got = outputs_of(model, batch)
    assert_close(got, outputs_of(spread(model, adapter), batch))
    assert bool(fused) == (act == "silu")


def test_an_activation_that_is_changed_later_is_seen(fused: list[int]) -> None:
    model = tiny_llama(dtype=torch.float64)
    batch = batch_for(model)
    bank = attach(model, {"a": LoraSpec(rank=2)})
    fill(bank)
    outputs_of(model, batch)
    assert len(fused) == 2
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.GELU()
    got = outputs_of(model, batch)
    assert len(fused) == 2
    assert_close(got, outputs_of(spread(model, bank.adapter()), batch))


class Own(nn.Linear):
    """A layer whose forward is not the plain one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize("child", ["gate_proj", "down_proj"])
def test_layers_with_a_forward_of_their_own_are_not_taken_over(child: str, fused: list[int]) -> None:
    model = tiny_llama(layers=1, dtype=torch.float64)
    old = getattr(model.model.layers[0].mlp, child)
    new = Own(old.in_features, old.out_features, bias=False).double()
    new.load_state_dict(old.state_dict())
    setattr(model.model.layers[0].mlp, child, new)
    batch = batch_for(model)
    adapter = made(model, rank=2)
    fused.clear()
    for targets in ("all-linear", ["up_proj"]):
        with attach(model, {}) as bank:
            bank.load("a", adapter.replace(factors={p: f for p, f in adapter.factors.items() if targets == "all-linear" or "up_proj" in p}),
                      trainable=True, allow_partial=True)  # fmt: skip
            bank.use("a")
            got = outputs_of(model, batch)
            expected = outputs_of(spread(model, bank.adapter()), batch)
        assert_close(got, expected)
    assert not fused


def test_dissolved_groups_leave_nothing_behind() -> None:
    model = tiny_t5()
    before, batch = State(model), batch_for(model)
    adapter = made(model, rank=2, targets=["q", "k", "v", "wi_0", "wi_1"])
    expected = outputs_of(spread(model, adapter), batch)
    with attach(model, {}) as bank:
        bank.load("a", adapter, trainable=True)
        bank.use("a")
        for _ in range(2):
            assert_close(outputs_of(model, batch), expected)
    before.check()
