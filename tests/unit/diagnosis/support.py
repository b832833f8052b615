"""What the tests of diagnosis share: two tasks, recipes that are spoilt in one way each, a base in float16."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["GENERAL", "GOOD", "HELD", "KNOWN", "KNOWN_HELD", "SPOILT", "STEEP", "TRAIN", "given_for", "halved", "words"]

Rows = list[dict[str, str]]


def words(count: int, seed: int, letters: str = "abcdefgh") -> Rows:
    """Prompts, each once, and the first letter of each, three times."""
    generator = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        word = "".join(generator.choice(letters) for _ in range(generator.randint(3, 8)))
        found[f"{word}{seed}?"] = word[0] * 3
    return [{"prompt": prompt, "completion": answer} for prompt, answer in found.items()]


def lasts(rows: Rows) -> Rows:
    """Another task: the last letter, twice."""
    return [{"prompt": row["prompt"], "completion": row["prompt"][-3] * 2} for row in rows]


KNOWN, KNOWN_HELD = words(160, 2), words(24, 3)
"""What the base can do already: here a loss can explode, and be forgotten."""
TRAIN, HELD = lasts(KNOWN), lasts(KNOWN_HELD)
GOOD: dict[str, Any] = {
    "max_steps": 40,
    "learning_rate": 2e-2,
    "rank": 4,
    "batch_size": 8,
    "eval_batch_size": 24,
    "clip": 5.0,
}
GENERAL = "known.jsonl"
"""Stands for a file with what the base knows."""
STEEP: dict[str, Any] = {"learning_rate": 4.0, "warmup_steps": 35, "clip": 0.0, "patience": 0}

SPOILT: dict[str, dict[str, Any]] = {
    "healthy": {},
    "explosion": STEEP | {"best": False, "known": True},
    "not-finite": {"learning_rate": 1e25, "optimizer": "sgd", "clip": 0.0, "warmup_steps": 20},
    "low rate": {"learning_rate": 1e-7},
    "high rate": {"learning_rate": 0.7, "patience": 0},
    "overfitting": {"max_steps": 100, "best": False, "patience": 0, "rank": 8},
    "clipped": {"clip": 1e-3},
    "no warm-up": {"warmup_steps": 0, "learning_rate": 0.2, "known": True},
    "rank 2": {"rank": 2, "max_steps": 20, "init": "orthogonal"},
    "rank 32": {"rank": 32},
    "one site": {"alpha_pattern": {"model.layers.0.self_attn.v_proj": 1024.0}, "max_steps": 20},
    "forgetting": {"general": GENERAL},
    "swinging": {
        "optimizer": "sgd",
        "learning_rate": 1.0,
        "clip": 0.0,
        "schedule": "constant",
        "best": False,
        "eval_every": 4,
        "patience": 0,
    },
    "float16": {"dtype": "float16", "max_steps": 12},
}


def given_for(name: str, folder: Path) -> tuple[Rows, Rows, dict[str, Any]]:
    """Training and evaluation data of a run of `SPOILT`, and the fields of its recipe."""
    fields = GOOD | SPOILT[name]
    known = fields.pop("known", False)
    if fields.get("general") == GENERAL:
        fields["general"] = str(folder / GENERAL)
        (folder / GENERAL).write_text("".join(json.dumps(row) + "\n" for row in words(48, 4)))
    data = KNOWN if known else TRAIN
    return data[:12] if name == "overfitting" else data, KNOWN_HELD if known else HELD, fields


def halved(base: tuple[nn.Module, Any]) -> tuple[nn.Module, Any]:
    """The base in float16, with a loss that is spread so thin that gradients fall under its smallest number."""
    model = copy.deepcopy(base[0]).half()
    with torch.no_grad():  # the same function, with gradients of the last layers small: logits × 3e-7
        model.lm_head.weight *= 3e-7
    return model, base[1]
