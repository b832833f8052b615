"""`RunFacts`: everything that the page of a run shows. Any of it may be missing, and is left out then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weft.diagnosis import Finding, Record
from weft.diagnosis.adapter_numbers import SiteNumbers

__all__ = ["RunFacts", "as_map", "as_number"]


def as_map(value: Any) -> Mapping[str, Any]:
    """A mapping from a file; an empty one of all else: files may be damaged, or of another version."""
    return value if isinstance(value, Mapping) else {}


def as_number(value: Any) -> float | None:
    """A number from a file, also where it is NaN or infinity as text; None of all else."""
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


@dataclass(frozen=True)
class RunFacts:
    """A run, as it is shown.

    Attributes:
        name: headline; place: the folder.
        record: the lines of its log, and what was known before the first step.
        environment: what environment.json says. recipe: what recipe.yaml says.
        report: what report.json says; empty while the run has not ended.
        sites: numbers of the adapter by site, see `weft.diagnosis.adapter_numbers`.
        findings: worst first.
        samples: ``{"kind", "rows": [{"prompt", "reference", "base", "adapter"}], "note"}``, as in samples.json.
        notes: what could not be looked at, and why.
    """

    name: str
    place: str
    record: Record
    environment: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    sites: Sequence[SiteNumbers] = ()
    findings: Sequence[Finding] = ()
    samples: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def finished(self) -> bool:
        """Whether its training ended."""
        return bool(self.report)

    def sizes(self) -> dict[str, float]:
        """‖ΔW‖/‖W‖ by site, where it is known: from the base, or from the norms that the training wrote down."""
        found = {}
        for site in self.sites:
            weight = self.record.weights.get(site.path, 0.0)
            if site.base is not None:
                found[site.path] = site.base.size
            elif weight and site.finite and not site.dora:
                found[site.path] = site.norm / weight
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: all but the lines of the log, which are in log.jsonl."""
        sizes = self.sizes()
        return {
            "name": self.name,
            "folder": self.place,
            "finished": self.finished,
            "steps": {"done": self.record.step, "planned": self.record.steps},
            "report": dict(self.report),
            "findings": [found.to_dict() for found in self.findings],
            "sites": [{**site.to_dict(), "size": sizes.get(site.path)} for site in self.sites],
            "samples": dict(self.samples),
            "recipe": dict(self.recipe),
            "environment": dict(self.environment),
            "notes": list(self.notes),
        }
