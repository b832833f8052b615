"""False alarms: healthy trainings of many kinds, and what the rules say about them; beside them spoilt ones, where they must say it.

Healthy is what ends with a better evaluation than its base, by learning rates at or below the rule's. Each run is short: what is counted is
findings, not quality.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import weft
from benchmarks.results.sst2 import base_path

__all__ = ["healthy", "measure"]

Run = tuple[str, dict[str, Any], dict[str, Any]]
"""Name, arguments of `weft.train`, fields of recipe and spec."""

SHORT: dict[str, Any] = {
    "max_steps": 24,
    "batch_size": 8,
    "eval_batch_size": 32,
    "rank": 8,
    "alpha": 32,
    "max_length": 256,
}


def measure(shared: Path, folder: Path) -> dict[str, Any]:
    """Train all of them and count. Runs that an earlier call made are not made again."""
    kept = folder / "alarms.json"
    before = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    found: dict[str, list[dict[str, Any]]] = dict(before.get("found", {}))
    for name, given, fields in healthy(shared):
        if name not in found:
            found[name] = _one(given, fields)
            print(f"{name}: {', '.join(f['severity'] + ' ' + f['rule'] for f in found[name]) or 'nothing'}", flush=True)
            kept.write_text(json.dumps(_figures(found), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return _figures(found)


def healthy(shared: Path) -> Iterator[Run]:
    """The runs, at least fifty."""
    stories = shared / "models/stories260k"
    kinds = {
        "completion (e2e)": {"base": stories, **_rows(shared / "data/e2e/train.jsonl", 1600)},
        "reasoning (gsm8k)": {"base": stories, **_rows(shared / "data/gsm8k/train.jsonl", 300, 330)},
        "text (shakespeare)": {"base": stories, **_texts(shared / "data/text/tinyshakespeare.txt", 900)},
        "text (wikitext)": {"base": stories, **_texts(shared / "data/text/wikitext2_valid.txt", 600)},
        "dialogues (e2e)": {"base": stories, **_chats(shared / "data/e2e/train.jsonl", 900)},
        "Chinese (medical)": {"base": stories, **_rows(shared / "data/medical_zh/train.jsonl", 200, 70)},
    }  # fmt: skip
    for name, given in kinds.items():
        for rank, seed in ((2, 0), (8, 1), (32, 2)):
            yield f"{name}, rank {rank}", given, {"rank": rank, "seed": seed}
    plain = kinds["completion (e2e)"]
    for share in (0.1, 0.3, 0.6):
        yield f"learning rate × {share}", plain, {"learning_rate": share * 0.011}
    for schedule in ("linear", "constant", "inverse_sqrt", "polynomial"):
        yield f"schedule {schedule}", plain, {"schedule": schedule}
    changes: dict[str, dict[str, Any]] = {
        "packed": {"batching": "packed"}, "random batches": {"batching": "random"}, "batch 2": {"batch_size": 2}, "batch 32": {"batch_size": 32, "max_steps": 12},
        "accumulation 4": {"accumulation": 4, "batch_size": 2}, "DoRA": {"dora": True}, "rsLoRA": {"rslora": True, "alpha": 8}, "dropout 0.1": {"dropout": 0.1},
        "LoRA+": {"lora_plus_ratio": 4.0, "learning_rate": 3e-3}, "no weight decay": {"weight_decay": 0.0}, "clip 0.3": {"clip": 0.3}, "no clip": {"clip": 0.0},
        "PiSSA": {"init": "pissa", "learning_rate": 1e-3}, "OLoRA": {"init": "olora", "learning_rate": 1e-3}, "EVA": {"init": "eva"}, "orthogonal": {"init": "orthogonal"},
        "growth": {"adaptive": {"kind": "grow", "max_rank": 16}, "rank": 2}, "budget": {"adaptive": {"kind": "budget", "target_rank": 4}, "rank": 8},
        "attention only": {"targets": ["q_proj", "v_proj"]}, "head too": {"targets": ["q_proj", "v_proj", "lm_head"]}, "bfloat16": {"dtype": "bfloat16"},
        "long, 3 epochs of 200": {"max_steps": None, "epochs": 3}, "checkpointing": {"gradient_checkpointing": True}, "loss in parts": {"loss_chunk": 256},
        "adafactor": {"optimizer": "adafactor"}, "prompts short": {"max_length": 192},
    }  # fmt: skip
    for name, fields in changes.items():
        given = {"base": stories, **_rows(shared / "data/e2e/train.jsonl", 200)} if name.startswith("long") else plain
        yield name, given, fields
    yield from _classes(shared)
    yield from _images(shared)


def _classes(shared: Path) -> Iterator[Run]:
    rows = _read(shared / "data/sst2/train.jsonl", 1200, seed=3)
    rows = [{"text": row["text"], "label": "good" if row["label"] else "bad"} for row in rows]
    given = {"base": base_path(), "data": rows[:1000], "eval_data": rows[1000:]}
    for rank, rate in ((4, 2e-3), (16, 1e-3)):
        yield (
            f"classification (sst2), rank {rank}", given,
            {"rank": rank, "learning_rate": rate, "targets": ["query", "value"], "max_length": 48},
        )  # fmt: skip


def _images(shared: Path) -> Iterator[Run]:
    import numpy as np

    arrays = np.load(shared / "data/cifar10_jpeg/cifar10_jpeg.npz")
    names = [f"class {number}" for number in range(10)]
    parts = {
        part: [{"image": image, "label": names[int(label)]} for image, label in zip(arrays[f"{part}_images"][:count], arrays[f"{part}_labels"][:count], strict=True)]
        for part, count in (("train", 600), ("test", 200))
    }  # fmt: skip
    given = {"base": shared / "models/resnet20_cifar10", "data": parts["train"], "eval_data": parts["test"]}
    for rank in (2, 8):
        yield (
            f"images (CNN), rank {rank}",
            given,
            {"rank": rank, "kind": "classify-images", "learning_rate": 1e-3, "targets": ["conv1", "conv2"]},
        )


def _one(given: dict[str, Any], fields: dict[str, Any]) -> list[dict[str, Any]]:
    values = {name: value for name, value in (SHORT | fields).items() if value is not None}
    values.setdefault("learning_rate", None)
    if values["learning_rate"] is None:
        del values["learning_rate"]
    with tempfile.TemporaryDirectory() as out:
        run = weft.train(**given, recipe=weft.Recipe.from_dict(values), out=Path(out) / "run", progress=False)
        said = weft.diagnose(run.path)
        assert run.report.adapter["loss"] < run.report.base["loss"], "a run that doesn't learn is not healthy"
    return [found.to_dict() for found in said]


def _figures(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    def count(severity: str) -> int:
        return sum(any(f["severity"] == severity for f in said) for said in found.values())

    rules = Counter((item["rule"], item["severity"]) for said in found.values() for item in said)
    rows = [
        [rule, severity, number, f"{number / max(1, len(found)):.0%}"]
        for (rule, severity), number in sorted(rules.items(), key=lambda item: -item[1])
    ]
    rows += [
        ["runs with a finding of high severity", "high", count("high"), f"{count('high') / max(1, len(found)):.0%}"]
    ]
    return {
        "title": "False alarms: what weft doctor says about healthy runs",
        "settings": (
            f"{len(found)} trainings of stories260k, all-MiniLM-L6-v2 and ResNet-20 on completions, dialogues, texts, classes and images, 20 to 75 steps each; "
            "ranks, learning rates up to the rule's, schedules, batchings, initialisations, DoRA, rsLoRA, dropout, adaptive ranks. All of them end "
            "with a better evaluation than their base"
        ),
        "columns": ["rule", "severity", "runs", "share"],
        "rows": rows,
        "summary": f"{len(found)} healthy runs: {count('high')} with a finding of high severity, {count('medium')} of medium, {count('low')} of low",
        "found": found,
    }  # fmt: skip


def _read(path: Path, count: int, seed: int = 0) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as handle:
        rows = [json.loads(line) for line in itertools.islice(handle, 20000)]
    random.Random(seed).shuffle(rows)
    return rows[:count]


def _parts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Nine tenths to learn; nothing that is asked twice in both."""
    cut = len(rows) * 9 // 10
    train, rest = rows[:cut], rows[cut:]
    asked = {json.dumps(next(iter(row.values()))) for row in train}
    return {"data": train, "eval_data": [row for row in rest if json.dumps(next(iter(row.values()))) not in asked][:32]}


def _rows(path: Path, count: int, longest: int = 400) -> dict[str, Any]:
    """Examples of at most so many characters: what is cut is not healthy."""
    seen: dict[str, dict[str, Any]] = {}
    for row in _read(path, 20000):
        if len(row["prompt"]) + len(row["completion"]) > longest:
            continue
        seen.setdefault(str(row["prompt"]), {"prompt": row["prompt"], "completion": row["completion"]})
    return _parts(list(seen.values())[:count])


def _chats(path: Path, count: int) -> dict[str, Any]:
    parts = _rows(path, count)
    return {
        role: [{"text": f"User: {row['prompt']}\nAssistant: {row['completion']}"} for row in rows]
        for role, rows in parts.items()
    }


def _texts(path: Path, count: int) -> dict[str, Any]:
    pieces = [
        piece.strip() for piece in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")) if len(piece.strip()) > 60
    ]
    rows = [{"text": piece[:400]} for piece in dict.fromkeys(pieces)]
    random.Random(1).shuffle(rows)
    return _parts(rows[:count])
