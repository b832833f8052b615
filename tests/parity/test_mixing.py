"""Mixtures beside PEFT's: where both are right they agree; where PEFT's weighted adapters are wrong, both numbers are shown.

A number is the distance from the true weighted sum of the updates, by dense float64 matrices: ``‖ΔW - Σ w ΔWᵢ‖ / ‖Σ w ΔWᵢ‖``.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import tiny_llama
from tests.tolerances import assert_close
from tests.unit.compose.support import adapter_of, change_of
from weft.adapter import Adapter
from weft.compose import combine
from weft.core.merge import merge
from weft.errors import MixError

peft = pytest.importorskip("peft", reason="needs peft to compare with")
pytestmark = pytest.mark.filterwarnings("ignore")

SITE = "model.layers.0.self_attn.q_proj"


def base() -> nn.Module:
    return tiny_llama(dtype=torch.float64)


def in_peft(model: nn.Module, adapters: list[Adapter], folder: Path) -> Any:
    """A copy of the model with the adapters in PEFT, as it reads them from files."""
    places = [adapter.save(folder / f"a{number}") for number, adapter in enumerate(adapters)]
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(places[0]), adapter_name="a0")
    for number, place in enumerate(places[1:], 1):
        wrapped.load_adapter(str(place), adapter_name=f"a{number}")
    for name, parameter in wrapped.named_parameters():
        parameter.data = parameter.data.double() if "lora" in name else parameter.data
    return wrapped


def mixed_in_peft(wrapped: Any, weights: list[float], how: str, names: list[str] | None = None, **options: Any) -> None:
    names = [f"a{number}" for number in range(len(weights))] if names is None else names
    wrapped.add_weighted_adapter(names, weights, "mixed", combination_type=how, **options)
    wrapped.set_adapter("mixed")


def peft_change(model: nn.Module, wrapped: Any) -> Tensor:
    """What PEFT's mixture adds to the weight of the site, by merging it."""
    merged = copy.deepcopy(wrapped).merge_and_unload()
    return merged.get_submodule(SITE).weight.detach() - model.get_submodule(SITE).weight.detach()


def weft_change(model: nn.Module, mixed: Adapter) -> Tensor:
    merged, _ = merge(model, mixed)
    return merged.get_submodule(SITE).weight.detach() - model.get_submodule(SITE).weight.detach()


def true_sum(model: nn.Module, adapters: list[Adapter], weights: list[float]) -> Tensor:
    parts = [change_of(model, adapter)[f"{SITE}.weight"] for adapter in adapters]
    return torch.stack([weight * part for weight, part in zip(weights, parts, strict=True)]).sum(0)


def both(
    model: nn.Module, adapters: list[Adapter], weights: list[float], how: str, folder: Path, **settings: Any
) -> tuple[float, float]:
    """Distances from the true sum: PEFT's and weft's."""
    wrapped = in_peft(model, adapters, folder)
    mixed_in_peft(wrapped, weights, how)
    total = true_sum(model, adapters, weights)
    theirs = peft_change(model, wrapped)
    ours = weft_change(model, combine(list(zip(adapters, weights, strict=True)), **settings))
    found = float((theirs - total).norm() / total.norm()), float((ours - total).norm() / total.norm())
    print(f"{how}: distance from the true sum: peft {found[0]:.4f}, weft {found[1]:.2e}")
    return found


def test_linear_has_cross_terms(tmp_path: Path) -> None:
    """(Σ √w B)(Σ √w A) is not Σ w B A: on unrelated adapters the error is of the size of the sum itself."""
    model = base()
    adapters = [adapter_of(model, seed, rank=4) for seed in (1, 2)]
    theirs, ours = both(model, adapters, [0.5, 0.5], "linear", tmp_path)
    assert theirs > 0.7
    assert ours < 1e-12
    best = combine(adapters, [0.5, 0.5], method="linear")
    site = next(site for site in best.report.sites if site.path == SITE)
    print(f"linear at the same rank: peft {theirs:.4f}, weft {site.relative_error:.4f}")
    assert best.factors[SITE].rank == 4
    assert site.relative_error < theirs / 1.5


