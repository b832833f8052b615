"""Adapted bare parameters: a lazy weight behaves as the dense one, and experts are computed by their factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import batch_for, tiny_mixtral
from tests.tolerances import assert_close
from tests.unit.core.support import State, fill, grads_of, made, outputs_of, spread
from weft.core.bank import attach
from weft.core.parameters import LazyWeight, dense_weight
from weft.spec import LoraSpec

E, O, I, R = 3, 4, 5, 2


def lazy(
    experts: int = 0, flipped: bool = False, dtype: torch.dtype = torch.float64, rank: int = R
) -> tuple[LazyWeight, Tensor]:
    """A lazy weight and the dense one, as the layer sees them."""
    lead = (experts,) if experts else ()
    W, A, B = (torch.randn(*lead, *shape, dtype=dtype, requires_grad=True) for shape in ((O, I), (rank, I), (O, rank)))
    found = LazyWeight(W, A, B, 0.7, flipped)
    whole = W + 0.7 * B @ A
    return found, whole.mT if flipped else whole


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def compare(found: LazyWeight, whole: Tensor, function: Callable[[Any], Tensor], *inputs: Tensor) -> None:
    got, expected = function(found), function(whole)
    assert isinstance(got, Tensor)
    assert_close(got, expected)
    wanted = [found.W, found.A, found.B, *inputs]
    wanted = [tensor for tensor in wanted if tensor.requires_grad]
    grad = torch.randn_like(got)
    for left, right in zip(torch.autograd.grad(got, wanted, grad, retain_graph=True),
                           torch.autograd.grad(expected, wanted, grad, retain_graph=True), strict=True):  # fmt: skip
        assert_close(left, right)


@pytest.mark.parametrize("flipped", [False, True])
def test_a_matrix_in_every_product(flipped: bool) -> None:
    found, whole = lazy(flipped=flipped)
    left, right = (O, I) if not flipped else (I, O)
    a, b = x(6, right), x(6, left)
    compare(found, whole, lambda w: F.linear(a, w), a)
    compare(found, whole, lambda w: F.linear(a, w, torch.ones(left, dtype=torch.float64)), a)
    compare(found, whole, lambda w: F.linear(a.view(2, 3, -1), w), a)
    compare(found, whole, lambda w: a @ w.T, a)
    compare(found, whole, lambda w: a @ w.t(), a)
    compare(found, whole, lambda w: a @ w.mT, a)
    compare(found, whole, lambda w: b @ w, b)
    compare(found, whole, lambda w: torch.matmul(b, w), b)
    compare(found, whole, lambda w: torch.mm(b, w), b)
    compare(found, whole, lambda w: w @ a.T, a)
    compare(found, whole, lambda w: b.matmul(w), b)
    compare(found, whole, lambda w: torch.addmm(torch.zeros(6, right, dtype=torch.float64), b, w), b)


@pytest.mark.parametrize("flipped", [False, True])
def test_a_matrix_in_anything_else(flipped: bool) -> None:
    found, whole = lazy(flipped=flipped)
    for function in (
        lambda w: w + 1, lambda w: 2 * w, lambda w: w.softmax(-1), lambda w: torch.exp(w), lambda w: w[1], lambda w: w[:, 1:3],
        lambda w: w.sum(), lambda w: torch.cat([w, w]), lambda w: w.to(torch.float64), lambda w: torch.einsum("ij->ji", w),
        lambda w: w.reshape(-1), lambda w: w.clone(), lambda w: -w, lambda w: 1 - w, lambda w: w / 2, lambda w: w**2,
        lambda w: w.contiguous(), lambda w: abs(w), lambda w: torch.stack(list(w)), lambda w: w - w,
    ):  # fmt: skip
        compare(found, whole, function)
    assert found.shape == whole.shape
    assert found.size(-1) == whole.size(-1)
    assert (found.ndim, found.dim(), len(found)) == (whole.ndim, whole.dim(), len(whole))
    assert (found.dtype, found.device) == (whole.dtype, whole.device)
    assert not hasattr(found, "__array_interface__")


@pytest.mark.parametrize("flipped", [False, True])
def test_stacked_experts(flipped: bool) -> None:
    found, whole = lazy(E, flipped)
    left, right = (O, I) if not flipped else (I, O)
    a, b = x(E, 6, right), x(E, 6, left)
    compare(found, whole, lambda w: torch.bmm(a, w.transpose(1, 2)), a)
    compare(found, whole, lambda w: a @ w.transpose(-1, -2), a)
    compare(found, whole, lambda w: a @ w.mT, a)
    compare(found, whole, lambda w: torch.bmm(b, w), b)
    compare(found, whole, lambda w: b @ w, b)
    compare(found, whole, lambda w: torch.bmm(w, a.mT), a)
    compare(found, whole, lambda w: torch.einsum("eni,eoi->eno", a, w), a)
    compare(found, whole, lambda w: b[0] @ w, b)
    compare(found, whole, lambda w: w.permute(2, 0, 1))
    for k in (0, 1, -1, torch.tensor(2)):
        compare(found, whole, lambda w, k=k: F.linear(a[0], w[k]), a)
        assert isinstance(found[k], LazyWeight)
    index = torch.tensor([2, 0, 0, 1])
    c, d = x(4, right), x(4, left)
    compare(found, whole, lambda w: torch.bmm(w[index], c.unsqueeze(-1)).squeeze(-1), c)
    compare(found, whole, lambda w: torch.bmm(d.unsqueeze(1), w[index]).squeeze(1), d)
    compare(found, whole, lambda w: w[1:])
    compare(found, whole, lambda w: w[torch.tensor([True, False, True])])
    compare(found, whole, lambda w: w[0, 1])
    compare(found, whole, lambda w: torch.stack([part.sum() for part in w]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [4, 8, 3])
@pytest.mark.parametrize("flipped", [False, True])
def test_grouped_products(dtype: torch.dtype, rank: int, flipped: bool) -> None:
    W, A, B = torch.randn(E, 24, 16), torch.randn(E, rank, 16), torch.randn(E, 24, rank)
    W = W.to(dtype)
    A, B = A.requires_grad_(), B.requires_grad_()
    rows = torch.tensor([3, 3, 10], dtype=torch.int32)  # the second expert gets none
    a = torch.randn(10, 24 if flipped else 16).to(dtype).requires_grad_()
    weight = LazyWeight(W, A, B, 0.7, flipped)
    got = F.grouped_mm(a, weight.transpose(-2, -1), offs=rows)
    whole = (W.double() + 0.7 * B.double() @ A.double()).mT
    whole = whole.mT if flipped else whole
    parts = torch.tensor_split(a.double(), rows[:-1].long())
    expected = torch.cat([part @ w for part, w in zip(parts, whole, strict=True)])
    assert got.dtype == dtype
    assert_close(got, expected, dtype)
    for name, left, right in zip("aAB", torch.autograd.grad(got.float().square().sum(), [a, A, B]),
                                 torch.autograd.grad(expected.square().sum(), [a, A, B]), strict=True):  # fmt: skip
        assert_close(left, right, torch.bfloat16 if dtype == torch.bfloat16 else "steps", name)


class Mixed(nn.Module):
    """Uses its parameter in several ways, and beside others."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))
        self.other = nn.Parameter(torch.randn(6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.mix)) @ self.mix + self.mix.sum(0) * self.other


