"""Factors: the low-rank update as a value; everything against the dense matrix in float64."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.tolerances import assert_close
from weft.core.factors import (
    Factors,
    blocks,
    compact_groups,
    concat,
    effective_rank,
    from_blocks,
    inner,
    spread_groups,
    truncate,
)
from weft.errors import NotFiniteError, ShapeError


def random_factors(
    d_out: int = 7, d_in: int = 5, rank: int = 3, experts: int = 0, scale: float = 0.7, **rest: Any
) -> Factors:
    lead = (experts,) if experts else ()
    A, B = (torch.randn(*lead, *shape, dtype=torch.float64) for shape in ((rank, d_in), (d_out, rank)))
    return Factors(A, B, scale, **rest)


def grouped(groups: int = 2, rank: int = 4) -> Factors:
    compact = torch.randn(6, rank // groups, dtype=torch.float64)
    A = torch.randn(rank, 4 * 9, dtype=torch.float64)
    return Factors(A, spread_groups(compact, groups), 0.7, "conv", (3, 3), groups=groups)


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_sizes_delta_norm_and_spectrum(experts: int, rank: int) -> None:
    item = random_factors(rank=rank, experts=experts)
    dense = 0.7 * item.B @ item.A
    assert (item.rank, item.d_in, item.d_out) == (rank, 5, 7)
    assert item.num_parameters == item.A.numel() + item.B.numel()
    assert_close(item.delta(), dense)
    assert item.norm() == pytest.approx(float(dense.norm()))
    values = torch.linalg.svdvals(dense)
    found = item.spectrum()
    assert found.shape == (*dense.shape[:-2], rank)
    assert_close(found[..., : min(rank, 5)], values[..., : min(rank, 5)])
    assert not found[..., 5:].any()


def test_the_scale_is_in_every_number_once() -> None:
    one, two = random_factors(), None
    two = dataclasses.replace(one, scale=-2 * one.scale)
    assert_close(two.delta(), -2 * one.delta())
    assert two.norm() == pytest.approx(2 * one.norm())
    assert_close(two.spectrum(), 2 * one.spectrum())
    assert_close(concat([(two, 1.0)]).delta(), two.delta())
    assert_close(truncate(two, 3)[0].delta(), two.delta())


def test_norm_and_spectrum_never_build_the_dense_matrix() -> None:
    item = Factors(torch.randn(2, 30_000), torch.randn(40_000, 2), 1.0)
    assert item.norm() == pytest.approx(float(item.spectrum().norm()), rel=1e-6)


@pytest.mark.parametrize("parts", [
    {"A": torch.ones(3, 5), "B": torch.ones(7, 2)},
    {"A": torch.ones(5), "B": torch.ones(7, 2)},
    {"A": torch.ones(2, 3, 5), "B": torch.ones(7, 3)},
    {"A": torch.ones(2, 3, 5), "B": torch.ones(4, 7, 3)},
    {"A": torch.ones(1, 1, 3, 5), "B": torch.ones(1, 1, 7, 3)},
    {"A": torch.ones(3, 5), "B": torch.ones(7, 3), "kernel": (3, 3), "kind": "conv"},
    {"A": torch.ones(3, 5), "B": torch.ones(7, 3), "magnitude": torch.ones(5)},
    {"A": torch.ones(3, 5), "B": torch.ones(7, 3), "bias": torch.ones(7, 1)},
    {"A": torch.ones(3, 5), "B": torch.ones(7, 3), "groups": 2},
    {"A": torch.ones(3, 5), "B": torch.ones(6, 3), "groups": 2, "kind": "conv"},
    {"A": torch.ones(2, 5), "B": torch.ones(7, 2), "groups": 2, "kind": "conv"},
    {"A": torch.ones(2, 5), "B": torch.ones(7, 2), "groups": 0},
], ids=str)  # fmt: skip
def test_parts_that_disagree_are_refused(parts: dict[str, Any]) -> None:
    with pytest.raises(ShapeError) as caught:
        Factors(**{"scale": 1.0, **parts})
    assert "(" in str(caught.value), "shapes are named"


def test_tensors_and_map() -> None:
    item = random_factors(magnitude=torch.ones(7), bias=torch.zeros(7))
    assert list(item.tensors()) == ["lora_A", "lora_B", "magnitude", "bias"]
    doubled = item.map(lambda tensor: tensor * 2)
    assert all(torch.equal(doubled.tensors()[name], 2 * tensor) for name, tensor in item.tensors().items())
    assert (doubled.scale, doubled.kind) == (item.scale, item.kind)
    assert item.num_parameters == 3 * 12 + 14
    plain = random_factors().map(Tensor.float)
    assert list(plain.tensors()) == ["lora_A", "lora_B"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["A", "B", "magnitude", "bias"])
def test_nan_and_infinity_are_refused_by_name(value: float, name: str) -> None:
    item = random_factors(magnitude=torch.ones(7), bias=torch.zeros(7))
    item.check_finite("here")
    tensor = copy.deepcopy(getattr(item, name))
    tensor.view(-1)[2] = value
    with pytest.raises(NotFiniteError, match=rf"some\.site: (lora_)?{name} has 1 of {tensor.numel()} values"):
        dataclasses.replace(item, **{name: tensor}).check_finite("some.site")
    with pytest.raises(NotFiniteError, match="scale is"):
        dataclasses.replace(item, scale=value).check_finite("x")


# sums


@given(
    st.lists(st.tuples(st.integers(1, 5), st.floats(-3, 3), st.floats(-2, 2)), min_size=1, max_size=5),
    st.sampled_from([0, 2]),
)
def test_concat_is_the_exact_sum(parts: list[tuple[int, float, float]], experts: int) -> None:
    made = [(random_factors(rank=rank, experts=experts, scale=scale), weight) for rank, scale, weight in parts]
    total = concat(made)
    assert total.rank == sum(rank for rank, _, _ in parts)
    assert total.scale == 1.0
    assert_close(total.delta(), sum(weight * item.delta() for item, weight in made))


def test_concat_of_grouped_convolutions_stays_block_diagonal() -> None:
    one, two = grouped(rank=4), grouped(rank=6)
    total = concat([(one, 0.5), (two, -2.0)])
    assert_close(total.delta(), 0.5 * one.delta() - 2 * two.delta())
    assert_close(spread_groups(compact_groups(total.B, 2), 2), total.B)
    assert not (torch.signbit(total.B) & (total.B == 0)).any(), "a file gives back the same bytes"


def test_what_does_not_add_is_refused() -> None:
    item = random_factors()
    for other in (
        random_factors(d_in=6),
        random_factors(d_out=6),
        random_factors(experts=2),
        random_factors(kind="embedding"),
    ):
        with pytest.raises(ShapeError, match="different shape"):
            concat([(item, 1.0), (other, 1.0)])
    with pytest.raises(ShapeError, match="not linear in its factors"):
        concat([(item, 1.0), (random_factors(magnitude=torch.ones(7)), 1.0)])


def test_biases_of_b_are_summed_by_weight_and_scale() -> None:
    one, two = random_factors(bias=torch.randn(7, dtype=torch.float64)), random_factors(scale=-3.0)
    total = concat([(one, 0.5), (two, 2.0), (dataclasses.replace(one, scale=2.0), 0.25)])
    assert_close(total.bias, (0.5 * 0.7 + 0.25 * 2.0) * one.bias)
    short, _ = truncate(one, 2)
    assert_close(short.scale * short.bias, one.scale * one.bias)


def test_narrow_factors_stay_narrow_only_where_nothing_is_rounded() -> None:
    item = random_factors(scale=2.0).map(lambda tensor: tensor.bfloat16())
    exact = concat([(item, 0.5), (item, -0.25)])
    assert exact.A.dtype == exact.B.dtype == torch.bfloat16
    for weight in (0.3, 0.7):
        total = concat([(item, 1.0), (item, weight)])
        assert total.B.dtype == torch.float32
        assert_close(total.delta(), (1 + weight) * item.map(Tensor.double).delta(), torch.float32)
    assert concat([(item, 1.0), (random_factors(), 1.0)]).A.dtype == torch.float64


@pytest.mark.parametrize("experts", [0, 3])
def test_inner_products_without_the_dense_matrix(experts: int) -> None:
    one, two = random_factors(experts=experts), random_factors(experts=experts, rank=5, scale=-2.0)
    assert inner(one, two) == pytest.approx(float((one.delta() * two.delta()).sum()))
    assert inner(one, one) == pytest.approx(one.norm() ** 2)


@pytest.mark.parametrize("experts", [0, 2])
def test_truncation_is_the_best_of_its_rank_and_says_what_it_lost(experts: int) -> None:
    item = random_factors(d_out=9, d_in=8, rank=6, experts=experts)
    U, S, Vh = torch.linalg.svd(item.delta(), full_matrices=False)
    for rank in (1, 2, 5, 6, 7):
        short, error = truncate(item, rank)
        keep = min(rank, 6)
        best = (U[..., :keep] * S[..., None, :keep]) @ Vh[..., :keep, :]
        assert short.rank == keep
        assert short.scale == 1.0
        assert_close(short.delta(), best)
        assert error == pytest.approx(float((best - item.delta()).norm() / item.delta().norm()), abs=1e-12)
        assert_close(short.A.norm(dim=-1), short.B.norm(dim=-2))
    zero = dataclasses.replace(item, B=torch.zeros_like(item.B))
    assert truncate(zero, 2)[1] == 0.0
    assert not truncate(zero, energy=0.9)[0].delta().any()


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("limit", [{"energy": 0.9}, {"energy": 0.5}, {"energy": 1.0}, {"error": 0.05}, {"error": 0.7}])
def test_truncation_to_an_energy_or_an_error_keeps_the_fewest_directions(experts: int, limit: dict[str, float]) -> None:
    item = random_factors(d_out=19, d_in=18, rank=9, experts=experts)
    item = dataclasses.replace(item, A=item.A * torch.logspace(0, -2, 9, dtype=torch.float64)[:, None])
    bound = limit["error"] if "error" in limit else math.sqrt(1 - limit["energy"])
    short, error = truncate(item, **limit)
    assert error <= bound + 1e-7
    assert error == pytest.approx(float((short.delta() - item.delta()).norm() / item.delta().norm()), abs=1e-7)
    assert short.rank == 1 or truncate(item, short.rank - 1)[1] > bound


@pytest.mark.parametrize("kind", ["unbalanced", "deficient", "tiny", "wide", "twins"])
def test_truncation_of_awkward_factors(kind: str) -> None:
    """Directions that are small in B and large in A, that are there twice, that are none; more ranks than columns."""
    item = random_factors(d_out=29, d_in=23, rank=8)
    if kind == "unbalanced":
        size = torch.logspace(-12, 12, 8, dtype=torch.float64)
        item = dataclasses.replace(item, A=item.A * size[:, None], B=item.B / size)
    elif kind == "deficient":
        item = dataclasses.replace(item, B=item.B * torch.tensor([1, 0, 1, 1, 0, 1, 1, 1.0], dtype=torch.float64))
    elif kind == "tiny":
        item = dataclasses.replace(item, B=item.B * 1e-30)
    elif kind == "wide":
        item = random_factors(d_out=5, d_in=6, rank=8)
    else:
        item = concat([(item, 0.5), (item, 0.25)])
    for rank in (2, 5, 8):
        short, error = truncate(item, rank)
        U, S, Vh = torch.linalg.svd(item.delta(), full_matrices=False)
        keep = short.rank
        best = (U[:, :keep] * S[:keep]) @ Vh[:keep]
        off = float((short.delta() - best).norm() / item.delta().norm())
        assert off < 1e-7, f"{kind} at rank {rank}"
        assert error == pytest.approx(float((best - item.delta()).norm() / item.delta().norm()), abs=1e-7)


@pytest.mark.parametrize("rank", [2, 4, 6])
def test_a_convolution_with_groups_is_truncated_group_by_group(rank: int) -> None:
    item = grouped(rank=8)
    short, error = truncate(item, rank)
    assert short.rank == rank
    assert_close(spread_groups(compact_groups(short.B, 2), 2), short.B)
    wanted = []
    for rows in item.delta().chunk(2):
        U, S, Vh = torch.linalg.svd(rows, full_matrices=False)
        wanted.append((U[:, : rank // 2] * S[: rank // 2]) @ Vh[: rank // 2])
    assert_close(short.delta(), torch.cat(wanted))
    assert error == pytest.approx(float((short.delta() - item.delta()).norm() / item.delta().norm()), abs=1e-9)


@pytest.mark.parametrize("experts", [0, 3])
def test_blocks_and_back(experts: int) -> None:
    for item in (random_factors(experts=experts), grouped(rank=6)):
        A, B = blocks(item)
        assert A.dim() == B.dim() == 3
        again = from_blocks(item, A, B * item.scale)
        assert_close(again.delta(), item.delta())
        assert again.scale == 1.0


def test_exactly_one_limit() -> None:
    for limits in ({}, {"rank": 2, "energy": 0.5}, {"energy": 0.5, "error": 0.1}):
        with pytest.raises(ShapeError, match="exactly one"):
            truncate(random_factors(), **limits)


# groups


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_groups_spread_and_compact(groups: int) -> None:
    compact = torch.randn(12, 4)
    B = spread_groups(compact, groups)
    assert B.shape == (12, 4 * groups)
    assert torch.equal(compact_groups(B, groups), compact)
    for group in range(groups):
        rows, columns = slice(group * 12 // groups, (group + 1) * 12 // groups), slice(4 * group, 4 * group + 4)
        assert torch.equal(B[rows, columns], compact[rows])
    assert int((B != 0).sum()) == int((compact != 0).sum())


def test_numbers_outside_of_the_blocks_are_refused() -> None:
    with pytest.raises(ShapeError, match="outside of its 2 diagonal blocks"):
        compact_groups(torch.ones(6, 4), 2)
    with pytest.raises(ShapeError, match="divide neither"):
        compact_groups(torch.ones(6, 4), 4)


def test_effective_rank() -> None:
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert effective_rank(torch.tensor([5.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(4)) == 0
    assert effective_rank(torch.tensor([[1.0, 1.0], [1.0, 0.0]])) == pytest.approx(1.5)
    values = torch.rand(6) + 0.1
    shares = values / values.sum()
    assert effective_rank(values) == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-5)
