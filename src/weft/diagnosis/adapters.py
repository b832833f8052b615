"""What is wrong with an adapter, from its numbers by site: each rule a function, each limit beside the numbers it was chosen by.

Does not know runs, files or how an adapter came about. The limits are for every part of a base by itself, where an adapter
has a spec by part.

The measured numbers below, unless said: 14 trainings of stories260k on e2e (rank 1 to 64, healthy and spoilt) and the four trained
adapters of others; medians over the sites of one adapter.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from weft.adapter import Adapter
from weft.diagnosis.adapter_numbers import ENERGY, INTRUDES_BELOW, AgainstBase, SiteNumbers, measure_adapter
from weft.diagnosis.finding import Finding, Severity, worst_first
from weft.drawing import short
from weft.errors import some_names

__all__ = ["ADAPTER_RULES", "diagnose_adapter", "judge"]

Sites = Sequence[SiteNumbers]

FLAT = 0.95
"""Effective rank over rank from which all directions count as in use. Rank 4 on e2e: 0.97 and 0.98, 6 % and 15 % above the loss of rank 64;
rank 8: 0.89, rank 16: 0.80. Others' adapters: 0.65 and 0.79 at rank 8, 0.97 at rank 4."""
IDLE = 0.5
"""Effective rank over rank up to which half of the rank is idle. Rank 64 on e2e: 0.38; rank 16: 0.80; others' adapters from 0.65 on."""
NEARLY_DEAD = 0.01
"""‖ΔW‖ over the median of the sites up to which a site never really moved. The smallest of a healthy adapter: 0.14."""
DOMINATES = 10.0
"""Size of the largest site over the median of the others from which it dominates. Healthy: up to 3.0; one alpha of 1,024 among 16: 48."""
HALF = 0.5
"""And the share of ‖ΔW‖² that it then has, at least. Healthy: up to 0.38."""
LARGE = 0.75
"""‖ΔW‖/‖W‖ from which an update drowns the base. Healthy on e2e, a task far from the base's: 0.22 to 0.48; at four times the learning
rate, which cost 38 % of the loss: 0.88. Larger bases have a tenth of it."""
DROWNED = 3.0
"""And from which nothing of the base is left. At forty times the learning rate, with the loss of the base: 70."""
TINY = 5e-4
"""‖ΔW‖/‖W‖ up to which an adapter does next to nothing. At a learning rate of 1e-5 instead of 7e-3, which gained 2 % of the loss: 1e-3."""
INTRUDED = 0.5
"""Share of leading directions that are new, from which the base counts as turned away. Healthy: 0 to 0.3; learning rate times four: 0.5, 0.7 with DoRA."""
DRIFTED = 0.25
"""Mean drift of DoRA's magnitudes. Healthy: 0.07; at twice the learning rate, which cost 23 % of the loss: 0.13. So the limit is set, not measured: twice that."""


def diagnose_adapter(adapter: Adapter, base_model: nn.Module | None = None) -> list[Finding]:
    """What is wrong with an adapter, worst first.

    Args:
        adapter: any; one with NaN or infinity too.
        base_model: the base that it was made for. With it the update is also measured against the weights.

    Raises:
        KeysError, ShapeError: the adapter's sites are not in this base, or are others.

    Example:
        >>> for found in diagnose_adapter(weft.load("runs/first/adapter")):  # doctest: +SKIP
        ...     print(found)
    """
    return judge(measure_adapter(adapter, base_model), adapter)


def judge(sites: Sites, adapter: Adapter) -> list[Finding]:
    """The findings of numbers that were measured already."""
    found = [*_not_finite(sites, adapter)]
    by_part: dict[str, list[SiteNumbers]] = {}
    for site in sites:
        if site.finite:
            by_part.setdefault(adapter.spec.tower_of(site.path) or "", []).append(site)
    for part, own in by_part.items():
        for rule in ADAPTER_RULES:
            found += [_named(part, finding) for finding in rule(own)]
    return worst_first(found)


def _named(part: str, finding: Finding) -> Finding:
    return dataclasses.replace(finding, evidence=f"{part}: {finding.evidence}") if part else finding


def _not_finite(sites: Sites, adapter: Adapter) -> Iterator[Finding]:
    bad = [(site.path, ", ".join(site.not_finite)) for site in sites if not site.finite]
    bad += [(name, "a trained copy") for name in _other_tensors(adapter)]
    if bad:
        first, tensors = bad[0]
        yield Finding(
            "not-finite", "high",
            f"NaN or infinity in {len(bad)} of {len(sites)} sites, the first {first} ({tensors}).",
            "The training that made it diverged: take an earlier checkpoint, or train again with a lower learning rate and a longer warm-up.",
            site=first, numbers={"sites": len(bad)},
        )  # fmt: skip