def test_a_parameter_keeps_its_name_and_reading_it_gives_the_update() -> None:
    model = Mixed()
    before, a = State(model), torch.randn(3, 6, dtype=torch.float64)
    adapter = made(model, rank=2, targets=[], target_parameters=["mix"])
    expected = spread(model, adapter)(a)
    parameter = model.mix
    with attach(model, {}) as bank:
        bank.load("a", adapter, trainable=True)
        assert model.mix is parameter
        bank.use("a")
        assert isinstance(model.mix, LazyWeight)
        assert dict(model.named_parameters())["mix"] is parameter
        assert_close(model(a), expected)
        model(a).sum().backward()
        grads_of(bank, "a")
        bank.use(None)
        assert model.mix is parameter
    assert model.mix is parameter
    before.check()


def test_a_parameter_can_be_replaced_while_attached() -> None:
    model = Mixed()
    with attach(model, {"a": LoraSpec(rank=2, targets=[], target_parameters=["mix"])}) as bank:
        fill(bank)
        new = nn.Parameter(torch.zeros(6, 6, dtype=torch.float64))
        model.mix = new
        item = bank.adapter().factors["mix"]
        assert_close(model.mix.dense(), item.delta())
    assert model.mix is new


@pytest.mark.parametrize("transposed", [False, True])
def test_the_slow_form(transposed: bool) -> None:
    W, A, B = (torch.randn(shape, dtype=torch.float64) for shape in ((E, O, I), (E, R, I), (E, O, R)))
    stored = W.mT if transposed else W
    got = dense_weight(stored, A, B, 0.7, transposed)
    assert_close(got, LazyWeight(W, A, B, 0.7, transposed).dense())


