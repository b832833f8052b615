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
from weft.core.factors import Factors, compact_groups, concat, spread_groups, truncate
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
    for part in ("magnitude", "bias"):
        with pytest.raises(ShapeError, match="not linear in its factors"):
            concat([(item, 1.0), (random_factors(**{part: torch.ones(7)}), 1.0)])


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
    with pytest.raises(ShapeError, match="block-diagonal"):
        truncate(grouped(), 2)


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