def _other_tensors(adapter: Adapter) -> list[str]:
    """Modules trained whole, and biases, that are not finite."""
    whole = {f"{path}.{name}": tensor for path, module in adapter.modules.items() for name, tensor in module.items()}
    return [name for name, tensor in (whole | dict(adapter.biases)).items() if not bool(tensor.isfinite().all())]


def dead_sites(sites: Sites) -> Iterator[Finding]:
    """Sites whose B never moved, or next to nothing."""
    idle = [site for site in sites if not site.moved and not site.dora]
    moved = [site for site in sites if site.moved]
    if len(idle) == len(sites):
        yield Finding(
            "untrained", "high", f"All {len(sites)} updates are zero: B never moved, and the base answers as without this adapter.",
            "Train it; if it was trained, look whether the loss fell, and whether the trained tensors were the saved ones.",
            numbers={"sites": len(sites)},
        )  # fmt: skip
        return
    middle = statistics.median(_size(site) for site in moved) if moved else 0.0
    weak = [site for site in moved if _size(site) <= NEARLY_DEAD * middle and not site.dora]
    if idle or weak:
        names = [site.path for site in (*idle, *weak)]
        what = [f"{len(idle)} of zero"] if idle else []
        what += [f"{len(weak)} of at most 1 % of the median size"] if weak else []
        yield Finding(
            "dead-sites", "medium", f"{len(names)} of {len(sites)} sites have next to no update, {' and '.join(what)}: {some_names(names)}.",
            "No gradient reaches them, or they are of no use: leave them out with exclude=[…], or look why the base doesn't use them.",
            site=names[0], numbers={"sites": len(names), "of": len(sites)},
        )  # fmt: skip


def dominated(sites: Sites) -> Iterator[Finding]:
    """One site that holds most of the change."""
    if len(sites) < 4:
        return
    largest = max(sites, key=_size)
    middle = statistics.median(_size(site) for site in sites if site is not largest)
    share = largest.norm**2 / sum(site.norm**2 for site in sites) if largest.norm else 0.0
    if middle and _size(largest) >= DOMINATES * middle and share >= HALF:
        yield Finding(
            "one-site-dominates", "medium",
            f"{largest.path} has {share:.0%} of ‖ΔW‖², {_size(largest) / middle:.0f} times the {_measure(largest)} of the median of the other {len(sites) - 1} sites.",
            f"Look at its alpha (scale {largest.scale:.3g}) and, where rates differ by site, at its learning rate: lower them by alpha_pattern, or leave the site out.",
            site=largest.path, numbers={"share": share, "times": _size(largest) / middle, "scale": largest.scale},
        )  # fmt: skip


def rank_too_small(sites: Sites) -> Iterator[Finding]:
    """A flat spectrum: every direction is in use. Of rank 1 nothing can be told."""
    told = [site for site in sites if site.moved and min(site.rank, *site.shape[-2:]) > 1]
    shares = [site.effective_rank / min(site.rank, *site.shape[-2:]) for site in told]
    if told and statistics.median(shares) >= FLAT:
        ranks, middle = _ranks(told), statistics.median(shares)
        yield Finding(
            "rank-too-small", "low",
            f"The spectrum is flat: at half of {len(told)} sites at least {middle:.0%} of the rank ({ranks}) is in use, and none is left over.",
            f"Try rank {2 * max(site.rank for site in told)}, or adaptive=GrowOnPlateau, and compare the evaluation loss; a training of few steps looks the same.",
            numbers={"effective_share": middle, "rank": max(site.rank for site in told)},
        )  # fmt: skip


def rank_too_large(sites: Sites) -> Iterator[Finding]:
    """Effective rank far under rank: memory and time for directions that do nothing."""
    told = [site for site in sites if site.moved and site.rank >= 4]
    shares = [site.effective_rank / site.rank for site in told]
    if told and statistics.median(shares) <= IDLE:
        middle, needed = statistics.median(site.effective_rank for site in told), max(site.directions for site in told)
        rank = max(site.rank for site in told)
        fits = 1 << (needed - 1).bit_length()
        train = f"; another time train with rank {fits}" if fits < rank else ""
        yield Finding(
            "rank-too-large", "low",
            f"The effective rank is {middle:.1f} of {_ranks(told)} (median of {len(told)} sites); {ENERGY:.0%} of ‖ΔW‖² lies in {needed} directions or fewer at every site.",
            f"Drop the others: weft shrink ADAPTER --energy {ENERGY} loses at most {(1 - ENERGY) ** 0.5:.0%} of ‖ΔW‖ at each site{train}.",
            numbers={"effective_rank": middle, "rank": rank, "directions": needed},
        )  # fmt: skip


