"""Spend a budget of bytes on ranks, where they capture most.

Knows spectra, not how they were measured.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.errors import PlanError
from weft.plan.sizes import bytes_of, in_words
from weft.plan.spectra import SiteSpectrum
from weft.spec import LoraSpec

__all__ = ["ITEMSIZE", "Spending", "spend", "uniform_rank"]

ITEMSIZE = 4
"""Bytes of a number of the factors: weft trains and saves them in float32."""

_FAINT = 1e-9
"""Share of the energy: what a direction that the halves don't agree on is worth, so that what is left of a budget is still spent."""


@dataclass(frozen=True)
class Spending:
    """A rank for every site, within a budget.

    Attributes:
        ranks: by path, in the order of the model.
        budget: bytes that were allowed. bytes: what the factors take, exactly.
        captured: share of its gradient's energy that each site holds with these ranks, the mean over sites.
        uniform: the largest rank that fits everywhere. uniform_captured: the share that it holds.
        uniform_bytes: what it takes.
    """

    ranks: Mapping[str, int]
    budget: int
    bytes: int
    captured: float
    uniform: int
    uniform_captured: float
    uniform_bytes: int

    def spec(self, spec: LoraSpec) -> LoraSpec:
        """The spec with these ranks: the most frequent one as `rank`, all others in `rank_pattern`; PEFT reads both.

        Every site keeps the spec's alpha, so that its learning rate stays right whatever its rank (see
        `weft.train.schedule.learning_rate_for`).
        """
        usual = Counter(self.ranks.values()).most_common(1)[0][0]
        pattern = {f"^{re.escape(path)}": rank for path, rank in self.ranks.items() if rank != usual}
        return spec.replace(rank=usual, alpha=spec.alpha, rank_pattern=pattern)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**vars(self), "ranks": dict(self.ranks)}

    def text(self) -> str:
        """A table for people: sites by rank."""
        width = max(map(len, self.ranks))
        lines = [f"{path:{width}}  {rank:>4}" for path, rank in self.ranks.items()]
        return "\n".join([
            f"{'site':{width}}  rank", *lines,
            f"{self.bytes:,} of {self.budget:,} bytes ({in_words(self.bytes)}); they hold {self.captured:.1%} of a site's gradient on average, "
            f"rank {self.uniform} everywhere ({self.uniform_bytes:,} bytes) {self.uniform_captured:.1%}",
        ])  # fmt: skip


def uniform_rank(budget: int, spectra: Sequence[SiteSpectrum], itemsize: int = ITEMSIZE) -> int:
    """The largest rank that fits into a budget at all sites; where ΔW has no such rank, its largest."""

    def cost(rank: int) -> int:
        return sum(min(rank, site.most) * site.numbers for site in spectra) * itemsize

    most = max(site.most for site in spectra)
    return max((rank for rank in range(1, most + 1) if cost(rank) <= budget), default=0)


def spend(budget: str | int, spectra: Sequence[SiteSpectrum], *, itemsize: int = ITEMSIZE) -> Spending:
    """Give every site rank 1, then each next byte to the direction that captures the largest share of its site's energy for its bytes.

    Shares, and not energies: AdamW moves every site by its learning rate, however small its gradient is. Greedy is best here up to the last
    direction that doesn't fit, for shares fall with the rank at every site.

    Args:
        budget: bytes of all factors, or text as ``"8MiB"``.
        spectra: of `weft.plan.spectra.site_spectra`.
        itemsize: bytes of a number.

    Raises:
        PlanError: rank 1 everywhere takes more than the budget; says how much.
    """
    allowed = bytes_of(budget)
    if not spectra:
        raise PlanError("there is no site to spend a budget on; name some in targets")
    least = sum(site.numbers for site in spectra) * itemsize
    if least > allowed:
        raise PlanError(
            f"a budget of {allowed:,} bytes ({in_words(allowed)}) is too small: rank 1 at all {len(spectra)} sites takes {least:,} bytes "
            f"({in_words(least)}), {least - allowed:,} more; raise the budget, or adapt fewer sites (--targets)"
        )
    by_path = {site.path: site for site in spectra}
    ranks = dict.fromkeys(by_path, 1)
    spent = least
    heap = [(-_worth(site, 1), number, site.path) for number, site in enumerate(spectra) if site.most > 1]
    heapq.heapify(heap)
    while heap:
        _, number, path = heapq.heappop(heap)
        site = by_path[path]
        cost = site.numbers * itemsize
        if spent + cost > allowed:
            continue  # a cheaper site's may still fit
        spent += cost
        ranks[path] += 1
        if ranks[path] < site.most:
            heapq.heappush(heap, (-_worth(site, ranks[path]), number, path))
    uniform = uniform_rank(allowed, spectra, itemsize)
    flat = {site.path: min(uniform, site.most) for site in spectra}

    def share(chosen: Mapping[str, int]) -> float:
        return sum(site.captured(chosen[site.path]) / (site.total or 1.0) for site in spectra) / len(spectra)

    flat_bytes = sum(flat[site.path] * site.numbers for site in spectra) * itemsize
    return Spending(ranks, allowed, spent, share(ranks), uniform, share(flat), flat_bytes)


def _worth(site: SiteSpectrum, rank: int) -> float:
    """Share of the site's energy that one more direction than ``rank`` captures, by the number of parameters that it takes."""
    share = site.energies[rank] / site.total if rank < len(site.energies) and site.total else 0.0
    return (share + _FAINT / (1 + rank)) / site.numbers
