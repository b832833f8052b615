"""Forward and backward of linear sites against dense ``W + ΔW`` in float64, and what they keep."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tolerances import assert_close
from tests.unit.core.support import dense, operand, saved_tensors
from weft.core import dropout as dropping
from weft.core import ops
from weft.core.ops import Operand, linear, linears, low_rank, reference_linear

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 3, 8, 33])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_are_those_of_the_dense_weight(dtype: torch.dtype, rank: int, bias: bool) -> None:
    site = operand(24, 40, rank, dtype=dtype, bias=bias)
    x = torch.randn(5, 7, 24).to(dtype).requires_grad_()
    grad = torch.randn(5, 7, 40).to(dtype)
    y = linear(x, site)
    assert y.dtype == dtype
    y.backward(grad)

    wide = x.detach().double().requires_grad_()
    A, B = (t.detach().double().requires_grad_() for t in (site.A, site.B))
    reference = Operand(site.W, site.b, A, B, site.scale)
    expected = F.linear(wide, dense(reference), None if site.b is None else site.b.double())
    expected.backward(grad.double())
    assert_close(y, expected, dtype, "forward")
    for got, want, name in ((x, wide, "x"), (site.A, A, "A"), (site.B, B, "B")):
        assert got.grad.dtype == dtype
        assert_close(got.grad, want.grad, dtype, name)


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6), (2, 1, 3, 6), (0, 6), (2, 0, 6)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_any_leading_shape_also_none_and_no_rows(shape: tuple[int, ...], p: float) -> None:
    sites = [operand(6, 9, 2, p=p), operand(6, 4, 3, bias=False)]
    x = torch.randn(shape, requires_grad=True)
    first, second = linears(x, sites)
    assert first.shape == (*shape[:-1], 9)
    assert second.shape == (*shape[:-1], 4)
    (first.sum() + second.sum()).backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    if p == 0:
        assert_close(first, F.linear(x, dense(sites[0]).float(), sites[0].b))
        assert_close(second, F.linear(x, dense(sites[1]).float()))


def strided() -> dict[str, Tensor]:
    wide = torch.randn(3, 5, 24)
    return {
        "transposed": torch.randn(3, 12, 5).transpose(1, 2),
        "every second": wide[..., ::2],
        "slice": wide[..., 3:15],
        "expanded": torch.randn(1, 5, 12).expand(3, 5, 12),
        "permuted": torch.randn(12, 3, 5).permute(1, 2, 0),
    }


@pytest.mark.parametrize("how", list(strided()))
@pytest.mark.parametrize("p", [0.0, 0.05, 0.3])
def test_inputs_need_not_be_contiguous(how: str, p: float, seed: int) -> None:
    x = strided()[how]
    site = operand(12, 7, 3, p=p)
    found = []
    for given in (x, x.contiguous()):
        torch.manual_seed(seed)
        given = given.detach().requires_grad_()
        y = linear(given, site)
        y.square().sum().backward()
        found.append((y, given.grad, site.A.grad.clone(), site.B.grad.clone()))
        site.A.grad = site.B.grad = None
    for got, want in zip(*found, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.4])
def test_sites_that_share_their_input_are_the_sites_alone(p: float, seed: int) -> None:
    sites = [operand(10, out, rank, bias=out != 6, p=p * (out != 7)) for out, rank in ((6, 2), (7, 5), (8, 1))]
    plain = Operand(torch.randn(5, 10), None, None, None)
    grads = [torch.randn(4, out) for out in (6, 5, 7, 8)]
    order = [sites[0], plain, *sites[1:]]
    x = torch.randn(4, 10, requires_grad=True)
    torch.manual_seed(seed)
    together = linears(x, order)
    torch.autograd.backward(together, grads)
    got = [x.grad.clone(), *(t.grad.clone() for s in sites for t in (s.A, s.B))]
    x.grad = None
    for site in sites:
        site.A.grad = site.B.grad = None
    torch.manual_seed(seed)
    for site, grad, expected in zip(order, grads, together, strict=True):
        alone = linear(x, site)
        assert_close(expected, alone)
        alone.backward(grad)
    for left, right in zip(got, [x.grad, *(t.grad for s in sites for t in (s.A, s.B))], strict=True):
        assert_close(left, right)


def test_an_output_that_nobody_uses_costs_no_gradient() -> None:
    sites = [operand(6, 5, 2), operand(6, 4, 3), operand(6, 3, 1)]
    x = torch.randn(7, 6, requires_grad=True)
    _, used, _ = linears(x, sites)
    used.square().sum().backward()
    assert sites[0].B.grad is None
    assert sites[2].B.grad is None
    assert_close(x.grad, 2 * F.linear(x, dense(sites[1]).float(), sites[1].b) @ dense(sites[1]).float())


def test_the_slow_form_is_the_same() -> None:
    site = operand(8, 6, 3, dtype=torch.float64)
    x = torch.randn(5, 8, dtype=torch.float64)
    assert_close(linear(x, site), reference_linear(x, site))
    assert_close(reference_linear(x, site), F.linear(x, dense(site), site.b))
    base = Operand(site.W, site.b, None, None)
    assert_close(reference_linear(x, base), F.linear(x, site.W, site.b))
    assert_close(low_rank(x, site.A, site.B, site.scale), site.scale * x @ site.A.T @ site.B.T)


@pytest.mark.parametrize("rest", ["base", "factors", "bias", "x alone"])
def test_whatever_requires_a_gradient_gets_it(rest: str) -> None:
    site = operand(6, 5, 2, grad=rest in ("factors",))
    for tensor in {"base": (site.W,), "bias": (site.b,)}.get(rest, ()):
        tensor.requires_grad_()
    x = torch.randn(4, 6, requires_grad=rest == "x alone")
    y = linear(x, site)
    loss = y.square().sum()
    wanted = [t for t in (x, site.W, site.b, site.A, site.B) if t.requires_grad]
    assert wanted
    got = torch.autograd.grad(loss, wanted, retain_graph=True)
    expected = torch.autograd.grad(reference_linear(x, site).square().sum(), wanted)
    for left, right in zip(got, expected, strict=True):
        assert_close(left, right)
    with torch.no_grad():
        assert not linear(x, site).requires_grad


def arguments(p: float, count: int) -> tuple[Any, list[Tensor]]:
    sites = [operand(5, 4 + k, 2 + k, dtype=torch.float64, p=p, bias=k == 0) for k in range(count)]
    tensors = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True)]
    for site in sites:
        tensors += [site.W.requires_grad_(), site.A, site.B] + ([site.b.requires_grad_()] if site.b is not None else [])

    def function(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(11)
        left, fresh = iter(rest), []
        for site in sites:
            W, A, B = next(left), next(left), next(left)
            fresh.append(Operand(W, None if site.b is None else next(left), A, B, site.scale, site.p))
        return linears(x, fresh)

    return function, tensors


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("count", [1, 3])
def test_gradcheck_with_dropout_too(p: float, count: int) -> None:
    function, tensors = arguments(p, count)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=count > 1)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_gradients_can_be_differentiated_again(p: float) -> None:
    function, tensors = arguments(p, 2)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_a_graph_that_is_kept_can_be_used_again() -> None:
    sites = [operand(6, 5, 2, p=0.1), operand(6, 5, 2)]
    x = torch.randn(4, 6, requires_grad=True)
    first, second = linears(x, sites)
    once = torch.autograd.grad(first.sum() + second.sum(), [x, sites[0].A, sites[1].B], retain_graph=True)
    twice = torch.autograd.grad(first.sum() + second.sum(), [x, sites[0].A, sites[1].B])
    for left, right in zip(once, twice, strict=True):
        assert torch.equal(left, right)


def test_gradients_add_up_over_several_backwards() -> None:
    site = operand(6, 5, 2)
    parts = torch.randn(3, 4, 6)
    for part in parts:
        linear(part, site).square().sum().backward()
    summed = site.A.grad.clone(), site.B.grad.clone()
    site.A.grad = site.B.grad = None
    linear(parts, site).square().sum().backward()
    assert_close(summed[0], site.A.grad)
    assert_close(summed[1], site.B.grad)


def test_results_can_be_changed_in_place() -> None:
    site, other = operand(6, 5, 2), operand(6, 5, 2)
    for shape in ((4, 6), (2, 4, 6)):
        x = torch.randn(shape)
        F.relu(linear(x, site), inplace=True).sum().backward()
        first, second = linears(x, (site, other))
        (first.mul_(2) + second).sum().backward()
    with torch.no_grad():
        assert F.relu(linear(x, site), inplace=True).min() >= 0


# what is kept for the backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_x_and_the_thin_product_are_kept(dtype: torch.dtype) -> None:
    sites = [operand(64, 48, 4, dtype=dtype, factors=torch.float32) for _ in range(3)]
    x = torch.randn(10, 20, 64, dtype=dtype)
    with saved_tensors() as saved:
        linears(x, sites)
    weights = [t for s in sites for t in (s.W, s.b, s.A, s.B)]
    assert any(tensor.data_ptr() == x.data_ptr() for tensor in saved.tensors), "x itself"
    (thin,) = saved.others(x, *weights)
    assert thin.shape == (200, 12)
    assert thin.dtype == dtype
    assert saved.bytes(x, *weights) == 200 * 12 * dtype.itemsize


def test_a_strided_x_is_kept_as_it_is() -> None:
    site = operand(12, 7, 3)
    x = torch.randn(3, 12, 50).transpose(1, 2)
    with saved_tensors() as saved:
        linear(x, site)
    assert saved.bytes(x, site.W, site.b, site.A, site.B) == 150 * 3 * 4


@pytest.mark.parametrize(("p", "limit"), [(0.01, 0.02), (0.05, 0.07), (0.3, 0.2501), (0.5, 0.2501)])
def test_dropout_keeps_positions_or_bytes_never_a_float_copy(p: float, limit: float) -> None:
    site = operand(64, 64, 4, p=p)
    x = torch.randn(500, 64)
    with saved_tensors() as saved:
        linear(x, site)
    extra = saved.bytes(x, site.W, site.b, site.A, site.B) - 500 * 4 * 4
    assert extra <= limit * x.numel() * 4
    drawn = [t for t in saved.others(x, site.W, site.b, site.A, site.B) if not t.is_floating_point()]
    assert len(drawn) == 1


def test_nothing_is_kept_without_gradients() -> None:
    site = operand(8, 8, 2, p=0.1)
    x = torch.randn(4, 8)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode, saved_tensors() as saved:
            linear(x, site)
        assert not saved.tensors


# dropout in the product


def test_dropout_drops_what_was_drawn(seed: int) -> None:
    for p in (0.05, 0.5):
        sites = [operand(10, 6, 2, p=p), operand(10, 7, 3), operand(10, 5, 2, p=p)]
        x = torch.randn(8, 10, requires_grad=True)
        torch.manual_seed(seed)
        masks = [dropping.drop(torch.ones(8, 10), dropping.draw(x, p)) for _ in range(2)]
        scaled = [masks[0] / (1 - p), torch.ones(8, 10), masks[1] / (1 - p)]
        torch.manual_seed(seed)
        outputs = linears(x, sites)
        plain = [
            F.linear(x, s.W, s.b) + s.scale * (x * mask) @ s.A.T @ s.B.T for s, mask in zip(sites, scaled, strict=True)
        ]
        wanted = [x, *(t for s in sites for t in (s.A, s.B))]
        got = torch.autograd.grad(sum(y.square().sum() for y in outputs), wanted)
        expected = torch.autograd.grad(sum(y.square().sum() for y in plain), wanted)
        for left, right in zip((*outputs, *got), (*plain, *expected), strict=True):
            assert_close(left, right)


def test_dropout_changes_nothing_on_average() -> None:
    for p in (0.1, 0.5):
        site = operand(16, 6, 3, p=p, grad=False)
        x = torch.randn(16).expand(20000, 16).contiguous()
        mean = linear(x, site).mean(0)
        expected = linear(x[0], Operand(site.W, site.b, site.A, site.B, site.scale))
        assert float((mean - expected).abs().max()) < 0.05 * float(expected.abs().max()) + 0.05


# dtypes


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("count", [1, 2])
def test_float32_factors_on_a_bfloat16_base(p: float, count: int, seed: int) -> None:
    sites = [operand(32, 24, 4, dtype=torch.bfloat16, factors=torch.float32, p=p) for _ in range(count)]
    x = torch.randn(6, 32, dtype=torch.bfloat16, requires_grad=True)
    torch.manual_seed(seed)
    outputs = linears(x, sites)
    sum(y.float().square().sum() for y in outputs).backward()
    wide = [Operand(s.W.double(), s.b.double(), s.A.detach().double().requires_grad_(),
                    s.B.detach().double().requires_grad_(), s.scale, p) for s in sites]  # fmt: skip
    x64 = x.detach().double().requires_grad_()
    torch.manual_seed(seed)
    expected = linears(x64, wide)
    sum(y.square().sum() for y in expected).backward()
    assert x.grad.dtype == torch.bfloat16
    for y, want in zip(outputs, expected, strict=True):
        assert y.dtype == torch.bfloat16
        assert_close(y, want, torch.bfloat16)
    for site, want in zip(sites, wide, strict=True):
        assert site.A.grad.dtype == site.B.grad.dtype == torch.float32
        assert_close(site.A.grad, want.A.grad, torch.bfloat16)
        assert_close(site.B.grad, want.B.grad, torch.bfloat16)


def test_autocast_computes_and_keeps_in_bfloat16() -> None:
    site = operand(32, 24, 4)
    x = torch.randn(6, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        with saved_tensors() as saved:
            y = linear(x, site)
        assert y.dtype == torch.bfloat16
    assert all(t.dtype == torch.bfloat16 for t in saved.others(site.W, site.b, site.A, site.B))
    y.float().square().sum().backward()
    assert x.grad.dtype == site.A.grad.dtype == torch.float32
    expected = torch.autograd.grad(reference_linear(x, site).square().sum(), [x, site.A, site.B])
    for got, want in zip((x.grad, site.A.grad, site.B.grad), expected, strict=True):
        assert_close(got, want, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x.double(), operand(32, 24, 4, dtype=torch.float64)).dtype == torch.float64
        with torch.no_grad():
            assert linear(x, site).dtype == torch.bfloat16


# function transforms and compilers do their own bookkeeping


def test_function_transforms() -> None:
    site = operand(6, 5, 2, dtype=torch.float64, grad=False)
    x = torch.randn(4, 6, dtype=torch.float64)

    def loss(A: Tensor, x: Tensor) -> Tensor:
        return linear(x, Operand(site.W, site.b, A, site.B, site.scale)).square().sum()

    alone = torch.stack([torch.func.grad(loss)(site.A, row) for row in x])
    assert_close(torch.func.vmap(torch.func.grad(loss), (None, 0))(site.A, x), alone)
    assert_close(alone.sum(0), torch.func.grad(loss)(site.A, x))


def test_compiled_and_eager_agree() -> None:
    site = operand(6, 5, 2)
    x = torch.randn(4, 6, requires_grad=True)
    compiled = torch.compile(lambda x: linear(x, site), backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(x).square().sum(), [x, site.A, site.B])
    expected = torch.autograd.grad(linear(x, site).square().sum(), [x, site.A, site.B])
    for left, right in zip(got, expected, strict=True):
        assert_close(left, right)


def test_needs_are_read_off_autograds_flags() -> None:
    flags = [True, False, *itertools.chain(*[(False, True, True, False), (True, False, False, False)])]
    needs = ops.Needs.of(flags, 2)
    assert needs.x
    assert list(needs.W) == [False, True]
    assert list(needs.b) == [True, False]
    assert needs.A
