"""Linear, Conv1D and embedding sites as layers: dense parity by dtype and rank, DoRA, own biases, layers that aren't plain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.tolerances import assert_close
from tests.unit.core.support import State, fill, grads_of, made, spread
from weft.core.bank import Bank, attach
from weft.core.layers import row_norms
from weft.core.slots import Slot
from weft.spec import LoraSpec

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


class Conv1D(nn.Module):
    """As transformers has it: the weight is (d_in, d_out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / nx**0.5), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Scaled(nn.Embedding):
    """As Gemma and BART have it."""

    def __init__(self, *sizes: int, embed_scale: Any = 3.0) -> None:
        super().__init__(*sizes)
        if isinstance(embed_scale, Tensor):
            self.register_buffer("embed_scale", embed_scale, persistent=False)
        else:
            self.embed_scale = embed_scale

    def forward(self, input: Tensor) -> Tensor:
        scale = self.embed_scale
        return super().forward(input) * (scale.to(self.weight.dtype) if isinstance(scale, Tensor) else scale)


LAYERS = {
    "linear": lambda: nn.Linear(12, 10),
    "linear without bias": lambda: nn.Linear(12, 10, bias=False),
    "Conv1D": lambda: Conv1D(10, 12),
    "embedding": lambda: nn.Embedding(12, 10),
    "padded embedding": lambda: nn.Embedding(12, 10, padding_idx=3),
    "scaled embedding": lambda: Scaled(12, 10),
    "scaled embedding, a buffer": lambda: Scaled(12, 10, embed_scale=torch.tensor(3.0)),
    "conv": lambda: nn.Conv2d(3, 10, 2, padding=1),
}


def inputs(kind: str, dtype: torch.dtype) -> Tensor:
    if "embedding" in kind:
        ids = torch.randint(12, (4, 7))
        return ids.masked_fill(ids == 3, 4) if "padded" in kind else ids
    return torch.randn(4, 3, 5, 5).to(dtype) if kind == "conv" else torch.randn(4, 7, 12).to(dtype)


def layer(kind: str, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(LAYERS[kind]()).to(dtype)


def slot_of(model: nn.Module) -> Slot:
    slot = model[0].weft.a
    assert isinstance(slot, Slot)
    return slot


@pytest.mark.parametrize("kind", list(LAYERS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 3, 8, 33])
def test_dense_parity(kind: str, dtype: torch.dtype, rank: int) -> None:
    model = layer(kind, dtype)
    before, x = State(model), inputs(kind, dtype)
    bank = attach(model, {"a": LoraSpec(rank=rank, alpha=0.7 * rank, targets=["0"])})
    fill(bank)
    adapter = bank.adapter()
    y = model(x)
    assert y.dtype == dtype
    assert {p.dtype for _, p in bank.named_parameters("a")} == {
        torch.float64 if dtype == torch.float64 else torch.float32
    }
    dense = spread(model, adapter).double()
    dense[0].weight = nn.Parameter(_whole(model, adapter.factors["0"]))
    expected = dense(x.double() if x.is_floating_point() else x)
    assert_close(y, expected, dtype)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad.double())
    whole = _oriented(dense[0])
    item = adapter.factors["0"]
    grads = grads_of(bank, "a")
    assert_close(grads["0.weft.a.lora_A"].flatten(1), item.scale * item.B.double().T @ whole, dtype)
    assert_close(grads["0.weft.a.lora_B"].flatten(1), item.scale * whole @ item.A.double().T, dtype)
    bank.detach()
    before.check()


def _oriented(dense: nn.Module) -> Tensor:
    grad = dense.weight.grad
    return grad.mT if isinstance(dense, nn.Embedding | Conv1D) else grad.flatten(1)


def _whole(model: nn.Module, item: Any) -> Tensor:
    """W + ΔW in float64, in the layer's own layout."""
    weight = model[0].weight.detach().double()
    delta = item.scale * item.B.double() @ item.A.double()
    return weight + (delta.mT if isinstance(model[0], nn.Embedding | Conv1D) else delta).reshape(weight.shape)


