"""The rules and their register: one function a rule, by decorator.

    @rule("loss-explosion", "the loss left its own range and did not come back", acts=True)
    def explosion(record: Record) -> Finding | None: ...

A rule looks at a `Record` and gives what it found; where the numbers that it needs are not there, nothing. The same rules look while a
run goes on and afterwards at its folder, so they depend on nothing but the record. This module does not know any rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from weft.diagnosis.finding import Finding, Severity, worst_first
from weft.diagnosis.record import Record

__all__ = ["RULES", "Rule", "Sign", "examine", "rule"]


@dataclass(frozen=True)
class Sign:
    """What a rule's function gives: a `Finding` without the rule's name. See there."""

    severity: Severity
    evidence: str
    advice: str
    step: int | None = None
    site: str | None = None
    numbers: dict[str, float] = dataclasses.field(default_factory=dict)


Look = Callable[[Record], Sign | None]


@dataclass(frozen=True)
class Rule:
    """A rule.

    Attributes:
        about: what it finds, in a few words, for lists.
        look: its function.
        acts: where a run may help itself (``on_trouble: act``), this rule, at high severity, makes it go back.
    """

    name: str
    about: str
    look: Look
    acts: bool = False

    def __call__(self, record: Record) -> Finding | None:
        """Look."""
        found = self.look(record)
        return (
            None
            if found is None
            else Finding(self.name, **{f.name: getattr(found, f.name) for f in dataclasses.fields(found)})
        )


RULES: dict[str, Rule] = {}
"""Every rule by name. Filled when the package is imported."""


def rule(name: str, about: str, *, acts: bool = False) -> Callable[[Look], Look]:
    """Register a function as a rule."""

    def register(look: Look) -> Look:
        assert name not in RULES, name
        RULES[name] = Rule(name, about, look, acts)
        return look

    return register


def examine(record: Record, rules: Iterable[Rule] | None = None) -> list[Finding]:
    """Every rule, or some of them, on a record; worst first."""
    found = (one(record) for one in (RULES.values() if rules is None else rules))
    return worst_first(item for item in found if item is not None)