def test_rank_stabilised_adapters_are_scaled_twice(tmp_path: Path) -> None:
    """PEFT's new adapter keeps use_rslora with alpha = r: its scale is √r in the place of 1."""
    model = base()
    adapters = [adapter_of(model, seed, rank=8, alpha=8, rslora=True) for seed in (1, 2)]
    theirs, ours = both(model, adapters, [0.5, 0.5], "cat", tmp_path)
    assert theirs == pytest.approx(16**0.5 - 1, rel=1e-6), "√16 times too large"
    assert ours < 1e-12


def test_dora_adapters_lose_their_magnitude(tmp_path: Path) -> None:
    """The magnitude of the mixture is the norm of the base, whatever those of the adapters were."""
    model = base()
    adapters = [adapter_of(model, seed, rank=4, dora=True) for seed in (1, 2)]
    theirs, ours = both(model, adapters, [0.5, 0.5], "cat", tmp_path, base=model)
    assert theirs > 0.1
    assert ours < 1e-10


def test_a_short_list_of_weights_drops_adapters(tmp_path: Path) -> None:
    model = base()
    adapters = [adapter_of(model, seed, rank=2) for seed in (1, 2, 3)]
    wrapped = in_peft(model, adapters, tmp_path)
    mixed_in_peft(wrapped, [1.0, 1.0], "cat", names=["a0", "a1", "a2"])
    change = peft_change(model, wrapped)
    assert_close(change, true_sum(model, adapters[:2], [1.0, 1.0]), what="the third one is not in it")
    with pytest.raises(MixError, match="3 adapters and 2 weights"):
        combine(adapters, [1.0, 1.0])


def test_the_exact_sum_is_pefts_cat_where_that_is_right(tmp_path: Path) -> None:
    """Plain adapters, also of different ranks and alphas."""
    model = base()
    adapters = [adapter_of(model, 1, rank=2, alpha=6), adapter_of(model, 2, rank=5, alpha=1)]
    theirs, ours = both(model, adapters, [0.7, 0.3], "cat", tmp_path)
    assert theirs < 1e-6
    assert ours < 1e-12


@pytest.mark.parametrize(
    ("how", "method", "weights"),
    [("svd", "svd", [0.7, -0.5]), ("ties_svd", "ties", [1.0, 1.0]), ("magnitude_prune_svd", "magnitude", [0.7, -0.5])],
)
def test_dense_methods_agree(how: str, method: str, weights: list[float], tmp_path: Path) -> None:
    """PEFT's ``*_svd`` methods work on ΔW, as weft's do; the results are one."""
    model = base()
    adapters = [adapter_of(model, 1, rank=4), adapter_of(model, 2, rank=4, alpha=7)]
    wrapped = in_peft(model, adapters, tmp_path)
    options = {} if method == "svd" else {"density": 0.5}
    mixed_in_peft(wrapped, weights, how, svd_rank=3, **options)
    ours = combine(list(zip(adapters, weights, strict=True)), method=method, rank=3, **options)
    assert_close(weft_change(model, ours), peft_change(model, wrapped), "svd")


@pytest.mark.parametrize("kind", ["plain", "dora", "ties"])
def test_peft_loads_a_mixture_and_gives_its_logits(kind: str, tmp_path: Path) -> None:
    model = base()
    adapters = [
        adapter_of(model, 1, rank=2, dora=kind == "dora"),
        adapter_of(model, 2, rank=4, targets=["q_proj", "up_proj"]),
    ]
    options: dict[str, Any] = {"method": "ties", "density": 0.5, "rank": 4} if kind == "ties" else {}
    mixed = combine(list(zip(adapters, (0.7, -0.4), strict=True)), base=model, **options)
    wrapped = peft.PeftModel.from_pretrained(
        copy.deepcopy(model), str(mixed.save(tmp_path / "mixed")), autocast_adapter_dtype=False
    )
    ids = torch.randint(3, 64, (2, 9))
    merged, _ = merge(model, mixed)
    with torch.no_grad():
        assert_close(wrapped(ids).logits, merged(ids).logits)
