"""What a mixture is, and what it cost: by site, in all, and in loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from weft.adapter import Adapter

__all__ = ["MixReport", "Mixture", "SiteMix"]


@dataclass(frozen=True)
class SiteMix:
    """One site of a mixture.

    Attributes:
        rank: of the mixture. parents: how many adapters have a part in it.
        norm: ‖target‖, what the method wanted to give: the weighted sum, or its own matrix before it was brought to a rank. None where
            nothing was left out, so that nobody had to know.
        relative_error: ‖ΔW - target‖ / ‖target‖; 0.0 where nothing was left out (or nothing was wanted).
        from_sum: ‖ΔW - Σ weight · ΔWᵢ‖ / ‖Σ weight · ΔWᵢ‖: how far from the plain sum, which a method such as TIES does not want to give.
    """

    path: str
    rank: int
    parents: int
    norm: float | None
    relative_error: float
    from_sum: float


@dataclass(frozen=True)
class MixReport:
    """What a mixture cost.

    Attributes:
        method: name of the method. settings: what it was given.
        sites: one `SiteMix` a site.
        notes: what the user should know, in sentences.
        losses: on the data that were given: of ``"base"``, of each parent, of the exact ``"sum"``, and of the ``"mixture"``.
        trials: of a search: weights and loss of every evaluation, in their order.
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    sites: tuple[SiteMix, ...] = ()
    notes: tuple[str, ...] = ()
    losses: Mapping[str, float] | None = None
    trials: tuple[Mapping[str, Any], ...] = ()

    @property
    def relative_error(self) -> float:
        """‖ΔW - target‖ / ‖target‖ over all sites together; 0.0 for a mixture that wanted nothing."""
        total = sum((site.norm or 0.0) ** 2 for site in self.sites)
        lost = sum((site.relative_error * (site.norm or 0.0)) ** 2 for site in self.sites)
        return math.sqrt(lost / total) if total else 0.0

    @property
    def from_sum(self) -> float:
        """Mean over the sites of the distance from the plain sum, see `SiteMix`."""
        return sum(site.from_sum for site in self.sites) / len(self.sites) if self.sites else 0.0

    @property
    def worst(self) -> SiteMix | None:
        """The site with the largest relative error."""
        return max(self.sites, key=lambda site: site.relative_error, default=None)

    @property
    def loss_change(self) -> float | None:
        """Loss of the mixture less that of the exact sum: what the method does to the loss; None without data."""
        return None if self.losses is None else self.losses["mixture"] - self.losses["sum"]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "method": self.method,
            "settings": dict(self.settings),
            "relative_error": self.relative_error,
            "from_sum": self.from_sum,
            "losses": dict(self.losses) if self.losses is not None else None,
            "loss_change": self.loss_change,
            "notes": list(self.notes),
            "trials": [dict(trial) for trial in self.trials],
            "sites": [asdict(site) for site in self.sites],
        }

    def summary(self) -> str:
        """A few lines for people."""
        ranks = sorted({site.rank for site in self.sites})
        said = "" if not ranks else f", rank {ranks[0]}" if len(ranks) == 1 else f", ranks {ranks[0]} to {ranks[-1]}"
        lines = [f"{self.method}: {len(self.sites)} sites{said}"]
        worst = self.worst
        if worst is None or worst.relative_error == 0:
            lines.append("nothing was left out: the error is float rounding")
        else:
            lines.append(
                f"relative error {self.relative_error:.4%} of what was wanted; at worst {worst.relative_error:.4%}, at {worst.path}"
            )
        if any(site.from_sum != site.relative_error for site in self.sites):
            lines.append(f"distance from the plain weighted sum: {self.from_sum:.2%}, which the method intends")
        if self.losses is not None:
            lines.append("loss: " + ", ".join(f"{name} {value:.4f}" for name, value in self.losses.items()))
        if self.loss_change:
            lines.append(f"the method changes the loss of the exact sum by {self.loss_change:+.4f}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


@dataclass(frozen=True, eq=False, repr=False)
class Mixture(Adapter):
    """An adapter that was mixed from others, or shrunk; usable wherever an `Adapter` is.

    Attributes:
        report: what it cost. A file keeps it in ``provenance.mixture``.
    """

    report: MixReport = field(default_factory=lambda: MixReport("exact"))

    def __repr__(self) -> str:
        inside = super().__repr__().partition("(")[2][:-1]
        return f"Mixture({inside}, {self.report.method}, relative error {self.report.relative_error:.4g})"
