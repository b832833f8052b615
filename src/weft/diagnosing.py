"""`diagnose`: what is wrong with a run or an adapter. The entry above the rules of `weft.diagnosis`.

    for finding in weft.diagnose("runs/NAME"):
        print(finding)

A run folder is looked at by its log, at any time, also of a run that was killed; where its adapter is there, that is looked at too.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.adapter import Adapter
from weft.diagnosis import Finding, Record, examine, worst_first
from weft.diagnosis.adapters import diagnose_adapter
from weft.errors import RunError
from weft.train.opening import BaseLike
from weft.train.page import base_of
from weft.train.run import Folder, Run
from weft.train.watching import Watch

__all__ = ["Diagnosis", "diagnose", "look_at"]


@dataclass(frozen=True)
class Diagnosis:
    """What was looked at, and what was found.

    Attributes:
        subject: in words: what it is, and how far it is.
        findings: worst first.
        notes: what could not be looked at, and why.
    """

    subject: str
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "subject": self.subject,
            "findings": [found.to_dict() for found in self.findings],
            "notes": list(self.notes),
        }


def diagnose(
    what: Run | Watch | Adapter | str | os.PathLike[str], base: BaseLike = None, *, dtype: str | None = None
) -> list[Finding]:
    """What is wrong with a run or an adapter, with the evidence and what to change.

    Args:
        what: a `Run`, a run folder (finished or not), an `Adapter`, what `weft.load` reads, or a `weft.Watch`.
        base: to compare an adapter with its base: a directory, a hub id, or a (model, tokenizer) pair; None: by itself.
        dtype: of a base that is loaded here.

    Returns:
        findings, worst first; nothing where all is well.

    Raises:
        RunError: no such folder; or a run that has no log yet; or the folder of a many-run (names its runs).
        FormatError: no adapter that can be read.
    """
    return list(look_at(what, base, dtype=dtype).findings)


def look_at(
    what: Run | Watch | Adapter | str | os.PathLike[str], base: BaseLike = None, *, dtype: str | None = None
) -> Diagnosis:
    """As `diagnose`, with what was looked at in words."""
    if isinstance(what, Watch):
        return Diagnosis(f"a training, at step {what.record.step}", tuple(what.findings))
    if isinstance(what, Adapter):
        return Diagnosis(f"adapter {what.digest[:12]}", tuple(_of_adapter(what, base, dtype)))
    place = Path(what.path if isinstance(what, Run) else what)
    if (place / "users.json").is_file():
        raise RunError(f"{place}: this is a run of many adapters; look at one of them: {_some_runs(place)}")
    if (place / "recipe.yaml").is_file() or (place / "log.jsonl").is_file():
        return _of_run(place, base, dtype)
    if place.is_dir() and not any(place.glob("*.safetensors")) and not any(place.glob("*.bin")):
        Folder(place).require()
    from weft.formats import load

    adapter = load(what if isinstance(what, str) else place)
    return Diagnosis(f"adapter {what}", tuple(_of_adapter(adapter, base, dtype)))


def _of_run(place: Path, base: BaseLike, dtype: str | None) -> Diagnosis:
    folder = Folder(place).require()
    rows, notes = _read(folder)
    facts = folder.read_environment().get("facts")
    if not isinstance(facts, Mapping):
        facts = {}
        notes.append(
            "this run was made by a version that did not write down what its rules need; what can be seen is less"
        )
    record = Record(tuple(rows), facts, folder.finished)
    findings = examine(record)
    subject = f"run {place}: {record.step:,} of {record.steps:,} steps"
    if folder.finished:
        adapter = Run.open(place).adapter
        seen = {found.rule for found in findings}
        findings += [found for found in _of_adapter(adapter, base, dtype) if found.rule not in seen]
    else:
        subject += f", not ended (go on: weft train --resume {shlex.quote(str(place))})"
    return Diagnosis(subject, tuple(worst_first(findings)), tuple(notes))


def _read(folder: Folder) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of a log; those that can't be read are passed over, and counted.

    Raises:
        RunError: there is nothing to look at.
    """
    try:
        lines = folder.log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise RunError(
            f"{folder.log}: there is no log to look at ({error.strerror}); the training writes it with its first step"
        ) from error
    rows: list[dict[str, Any]] = []
    bad: list[int] = []
    for count, line in enumerate(lines, 1):
        row = _row(line)
        bad += [] if row is not None else [count]
        rows += [] if row is None else [row]
    if not rows:
        raise RunError(f"{folder.log}: no line of this log can be read")
    if not bad:
        return rows, []
    where = ", ".join(map(str, bad[:5])) + (" …" if len(bad) > 5 else "")
    return rows, [f"{folder.log}: {len(bad)} of {len(lines)} lines can't be read and were passed over ({where})"]


def _row(line: str) -> dict[str, Any] | None:
    """One line; None: it is damaged."""
    try:
        row = json.loads(line)
        return row if isinstance(row, dict) and isinstance(row["step"], int) else None
    except (ValueError, KeyError):
        return None


def _of_adapter(adapter: Adapter, base: BaseLike, dtype: str | None) -> list[Finding]:
    return diagnose_adapter(adapter, base_of(adapter, base, dtype))


def _some_runs(place: Path) -> str:
    there = sorted(child.name for child in place.iterdir() if (child / "recipe.yaml").is_file())
    return ", ".join(there[:8]) + (" …" if len(there) > 8 else "") if there else "none of them has begun"
