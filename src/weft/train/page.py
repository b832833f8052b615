"""report.html of a run: what is in its folder, gathered; and drawn by `weft.report`.

    facts = gather("runs/NAME")          # whatever is there: also of a run that has not ended
    write_page(facts, "report.html")

Does not know how a training goes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from weft.adapter import Adapter
from weft.core.loading import base_weights, check_base
from weft.diagnosis import Finding, Record, examine, worst_first
from weft.diagnosis.adapter_numbers import SiteNumbers, measure_adapter
from weft.diagnosis.adapters import judge
from weft.errors import RunError, WeftError
from weft.identity import fingerprint
from weft.report import RunFacts, run_page
from weft.train.opening import BaseLike, open_base, trained_format
from weft.train.run import Folder, write_beside
from weft.train.yaml12 import parse_file

__all__ = ["PAGE", "SAMPLES", "base_of", "draw", "gather", "write_page"]

PAGE, SAMPLES = "report.html", "samples.json"


def gather(
    place: str | os.PathLike[str], *, adapter: Adapter | None = None, base: BaseLike = None, dtype: str | None = None
) -> RunFacts:
    """What the folder of a run holds.

    Args:
        place: the folder; its training may go on, or have been killed.
        adapter: of the run; None: the one in the folder, where it is.
        base: to measure the adapter against: a directory, a hub id or a (model, tokenizer) pair; None: by itself.
        dtype: of a base that is loaded here.

    Raises:
        RunError: no run folder; the folder of a many-run (says where its page is).
        BaseError, BaseMismatchError: the base can't be loaded; it is not the adapter's.
    """
    root = Path(place)
    if (root / "users.json").is_file():
        page = root / PAGE
        where = f"its page is {page}" if page.is_file() else "its page is written at its end"
        raise RunError(f"{root}: this is a run of many adapters; {where}. For one of them: weft report {root}/NAME")
    folder = Folder(root).require()
    notes: list[str] = []
    rows = _read_log(folder, notes)
    environment, report = _read(folder.environment, notes), _read(folder.report, notes)
    facts = environment.get("facts")
    record = Record(tuple(rows), facts if isinstance(facts, Mapping) else {}, bool(report))
    recipe = _recipe(folder, notes)
    if adapter is None and folder.adapter.is_dir():
        adapter = _load(folder, notes)
    if adapter is None and base is not None:
        notes.append("There is no adapter yet, so nothing is measured against the base.")
    sites = [] if adapter is None else measure_adapter(adapter, base_of(adapter, base, dtype))
    return RunFacts(
        name=root.absolute().name,
        place=str(place),
        record=record,
        environment=environment,
        recipe=recipe,
        report=report,
        sites=tuple(sites),
        findings=tuple(_findings(record, sites, adapter)),
        samples=_read(root / SAMPLES, notes),
        notes=tuple(notes),
    )


def write_page(facts: RunFacts, path: str | os.PathLike[str]) -> Path:
    """Draw and write; beside, then renamed.

    Raises:
        RunError: it can't be written there.
    """
    target = Path(path)
    if target.is_dir():
        raise RunError(
            f"{target}: the page can't be written here: this is a folder; name a file, as in {target / PAGE}"
        )
    try:
        write_beside(target, run_page(facts))
    except OSError as error:
        raise RunError(f"{target}: the page can't be written here: {error.strerror or error}") from error
    return target


def draw(folder: Folder, adapter: Adapter) -> str | None:
    """report.html of a training that has just ended; what went wrong in words, for no picture is worth a training."""
    try:
        write_page(gather(folder.root, adapter=adapter), folder.root / PAGE)
    except Exception as error:  # noqa: BLE001 - the training is done and written; its picture can be made again
        return f"report.html was not written ({type(error).__name__}: {error}); weft report {folder.root} tries again"
    return None


def base_of(adapter: Adapter, base: BaseLike, dtype: str | None = None) -> nn.Module | None:
    """The model that an adapter is to be compared with, as it needs it; None where no base is named.

    Raises:
        BaseError: it can't be loaded. BaseMismatchError: it is another one.
    """
    if base is None:
        return None
    trained = trained_format(adapter)
    model, _ = open_base(base, labels=trained.get("labels"), dtype=dtype, kind=trained.get("kind"))
    check_base(adapter, fingerprint(model, base_weights(model, tuple(adapter.modules))))
    return model


def _findings(record: Record, sites: list[SiteNumbers], adapter: Adapter | None) -> list[Finding]:
    found = examine(record)
    seen = {item.rule for item in found}
    if adapter is not None:
        found = [*found, *(item for item in judge(sites, adapter) if item.rule not in seen)]
    return worst_first(found)


def _read_log(folder: Folder, notes: list[str]) -> list[dict[str, Any]]:
    try:
        lines = folder.log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        notes.append("There is no log yet, so there are no curves.")
        return []
    rows, bad = [], 0
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            bad += 1
    if bad:
        notes.append(f"log.jsonl: {bad} of {len(lines)} lines can't be read and were passed over.")
    return rows


def _read(path: Path, notes: list[str]) -> dict[str, Any]:
    """A JSON mapping; nothing where the file isn't there, and a note where it can't be read."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} can't be read: {error}")
        return {}
    if not isinstance(found, dict):
        notes.append(f"{path.name} is no mapping and was passed over.")
        return {}
    return found


def _recipe(folder: Folder, notes: list[str]) -> dict[str, Any]:
    try:
        return dict(parse_file(folder.recipe))
    except WeftError as error:
        notes.append(f"recipe.yaml can't be read: {error}")
        return {}


def _load(folder: Folder, notes: list[str]) -> Adapter | None:
    from weft.formats import load

    try:
        return load(folder.adapter)
    except WeftError as error:
        notes.append(f"The adapter can't be read: {error}")
        return None
