"""What came of a many-run: a row an adapter, as plain data and as a table for people.

Knows no models and no pages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.diagnosis import Record, examine
from weft.errors import RunError, did_you_mean
from weft.many.folder import ManyFolder
from weft.many.member import Member
from weft.train.inputs import NOTHING_HELD_OUT
from weft.train.run import Run

__all__ = ["ManyReport", "Runs", "row_of"]

POINTS = 48
"""Of a loss curve in the report; the log has all."""


@dataclass(frozen=True)
class ManyReport:
    """The report of a many-run.

    Attributes:
        rows: one an adapter, failed ones first: ``name``, ``folder``, ``status`` (``"end"``, ``"early"``, ``"halved"``,
            ``"failed"``), ``reason``, ``examples``, ``tokens``, ``steps``, ``base`` and ``adapter`` (metrics), ``curve``,
            ``warnings`` …
        tokens, seconds: of the whole run, evaluations in it. rounds: optimizer steps of the batch.
        slots: places in the bank. notes: what the user should know.
    """

    rows: Sequence[Mapping[str, Any]]
    tokens: int = 0
    seconds: float = 0.0
    rounds: int = 0
    slots: int = 0
    notes: tuple[str, ...] = field(default_factory=tuple)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in report.json."""
        return {**vars(self), "rows": [dict(row) for row in self.rows], "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ManyReport:
        """The inverse of `to_dict`."""
        known = {name: values[name] for name in ("tokens", "seconds", "rounds", "slots") if name in values}
        return cls(tuple(values["rows"]), **known, notes=tuple(values.get("notes", ())))

    @property
    def failed(self) -> list[Mapping[str, Any]]:
        """Rows of adapters that were stopped."""
        return [row for row in self.rows if row["status"] == "failed"]

    def headline(self) -> str:
        """One line: how many adapters, how fast."""
        speed = self.tokens / self.seconds if self.seconds else 0.0
        return (
            f"{len(self.rows) - len(self.failed):,} of {len(self.rows):,} adapters trained, {self.tokens:,} tokens in {self.seconds:.0f} s "
            f"({speed:,.0f} tokens/s), {self.rounds:,} rounds, {self.slots} at once"
        )

    def text(self, limit: int = 20) -> str:
        """A short text for people: failed ones first, then the first of the others."""
        done = [row for row in self.rows if row["status"] != "failed"]
        lines = [self.headline()]
        lines += [f"FAILED  {row['name']}: {row['reason']}" for row in self.failed]
        if done:
            width = min(32, max(len(str(row["name"])) for row in done[:limit]))
            lines += ["", f"{'':{width}}  {'examples':>8}  {'steps':>6}  {'loss before':>11}  {'after':>8}"]
        for row in done[:limit]:
            before, after = losses_of(row)
            mark = "  ⚠" if row["warnings"] else ""
            lines.append(
                f"{str(row['name'])[:width]:{width}}  {row['examples']:>8,}  {row['steps']:>6,}  {_number(before):>11}  {_number(after):>8}{mark}"
            )
        if len(done) > limit:
            lines.append(f"… and {len(done) - limit:,} more")
        odd = [row for row in done if row["warnings"]]
        lines += [f"⚠  {row['name']}: {'; '.join(row['warnings'])}" for row in odd[:limit]]
        lines += [f"⚠  and {len(odd) - limit:,} more, see report.html"] if len(odd) > limit else []
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


class Runs(Mapping[str, Run]):
    """The runs of a many-run by name; those that failed are not in it, but in `report`.

    Attributes:
        path: the folder. report: what came of it.
    """

    def __init__(self, path: Path, report: ManyReport) -> None:
        self.path, self.report = path, report
        self._rows = {str(row["name"]): row for row in report.rows}

    @classmethod
    def open(cls, path: Any) -> Runs:
        """A many-run that was made before.

        Raises:
            RunError: no many-run, or one that has not ended.
        """
        import json

        folder = ManyFolder(path).require()
        if not folder.finished:
            raise RunError(f"{path}: this run has not ended; continue it: weft train-many --resume {path}")
        return cls(folder.root, ManyReport.from_dict(json.loads(folder.report.read_text(encoding="utf-8"))))

    def __getitem__(self, name: str) -> Run:
        row = self._rows.get(name)
        if row is None:
            raise RunError(f"{self.path}: no run of {name!r}.{did_you_mean(name, self._rows)}")
        if row["status"] == "failed":
            raise RunError(f"{self.path}: the run of {name!r} failed: {row['reason']}")
        return Run.open(self.path / row["folder"])

    def __iter__(self) -> Iterator[str]:
        return (name for name, row in self._rows.items() if row["status"] != "failed")

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self._rows and self._rows[str(name)]["status"] != "failed"


def row_of(
    name: str, key: str, member: Member | None, log: Sequence[Mapping[str, Any]], reason: str = "", digest: str = ""
) -> dict[str, Any]:
    """The row of one adapter; of one whose data could not even be read, what is known."""
    row: dict[str, Any] = {
        "name": name,
        "folder": key,
        "status": "failed" if reason else "end",
        "reason": reason,
        "warnings": [],
    }
    row |= {
        "examples": 0,
        "tokens": 0,
        "steps": 0,
        "base": {},
        "adapter": {},
        "curve": [],
        "digest": digest,
        "seconds": 0.0,
    }
    if member is None:
        return row
    course, inputs = member.course, member.inputs
    metrics = member.result
    row |= {
        "status": "failed" if reason else course.stopped or "end", "examples": inputs.data["train"]["examples"],
        "eval_examples": inputs.data.get("eval", {}).get("examples", 0), "tokens": course.tokens, "steps": course.step,
        "planned": member.schedule.steps, "first_loss": course.first_loss, "last_loss": course.last_loss, "base": course.base,
        "adapter": metrics, "best_step": member.best.step if member.best is not None and member.schedule.best else None,
        "rank": _rank(member), "learning_rate": member.schedule.learning_rate, "metric": member.schedule.metric, "curve": curve_of(log), "seconds": course.seconds,
    }  # fmt: skip
    row["warnings"] = [*_warnings(member, metrics), *_findings(member, log)]
    return row


def _rank(member: Member) -> float:
    """That of the spec; where ranks change, their mean over the sites of the result."""
    held = member.held.values()
    return round(sum(held) / len(held), 1) if held else member.spec.rank


def losses_of(row: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Before and after: on evaluation data where there are any, else the training loss at first and at last."""
    if row.get("adapter"):
        return row["base"].get("loss"), row["adapter"].get("loss")
    return row.get("first_loss"), row.get("last_loss")


def curve_of(log: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Some points [step, training loss] of a log."""
    points = [
        [row["step"], row["loss"]] for row in log if isinstance(row.get("loss"), float) and math.isfinite(row["loss"])
    ]
    if len(points) <= POINTS:
        return points
    picked = sorted({round(index * (len(points) - 1) / (POINTS - 1)) for index in range(POINTS)})
    return [points[index] for index in picked]


def _warnings(member: Member, metrics: Mapping[str, float]) -> list[str]:
    course, found = member.course, [note for note in member.inputs.notes if note == NOTHING_HELD_OUT]
    account = member.inputs.data["train"].get("account", {})
    for what in ("truncated", "split", "empty", "masked"):
        count = account.get(what, {}).get("count", 0)
        if count:
            found.append(f"{count:,} examples {'without anything to learn' if what in ('empty', 'masked') else what}")
    if metrics and course.base and not metrics["loss"] < course.base["loss"]:
        found.append("not better than the base on its evaluation data")
    if course.first_loss is not None and course.last_loss is not None and course.last_loss > course.first_loss:
        found.append("the training loss rose")
    return found


def _findings(member: Member, log: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the rules of `weft doctor` say that is not said already."""
    schedule = member.schedule
    facts = {
        "steps": schedule.steps,
        "warmup_steps": schedule.warmup_steps,
        "learning_rate": schedule.learning_rate,
        "best": schedule.best,
    }
    found = examine(Record(tuple(log), facts, ended=True))
    return [
        f"{item.rule}: {item.evidence}" for item in found if item.severity != "low" and item.rule != "worse-than-base"
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
