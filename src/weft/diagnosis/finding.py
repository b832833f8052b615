"""`Finding`: one thing that is wrong, or may be, with the evidence and what to change.

This module does not know what is looked at or how.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["SEVERITIES", "Finding", "Severity", "worst", "worst_first"]

Severity = Literal["high", "medium", "low"]

SEVERITIES: tuple[Severity, ...] = ("high", "medium", "low")
"""Worst first. High: the result is not to be used, or the run is lost. Medium: it would be better otherwise. Low: good to know."""


@dataclass(frozen=True)
class Finding:
    """What one rule found.

    Attributes:
        rule: the rule's name, as in ``"loss-explosion"``.
        severity: ``"high"``, ``"medium"`` or ``"low"``; see `SEVERITIES`.
        evidence: what was seen, in one sentence, with the numbers.
        advice: what to change, in one sentence, with names of fields and values.
        step: the step at which it began, where there is one. site: the site that it is about, where it is one.
        numbers: the numbers of the evidence, for programs and plots.
    """

    rule: str
    severity: Severity
    evidence: str
    advice: str
    step: int | None = None
    site: str | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """For a log line: rule, evidence, advice."""
        where = f" at step {self.step}" if self.step is not None else ""
        return f"{self.severity}: {self.rule}{where}: {self.evidence} {self.advice}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**dataclasses.asdict(self), "numbers": dict(self.numbers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Finding:
        """The inverse of `to_dict`."""
        return cls(**values)


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """By severity, then by the step at which they began."""
    return sorted(findings, key=lambda found: (SEVERITIES.index(found.severity), found.step or 0, found.rule))


def worst(findings: Iterable[Finding]) -> Severity | None:
    """The highest severity; None where nothing was found."""
    return next((found.severity for found in worst_first(findings)), None)