def update_size(sites: Sites) -> Iterator[Finding]:
    """‖ΔW‖ against ‖W‖: the base drowned, or nothing done."""
    told = _against(sites)
    if not told:
        return
    sizes = [base.size for _, base in told]
    middle, (largest, top) = statistics.median(sizes), max(told, key=lambda pair: pair[1].size)
    numbers = {"size": middle, "largest": top.size, "turn": statistics.median(base.turn for _, base in told)}
    if middle >= LARGE:
        severity: Severity = "high" if middle >= DROWNED else "medium"
        yield Finding(
            "update-too-large", severity,
            f"The change is {short(middle)} times as large as the weights (median of ‖ΔW‖/‖W‖; largest {short(top.size)} at {largest.path}).",
            "Train again with a lower learning rate, a lower alpha or fewer steps; what the base knew is overwritten.",
            site=largest.path, numbers=numbers,
        )  # fmt: skip
    elif 0 < middle <= TINY:
        yield Finding(
            "update-too-small", "low",
            f"The change is {middle:.1g} of the weights (median of ‖ΔW‖/‖W‖), so the base answers nearly as without it.",
            "Train longer or with a higher learning rate, unless the loss says that this is enough.",
            numbers=numbers,
        )  # fmt: skip


def turned_away(sites: Sites) -> Iterator[Finding]:
    """Leading directions of the adapted weights that the base never had."""
    told = _against(sites)
    shares = [base.intruders / base.looked_at for _, base in told]
    if told and statistics.median(shares) >= INTRUDED:
        middle, turn = statistics.median(shares), statistics.median(base.turn for _, base in told)
        worst, _ = max(told, key=lambda pair: pair[1].intruders)
        yield Finding(
            "turned-away", "medium",
            f"{middle:.0%} of the leading directions of the adapted weights (median of {len(told)} sites) are new: their cosine with every direction of the base's is below {INTRUDES_BELOW}; "
            f"‖ΔW‖₂ is {short(turn)} of ‖W‖₂.",
            "Expect forgetting: check the loss on general text; a lower learning rate or alpha, or a higher rank at the same alpha, keeps the base's directions.",
            site=worst.path, numbers={"intruders": middle, "turn": turn},
        )  # fmt: skip


def magnitude_drift(sites: Sites) -> Iterator[Finding]:
    """DoRA's magnitudes far from the norms that they began at."""
    drifts = [(site, base.drift) for site, base in _against(sites) if base.drift is not None]
    if not drifts:
        return
    middle, (worst, most) = statistics.median(drift for _, drift in drifts), max(drifts, key=lambda pair: pair[1])
    if middle >= DRIFTED:
        yield Finding(
            "magnitude-drift", "medium",
            f"DoRA's magnitudes moved {middle:.0%} away from the norms of the base's rows (median of {len(drifts)} sites; most {most:.0%} at {worst.path}).",
            "Train with a lower learning rate: a magnitude scales a whole row of the base, so it needs no more than a few percent.",
            site=worst.path, numbers={"drift": middle, "most": most},
        )  # fmt: skip


ADAPTER_RULES: tuple[Callable[[Sites], Iterator[Finding]], ...] = (
    dead_sites, dominated, rank_too_small, rank_too_large, update_size, turned_away, magnitude_drift,
)  # fmt: skip
"""Each rule sees the sites of one part of a base, all of them finite."""


def _against(sites: Sites) -> list[tuple[SiteNumbers, AgainstBase]]:
    return [(site, site.base) for site in sites if site.base is not None]


def _size(site: SiteNumbers) -> float:
    """Against the weight where that is known: sites of different widths can be compared then."""
    return site.base.size if site.base is not None else site.norm


def _measure(site: SiteNumbers) -> str:
    return "‖ΔW‖/‖W‖" if site.base is not None else "‖ΔW‖"


def _ranks(sites: Sites) -> Any:
    low, high = min(site.rank for site in sites), max(site.rank for site in sites)
    return f"{high}" if low == high else f"{low} to {high}"