@pytest.mark.parametrize("kind", list(LAYERS))
@pytest.mark.parametrize("trained", ["factors", "magnitude"])
def test_dora_is_the_magnitude_times_the_direction(kind: str, trained: str) -> None:
    model = layer(kind)
    x = inputs(kind, torch.float64)
    bank = attach(model, {"a": LoraSpec(rank=3, alpha=6, targets=["0"], dora=True)})
    base = model[0]
    bank.use(None)
    plain = model(x)
    bank.use("a")
    assert_close(model(x), plain, torch.float64)
    fill(bank)
    slot = slot_of(model)
    A, B, m = (t.detach().clone().requires_grad_() for t in (slot.lora_A, slot.lora_B, slot.magnitude))
    delta = 2 * B.flatten(1) @ A.flatten(1)
    transposed = isinstance(base, nn.Embedding | Conv1D)
    W = base.weight.detach().mT if transposed else base.weight.detach().flatten(1)
    norms = (W + delta).norm(dim=1).detach()
    weight = (m / norms)[:, None] * (W + delta)
    weight = weight.mT if transposed else weight.view_as(base.weight)
    bank.use(None)
    expected = torch.func.functional_call(base, {"weight": weight}, (x,))
    bank.use("a")
    y = model(x)
    assert_close(y, expected)
    wanted, copies = ([slot.magnitude], [m]) if trained == "magnitude" else ([slot.lora_A, slot.lora_B], [A, B])
    got = torch.autograd.grad(y.square().sum(), wanted)
    for left, right in zip(got, torch.autograd.grad(expected.square().sum(), copies), strict=True):
        assert_close(left, right)


