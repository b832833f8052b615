"""A byte budget spent on ranks: exact, never over, and best."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from tests.models import tiny_llama
from weft.core.bank import attach
from weft.errors import PlanError
from weft.plan.budget import spend
from weft.plan.sizes import bytes_of, in_words
from weft.plan.spectra import SiteSpectrum
from weft.spec import LoraSpec


def _site(path: str, d_out: int, d_in: int) -> SiteSpectrum:
    energies = sorted((random.random() ** 3 + 1e-3 for _ in range(min(d_out, d_in))), reverse=True)
    return SiteSpectrum(path, d_out, d_in, d_out + d_in, tuple(energies), sum(energies))


def _sites() -> list[SiteSpectrum]:
    return [_site("layers.0.q", 6, 4), _site("layers.0.up", 12, 6), _site("q", 5, 5)]


def test_no_byte_too_much_and_nothing_affordable_is_left() -> None:
    sites = _sites()
    for budget in (4 * 38, 500, 777, 1000, 10**9):
        found = spend(budget, sites)
        assert found.bytes == 4 * sum(found.ranks[site.path] * site.numbers for site in sites) <= budget
        assert all(1 <= found.ranks[site.path] <= site.most for site in sites)
        left = [site.numbers * 4 for site in sites if found.ranks[site.path] < site.most]
        assert not left or budget - found.bytes < min(left)
        assert found.uniform_bytes <= budget


def test_with_equal_costs_greedy_is_the_best_of_all_choices() -> None:
    sites = [_site(name, 4, 4) for name in ("a", "b", "c")]
    for directions in (3, 5, 8):
        found = spend(directions * 8 * 4, sites)
        best = max(sum(site.captured(rank) / site.total for site, rank in zip(sites, ranks, strict=True))
                   for ranks in itertools.product(range(1, 5), repeat=3) if sum(ranks) <= directions)  # fmt: skip
        assert found.captured * 3 == pytest.approx(best)


def test_rank_one_everywhere_is_the_least() -> None:
    sites = _sites()
    least = 4 * sum(site.numbers for site in sites)
    assert set(spend(least, sites).ranks.values()) == {1}
    with pytest.raises(PlanError, match=rf"rank 1 at all 3 sites takes {least:,} bytes.* 1 more"):
        spend(least - 1, sites)


def test_the_spec_has_these_ranks_also_where_a_path_ends_another() -> None:
    found = spend(800, _sites())
    spec = found.spec(LoraSpec(alpha=32))
    assert {path: spec.rank_at(path) for path in found.ranks} == dict(found.ranks)
    assert all(spec.scale_at(path) * rank == 32 for path, rank in found.ranks.items())


def test_a_bank_takes_the_spec() -> None:
    model = tiny_llama()
    sites = [
        _site(f"model.layers.{layer}.self_attn.{name}", rows, 32)
        for layer in (0, 1)
        for name, rows in (("q_proj", 32), ("v_proj", 16))
    ]
    found = spend("5KiB", sites)
    with attach(model, {"a": found.spec(LoraSpec(targets=["q_proj", "v_proj"], alpha=32))}) as bank:
        ranks = {path: bank.adapter("a").factors[path].rank for path in found.ranks}
        assert sum(value.numel() * 4 for _, value in bank.named_parameters("a")) == found.bytes
        assert all(value.dtype == torch.float32 for _, value in bank.named_parameters("a"))
    assert ranks == dict(found.ranks)


@pytest.mark.parametrize(
    ("text", "size"), [("8MiB", 8 << 20), ("1.5 kib", 1536), ("2GB", 2 * 10**9), ("77", 77), (5, 5)]
)
def test_sizes_are_read(text: str | int, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["8 MeB", "much", "-3MiB", "0", "0.2B", "", "1e999MiB", 0, True])
def test_what_is_no_size_is_refused(text: str | int) -> None:
    with pytest.raises(PlanError, match="budget"):
        bytes_of(text)


def test_sizes_are_said() -> None:
    assert [in_words(size) for size in (12, 1024, 8 << 20, 3 << 39)] == ["12 B", "1.00 KiB", "8.00 MiB", "1.50 TiB"]