def experts(flip: bool, **settings: Any) -> nn.Module:
    model = tiny_mixtral(**settings)
    if flip:
        for layer in model.model.layers:
            block = layer.mlp.experts
            block.gate_up_proj = nn.Parameter(block.gate_up_proj.detach().mT.contiguous())
            block.down_proj = nn.Parameter(block.down_proj.detach().mT.contiguous())
            block.is_transposed = True
    return model


@pytest.mark.parametrize(("how", "flip"), [
    ("eager", False), ("batched_mm", False), ("batched_mm", True), ("grouped_mm", False), ("grouped_mm", True),
])  # fmt: skip
@pytest.mark.parametrize("rank", [3, 8])
def test_every_implementation_of_experts(how: str, flip: bool, rank: int) -> None:
    """Flipped: weights stored as (E, d_in, d_out), which the eager forward of this architecture doesn't know."""
    model = experts(flip)
    model.set_experts_implementation(how)
    before, batch = State(model), batch_for(model)
    adapter = made(
        model, rank=rank, targets=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    assert {item.A.shape[0] for item in adapter.factors.values() if item.kind == "parameter"} == {4}
    dense = spread(model, adapter)
    out = dense(**batch)
    out.loss.backward()
    with attach(model, {}) as bank:
        bank.load("a", adapter, trainable=True)
        bank.use("a")
        got = model(**batch)
        assert_close(got.logits, out.logits, "steps")
        got.loss.backward()
        grads = grads_of(bank, "a")
        for path, item in adapter.factors.items():
            if item.kind != "parameter":
                continue
            owner, _, name = path.rpartition(".")
            whole = dense.get_submodule(owner)._parameters[name].grad.double()
            whole = whole.mT if flip else whole
            key = f"{owner}.weft.a:{name}"
            assert_close(grads[f"{key}.lora_A"], item.scale * item.B.double().mT @ whole, "steps", path)
            assert_close(grads[f"{key}.lora_B"], item.scale * whole @ item.A.double().mT, "steps", path)
        with torch.no_grad():
            assert_close(outputs_of(model, batch), out.logits, "steps")
    before.check()


def test_experts_in_double_precision() -> None:
    model = tiny_mixtral(dtype=torch.float64)
    batch = batch_for(model)
    adapter = made(model, rank=3, targets=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    with attach(model, {}) as bank:
        bank.load("a", adapter)
        bank.use("a")
        assert_close(outputs_of(model, batch), outputs_of(spread(model, adapter), batch))


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
def test_experts_in_bfloat16_and_under_autocast(how: str) -> None:
    model = tiny_mixtral(layers=1)
    model.set_experts_implementation(how)
    adapter = made(model, rank=8, targets=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    states, weights, chosen = (
        torch.randn(9, 32),
        torch.rand(9, 2),
        torch.stack([torch.randperm(4)[:2] for _ in range(9)]),
    )
    expected = spread(model, adapter).model.layers[0].mlp.experts(states, chosen, weights)
    for dtype, cast in ((torch.bfloat16, False), (torch.float32, True)):
        model.to(dtype)
        with attach(model, {}) as bank, torch.autocast("cpu", torch.bfloat16, enabled=cast):
            bank.load("a", adapter, trainable=True, allow_other_base=True)
            bank.use("a")
            got = model.model.layers[0].mlp.experts(states.to(dtype), chosen, weights)
            assert_close(got, expected, torch.bfloat16)
            got.float().sum().backward()
            assert all(grad.dtype == torch.float32 for grad in grads_of(bank, "a").values())


def test_only_the_matrix_that_is_meant() -> None:
    model = tiny_mixtral()
    adapter = made(model, rank=2, targets=[], target_parameters=["experts.down_proj"], layers=[1])
    assert adapter.sites == ("model.layers.1.mlp.experts.down_proj",)
    with attach(model, {"a": LoraSpec(rank=2, targets=[], target_parameters=["experts.down_proj"], layers=[1])}):
        assert isinstance(model.model.layers[1].mlp.experts.down_proj, LazyWeight)
        assert isinstance(model.model.layers[0].mlp.experts.down_proj, nn.Parameter)
        assert isinstance(model.model.layers[1].mlp.experts.gate_up_proj, nn.Parameter)
