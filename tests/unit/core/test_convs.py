"""Adapted convolutions against dense ``W + ΔW``: every stride, padding, dilation and group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.tolerances import assert_close
from tests.unit.core.support import State, fill, grads_of, saved_tensors, spread
from weft.core import dropout as dropping
from weft.core.bank import Bank, attach
from weft.core.slots import Slot
from weft.spec import LoraSpec

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SHAPES: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 2, "stride": 3, "padding": 1, "dilation": 2, "bias": False},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect", "stride": 2},
    {"kernel_size": 3, "padding": "same", "padding_mode": "replicate"},
]


def one(
    dimensions: int, dtype: torch.dtype = torch.float64, spec: dict[str, Any] | None = None, **conv: Any
) -> tuple[nn.Module, Bank]:
    """A convolution of 4 channels in a Sequential, and a bank with random factors."""
    model = nn.Sequential(KINDS[dimensions](4, 6, **conv)).to(dtype)
    bank = attach(model, {"a": LoraSpec(**({"rank": 2, "targets": ["0"]} | (spec or {})))})
    fill(bank)
    return model, bank


def image(dimensions: int, dtype: torch.dtype = torch.float64, rows: int = 2) -> Tensor:
    return torch.randn(rows, 4, *(7, 6, 5)[:dimensions], dtype=dtype)


def slot_of(model: nn.Module) -> Slot:
    slot = model[0].weft.a
    assert isinstance(slot, Slot)
    return slot


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # the base's own
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("conv", SHAPES, ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()))
def test_forward_and_gradients_are_those_of_the_dense_weight(dimensions: int, conv: dict[str, Any]) -> None:
    model, bank = one(dimensions, **conv)
    x = image(dimensions).requires_grad_()
    plain = spread(model, bank.adapter())
    layer = model[0]
    W = layer.weight.detach().requires_grad_()
    A, B = (t.detach().clone().requires_grad_() for t in (slot_of(model).lora_A, slot_of(model).lora_B))
    whole = W + slot_of(model).scale * (B.flatten(1) @ A.flatten(1)).view_as(W)
    wide = x.detach().requires_grad_()
    bank.use(None)
    expected = torch.func.functional_call(layer, {"weight": whole}, (wide,))
    bank.use("a")
    y = model(x)
    assert_close(y, plain(x))
    assert_close(y, expected)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    assert_close(x.grad, wide.grad)
    assert_close(slot_of(model).lora_A.grad, A.grad)
    assert_close(slot_of(model).lora_B.grad, B.grad)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("groups", [2, 4])
def test_groups(dimensions: int, groups: int) -> None:
    """A sees all channels, B has the layer's groups; as in PEFT."""
    model = nn.Sequential(KINDS[dimensions](4, 8, 3, stride=2, padding=1, groups=groups)).double()
    bank = attach(model, {"a": LoraSpec(rank=4, targets=["0"])})
    fill(bank)
    slot, layer = slot_of(model), model[0]
    x = image(dimensions).requires_grad_()
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dimensions]
    factors = bank.adapter().factors["0"]
    delta = (factors.scale * factors.B @ factors.A).view(8, 4, *layer.kernel_size)
    expected = conv(x, layer.weight, layer.bias, 2, 1, 1, groups) + conv(x, delta, None, 2, 1)
    y = model(x)
    assert slot.lora_B.shape[:2] == (8, 4 // groups)
    assert_close(y, expected)
    y.square().sum().backward()
    got = grads_of(bank, "a"), x.grad.clone()
    x.grad = slot.lora_A.grad = slot.lora_B.grad = None
    thin = conv(x, slot.lora_A, None, 2, 1)
    plain = conv(x, layer.weight, layer.bias, 2, 1, 1, groups) + slot.scale * conv(
        thin, slot.lora_B.view(8, -1, *(1,) * dimensions), groups=groups
    )
    plain.square().sum().backward()
    for name, expected in grads_of(bank, "a").items():
        assert_close(got[0][name], expected, what=name)
    assert_close(got[1], x.grad)


def test_an_image_without_a_batch_and_an_empty_batch() -> None:
    for dimensions in (1, 2, 3):
        model, _ = one(dimensions, kernel_size=3, padding=1)
        x = image(dimensions)
        assert_close(model(x[0]), model(x)[0])
        assert model(x[:0]).shape[0] == 0


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_what_was_drawn(p: float, seed: int) -> None:
    model, bank = one(2, spec={"dropout": p}, kernel_size=3, padding=1, stride=2)
    slot = slot_of(model)
    x = image(2).requires_grad_()
    assert_close(model.eval()(x), spreaded(model, x))
    model.train()
    torch.manual_seed(seed)
    y = model(x)
    torch.manual_seed(seed)
    mask = dropping.drop(torch.ones_like(x), dropping.draw(x, p)) / (1 - p)
    bank.use(None)
    expected = model(x) + slot.scale * F.conv2d(
        F.conv2d(x * mask, slot.lora_A, None, 2, 1), slot.lora_B.view(6, 2, 1, 1)
    )
    assert_close(y, expected)
    wanted = [x, slot.lora_A, slot.lora_B]
    for left, right in zip(torch.autograd.grad(y.square().sum(), wanted),
                           torch.autograd.grad(expected.square().sum(), wanted), strict=True):  # fmt: skip
        assert_close(left, right)


def spreaded(model: nn.Module, x: Tensor) -> Tensor:
    slot = slot_of(model)
    weight = model[0].weight + slot.scale * (slot.lora_B.flatten(1) @ slot.lora_A.flatten(1)).view_as(model[0].weight)
    return F.conv2d(x, weight, model[0].bias, model[0].stride, model[0].padding)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck_twice(p: float) -> None:
    model, _ = one(2, spec={"dropout": p}, kernel_size=2, padding=1, dilation=2)
    model.train()
    slot = slot_of(model)
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(5)
        slot.__dict__["_parameters"].update(lora_A=A, lora_B=B)
        return model(x)

    inputs = (x, slot.lora_A, slot.lora_B)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("outputs", "dtype", "kept"), [(6, torch.float32, 0), (64, torch.float32, 4), (6, torch.bfloat16, 2)]
)
def test_only_x_and_the_thin_image_are_kept(
    layout: torch.memory_format, outputs: int, dtype: torch.dtype, kept: int
) -> None:
    model = nn.Sequential(nn.Conv2d(4, outputs, 3, padding=1)).to(dtype)
    fill(attach(model, {"a": LoraSpec(rank=2, targets=["0"])}))
    x = torch.randn(2, 4, 20, 20).to(dtype, memory_format=layout)
    layer, slot = model[0], slot_of(model)
    with saved_tensors() as saved:
        y = model(x)
    assert any(tensor.data_ptr() == x.data_ptr() for tensor in saved.tensors)
    assert saved.bytes(x, layer.weight, layer.bias, slot.lora_A, slot.lora_B) == 2 * 2 * 400 * kept
    assert_close(y, model(x.contiguous()), dtype)
    y.sum().backward()