def test_the_row_of_the_padding_is_not_trained() -> None:
    model = layer("padded embedding")
    bank = attach(model, {"a": LoraSpec(rank=3, targets=["0"])})
    x = torch.tensor([[3, 1, 3], [5, 3, 0]])
    optimizer = torch.optim.SGD([p for _, p in bank.named_parameters("a")], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    update = bank.adapter().delta("0")
    assert not update[:, 3].any()
    assert update[:, [0, 1, 5]].any(0).all()


def test_dora_by_rows_without_the_dense_matrix() -> None:
    W, A, B = torch.randn(9, 7), torch.randn(3, 7), torch.randn(9, 3)
    assert_close(row_norms(W, A, B, 0.7), (W + 0.7 * B @ A).norm(dim=1))
    half = row_norms(W.bfloat16(), A, B, 0.7)
    assert half.dtype == torch.float32
    assert_close(half, (W.bfloat16().float() + 0.7 * B @ A).norm(dim=1))
    conv, A, B = torch.randn(9, 4, 3, 3), torch.randn(3, 4, 3, 3), torch.randn(9, 3, 1, 1)
    assert_close(row_norms(conv, A, B, 2.0), (conv.flatten(1) + 2 * B.flatten(1) @ A.flatten(1)).norm(dim=1))
    assert row_norms(-B.flatten(1) @ A.flatten(1), A.flatten(1), B.flatten(1), 1.0).isfinite().all()


@pytest.mark.parametrize("kind", ["linear", "linear without bias", "Conv1D", "conv"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_bias_of_b(kind: str, dora: bool) -> None:
    model = layer(kind)
    x = inputs(kind, torch.float64)
    bank = attach(model, {"a": LoraSpec(rank=3, alpha=6, targets=["0"], lora_bias=True, dora=dora)})
    fill(bank)
    slot, base = slot_of(model), model[0]
    bias = None if base.bias is None else base.bias.detach()
    bank.use(None)
    channels = (-1, 1, 1) if kind == "conv" else (-1,)
    without = model(x) - (0 if bias is None else bias.view(channels))
    bank.use("a")
    own = slot.magnitude, slot.bias
    slot._parameters.update(magnitude=None, bias=None)
    update = model(x) - (0 if bias is None else bias.view(channels)) - without
    slot._parameters.update(magnitude=own[0], bias=own[1])
    expected = without + update + 2 * slot.bias.view(channels)
    if dora:
        item = bank.adapter().factors["0"]
        W = base.weight.mT if kind == "Conv1D" else base.weight.flatten(1)
        expected = expected * (slot.magnitude / (W + 2 * item.B @ item.A).norm(dim=1)).view(channels)
    assert_close(model(x), expected + (0 if bias is None else bias.view(channels)))
    model(x).sum().backward()
    assert len(grads_of(bank, "a")) == 3 + dora


# arguments, in-place, subclasses


def test_arguments_by_name() -> None:
    cases = [(nn.Linear(4, 3), "input", torch.randn(2, 4)), (Conv1D(3, 4), "x", torch.randn(2, 4)),
             (nn.Embedding(5, 3), "input", torch.tensor([1, 2])), (nn.Conv1d(4, 3, 1), "input", torch.randn(2, 4, 5))]  # fmt: skip
    for module, name, x in cases:
        model = nn.Sequential(module)
        with attach(model, {"a": LoraSpec(rank=2, targets=["0"])}) as bank:
            fill(bank)
            for use in ("a", None):
                bank.use(use)
                assert torch.equal(model[0](**{name: x}), model[0](x))


class Quantised(nn.Linear):
    """Like the layers of bitsandbytes and friends: packed weights, a forward of their own."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        size = self.weight.detach().abs().max() / 127
        self.register_buffer("size", size)
        self.weight = nn.Parameter((self.weight.detach() / size).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.size, self.bias)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_quantised_layers_keep_their_forward(p: float, seed: int) -> None:
    model = nn.Sequential(Quantised(12, 10))
    before, x = State(model), torch.randn(4, 12)
    base = model(x)
    bank = attach(model, {"a": LoraSpec(rank=3, alpha=6, targets=["0"], dropout=p)})
    assert {p.dtype for _, p in bank.named_parameters("a")} == {torch.float32}
    fill(bank)
    item = bank.adapter().factors["0"]
    expected = base + x @ item.delta().T
    assert_close(model.eval()(x), expected)
    model.train()
    torch.manual_seed(seed)
    first = model(x)
    first.sum().backward()
    assert len(grads_of(bank, "a")) == 2
    assert torch.allclose(first, expected, rtol=1e-4, atol=1e-5) == (p == 0)
    bank.detach()
    before.check()


def test_q_k_v_that_are_quantised_form_no_group() -> None:
    model = nn.ModuleDict({name: Quantised(6, 4) for name in ("q_proj", "k_proj", "v_proj")})
    model = nn.ModuleDict({"attn": model})
    with attach(model, {"a": LoraSpec(rank=2)}) as bank:
        fill(bank)
        x = torch.randn(3, 6)
        for name, module in model["attn"].items():
            assert module._weft.sites["weight"].group is None
            item = bank.adapter().factors[f"attn.{name}"]
            bank.use(None)
            base = module(x)
            bank.use("a")
            assert_close(module(x), base + x @ item.delta().T)


def test_a_subclass_that_changes_nothing_is_plain() -> None:
    class Named(nn.Linear):
        pass

    model = nn.ModuleDict({"attn": nn.ModuleDict({name: Named(6, 4) for name in ("q_proj", "k_proj", "v_proj")})})
    with attach(model, {"a": LoraSpec(rank=2)}):
        assert model["attn"]["q_proj"]._weft.sites["weight"].group is not None


def test_parametrised_weights_are_read_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(6, 5)).double()
    nn.utils.parametrizations.weight_norm(model[0])
    x = torch.randn(3, 6, dtype=torch.float64)
    adapter = made(model, rank=2, targets="0")
    with attach(model, {}) as bank:
        bank.load("a", adapter)
        bank.use("a")
        assert_close(model(x), F.linear(x, model[0].weight + adapter.delta("0"), model[0].bias))


# fan-in


@pytest.mark.parametrize(("d_in", "d_out"), [(400, 20), (20, 400)])
@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
def test_the_fan_in_of_a_is_d_in(d_in: int, d_out: int, kind: str) -> None:
    model = nn.Sequential(nn.Linear(d_in, d_out) if kind == "linear" else Conv1D(d_out, d_in))
    with attach(model, {"a": LoraSpec(rank=16, targets=["0"])}) as bank:
        item = bank.adapter().factors["0"]
        assert item.A.shape == (16, d_in)
        assert item.B.shape == (d_out, 16)
        assert float(item.A.abs().max()) == pytest.approx(d_in**-0.5, rel=0.05)


# dropout by site


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_each_site_draws_its_own_dropout(p: float) -> None:
    model = nn.ModuleDict(
        {"attn": nn.ModuleDict({name: nn.Linear(200, 1, bias=False) for name in ("q_proj", "k_proj", "v_proj")})}
    )
    bank = attach(model, {"a": LoraSpec(rank=1, dropout=p)})
    with torch.no_grad():
        for _, parameter in bank.named_parameters("a"):
            parameter.fill_(1.0)
        for module in model["attn"].values():
            module._parameters["weight"].zero_()
    model.train()
    x = torch.eye(200)
    kept = torch.stack([model["attn"][name](x).squeeze() * (1 - p) for name in ("q_proj", "k_proj", "v_proj")]).round()
    assert set(kept.unique().tolist()) <= {0.0, 1.0}
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[1], kept[2])
    model.eval()
    assert_close(model["attn"]["q_proj"](x).squeeze(), torch.ones(200))


def test_dropout_is_off_in_eval_and_for_an_untouched_base() -> None:
    model = nn.Sequential(nn.Linear(20, 20))
    bank: Bank = attach(model, {"a": LoraSpec(rank=2, dropout=0.5, targets=["0"])})
    fill(bank)
    x = torch.randn(4, 20)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    bank.use(None)
    assert torch.equal(model(x), model(x))
