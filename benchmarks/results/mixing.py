"""Three tasks on one base (stories260k): restaurant descriptions, Shakespeare, sentiment as text; every method of mixing, loss by task."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import weft
from weft.compose.losses import Judge
from weft.compose.parents import read_parents

__all__ = ["measure"]

TASKS = ("e2e", "shakespeare", "sst2")
RANK, BATCH, STEPS, RATE = 16, 16, 400, 5e-3
EXAMPLES, TESTED = 6000, 300
SEARCHED = 100

MIXTURES: tuple[tuple[str, Sequence[float], str, Mapping[str, Any]], ...] = (
    ("exact, the sum", (1, 1, 1), "exact", {}),
    ("exact, half of each", (0.5, 0.5, 0.5), "exact", {}),
    ("exact, the mean", (1 / 3, 1 / 3, 1 / 3), "exact", {}),
    ("exact", (0.7, 0.3, 0), "exact", {}),
    ("exact", (0, 0.5, 0.5), "exact", {}),
    ("layerwise: the first two layers half", (0.5, 0.5, 0.5), "layerwise", {"first": 0.25}),
    ("svd, rank 16", (0.5, 0.5, 0.5), "svd", {"rank": 16}),
    ("svd, rank 4", (0.5, 0.5, 0.5), "svd", {"rank": 4}),
    ("svd, 99 % of the energy", (0.5, 0.5, 0.5), "svd", {"energy": 0.99}),
    ("linear", (0.5, 0.5, 0.5), "linear", {}),
    ("task arithmetic, scaling 0.4", (1, 1, 1), "task_arithmetic", {"scaling": 0.4}),
    ("TIES, density 0.5, scaling 1", (1, 1, 1), "ties", {"density": 0.5}),
    ("TIES, density 0.5, scaling 1, rank 16", (1, 1, 1), "ties", {"density": 0.5, "rank": 16}),
    ("TIES, density 0.2, scaling 1", (1, 1, 1), "ties", {"density": 0.2}),
    ("DARE, density 0.5", (0.5, 0.5, 0.5), "dare", {"density": 0.5}),
    ("DARE-TIES, density 0.5, scaling 1", (1, 1, 1), "dare_ties", {"density": 0.5}),
    ("magnitude, density 0.3", (0.5, 0.5, 0.5), "magnitude", {"density": 0.3}),
    ("KnOTS, density 0.5, scaling 1", (1, 1, 1), "knots", {"density": 0.5}),
)
TOGETHER = 0.5
TAKEN = (-0.1, -0.25)


def measure(shared: Path, folder: Path) -> dict[str, Any]:
    """Train three adapters, mix them, and measure the loss of each task."""
    base = shared / "models/stories260k"
    with tempfile.TemporaryDirectory() as work, contextlib.ExitStack() as opened:
        data = {task: _data(task, shared / "data", Path(work)) for task in TASKS}
        adapters = {task: _trained(base, data[task][0], Path(work) / f"run-{task}") for task in TASKS}
        parents = read_parents(adapters.values())
        judges = {
            task: opened.enter_context(Judge.opened(str(base), data[task][1], [parents[number]]))
            for number, task in enumerate(TASKS)
        }

        def losses(adapter: weft.Adapter | None) -> list[float]:
            return [round(judges[task].loss(adapter), 4) for task in TASKS]

        start = losses(None)
        rows: list[list[Any]] = [["the base", "", "", *start]]
        rows += [
            [f"{task} alone", _weights([float(task == other) for other in TASKS]), "", *losses(adapters[task])]
            for task in TASKS
        ]
        for name, weights, method, options in MIXTURES:
            mixed = _mixed(adapters, weights, method, options)
            error = mixed.report.relative_error
            rows.append([name, _weights(weights), f"{error:.2%}" if error else "0", *losses(mixed)])
        rows.append(["A's and B's added apart (no mixture)", _weights((0.5, 0.5, 0.5)), *_apart(adapters, losses)])
        rows.append(_searched(base, data, adapters, losses, Path(work)))
        together = losses(_mixed(adapters, [TOGETHER] * len(TASKS), "exact", {}))
        changes: dict[float, list[list[float]]] = {}
        for rest, before, what in (
            (TOGETHER, together, "taken out of the mixture of halves"),
            (0.0, start, "taken away from the base"),
        ):
            for weight in TAKEN:
                for number, task in enumerate(TASKS):
                    weights = [weight if number == other else rest for other in range(len(TASKS))]
                    found = losses(_mixed(adapters, weights, "exact", {}))
                    rows.append([f"{task} {what}", _weights(weights), "0", *found])
                    if rest:
                        change = [now - then for now, then in zip(found, before, strict=True)]
                        changes.setdefault(weight, []).append(change)
    return {
        "title": "Three adapters of one base, mixed (stories260k)",
        "settings": f"rank {RANK} on all linear layers, {STEPS} steps of {BATCH}, learning rate {RATE:g}, seed 0; loss in nats a token on {TESTED} "
        "held-out examples of each task: E2E (restaurant descriptions), tinyshakespeare, SST-2 as text. Error: of what the method wanted, lost to "
        f"the rank; methods by elements at the sum of the ranks where none is said. {_negation(changes)}",
        "columns": ["mixture", "weights e2e, shakespeare, sst2", "error", *(f"loss {task}" for task in TASKS)],
        "rows": rows,
        "summary": f"base {start}, sum {rows[4][3:]}",
    }


def _data(task: str, data: Path, work: Path) -> tuple[str, str]:
    """Training and test files of a task."""
    if task == "shakespeare":
        text = (data / "text/tinyshakespeare.txt").read_text(encoding="utf-8")
        parts = [part.strip() for part in text.split("\n\n") if len(part.strip()) > 20]
        cut = len(parts) * 9 // 10
        rows = [[{"text": part} for part in parts[:cut]][:EXAMPLES], [{"text": part} for part in parts[cut:]][:TESTED]]
    elif task == "sst2":
        said = ("bad", "good")
        rows = [
            [
                {"text": f"{row['text']} It was {said[int(row['label'])]}."}
                for row in _lines(data / f"sst2/{name}.jsonl")
            ][:count]
            for name, count in (("train", EXAMPLES), ("test", TESTED))
        ]
    else:
        train = _lines(data / "e2e/train.jsonl")
        rows = [
            train[:: max(1, len(train) // EXAMPLES)][:EXAMPLES],
            _lines(data / "e2e/valid.jsonl")[:: 4672 // TESTED][:TESTED],
        ]
    files = []
    for name, part in zip(("train", "test"), rows, strict=True):
        files.append(str(work / f"{task}-{name}.jsonl"))
        Path(files[-1]).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return files[0], files[1]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _trained(base: Path, data: str, out: Path) -> weft.Adapter:
    recipe = weft.Recipe(max_steps=STEPS, batch_size=BATCH, learning_rate=RATE, max_length=192, seed=0)
    spec = weft.LoraSpec(rank=RANK, alpha=RANK, targets="all-linear")
    return weft.train(base=str(base), data=data, spec=spec, recipe=recipe, out=out, progress=False).adapter


def _mixed(
    adapters: Mapping[str, weft.Adapter], weights: Sequence[float], method: str, options: Mapping[str, Any]
) -> Any:
    chosen: list[Any] = list(weights)
    options = dict(options)
    if "first" in options:
        first = options.pop("first")
        chosen = [{r"layers\.[01]\..*": first, "default": weight} for weight in weights]
    return weft.combine(list(adapters.values()), chosen, method=method, **options)


def _apart(adapters: Mapping[str, weft.Adapter], losses: Any) -> list[Any]:
    """What adding the factors gives, ``(Σ √w B)(Σ √w A)``, and how far that is from the sum of the updates."""
    values = list(adapters.values())
    right = weft.combine(values, [0.5] * len(values))
    factors, off, size = {}, 0.0, 0.0
    for path in values[0].sites:
        items = [value.factors[path] for value in values]
        A = torch.stack([item.A * 0.5**0.5 for item in items]).sum(0)
        B = torch.stack([item.B * (item.scale * 0.5**0.5) for item in items]).sum(0)
        factors[path] = weft.Factors(A, B, 1.0)
        off += float((factors[path].delta() - right.delta(path)).square().sum())
        size += float(right.delta(path).square().sum())
    return [f"{(off / size) ** 0.5:.2%}", *losses(values[0].replace(factors=factors))]


def _searched(
    base: Path, data: Mapping[str, tuple[str, str]], adapters: Mapping[str, weft.Adapter], losses: Any, work: Path
) -> list[Any]:
    """Weights found on a few training examples of the first two tasks together, as text."""
    rows = []
    for task in TASKS[:2]:
        part = _lines(Path(data[task][0]))[-SEARCHED // 2 :]
        rows += [{"text": row.get("text") or f"{row['prompt']}{row['completion']}"} for row in part]
    mixed = weft.combine(list(adapters.values()), search=rows, base=str(base), evaluations=30, progress=False)
    weights = [round(parent["weight"], 2) for parent in mixed.provenance.parents]
    return [
        f"exact, weights found by 30 evaluations on {len(rows)} examples of e2e and shakespeare",
        _weights(weights),
        "0",
        *losses(mixed),
    ]


def _weights(weights: Sequence[float]) -> str:
    return ", ".join(f"{weight:.3g}" for weight in weights)


def _negation(changes: Mapping[float, Sequence[Sequence[float]]]) -> str:
    """How much taking a task out of the mixture of all changes its loss and those of the others."""
    said = []
    for weight, found in changes.items():
        own = [change[number] for number, change in enumerate(found)]
        others = [value for number, change in enumerate(found) for other, value in enumerate(change) if other != number]
        said.append(
            f"with weight {weight:g} in the place of {TOGETHER:g} its own loss changes by {min(own):+.3f} to {max(own):+.3f}, those of the "
            f"other tasks by {min(others):+.3f} to {max(others):+.3f}"
        )
    return f"Taking a task out of the mixture of all three: {'; '.join(said)}"
