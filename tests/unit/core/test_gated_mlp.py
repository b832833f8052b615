"""A SwiGLU MLP in one function: the same numbers and gradients as the three layers, and less kept."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tolerances import assert_close
from tests.unit.core.support import dense, operand, saved_tensors
from weft.core import dropout as dropping
from weft.core.gated_mlp import gated_mlp, reference_gated_mlp
from weft.core.ops import Operand

Sites = tuple[Operand, Operand, Operand]


def block(wide: int = 10, inner: int = 14, *, dtype: torch.dtype = torch.float32, p: float = 0.0, bias: bool = False,
          factors: torch.dtype | None = None) -> Sites:  # fmt: skip
    gate, up = (operand(wide, inner, rank, dtype=dtype, p=p, bias=bias, factors=factors) for rank in (2, 5))
    return gate, up, operand(inner, wide, 3, dtype=dtype, p=p, bias=bias, factors=factors)


def without(site: Operand) -> Operand:
    return Operand(site.W, site.b, None, None)


def factors_of(sites: Sites) -> list[Tensor]:
    return [tensor for site in sites for tensor in (site.A, site.B) if tensor is not None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_dense_block(dtype: torch.dtype, bias: bool) -> None:
    sites = block(dtype=dtype, bias=bias)
    x = torch.randn(3, 5, 10).to(dtype).requires_grad_()
    grad = torch.randn(3, 5, 10).to(dtype)
    y = gated_mlp(x, *sites)
    y.backward(grad)
    wide = x.detach().double().requires_grad_()
    copies = [Operand(s.W, s.b, s.A.detach().double().requires_grad_(), s.B.detach().double().requires_grad_(), s.scale)
              for s in sites]  # fmt: skip
    g, u = (F.linear(wide, dense(s), None if s.b is None else s.b.double()) for s in copies[:2])
    down = copies[2]
    expected = F.linear(F.silu(g) * u, dense(down), None if down.b is None else down.b.double())
    expected.backward(grad.double())
    assert y.dtype == dtype
    assert_close(y, expected, dtype)
    for left, right in zip([x, *factors_of(sites)], [wide, *factors_of(copies)], strict=True):
        assert_close(left.grad, right.grad, dtype)


@pytest.mark.parametrize("adapted", [c for n in (1, 2) for c in itertools.combinations(range(3), n)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_any_of_the_three_may_be_adapted(adapted: tuple[int, ...], p: float, seed: int) -> None:
    sites = tuple(site if k in adapted else without(site) for k, site in enumerate(block(p=p)))
    x = torch.randn(6, 10, requires_grad=True)
    torch.manual_seed(seed)
    y = gated_mlp(x, *sites)
    torch.manual_seed(seed)
    masks = {}
    for k in adapted:
        like = torch.ones(6, 14 if k == 2 else 10)
        masks[k] = dropping.drop(like, dropping.draw(like, p)) / (1 - p) if p else like

    def one(k: int, x: Tensor) -> Tensor:
        site = sites[k]
        out = F.linear(x, site.W)
        return out + site.scale * (x * masks[k]) @ site.A.T @ site.B.T if k in masks else out

    expected = one(2, F.silu(one(0, x)) * one(1, x))
    assert_close(y, expected)
    wanted = [x, *factors_of(sites)]
    for left, right in zip(torch.autograd.grad(y.square().sum(), wanted),
                           torch.autograd.grad(expected.square().sum(), wanted), strict=True):  # fmt: skip
        assert_close(left, right)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck_twice(p: float) -> None:
    sites = block(3, 4, dtype=torch.float64, p=p, bias=True)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, *factors: Tensor) -> Tensor:
        torch.manual_seed(3)
        pairs = zip(sites, factors[0::2], factors[1::2], strict=True)
        return gated_mlp(x, *(Operand(s.W, s.b, A, B, s.scale, s.p) for s, A, B in pairs))

    assert torch.autograd.gradcheck(function, (x, *factors_of(sites)))
    assert torch.autograd.gradgradcheck(function, (x, *factors_of(sites)), fast_mode=True)


def test_a_kept_graph_can_be_used_again_and_x_stays() -> None:
    sites = block(p=0.1)
    x = torch.randn(6, 10, requires_grad=True)
    before = x.detach().clone()
    y = gated_mlp(x, *sites)
    once = torch.autograd.grad(y.sum(), [x, *factors_of(sites)], retain_graph=True)
    twice = torch.autograd.grad(y.sum(), [x, *factors_of(sites)])
    assert all(torch.equal(left, right) for left, right in zip(once, twice, strict=True))
    assert torch.equal(x, before)


def test_it_keeps_x_gate_up_and_thin_products() -> None:
    sites = block(64, 160)
    x = torch.randn(50, 64)
    weights = [tensor for site in sites for tensor in (site.W, site.A, site.B)]
    with saved_tensors() as saved:
        gated_mlp(x, *sites)
    assert any(tensor.data_ptr() == x.data_ptr() for tensor in saved.tensors)
    assert saved.bytes(x, *weights) == 50 * (2 * 160 + 2 + 5 + 3) * 4


def test_a_frozen_block_of_autograd_keeps_more() -> None:
    sites = block(64, 160)
    x = torch.randn(50, 64, requires_grad=True)
    weights = [tensor for site in sites for tensor in (site.W, site.A, site.B)]
    with saved_tensors() as frozen:
        reference_gated_mlp(x, *(without(site) for site in sites))
    with saved_tensors() as ours:
        gated_mlp(x, *sites)
    assert ours.bytes(*weights) < frozen.bytes(*weights)


def test_no_rows_strides_and_one_dimension() -> None:
    sites = block()
    for x in (torch.randn(0, 10), torch.randn(10), torch.randn(10, 7).t(), torch.randn(1, 3, 10).expand(4, 3, 10)):
        x = x.requires_grad_()
        y = gated_mlp(x, *sites)
        assert y.shape == x.shape
        y.sum().backward()
        assert_close(y, reference_gated_mlp(x, *sites))


def test_mixed_dtypes_and_autocast() -> None:
    sites = block(dtype=torch.bfloat16, factors=torch.float32)
    x = torch.randn(6, 10, dtype=torch.bfloat16, requires_grad=True)
    y = gated_mlp(x, *sites)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in factors_of(sites))
    sites = block()
    x = torch.randn(6, 10)
    with torch.autocast("cpu", torch.bfloat16):
        y = gated_mlp(x, *sites)
        assert y.dtype == torch.bfloat16
        assert_close(y, reference_gated_mlp(x, *sites), torch.bfloat16)
