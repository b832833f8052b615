"""Every method against a dense float64 oracle that is written down here by itself."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.models import tiny_llama
from tests.tolerances import TOLERANCES, assert_close
from tests.unit.compose.support import adapter_of, delta, three
from weft.adapter import Adapter
from weft.cli.combine import EPILOG
from weft.compose import METHODS, combine
from weft.compose.dense import disjoint_mean, drop, generator_for, nearest, trim

WEIGHTS = (0.7, -0.5, 1.2)


@pytest.fixture(scope="module")
def adapters() -> list[Adapter]:
    return three(tiny_llama(dtype=torch.float64))


def updates(adapters: list[Adapter], path: str) -> list[Tensor]:
    return [torch.as_tensor(delta(adapter, path)) for adapter in adapters]


def best(target: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(target, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def trimmed(update: Tensor, density: float) -> Tensor:
    count = round(density * update.numel())
    kept = update.flatten().abs().argsort(descending=True)[:count]
    mask = torch.zeros(update.numel(), dtype=torch.bool)
    mask[kept] = True
    return torch.where(mask.view(update.shape), update, 0.0)


def elected(parts: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    """TIES, element by element."""
    found = torch.zeros(parts[0].shape, dtype=parts[0].dtype)
    for index in range(found.numel()):
        values = [(float(part.reshape(-1)[index]), weight) for part, weight in zip(parts, weights, strict=True)]
        sign = sum(value * weight for value, weight in values)
        agree = [(value, weight) for value, weight in values if value * weight * sign > 0]
        mass = sum(abs(weight) for _, weight in agree)
        found.view(-1)[index] = sum(value * weight for value, weight in agree) / mass if mass else 0.0
    return found


def dropped(adapters: list[Adapter], path: str, density: float, seed: int) -> list[Tensor]:
    found = []
    for adapter, update in zip(adapters, updates(adapters, path), strict=True):
        generator = generator_for(seed, path, adapter.digest, 0)
        found.append(torch.where(torch.rand(update.shape, generator=generator) < density, update / density, 0.0))
    return found


def weighted(parts: list[Tensor]) -> Tensor:
    return sum((weight * part for weight, part in zip(WEIGHTS, parts, strict=True)), torch.zeros(()))


def test_all_methods_have_a_paper_a_line_of_help_and_an_oracle_here() -> None:
    assert set(METHODS) == {
        "exact",
        "svd",
        "linear",
        "task_arithmetic",
        "layerwise",
        "knots",
        "ties",
        "dare",
        "dare_ties",
        "magnitude",
    }
    for name, method in METHODS.items():
        assert re.search(r"arXiv:\d{4}\.\d{5}|doi:", method.paper), name
        assert method.summary.endswith("."), name
    listed = EPILOG.removeprefix("Methods: ").partition(".")[0].split(", ")
    assert listed == list(METHODS)


@pytest.mark.parametrize("path", ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"])
def test_methods_that_give_the_sum(adapters: list[Adapter], path: str) -> None:
    total = weighted(updates(adapters, path))
    pairs = list(zip(adapters, WEIGHTS, strict=True))
    exact = combine(pairs)
    assert_close(exact.delta(path), total)
    assert exact.factors[path].rank == 12
    assert exact.report.relative_error == 0.0
    assert_close(combine(pairs, method="task_arithmetic", scaling=0.25).delta(path), 0.25 * total)
    assert_close(combine(pairs, method="svd", rank=5).delta(path), best(total, 5))
    assert_close(combine(pairs, method="svd", rank=5, scaling=-2.0).delta(path), -2 * best(total, 5))
    assert_close(combine(pairs, method="linear").delta(path), best(total, 6))
    assert combine(pairs, method="linear").factors[path].rank == 6


@pytest.mark.parametrize("limit", [{"rank": 4}, {"energy": 0.9}, {"error": 0.2}])
def test_the_error_of_a_truncation_is_the_true_one(adapters: list[Adapter], limit: dict[str, float]) -> None:
    mixed = combine(list(zip(adapters, WEIGHTS, strict=True)), method="svd", **limit)
    lost = wanted = 0.0
    for site in mixed.report.sites:
        total = weighted(updates(adapters, site.path))
        off = float((mixed.delta(site.path) - total).norm())
        assert site.relative_error == pytest.approx(off / float(total.norm()), abs=1e-9)
        assert site.norm == pytest.approx(float(total.norm()))
        lost, wanted = lost + off**2, wanted + float(total.norm()) ** 2
        if "rank" not in limit:
            bound = limit.get("error", (1 - limit.get("energy", 0.0)) ** 0.5)
            assert site.relative_error <= bound
            assert site.rank == 1 or float((best(total, site.rank - 1) - total).norm() / total.norm()) > bound
    assert mixed.report.relative_error == pytest.approx((lost / wanted) ** 0.5)


def test_layerwise_weights(adapters: list[Adapter]) -> None:
    by_layer = {r"layers\.0\..*": 0.0, r"1\.self_attn\.\w+": -2.0, "default": 0.5}
    mixed = combine([(adapters[0], by_layer), (adapters[1], 1.0)], method="layerwise")
    for path in mixed.sites:
        weight = 0.0 if ".0." in path else -2.0 if "attn" in path else 0.5
        assert_close(mixed.delta(path), weight * torch.as_tensor(delta(adapters[0], path)) + delta(adapters[1], path))
        assert mixed.factors[path].rank == (4 if weight == 0 else 6), "an update of weight 0 takes no rank"
    same = combine([(adapters[0], by_layer), (adapters[1], 1.0)])
    assert same.digest == mixed.digest, "every method takes weights by pattern"


ELEMENTWISE: dict[str, Callable[[list[Adapter], str], Tensor]] = {
    "ties": lambda a, p: elected([trimmed(u, 0.3) for u in updates(a, p)], WEIGHTS),
    "dare": lambda a, p: weighted(dropped(a, p, 0.3, 5)),
    "dare_ties": lambda a, p: elected(dropped(a, p, 0.3, 5), WEIGHTS),
    "magnitude": lambda a, p: weighted([trimmed(u, 0.3) for u in updates(a, p)]),
}


@pytest.mark.parametrize("method", ELEMENTWISE)
def test_methods_by_elements(adapters: list[Adapter], method: str) -> None:
    path = "model.layers.0.self_attn.k_proj"
    wanted = ELEMENTWISE[method](adapters, path)
    pairs = list(zip(adapters, WEIGHTS, strict=True))
    whole = combine(pairs, method=method, density=0.3, rank=32, seed=5)
    assert_close(whole.delta(path), wanted, what="at full rank nothing is lost")
    mixed = combine(pairs, method=method, density=0.3, rank=4, seed=5, scaling=0.5)
    assert_close(mixed.delta(path), 0.5 * best(wanted, 4))
    site = next(site for site in mixed.report.sites if site.path == path)
    assert site.relative_error == pytest.approx(float((best(wanted, 4) - wanted).norm() / wanted.norm()), abs=1e-9)
    total = weighted(updates(adapters, path))
    assert site.from_sum == pytest.approx(float((mixed.delta(path) - total).norm() / total.norm()), abs=1e-7)
    assert combine(pairs, method=method, density=0.3).factors[path].rank == 12, (
        "the sum of the ranks where none is given"
    )


@pytest.mark.parametrize("inner", ["ties", "dare_ties", "sum"])
def test_knots_by_the_dense_matrices(adapters: list[Adapter], inner: str) -> None:
    path = "model.layers.1.mlp.up_proj"
    parts = updates(adapters, path)
    U, S, Vh = torch.linalg.svd(torch.cat(parts, dim=1), full_matrices=False)
    real = int((S / S[0] > 1e-9).sum())
    aligned = list(Vh[:real].split(parts[0].shape[1], dim=1))
    if inner == "ties":
        aligned = [trimmed(V, 0.4) for V in aligned]
    if inner == "sum":
        wanted = (U[:, :real] * S[:real]) @ weighted(aligned)
        assert_close(wanted, weighted(parts))
    else:
        wanted = (U[:, :real] * S[:real]) @ elected(aligned, WEIGHTS)
    options = {} if inner == "sum" else {"density": 0.4 if inner == "ties" else 1.0}
    mixed = combine(list(zip(adapters, WEIGHTS, strict=True)), method="knots", inner=inner, **options)
    assert_close(mixed.delta(path), wanted, what="the basis is common: signs of singular vectors don't matter")
    assert mixed.factors[path].rank == 12
    short = combine(list(zip(adapters, WEIGHTS, strict=True)), method="knots", inner=inner, rank=3, **options)
    assert_close(short.delta(path), best(wanted, 3))


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_adapters_changes_nothing(adapters: list[Adapter], method: str) -> None:
    options: dict[str, object] = {"density": 0.4} if METHODS[method].elementwise or method == "knots" else {}
    options |= {"rank": 3} if method == "svd" else {}
    pairs: list[tuple[Adapter, object]] = list(zip(adapters, WEIGHTS, strict=True))
    if method == "layerwise":
        pairs[0] = (adapters[0], {"q_proj": 0.1, "default": 0.7})
    one, two = (combine(order, method=method, seed=3, **options) for order in (pairs, pairs[::-1]))
    for path in one.sites:
        assert_close(one.delta(path), two.delta(path))
    again = combine(pairs, method=method, seed=3, **options)
    assert again.digest == one.digest
    if "seed" in METHODS[method].takes and method.startswith("dare"):
        assert combine(pairs, method=method, seed=4, **options).digest != one.digest


def test_one_adapter_is_itself_under_every_method_that_averages(adapters: list[Adapter]) -> None:
    path = adapters[0].sites[0]
    for method in ("ties", "dare_ties", "magnitude", "dare", "knots"):
        mixed = combine([(adapters[0], 1.0)], method=method, density=1.0)
        assert_close(mixed.delta(path), torch.as_tensor(delta(adapters[0], path)))


def test_dropping_keeps_the_mean_and_the_share() -> None:
    ones = torch.ones(400, 400, dtype=torch.float64)
    found = drop(ones, 0.2, generator_for(0, "x"))
    assert set(found.unique().tolist()) == {0.0, 5.0}
    assert float((found != 0).double().mean()) == pytest.approx(0.2, abs=0.01)
    assert float(found.mean()) == pytest.approx(1.0, abs=0.05)


def test_trimming_keeps_the_largest_and_at_least_one() -> None:
    values = torch.tensor([[3.0, -4.0, 0.5], [0.1, 2.0, -1.0]])
    assert torch.equal(trim(values, 0.5), torch.tensor([[3.0, -4.0, 0.0], [0.0, 2.0, 0.0]]))
    assert int((trim(values, 1e-9) != 0).sum()) == 1
    assert torch.equal(trim(values, 1.0), values)


def test_the_sign_with_more_mass_is_elected() -> None:
    parts = [torch.tensor([1.0, 1.0, 0.0, -2.0]), torch.tensor([-3.0, 2.0, 0.0, 2.0])]
    found = disjoint_mean(lambda: zip(parts, (1.0, 0.5), strict=True))
    assert_close(found, torch.tensor([-3.0, 4 / 3, 0.0, -2.0]))


@pytest.mark.parametrize("limit", [{"rank": 20}, {"error": 0.3}, {"energy": 0.9}])
def test_large_matrices_are_decomposed_at_random_and_nearly_as_well(limit: dict[str, float]) -> None:
    """The exact decomposition of a 1,100-wide matrix is the reference."""
    target = torch.randn(1100, 40) @ torch.diag(torch.logspace(0, -2, 40)) @ torch.randn(40, 1150) + 1e-3 * torch.randn(
        1100, 1150
    )
    A, B = nearest(target, **limit)
    error = float((target - B @ A).norm() / target.norm())
    S = torch.linalg.svdvals(target)
    optimum = float(S[A.shape[0] :].norm() / S.norm())
    assert error <= optimum * 1.01 + 1e-6
    bound = limit.get("error", (1 - limit["energy"]) ** 0.5 if "energy" in limit else None)
    if bound is not None:
        assert error <= bound * 1.001
        assert float(S[A.shape[0] - 1 :].norm() / S.norm()) > bound


def test_float32_adapters_stay_within_their_precision() -> None:
    values = three(tiny_llama())
    mixed = combine(list(zip(values, WEIGHTS, strict=True)))
    for path in mixed.sites:
        assert mixed.factors[path].A.dtype == torch.float32
        assert_close(mixed.delta(path), weighted(updates(values, path)).float(), TOLERANCES[torch.float32])


def test_bfloat16_adapters_are_not_rounded_again() -> None:
    """0.7 · B in bfloat16 would lose 0.4 %."""
    value = adapter_of(tiny_llama()).map(Tensor.bfloat16)
    other = adapter_of(tiny_llama(), 2).map(Tensor.bfloat16)
    other = other.replace(provenance=value.provenance)
    mixed = combine([(value, 0.7), (other, 0.3)])
    for path in mixed.sites:
        wanted = 0.7 * torch.as_tensor(delta(value, path)) + 0.3 * torch.as_tensor(delta(other, path))
        assert_close(mixed.delta(path), wanted.float(), TOLERANCES[torch.float32])
