"""`compare`: how the updates of adapters lie to each other, site by site. Where they overlap, agree, or cancel."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from weft.compose.parents import Parent, all_sites, check_bases, read_parents
from weft.core.factors import Factors, blocks, inner
from weft.errors import MixError

__all__ = ["Comparison", "SiteComparison", "compare", "conflict", "overlap"]

_ENERGY = 0.95
"""Directions that hold this share of ‖ΔW‖² span what is compared: the rest of a rank is mostly noise."""

_AT_ONCE = 1 << 22
"""Elements of ΔW that are built at a time."""


@dataclass(frozen=True)
class SiteComparison:
    """Two adapters at one site.

    Attributes:
        cosine: of the two updates as vectors, in [-1, 1].
        overlap_in, overlap_out: of the spaces that they read from and write to, in [0, 1]; see `overlap`.
        chance_in, chance_out: what random spaces of these sizes have in the mean.
        conflict: share of their mass that cancels when they are added, in [0, 1]; see `conflict`.
        norms: ‖ΔW‖ of both.
    """

    path: str
    one: str
    other: str
    cosine: float
    overlap_in: float
    overlap_out: float
    chance_in: float
    chance_out: float
    conflict: float
    norms: tuple[float, float]


MEASURES = ("cosine", "overlap_in", "overlap_out", "conflict")


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Attributes:
        names: of the adapters. sites: one entry for each pair and each site that both have.
        alone: by adapter, the sites that no other one has.
    """

    names: tuple[str, ...]
    sites: tuple[SiteComparison, ...]
    alone: dict[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Every two adapters."""
        return tuple(itertools.combinations(self.names, 2))

    def of(self, pair: tuple[str, str]) -> tuple[SiteComparison, ...]:
        """The sites of a pair."""
        return tuple(site for site in self.sites if (site.one, site.other) == pair)

    def overall(self, pair: tuple[str, str]) -> dict[str, float]:
        """Mean of each measure over the sites of a pair; the cosine that of the whole updates on these sites."""
        sites = self.of(pair)
        if not sites:
            return {}
        means = {
            name: sum(getattr(site, name) for site in sites) / len(sites)
            for name in (*MEASURES, "chance_in", "chance_out")
        }
        sizes = [math.sqrt(sum(site.norms[k] ** 2 for site in sites)) for k in (0, 1)]
        dot = sum(site.cosine * site.norms[0] * site.norms[1] for site in sites)
        means["cosine"] = dot / (sizes[0] * sizes[1]) if sizes[0] and sizes[1] else 0.0
        return means

    def groups(self, pair: tuple[str, str]) -> dict[str, tuple[SiteComparison, ...]]:
        """The sites of a pair whose paths differ in layer numbers only."""
        found: dict[str, list[SiteComparison]] = {}
        for site in self.of(pair):
            found.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", site.path), []).append(site)
        return {(name if len(group) > 1 else group[0].path): tuple(group) for name, group in found.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        pairs = [{"one": one, "other": other, **self.overall((one, other))} for one, other in self.pairs]
        return {
            "names": list(self.names),
            "pairs": pairs,
            "sites": [asdict(site) for site in self.sites],
            "alone": {name: list(paths) for name, paths in self.alone.items()},
            "notes": list(self.notes),
        }

    def picture(self) -> str:
        """A heat map of all sites as an SVG document."""
        from weft.compose.heatmap import heat_map

        return heat_map(self)


def compare(adapters: Iterable[Any], *, allow_other_base: bool = False) -> Comparison:
    """Compare two or more adapters of one base.

    Args:
        adapters: adapters or paths.
        allow_other_base: compare although the bases differ.

    Raises:
        MixError: fewer than two adapters, one twice, updates of different shape at one site.
        BaseMismatchError: adapters of different bases.

    Example:
        >>> found = weft.compare(["runs/a", "runs/b"])  # doctest: +SKIP
        >>> found.overall(found.pairs[0])["cosine"]  # doctest: +SKIP
        0.0213
    """
    parents = read_parents(adapters, fewest=2)
    notes = check_bases(parents, allow_other_base)
    for parent in parents:
        parent.adapter.check_finite()
        if any(item.magnitude is not None for item in parent.adapter.factors.values()):
            notes.append(f"{parent.name!r} is a DoRA adapter: its B A is compared, without the magnitude")
    sites = [
        _compared(path, one, other)
        for one, other in itertools.combinations(parents, 2)
        for path in all_sites(parents)
        if path in one.adapter.factors and path in other.adapter.factors
    ]
    return Comparison(tuple(parent.name for parent in parents), tuple(sites), _alone(parents), tuple(notes))


def _alone(parents: Sequence[Parent]) -> dict[str, tuple[str, ...]]:
    found = {}
    for parent in parents:
        others = {path for other in parents if other is not parent for path in other.adapter.factors}
        found[parent.name] = tuple(path for path in parent.adapter.sites if path not in others)
    return found


def _compared(path: str, one: Parent, other: Parent) -> SiteComparison:
    left, right = one.adapter.factors[path], other.adapter.factors[path]
    shapes = [(item.kind, *item.A.shape[:-2], item.d_out, item.d_in, item.groups) for item in (left, right)]
    if shapes[0] != shapes[1]:
        raise MixError(
            f"{path}: the updates of {one.name!r} and {other.name!r} differ in kind or shape: {shapes[0]} and {shapes[1]}"
        )
    norms = left.norm(), right.norm()
    both = norms[0] * norms[1]
    cosine = max(-1.0, min(1.0, inner(left, right) / both)) if both else 0.0
    (reads, chance_in), (writes, chance_out) = overlap(left, right, "in"), overlap(left, right, "out")
    return SiteComparison(
        path, one.name, other.name, cosine, reads, writes, chance_in, chance_out, conflict(left, right), norms
    )


def overlap(one: Factors, other: Factors, side: str) -> tuple[float, float]:
    """How much of the smaller of two spaces lies in the other, ``‖U₁ᵀ U₂‖² / min(i, j)``; and what chance gives, ``max(i, j) / d``.

    U are the singular directions that hold 95 % of an update's ‖ΔW‖², i and j their numbers. Of experts and groups the mean.

    Args:
        side: ``"in"``: the directions that are read (rows of ΔW); ``"out"``: those that are written.

    Source:
        Hu et al. 2021, LoRA, arXiv:2106.09685, section 7.2, equation 4.
    """
    left, right = _directions(one, side), _directions(other, side)
    values, chances = [], []
    for U, V in zip(left, right, strict=True):
        small, large = sorted((U.shape[1], V.shape[1]))
        values.append(float((U.mT @ V).square().sum()) / small if small else 0.0)
        chances.append(large / U.shape[0])
    return min(1.0, sum(values) / len(values)), sum(chances) / len(chances)


def _directions(item: Factors, side: str) -> list[Tensor]:
    """Orthonormal (d, k) for each matrix of an update; k = 0 for a zero one."""
    A, B = (tensor.double() for tensor in blocks(item))
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    found = Q_A @ Vh.mT if side == "in" else Q_B @ U
    squares = S.square()
    before = squares.cumsum(-1) - squares
    counts = ((before < _ENERGY * squares.sum(-1, keepdim=True)) & (squares > 0)).sum(-1)
    return [basis[:, : int(count)] for basis, count in zip(found, counts, strict=True)]


def conflict(one: Factors, other: Factors) -> float:
    """Share of the mass of two updates that cancels when they are added: ``1 - Σ|a + b| / Σ(|a| + |b|)``.

    0: no element has different signs; 1: one is the other, turned around. Independent updates of one size lose 1 - 1/√2 = 0.29. Built in
    pieces of rows: memory stays bounded.

    Source:
        Yadav et al. 2023, TIES-Merging, arXiv:2306.01708, section 3.1, counts signs; here they are weighed.
    """
    kept = mass = 0.0
    parts = [blocks(item) for item in (one, other)]
    for number in range(parts[0][0].shape[0]):
        (A, B), (C, D) = ((a[number].float(), b[number].float()) for a, b in parts)
        step = max(1, _AT_ONCE // A.shape[1])
        for start in range(0, B.shape[0], step):
            left = one.scale * (B[start : start + step] @ A)
            right = other.scale * (D[start : start + step] @ C)
            kept += float((left + right).abs().sum(dtype=torch.float64))
            mass += float(left.abs().sum(dtype=torch.float64) + right.abs().sum(dtype=torch.float64))
    return max(0.0, 1 - kept / mass) if mass else 0.0
