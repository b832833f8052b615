"""A run: the folder that one training leaves behind, and what it says.

    runs/NAME/recipe.yaml        the recipe, as it was used
             environment.json    versions, machine, command, base, data
             log.jsonl           one line a logged step and one an evaluation
             checkpoints/        checkpoint-N: factors, optimizer, schedule, random state; and an adapter that can be loaded
             adapter/            the result
             report.json, report.md, curve.svg; report.html, the page; samples.json, answers before and after

Files are written beside and renamed. This module does not know torch or how a training goes.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.diagnosis.finding import Finding
from weft.errors import RunError, did_you_mean, some_names
from weft.train.curve import loss_curve

if TYPE_CHECKING:
    from weft.adapter import Adapter
    from weft.train.recipe import Recipe

__all__ = ["Folder", "Report", "Run", "describe_environment", "plain_json", "side_by_side", "write_beside"]

_OWN = (
    "recipe.yaml",
    "environment.json",
    "log.jsonl",
    "checkpoints",
    "adapter",
    "report.json",
    "report.md",
    "curve.svg",
    "report.html",
    "samples.json",
    "trackers",
    ".lock",
)


@dataclass(frozen=True)
class Report:
    """What came of a training.

    Attributes:
        base: metrics of the base on the evaluation data, e.g. ``{"loss": 2.9, "perplexity": 18.2}``; empty without.
        adapter: the same with the adapter.
        steps, epochs, tokens: optimizer steps, passes over the data, tokens that the model read (no padding).
        seconds: of the last process that trained; tokens_per_second is its speed.
        best_step: the step whose checkpoint was kept; stopped: ``"end"`` or ``"early"``.
        learning_rate, rate_reason: the peak, and where it is from.
        trainable: numbers that were trained.
        digest: of the adapter.
        data: by ``"train"`` and ``"eval"``: source, digest, examples, and the account of what was truncated or dropped.
        notes: what the user should know.
        ranks: where they changed: ``"changes"``, each with step, reason and ranks before and after by site, and ``"sites"``, the ranks of the
            adapter; empty where they didn't.
        findings: what is wrong with the run, worst first, see `weft.diagnosis.Finding`.
    """

    base: Mapping[str, float] = field(default_factory=dict)
    adapter: Mapping[str, float] = field(default_factory=dict)
    steps: int = 0
    epochs: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    train_loss: float | None = None
    best_step: int | None = None
    stopped: str = "end"
    learning_rate: float = 0.0
    rate_reason: str = ""
    trainable: int = 0
    digest: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    ranks: Mapping[str, Any] = field(default_factory=dict)
    findings: tuple[Mapping[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in report.json."""
        return {
            **dataclasses.asdict(self),
            "notes": list(self.notes),
            "findings": [dict(item) for item in self.findings],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """The inverse of `to_dict`; keys of later versions are dropped."""
        known = {item.name: values[item.name] for item in dataclasses.fields(cls) if item.name in values}
        lists = {name: tuple(known.get(name, ())) for name in ("notes", "findings")}
        return cls(**{**known, **lists})

    def text(self) -> str:
        """A short text for people, as in report.md."""
        stop = f"stopped early, {self.steps:,} steps" if self.stopped == "early" else f"{self.steps:,} steps"
        lines = [
            f"{stop}, {self.epochs:.2f} epochs, {self.tokens:,} tokens in {self.seconds:.0f} s ({self.tokens_per_second:,.0f} tokens/s)",
            f"{self.trainable:,} trained numbers, learning rate {self.rate_reason or self.learning_rate}",
        ]
        if self.best_step is not None:
            lines.append(f"kept: the checkpoint of step {self.best_step:,}")
        lines += rank_lines(self.ranks)
        if self.adapter:
            lines += ["", *side_by_side(self.base, self.adapter)]
        lines += [f"{name}: {part['summary']}" for name, part in self.data.items() if part.get("summary")]
        lines += [f"note: {note}" for note in self.notes]
        lines += [str(Finding.from_dict(item)) for item in self.findings]
        return "\n".join(lines)


@dataclass(frozen=True)
class Run:
    """A finished training.

    Attributes:
        path: its folder.
        adapter: the result; `Run.open` loads it from ``adapter/``.
        report: what came of it.
    """

    path: Path
    adapter: Adapter
    report: Report

    @property
    def log(self) -> list[dict[str, Any]]:
        """The lines of log.jsonl: ``{"step", "loss", "learning_rate", "grad_norm", "tokens", …}`` and evaluations."""
        return Folder(self.path).read_log()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """A run that was made before.

        Raises:
            RunError: no run folder, or one whose training has not ended (says how to go on).
        """
        folder = Folder(Path(path)).require()
        if not folder.finished:
            raise RunError(f"{path}: this run has not ended; continue it: weft train --resume {shlex.quote(str(path))}")
        from weft.formats import load

        return cls(
            folder.root, load(folder.adapter), Report.from_dict(json.loads(folder.report.read_text(encoding="utf-8")))
        )


class Folder:
    """The paths of a run folder, and how they are written."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self.recipe, self.environment, self.log = (self.root / name for name in _OWN[:3])
        self.checkpoints, self.adapter, self.report = (self.root / name for name in _OWN[3:6])
        self.trackers = self.root / "trackers"

    @property
    def finished(self) -> bool:
        """The report is the last thing that a training writes."""
        return self.report.is_file()

    def require(self) -> Folder:
        """This folder, if it is a run's.

        Raises:
            RunError: it isn't; names runs near it.
        """
        if self.recipe.is_file() and self.environment.is_file():
            return self
        near = (
            [child.name for child in self.root.parent.iterdir() if (child / "recipe.yaml").is_file()]
            if self.root.parent.is_dir()
            else []
        )
        found = (
            "a folder without recipe.yaml and environment.json"
            if self.root.is_dir()
            else "a file"
            if self.root.exists()
            else "nothing"
        )
        raise RunError(f"{self.root}: expected the folder of a run, got {found}.{did_you_mean(self.root.name, near)}")

    def check(self, overwrite: bool = False) -> None:
        """See that a new run can be made here; changes nothing.

        Raises:
            RunError: it holds a run or other files; or it can't be written.
        """
        if self.root.exists() and not self.root.is_dir():
            raise RunError(f"{self.root}: this is a file; a run needs a folder of its own")
        there = [child.name for child in self.root.iterdir()] if self.root.is_dir() else []
        foreign = [name for name in there if name not in _OWN]
        if foreign and not self.recipe.is_file():
            raise RunError(
                f"{self.root}: this folder is not empty and holds no run ({some_names(foreign)}); files of others are left alone: give another name"
            )
        if self.recipe.is_file() and not overwrite:
            raise RunError(
                f"{self.root}: there is a run in this folder; resume it (resume=True, --resume), replace it (overwrite=True, "
                "--overwrite), or give another name"
            )
        above = next(path for path in (self.root.absolute(), *self.root.absolute().parents) if path.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise RunError(f"{self.root}: a run can't be written here: {above} is no folder that can be written")

    def create(self, overwrite: bool = False) -> None:
        """Make the folder; a run that stood there is removed, if it may be.

        Raises:
            RunError: see `check`.
        """
        self.check(overwrite)
        for name in _OWN:
            path = self.root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        try:
            self.checkpoints.mkdir(parents=True)
        except OSError as error:
            raise RunError(f"{self.root}: a run can't be written here: {error}") from error

    def lock(self) -> Any:
        """Hold the folder for this process, until it ends in whatever way.

        Raises:
            RunError: another process trains in it.
        """
        handle = open(self.root / ".lock", "w")  # noqa: SIM115 - held as long as the training
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            return handle
        except BlockingIOError as error:
            handle.close()
            raise RunError(
                f"{self.root}: another process trains in this folder; wait for it, or give another name"
            ) from error
        except OSError:
            return handle  # a file system without locks
        return handle

    def read_log(self) -> list[dict[str, Any]]:
        """Lines of the log; half a line at the end (a killed process) is passed over."""
        if not self.log.is_file():
            return []
        rows = []
        for line in self.log.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def append_log(self, row: Mapping[str, Any]) -> None:
        """Add one line."""
        with self.log.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(plain_json(row)) + "\n")

    def rewind_log(self, step: int) -> None:
        """Drop the lines after a step: a resumed run writes them again. What says that it went back stays."""
        kept = [row for row in self.read_log() if row.get("step", 0) <= step or row.get("of") == "trouble"]
        write_beside(self.log, "".join(json.dumps(row) + "\n" for row in kept))

    def save_recipe(self, recipe: Recipe) -> None:
        """Write recipe.yaml."""
        recipe.save(self.recipe)

    def read_environment(self) -> dict[str, Any]:
        """What environment.json says."""
        try:
            return dict(json.loads(self.environment.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise RunError(f"{self.environment}: this file can't be read: {error}") from error

    def save_environment(self, values: Mapping[str, Any]) -> None:
        """Write environment.json."""
        write_beside(self.environment, json.dumps(values, indent=2, ensure_ascii=False) + "\n")

    def save_report(self, report: Report, headline: str) -> None:
        """Write curve.svg and report.md, and last report.json, by which a run is finished."""
        write_beside(self.root / "curve.svg", loss_curve(self.read_log(), headline, report.best_step))
        write_beside(self.root / "report.md", f"# {headline}\n\n```\n{report.text()}\n```\n\n![loss](curve.svg)\n")
        write_beside(self.report, json.dumps(plain_json(report.to_dict()), indent=2, ensure_ascii=False) + "\n")


def rank_lines(ranks: Mapping[str, Any]) -> list[str]:
    """One line for each change of ranks, and one for what is there at the end."""
    if not ranks:
        return []
    lines = [f"step {row['step']}: {row['change']}, {row['why']}" for row in ranks["changes"]]
    if len(lines) > 12:
        lines[5:-5] = [f"… {len(lines) - 10} more changes of ranks, all in report.json …"]
    counts = sorted(Counter(ranks["sites"].values()).items())
    if len(counts) <= 4:
        held = ", ".join(f"{rank} at {count} site{'s' if count > 1 else ''}" for rank, count in counts)
    else:
        total = sum(rank * count for rank, count in counts)
        held = f"{counts[0][0]} to {counts[-1][0]}, {total / len(ranks['sites']):.1f} on average over {len(ranks['sites'])} sites"
    return [*lines, f"ranks of the adapter: {held}" + ("" if lines else ", none changed")]


def side_by_side(base: Mapping[str, float], adapter: Mapping[str, float] | None) -> list[str]:
    """A table of metrics, one a line: name, base, adapter."""
    names = list(dict.fromkeys([*base, *(adapter or {})]))
    width = max(map(len, names), default=0)
    lines = [f"{'':{width}}  {'base':>10}" + (f"  {'adapter':>10}" if adapter is not None else "")]
    for name in names:
        cells = [base] if adapter is None else [base, adapter]
        shown = "  ".join(f"{part[name]:>10.4g}" if name in part else f"{'-':>10}" for part in cells)
        lines.append(f"{name:{width}}  {shown}")
    return lines


def describe_environment() -> dict[str, Any]:
    """Versions, machine and command, as plain data."""
    import torch

    versions = {"python": platform.python_version()}
    for name in ("weft", "torch", "transformers", "accelerate", "datasets", "safetensors", "tokenizers", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "weft" not in versions:
        import weft

        versions["weft"] = weft.__version__
    accelerators = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": versions,
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "accelerators": accelerators,
        "command": shlex.join(sys.argv),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def write_beside(path: Path, text: str) -> None:
    """Write a file beside its place, then rename: a reader finds the old file or the new one, never half of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def plain_json(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain_json(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [plain_json(item) for item in value]
    return value
