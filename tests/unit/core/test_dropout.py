"""What dropout draws: the rate, independence, and that both forms (positions, bytes) mean the same."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from weft.core.dropout import SPARSE_BELOW, draw, draw_rows, drop, drop_

RATES = [0.001, 0.01, 0.05, 0.1, 0.129, 0.13, 0.3, 0.5, 0.9]


def as_mask(like: Tensor, p: float) -> Tensor:
    """True where an element is dropped."""
    return drop(torch.ones_like(like), draw(like, p)) == 0


@pytest.mark.parametrize("p", RATES)
def test_the_rate_is_p(p: float) -> None:
    n = 400_000
    dropped = int(as_mask(torch.empty(n), p).sum())
    assert abs(dropped - n * p) < 6 * math.sqrt(n * p * (1 - p)) + 1


@pytest.mark.parametrize("p", [0.02, 0.1, 0.4])
def test_every_element_has_the_same_chance(p: float) -> None:
    counts = torch.zeros(50)
    rounds = 2000
    for _ in range(rounds):
        counts += as_mask(counts, p)
    expected, spread = rounds * p, math.sqrt(rounds * p * (1 - p))
    assert float((counts - expected).abs().max()) < 5.5 * spread
    chi_square = float(((counts - expected) / spread).square().sum())
    assert chi_square < 50 + 6 * math.sqrt(2 * 50)


@pytest.mark.parametrize("p", [0.02, 0.1, 0.4])
def test_elements_and_draws_are_independent(p: float) -> None:
    n = 400_000
    one, two = as_mask(torch.empty(n), p), as_mask(torch.empty(n), p)
    both = n * p * p
    for left, right in ((one, two), (one[1:], one[:-1]), (one[7:], one[:-7])):
        assert abs(int((left & right).sum()) - both) < 6 * math.sqrt(both) + 2


@pytest.mark.parametrize("p", [0.02, 0.1])
def test_gaps_are_geometric(p: float) -> None:
    gaps = draw(torch.empty(300_000), p).long().diff()
    for length in (1, 2, 5):
        expected = len(gaps) * p * (1 - p) ** (length - 1)
        assert abs(int((gaps == length).sum()) - expected) < 6 * math.sqrt(expected)
    assert abs(float(gaps.double().mean()) - 1 / p) < 6 / p / math.sqrt(len(gaps))


@pytest.mark.parametrize("p", [1e-12, 1e-6, 0.01, 0.12])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 17, 1000])
def test_positions_are_distinct_ascending_and_inside(n: int, p: float) -> None:
    for _ in range(20):
        places = draw(torch.empty(n), p)
        assert places.dtype == torch.int32
        assert bool((places.diff() > 0).all())
        assert n > 0 or not len(places)
        assert not len(places) or (int(places[0]) >= 0 and int(places[-1]) < n)


def test_positions_below_the_threshold_bytes_above() -> None:
    like = torch.empty(4, 5)
    assert draw(like, SPARSE_BELOW - 1e-6).dtype == torch.int32
    assert draw(like, SPARSE_BELOW).dtype == torch.bool
    assert draw(like, SPARSE_BELOW).shape == like.shape
    n = 100_000
    assert draw(torch.empty(n), 0.12).nbytes < draw(torch.empty(n), 0.14).nbytes


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_torchs_seed_repeats_it(p: float, seed: int) -> None:
    like = torch.empty(1000)
    torch.manual_seed(seed)
    first, second = draw(like, p), draw(like, p)
    torch.manual_seed(seed)
    assert torch.equal(draw(like, p), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_drop_leaves_its_argument_and_takes_any_strides(p: float) -> None:
    base = torch.randn(12, 30)
    for x in (base, base.t(), base[:, ::2]):
        dropped = draw(x, p)
        before = x.clone()
        got = drop(x, dropped)
        assert torch.equal(x, before)
        mask = drop(torch.ones(x.shape), dropped)
        assert torch.equal(got, x * mask)
        again = x.contiguous()
        assert drop_(again, dropped).data_ptr() == again.data_ptr()
        assert torch.equal(again, got)


@pytest.mark.parametrize("p", [0.05, 0.4])
def test_what_a_row_draws_depends_on_its_seed_and_on_nothing_that_follows(p: float) -> None:
    x = torch.empty(9, 50)
    drawn = draw_rows(x, [4, 2, 3], [p, p, p], [7, 8, 7])
    assert drawn is not None
    mask = torch.zeros(9 * 50, dtype=torch.bool)
    if drawn.dtype == torch.bool:
        mask = drawn.view(-1)
    else:
        mask[drawn] = True
    mask = mask.view(9, 50)
    assert torch.equal(mask[6:], mask[:3]), "the same seed draws the same, however long the row is"
    assert not torch.equal(mask[4:6], mask[:2])
    alone = draw_rows(torch.empty(2, 50), [2], [p], [8])
    assert alone is not None
    single = (
        alone.view(-1) if alone.dtype == torch.bool else torch.zeros(100, dtype=torch.bool).index_fill_(0, alone, True)
    )
    assert torch.equal(single.view(2, 50), mask[4:6])


def test_rows_drop_with_their_own_probability() -> None:
    torch.manual_seed(0)
    drawn = draw_rows(torch.empty(300, 1000), [100, 100, 100], [0.0, 0.05, 0.3], [None, None, None])
    assert drawn is not None
    shares = [float(part.float().mean()) for part in drawn.chunk(3)]
    assert shares[0] == 0
    assert abs(shares[1] - 0.05) < 0.005
    assert abs(shares[2] - 0.3) < 0.01
    assert draw_rows(torch.empty(4, 4), [4], [0.0], [1]) is None
