"""What an adapter does at each site, in numbers: the spectrum of ΔW; and, with the base, how far it turns the weights.

Without a base everything comes from the factors: QR and r × r, never the dense matrix. With one, a site's weight is looked
at in full, one site at a time.

Shapes: r rank, o = d_out, i = d_in, n independent matrices (experts; 1 else), k leading directions. Knows no thresholds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapter import Adapter
from weft.core.adapted import magnitude_share, row_norms
from weft.core.decompose import leading
from weft.core.factors import Factors, effective_rank, kept
from weft.core.loading import locate
from weft.core.site import Site
from weft.core.tree import by_path, walk
from weft.errors import ShapeError

__all__ = ["LEADING", "AgainstBase", "SiteNumbers", "measure_adapter"]

LEADING = 10
"""Leading directions of the adapted weight that are looked at, as in the paper on intruder dimensions."""
INTRUDES_BELOW = 0.5
"""Cosine with every direction of the base's below which a direction of the adapted weight is new. The paper sweeps it; 0.5 is in its middle."""
ENERGY = 0.99
"""Share of ‖ΔW‖² that counts as all of it: what a truncation to those directions loses is 10 % of ‖ΔW‖."""
_EXACT_UP_TO = 1024
"""Smaller side of a weight up to which all of its directions are computed; of larger ones `_SAMPLED` leading ones are."""
_SAMPLED = 256
_DOUBLE_UP_TO = 256
_POWER_STEPS = 4


@dataclass(frozen=True)
class AgainstBase:
    """An update against the weight W that it changes. With DoRA's magnitude ΔW is the whole change, ``W' - W``.

    Attributes:
        weight_norm: ‖W‖ (Frobenius).
        size: ‖ΔW‖ / ‖W‖ (Frobenius); infinite where W is zero.
        turn: ‖ΔW‖₂ / ‖W‖₂ (largest singular values); of experts the largest.
        intruders: how many of the `LEADING` left singular vectors of W + ΔW have a cosine below 0.5 with every left singular vector of W
            (exact up to a smaller side of 1,024, beyond it with the 256 leading ones); of experts the most.
        looked_at: how many there are: LEADING, or the smaller side.
        drift: with DoRA: by how much magnitudes left the norms of the base's rows, mean of ``|m / ‖W_row‖ - 1|``; None without.

    Source:
        Shuttleworth et al. 2024, LoRA vs full fine-tuning: an illusion of equivalence, arXiv:2410.21228, section 3 (intruder dimensions).
        Liu et al. 2024, DoRA, arXiv:2402.09353, section 3.2 (drift of magnitudes).
    """

    weight_norm: float
    size: float
    turn: float
    intruders: int
    looked_at: int
    drift: float | None = None


