"""Facts about an adapter: norms and effective ranks against dense matrices, groups, files, warnings."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import weft.formats
from weft.adapter import Adapter
from weft.core.factors import Factors, effective_rank
from weft.errors import FormatError, NotFiniteError
from weft.inspection import inspect_adapter, prove_adapter
from weft.spec import LoraSpec


def adapter(**changes: Factors) -> Adapter:
    """Four alike sites in two layers, and whatever is given."""
    sites = {
        f"model.layers.{layer}.{name}": Factors(torch.randn(3, 8), torch.randn(6, 3), 0.5)
        for layer in range(2)
        for name in ("up", "down")
    }
    return Adapter(LoraSpec(rank=3), {**sites, **changes})


def test_sites_against_dense_matrices(tmp_path: Path) -> None:
    made = adapter()
    made.save(tmp_path / "a")
    found = inspect_adapter(tmp_path / "a")
    for site in found.sites:
        dense = made.delta(site.path).double()
        assert site.norm == pytest.approx(float(dense.norm()), rel=1e-5)
        assert site.effective_rank == pytest.approx(effective_rank(torch.linalg.svdvals(dense)[:3]), rel=1e-5)
        assert (site.shape, site.rank, site.scale, site.trained) == ((6, 8), 3, 0.5, True)
    assert found.norm == pytest.approx(math.sqrt(sum(site.norm**2 for site in found.sites)))
    assert found.adapter == made
    assert "adapter_model.safetensors" in found.files
    assert all(size > 0 for size in found.files.values())


def test_alike_sites_are_one_group(tmp_path: Path) -> None:
    odd = Factors(torch.randn(2, 8), torch.randn(5, 2), 1.0)
    adapter(lm_head=odd).save(tmp_path / "a")
    groups = {group.pattern: group for group in inspect_adapter(tmp_path / "a").groups}
    assert {name: group.count for name, group in groups.items()} == {
        "model.layers.*.up": 2,
        "model.layers.*.down": 2,
        "lm_head": 1,
    }
    low, middle, high = groups["model.layers.*.up"].norms
    assert low <= middle <= high
    assert groups["lm_head"].shape == (5, 8)


def test_stacked_experts_have_their_number_in_the_shape(tmp_path: Path) -> None:
    stacked = Factors(torch.randn(4, 2, 8), torch.randn(4, 6, 2), 1.0, kind="parameter")
    found = inspect_adapter(Adapter(LoraSpec(rank=2), {"mlp.experts.up": stacked}).save(tmp_path / "a", for_peft=False))
    assert found.sites[0].shape == (4, 6, 8)
    assert 1 <= found.sites[0].effective_rank <= 2


def test_what_never_moved_is_said(tmp_path: Path) -> None:
    idle = Factors(torch.randn(3, 8), torch.zeros(6, 3), 0.5)
    some = inspect_adapter(adapter(**{"model.layers.1.up": idle}).save(tmp_path / "some"))
    assert [text for text in some.warnings if "1 of 4 sites have an update of zero: model.layers.1.up" in text]
    none = inspect_adapter(Adapter(LoraSpec(rank=3), {"up": idle}).save(tmp_path / "none"))
    assert any(text.startswith("untrained") for text in none.warnings)


def test_an_update_that_cancels_itself_is_untrained(tmp_path: Path) -> None:
    """Such is a start like PiSSA's: its product, and the same product subtracted."""
    A, B = torch.randn(2, 8), torch.randn(6, 2)
    start = Factors(torch.cat([A, A]), torch.cat([B, -B], dim=1), 1.0)
    found = inspect_adapter(Adapter(LoraSpec(rank=4), {"up": start}).save(tmp_path / "a"))
    assert not found.sites[0].trained
    assert found.sites[0].effective_rank == 0


def test_not_a_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Factors(torch.full((3, 8), math.nan), torch.randn(6, 3), 0.5)
    monkeypatch.setattr(weft.formats, "load", lambda path: adapter(up=broken))
    with pytest.raises(NotFiniteError, match="up: lora_A"):
        inspect_adapter(tmp_path)


def test_nothing_can_be_proved_without_golden_prompts() -> None:
    with pytest.raises(FormatError, match="golden prompts"):
        prove_adapter(adapter())