@pytest.mark.parametrize("outputs", [6, 64], ids=["few outputs", "many"])
@pytest.mark.parametrize("trained", ["all", "A", "B", "W"])
def test_one_weight_for_base_and_update_has_the_gradients_of_the_parts(outputs: int, trained: str) -> None:
    """On a CPU in float32 and float64 the two are one convolution; whichever gradients are asked for are right."""
    model = nn.Sequential(nn.Conv2d(4, outputs, 3, stride=2, padding=1)).double()
    fill(attach(model, {"a": LoraSpec(rank=2, targets=["0"], alpha=3)}))
    layer, slot = model[0], slot_of(model)
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64, requires_grad=trained == "all")
    layer.weight.requires_grad_(trained in ("all", "W"))
    slot.lora_A.requires_grad_(trained in ("all", "A"))
    slot.lora_B.requires_grad_(trained in ("all", "B"))
    update = F.conv2d(F.conv2d(x, slot.lora_A, None, 2, 1), slot.lora_B.view(outputs, 2, 1, 1)) * slot.scale
    expected = F.conv2d(x, layer.weight, layer.bias, 2, 1) + update
    y, grad = model(x), torch.randn_like(expected)
    assert_close(y, expected)
    wanted = [tensor for tensor in (x, layer.weight, slot.lora_A, slot.lora_B) if tensor.requires_grad]
    for left, right in zip(
        torch.autograd.grad(y, wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True
    ):
        assert_close(left, right)


def test_dtypes() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3)).bfloat16()
    bank = attach(model, {"a": LoraSpec(rank=2, targets=["0"])})
    fill(bank)
    x = image(2).bfloat16()
    y = model(x)
    assert y.dtype == torch.bfloat16
    assert_close(y, spread(model, bank.adapter()).double()(x.double()), torch.bfloat16)
    y.float().sum().backward()
    assert all(grad.dtype == torch.float32 for grad in grads_of(bank, "a").values())
    model, bank = one(2, torch.float32, kernel_size=3)
    x = image(2, torch.float32)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert_close(y, expected, torch.bfloat16)
    y.float().sum().backward()


class Standardised(nn.Conv2d):
    """A convolution whose forward is not the plain one."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def test_a_convolution_with_a_forward_of_its_own_keeps_it() -> None:
    model = nn.Sequential(Standardised(4, 6, 3, padding=1)).double()
    x = image(2)
    base = model(x)
    with attach(model, {"a": LoraSpec(rank=2, targets=["0"])}) as bank:
        assert torch.equal(model(x), base)
        fill(bank)
        slot = slot_of(model)
        update = F.conv2d(F.conv2d(x, slot.lora_A, padding=1), slot.lora_B.view(6, 2, 1, 1)) * slot.scale
        assert_close(model(x), base + update)


def test_in_place_activations_may_follow() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(120, 3), nn.ReLU(inplace=True)
    )
    before = State(model)
    with attach(model, {"a": LoraSpec(rank=2, targets=["0", "3"])}) as bank:
        fill(bank)
        model(image(2, torch.float32)).sum().backward()
        assert len(grads_of(bank, "a")) == 4
    before.check()