@dataclass(frozen=True)
class SiteNumbers:
    """One site of an adapter.

    Attributes:
        shape: (d_out, d_in), or (experts, d_out, d_in).
        norm: ‖ΔW‖ (Frobenius), without DoRA's magnitude. NaN where a factor is not finite.
        share: of all sites' ‖ΔW‖².
        spectrum: (r,) singular values of ΔW, largest first; of experts the root of their mean square.
        effective_rank: see `weft.core.factors.effective_rank`; 0 for a zero update.
        directions: the fewest that hold 99 % of ‖ΔW‖²; of experts the most; 0 for a zero update.
        moved: False where the update is zero: B never moved.
        not_finite: names of tensors with NaN or infinity in them.
        base: against the base's weight; None where no base was given, or its weight can't be read as a matrix.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    scale: float
    norm: float
    share: float
    spectrum: tuple[float, ...]
    effective_rank: float
    directions: int
    moved: bool
    dora: bool = False
    not_finite: tuple[str, ...] = ()
    base: AgainstBase | None = None

    @property
    def finite(self) -> bool:
        """Whether every number of the site is one."""
        return not self.not_finite

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return dataclasses.asdict(self)


def measure_adapter(adapter: Adapter, base_model: nn.Module | None = None) -> list[SiteNumbers]:
    """The numbers of every site, in the order of the model.

    Args:
        adapter: any; NaN and infinity are reported, not refused.
        base_model: the base that it was made for, also one with a bank on it. It is read, never changed.

    Raises:
        KeysError, ShapeError: the adapter's sites are not in this base, or are others.
    """
    weights = {} if base_model is None else dict(_weights(base_model, adapter))
    found = []
    for path, factors in adapter.factors.items():
        bad = _not_finite(factors)
        site = _bad_numbers(path, factors, bad) if bad else _numbers(path, factors)
        if path in weights and not bad:
            site = dataclasses.replace(site, base=_against(weights.pop(path), factors, site.norm))
        found.append(site)
    total = sum(site.norm**2 for site in found if site.finite)
    return [dataclasses.replace(site, share=site.norm**2 / total if total and site.finite else 0.0) for site in found]


def _numbers(path: str, factors: Factors) -> SiteNumbers:
    values = factors.spectrum()
    by_matrix = values if values.dim() == 2 else values[None]
    together = by_matrix.square().mean(0).sqrt()
    moved = factors.moved
    return SiteNumbers(
        path=path,
        kind=factors.kind,
        shape=(*factors.A.shape[:-2], factors.d_out, factors.d_in),
        rank=factors.rank,
        scale=factors.scale,
        norm=float(by_matrix.square().sum().sqrt()),
        share=0.0,
        spectrum=tuple(together.tolist()),
        effective_rank=effective_rank(values) if moved else 0.0,
        directions=max(kept(row[None], 1, None, ENERGY, None) for row in by_matrix) if moved else 0,
        moved=moved,
        dora=factors.magnitude is not None,
    )


def _bad_numbers(path: str, factors: Factors, bad: tuple[str, ...]) -> SiteNumbers:
    shape = (*factors.A.shape[:-2], factors.d_out, factors.d_in)
    none = (math.nan,) * factors.rank
    return SiteNumbers(path, factors.kind, shape, factors.rank, factors.scale, math.nan, 0.0, none, math.nan, 0, True,
                       factors.magnitude is not None, bad)  # fmt: skip


def _not_finite(factors: Factors) -> tuple[str, ...]:
    bad = [name for name, tensor in factors.tensors().items() if not bool(torch.isfinite(tensor).all())]
    return (*bad, *(() if math.isfinite(factors.scale) else ("scale",)))


def _weights(model: nn.Module, adapter: Adapter) -> Iterator[tuple[str, Site]]:
    found = locate(by_path(walk(model)), adapter)
    yield from zip(adapter.factors, found.sites, strict=True)


def _against(site: Site, factors: Factors, norm: float) -> AgainstBase | None:
    """An update against its weight, in float64 (float32 for large ones); None where that has no matrix."""
    W = _matrices(site)
    if W is None or not bool(torch.isfinite(W).all()):
        return None
    A, B = (tensor.to(W.device, W.dtype) for tensor in (factors.A, factors.B))
    A, B = (A, B) if A.dim() == 3 else (A[None], B[None])
    new, drift = torch.baddbmm(W, B, A, alpha=factors.scale), None
    if factors.magnitude is not None:
        magnitude = factors.magnitude.to(W.device, W.dtype)
        own, norms = W[0].norm(dim=1), row_norms(W[0], A[0], B[0], factors.scale)
        new = new * magnitude_share(magnitude, norms)[:, None]
        there = own > 0
        drift = float((magnitude[there] / own[there] - 1).abs().mean()) if bool(there.any()) else 0.0
        changed = new - W
        norm, tops = float(changed.norm()), [float(leading(changed[0], 1, steps=_POWER_STEPS, generator=_seeded())[1])]
    else:
        tops = torch.linalg.svdvals(_core(factors))[..., 0].reshape(-1).tolist()
    turns, intruders, looked_at = [], [], min(LEADING, *W.shape[1:])
    for top, before, after in zip(tops, W, new, strict=True):
        U, S = _left(before, None)
        turns.append(top / float(S[0]) if float(S[0]) else math.inf if top else 0.0)
        V, strength = _left(after, looked_at)
        closest = (U.mT @ V).abs().amax(0)
        intruders.append(int(((closest < INTRUDES_BELOW) & (strength > 0)).sum()))
    own_norm = float(W.norm())
    size = norm / own_norm if own_norm else math.inf if norm else 0.0
    return AgainstBase(own_norm, size, max(turns), max(intruders), looked_at, drift)


def _core(factors: Factors) -> Tensor:
    """(…, k, k): what has the singular values of ΔW."""
    R_B, R_A = torch.linalg.qr(factors.B.double()).R, torch.linalg.qr(factors.A.double().mT).R
    core: Tensor = factors.scale * (R_B @ R_A.mT)
    return core


def _matrices(site: Site) -> Tensor | None:
    """W as (n, o, i); a convolution's groups as one matrix with zeros between them, as its update is. None of a packed one."""
    weight = site.weight.detach()
    if hasattr(weight, "quant_state") or not weight.is_floating_point():
        return None
    if site.groups > 1:
        rows = weight.flatten(1)
        by_group = rows.view(site.groups, -1, rows.shape[1])
        weight = torch.block_diag(*by_group)  # type: ignore[no-untyped-call]
        W = weight[None]
    else:
        try:
            W = site.oriented(weight)
        except ShapeError:
            return None
    stack: Tensor = W if W.dim() == 3 else W[None]
    return stack.to(torch.float64 if min(stack.shape[1:]) <= _DOUBLE_UP_TO else torch.float32)


def _left(M: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    """(o, k) left singular vectors and (k,) values of M: the leading ``count``; None: all, or as many as are affordable."""
    small = min(M.shape)
    if small <= _EXACT_UP_TO:
        U, S, _ = leading(M, small if count is None else count)
    else:
        U, S, _ = leading(M, count or min(_SAMPLED, small), steps=_POWER_STEPS, generator=_seeded())
    return U, S


def _seeded() -> torch.Generator:
    """The same test matrices every time: the same adapter has the same numbers."""
    return torch.Generator().manual_seed(0)
