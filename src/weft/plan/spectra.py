"""How many directions the gradient of each site needs, measured on the first batches of the user's own data.

The gradient of a weight, ``G = Σ g xᵀ`` over tokens, is never built where it is large: two random sketches of it stream by. The
batches are halved, and a direction counts as far as both halves agree on it; what only one of them shows is noise of the sample, and
makes every gradient look as if it needed all ranks. `exact_gradients` is the slow way to the same numbers.

Shapes: N tokens, o = d_out, i = d_in, k and l widths of the sketches, r directions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.core.data_passes import call_model, collect_gradients, loss_of, undisturbed
from weft.core.site import Site
from weft.errors import DataError, SpecError

__all__ = ["KEEP", "SiteSpectrum", "Sketch", "agreement", "exact_gradients", "numbers_of_one_rank", "site_spectra"]

KEEP = 64
"""Directions that are looked at, by site."""

_OVERSAMPLE = 16

Triplets = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class SiteSpectrum:
    """What the gradient of one site looks like.

    Attributes:
        path: of the site. d_out, d_in: of its ΔW.
        numbers: what one more rank adds to the adapter here.
        energies: by direction, falling: the part of the squared gradient norm that both halves of the batches agree on. A step against the
            gradient that is cut to rank r lowers the loss, to first order, by the sum of the first r.
        total: the same for all directions together, also those beyond `KEEP`.
    """

    path: str
    d_out: int
    d_in: int
    numbers: int
    energies: tuple[float, ...]
    total: float

    @property
    def most(self) -> int:
        """The largest rank that ΔW can have."""
        return min(self.d_out, self.d_in)

    def captured(self, rank: int) -> float:
        """Energy of the first ``rank`` directions."""
        return sum(self.energies[:rank])

    @property
    def effective_rank(self) -> float:
        """Participation ratio of the energies, (Σ e)² / Σ e²: 1 for one direction, n for n equal ones."""
        squares = sum(energy**2 for energy in self.energies)
        return sum(self.energies) ** 2 / squares if squares else 0.0


class Sketch:
    """A matrix ``Σ g xᵀ`` that streams by, as two random projections ``Y = G Ω`` and ``W = Ψ G``; dense where that is smaller.

    Args:
        d_out, d_in: shape of the matrix.
        keep: directions that are wanted; those of a matrix of this rank or less are exact.
        seed: of the projections.

    Source:
        Tropp et al. 2017, Practical sketching algorithms for low-rank matrix approximation, arXiv:1609.00048, algorithm 4.
    """

    def __init__(
        self, d_out: int, d_in: int, keep: int, *, seed: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        k = keep + _OVERSAMPLE
        l = 2 * k + 1  # the letter of the paper
        self.keep = min(keep, d_out, d_in)
        self.dense: Tensor | None = None
        if k * d_out + l * d_in >= d_out * d_in:
            self.dense = torch.zeros(d_out, d_in, dtype=dtype, device=device)
            return
        generator = torch.Generator().manual_seed(seed)
        self.Omega = torch.randn(d_in, k, generator=generator, dtype=dtype).to(device)
        self.Psi = torch.randn(l, d_out, generator=generator, dtype=dtype).to(device)
        self.Y = torch.zeros(d_out, k, dtype=dtype, device=device)
        self.W = torch.zeros(l, d_in, dtype=dtype, device=device)

    def add(self, g: Tensor, x: Tensor) -> None:
        """Add ``gᵀ x`` of g (N, o) and x (N, i)."""
        if self.dense is not None:
            self.dense += g.mT @ x
            return
        self.Y += g.mT @ (x @ self.Omega)
        self.W += (self.Psi @ g.mT) @ x

    def triplets(self) -> Triplets:
        """U (o, r), S (r,) largest first, Vh (r, i), with r = ``keep`` at most."""
        if self.dense is not None:
            U, S, Vh = torch.linalg.svd(self.dense, full_matrices=False)
        else:
            Q = torch.linalg.qr(self.Y).Q
            X = torch.linalg.lstsq(self.Psi @ Q, self.W).solution
            U, S, Vh = torch.linalg.svd(X, full_matrices=False)
            U = Q @ U
        return U[:, : self.keep], S[: self.keep], Vh[: self.keep]

    def inner(self, other: Sketch) -> float:
        """``⟨G, H⟩`` with a matrix that was sketched with the same seed; an unbiased estimate where it is not dense."""
        if self.dense is not None and other.dense is not None:
            return float((self.dense * other.dense).sum())
        return float((self.Y * other.Y).sum()) / self.Y.shape[1]


def agreement(one: Triplets, other: Triplets) -> Tensor:
    """The energy of each leading direction that two measurements of one matrix agree on.

    For the singular triplets (u, s, v) of one half, ``s · uᵀ H v`` with the other half's H; both ways, and the mean of both. For two
    equal halves these are the squared singular values; for unrelated ones they are 0 in expectation, however large those are.

    Returns:
        (r,) float64, falling; negative ones are 0.
    """
    found = []
    for (U, S, Vh), (P, D, Qh) in ((one, other), (other, one)):
        crossed = ((U.mT @ P) * D) @ Qh
        found.append((S * (crossed * Vh).sum(-1)).double())
    least = min(map(len, found))
    return ((found[0][:least] + found[1][:least]) / 2).clamp_min(0).sort(descending=True).values


def site_spectra(
    model: nn.Module, sites: Sequence[Site], batches: Iterable[Any], *, keep: int = KEEP, seed: int = 0
) -> tuple[list[SiteSpectrum], float]:
    """The spectrum of every site's gradient on the base, and the mean loss of the batches.

    Args:
        model: has all sites in it, and no adapter in use; it is left as it was.
        sites: linear ones are sketched while one backward pass a batch goes by; the gradients of all others (convolutions, embeddings,
            experts, an attention's own projections) are built and taken apart exactly.
        batches: inputs with labels; every second one goes to the other half. At least two.
        keep: directions to look at.
        seed: of the sketches.

    Returns:
        Spectra in the order of the sites, and the loss in nats a token (or label), batches weighted equally.

    Raises:
        DataError: fewer than two batches.
        SpecError: the output has no loss, or no gradient reached a site (a quantised weight that is no linear layer …).
        NotFiniteError: a loss that is NaN or infinite.
    """
    batches = list(batches)
    if len(batches) < 2:
        raise DataError(
            f"the spectrum of the gradient is measured on two halves of the data, and there is {len(batches)} batch; give more "
            "examples or a smaller batch size"
        )
    streamed = [
        site for site in sites if site.kind == "linear" and site.host is None and isinstance(site.module, nn.Module)
    ]
    watch = _Watch(streamed, keep, seed)
    losses = watch.run(model, batches)
    lost = [site.path for site in streamed if not all(half[site.path].seen for half in watch.halves)]
    if lost:
        raise SpecError(
            f"no gradient reached {lost[0]!r} in the first batches; exclude it, or give batches that use it"
        )
    found = {site.path: _spectrum(site, *(half[site.path].sketch for half in watch.halves)) for site in streamed}
    rest = [site for site in sites if site.path not in found]
    if rest:
        gradients = exact_gradients(model, rest, batches)
        found |= {site.path: _exact_spectrum(site, *gradients[site.path], keep) for site in rest}
    return [found[site.path] for site in sites], sum(losses) / len(losses)


def exact_gradients(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Any]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The reference: both halves' gradients as whole matrices, (d_out, d_in), or (E, d_out, d_in) for experts."""
    one, other = ({site.path: site.oriented(found) for site, found in collect_gradients(model, sites, batches[half::2])}
                  for half in (0, 1))  # fmt: skip
    return {site.path: (one[site.path], other[site.path]) for site in sites}


def numbers_of_one_rank(site: Site) -> int:
    """Parameters that one more rank takes at a site."""
    return (site.d_in + site.d_out) * (site.experts or 1)


class _Half:
    """A sketch, and whether anything came."""

    def __init__(self, sketch: Sketch) -> None:
        self.sketch, self.seen = sketch, False


class _Watch:
    """Hooks that feed what flows into linear sites, and the gradient of what flows out, into sketches: one for each half."""

    def __init__(self, sites: Sequence[Site], keep: int, seed: int) -> None:
        self.sites = sites
        self.half = 0
        self.halves: tuple[dict[str, _Half], dict[str, _Half]] = ({}, {})
        for number, site in enumerate(sites):
            weight = site.weight
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            for half in self.halves:
                sketch = Sketch(site.d_out, site.d_in, keep, seed=seed + number, dtype=dtype, device=weight.device)
                half[site.path] = _Half(sketch)

    def run(self, model: nn.Module, batches: Sequence[Any]) -> list[float]:
        """One forward and backward a batch; the losses."""
        losses = []
        with undisturbed(model), torch.enable_grad(), ExitStack() as hooks:
            for site in self.sites:
                hooks.callback(site.module.register_forward_hook(self._hook(site), with_kwargs=True).remove)
            for number, batch in enumerate(batches):
                self.half = number % 2
                loss = loss_of(call_model(model, batch), "the spectrum of the gradient")
                losses.append(float(loss.detach()))
                if loss.requires_grad:  # each half's gradient is of its batches' mean loss
                    (loss / len(batches[self.half :: 2])).backward()  # type: ignore[no-untyped-call]
        return losses

    def _hook(self, site: Site) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Tensor) -> Tensor:
            x = next(item for item in (*args, *kwargs.values()) if isinstance(item, Tensor)).detach()
            y = y if y.requires_grad else y.detach().requires_grad_()  # the first sites begin the graph
            y.register_hook(lambda gradient: self._add(site, gradient, x))  # type: ignore[no-untyped-call]
            return y

        return see

    def _add(self, site: Site, gradient: Tensor, x: Tensor) -> None:
        half = self.halves[self.half][site.path]
        dtype = torch.float64 if site.weight.dtype == torch.float64 else torch.float32
        half.sketch.add(gradient.reshape(-1, site.d_out).to(dtype), x.reshape(-1, site.d_in).to(dtype))
        half.seen = True


def _spectrum(site: Site, one: Sketch, other: Sketch) -> SiteSpectrum:
    energies = agreement(one.triplets(), other.triplets())
    total = max(one.inner(other), float(energies.sum()))
    return SiteSpectrum(site.path, site.d_out, site.d_in, numbers_of_one_rank(site), tuple(energies.tolist()), total)


def _exact_spectrum(site: Site, one: Tensor, other: Tensor, keep: int) -> SiteSpectrum:
    """Of whole gradients; of stacked experts, the sum over experts by direction."""
    pairs = zip(one.reshape(-1, *one.shape[-2:]), other.reshape(-1, *other.shape[-2:]), strict=True)
    found = [agreement(_triplets(G, keep), _triplets(H, keep)) for G, H in pairs]
    energies = torch.stack(found).sum(0)
    total = max(float((one * other).sum()), float(energies.sum()))
    return SiteSpectrum(site.path, site.d_out, site.d_in, numbers_of_one_rank(site), tuple(energies.tolist()), total)


def _triplets(G: Tensor, keep: int) -> Triplets:
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    return U[:, :keep], S[:keep], Vh[:keep]
