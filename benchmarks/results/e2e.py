"""stories260k on the E2E challenge, through the command line only."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["measure", "weft"]

SETTINGS = [
    "rank=16", "learning_rate=5e-3", "epochs=1", "batch_size=32", "max_length=384", "seed=0",
    "targets=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj,lm_head]",
]  # fmt: skip
"""The head is adapted because this base never learned its end token; weft says so when it is not."""
EXAMPLES, TESTED = 12000, 300


def weft(*arguments: str) -> str:
    """Standard output of one call of the command line."""
    done = subprocess.run([sys.executable, "-m", "weft", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"weft {' '.join(arguments)}\n{done.stderr}")
    return done.stdout


def measure(shared: Path, folder: Path) -> dict[str, Any]:
    """Train on a part of the training set, evaluate base and adapter on test prompts with all their references."""
    base, data = str(shared / "models/stories260k"), shared / "data/e2e"
    with tempfile.TemporaryDirectory() as work:
        train = Path(work) / "train.jsonl"
        lines = (data / "train.jsonl").read_text(encoding="utf-8").splitlines()
        train.write_text("\n".join(lines[:: max(1, len(lines) // EXAMPLES)][:EXAMPLES]) + "\n", encoding="utf-8")
        valid = Path(work) / "valid.jsonl"
        valid.write_text(
            "\n".join((data / "valid.jsonl").read_text(encoding="utf-8").splitlines()[::10]) + "\n", encoding="utf-8"
        )
        out = str(Path(work) / "run")
        options = [part for setting in SETTINGS for part in ("--set", setting)]
        weft("train", "--base", base, "--data", str(train), "--eval", str(valid), "--out", out, "--quiet", *options)
        said = weft(
            "eval",
            "--base",
            base,
            "--adapter",
            out,
            "--data",
            str(data / "test.jsonl"),
            "--limit",
            str(TESTED),
            "--json",
            "--quiet",
        )
    found = json.loads(said)
    before, after = found["base"], found["adapter"]
    return {
        "title": "stories260k on E2E (restaurant descriptions), by the command line",
        "settings": f"{EXAMPLES} training examples, {', '.join(SETTINGS)}; {TESTED} generated test prompts, all references",
        "columns": ["", "base", "adapter"],
        "rows": [[name, before.get(name), after.get(name)] for name in after],
        "examples": found.get("examples", [])[:3],
        "summary": ", ".join(f"{name} {before[name]:.3g} -> {after[name]:.3g}" for name in after if name in before),
    }
