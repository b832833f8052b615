"""Spectra of gradients: the sketch against the whole matrix, and what two halves agree on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import tiny_llama
from weft.core.sites import find_sites
from weft.errors import DataError
from weft.plan.spectra import Sketch, agreement, exact_gradients, site_spectra
from weft.spec import LoraSpec


def _sketch(d_out: int, d_in: int, keep: int) -> Sketch:
    return Sketch(
        d_out, d_in, keep, seed=int(torch.randint(1 << 20, ())), dtype=torch.float64, device=torch.device("cpu")
    )


class _Net(nn.Module):
    """Two wide layers and a loss; wide enough to be sketched."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(160, 128), nn.Linear(128, 160)
        self.double()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.down(torch.tanh(self.up(x))) - labels).square().mean()}


def _batches(count: int, rows: int) -> list[dict[str, Tensor]]:
    # labels have something in common, so that the halves agree on something
    common = torch.randn(160, dtype=torch.float64)
    draw: Any = lambda: torch.randn(rows, 160, dtype=torch.float64)  # noqa: E731
    return [{"x": draw(), "labels": 2 * common + draw()} for _ in range(count)]


def test_a_sketch_of_few_directions_is_exact() -> None:
    sketch = _sketch(120, 200, 8)
    assert sketch.dense is None
    g, x = torch.randn(6, 120, dtype=torch.float64), torch.randn(6, 200, dtype=torch.float64)
    for row in range(6):
        sketch.add(g[row : row + 1], x[row : row + 1])
    U, S, Vh = sketch.triplets()
    torch.testing.assert_close((U * S) @ Vh, g.mT @ x, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(S[:6], torch.linalg.svdvals(g.mT @ x)[:6], rtol=1e-7, atol=1e-9)


def test_a_sketch_finds_the_leading_directions_of_a_falling_spectrum() -> None:
    U, V = (torch.linalg.qr(torch.randn(n, 100, dtype=torch.float64)).Q for n in (120, 200))
    S = 0.8 ** torch.arange(100, dtype=torch.float64)
    sketch = _sketch(120, 200, 8)
    sketch.add((U * S).mT, V.mT)
    torch.testing.assert_close(sketch.triplets()[1], S[:8], rtol=0.1, atol=0)


def test_small_matrices_are_kept_whole() -> None:
    sketch = _sketch(20, 30, 8)
    g, x = torch.randn(50, 20, dtype=torch.float64), torch.randn(50, 30, dtype=torch.float64)
    sketch.add(g, x)
    torch.testing.assert_close(sketch.dense, g.mT @ x)
    torch.testing.assert_close(sketch.triplets()[1], torch.linalg.svdvals(g.mT @ x)[:8])


def test_equal_halves_agree_on_everything_and_unrelated_ones_on_little() -> None:
    G, H = torch.randn(2, 40, 30, dtype=torch.float64)
    one, other = torch.linalg.svd(G, full_matrices=False), torch.linalg.svd(H, full_matrices=False)
    torch.testing.assert_close(agreement(one, one), one[1].square())
    assert agreement(one, other).sum() < 0.3 * one[1].square().sum()


def test_the_stream_finds_what_the_whole_gradients_hold() -> None:
    model = _Net()
    sites = find_sites(model, LoraSpec()).sites
    batches = _batches(4, 5)  # ten tokens a half: fewer than are kept, so that the sketch is exact
    spectra, loss = site_spectra(model, sites, batches, keep=12, seed=3)
    exact = exact_gradients(model, sites, batches)
    for site in spectra:
        one, other = (torch.linalg.svd(half, full_matrices=False) for half in exact[site.path])
        wanted = agreement(*((U[:, :12], S[:12], Vh[:12]) for U, S, Vh in (one, other)))
        torch.testing.assert_close(
            torch.tensor(site.energies, dtype=torch.float64),
            wanted,
            rtol=1e-6,
            atol=1e-9 * float(one[1][0] * other[1][0]),
        )
        assert site.numbers == site.d_in + site.d_out == 288
    assert loss == pytest.approx(sum(model(**batch)["loss"].item() for batch in batches) / 4)


def test_a_model_is_left_as_it_was() -> None:
    model = tiny_llama().train()
    model.lm_head.weight.requires_grad_(False)
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.randint(3, 64, (2, 3, 8))
    batches = [{"input_ids": rows, "labels": rows} for rows in ids]
    spectra, _ = site_spectra(model, find_sites(model, LoraSpec()).sites, batches)
    assert len(spectra) == 14
    assert all(site.total > 0 or max(site.energies) == 0 for site in spectra)
    assert model.training
    assert {name: value.requires_grad for name, value in model.named_parameters()} == flags
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(value.grad is None for value in model.parameters())


def test_embeddings_are_taken_apart_exactly() -> None:
    model = tiny_llama(dtype=torch.float64)
    sites = find_sites(model, LoraSpec(targets=["embed_tokens", "q_proj"])).sites
    ids = torch.randint(3, 64, (4, 3, 8))
    batches = [{"input_ids": rows, "labels": rows} for rows in ids]
    spectra, _ = site_spectra(model, sites, batches, keep=64)
    exact = exact_gradients(model, sites, batches)
    for site in spectra:
        one, other = (torch.linalg.svd(half, full_matrices=False) for half in exact[site.path])
        wanted = agreement(one, other)
        torch.testing.assert_close(
            torch.tensor(site.energies, dtype=torch.float64),
            wanted,
            rtol=1e-6,
            atol=1e-9 * float(one[1][0] * other[1][0]),
        )


def test_one_batch_has_no_halves() -> None:
    model = tiny_llama()
    ids = torch.randint(3, 64, (2, 8))
    with pytest.raises(DataError, match="two halves"):
        site_spectra(model, find_sites(model, LoraSpec()).sites, [{"input_ids": ids, "labels": ids}])
