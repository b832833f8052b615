"""Chinese medical questions in small: the embedded base, which knows no Chinese, through the command line."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.results.e2e import weft

__all__ = ["measure"]

SETTINGS = ["rank=16", "epochs=1", "batch_size=8", "max_length=256", "seed=0"]
EXAMPLES, TESTED = 1500, 100


def measure(shared: Path, folder: Path) -> dict[str, Any]:
    """Train on a part, evaluate the loss on held-out questions."""
    data = shared / "data/medical_zh"
    with tempfile.TemporaryDirectory() as work:
        parts = {}
        for name, count in (("train", EXAMPLES), ("valid", TESTED)):
            lines = (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
            parts[name] = Path(work) / f"{name}.jsonl"
            parts[name].write_text("\n".join(lines) + "\n", encoding="utf-8")
        out = str(Path(work) / "run")
        options = [part for setting in SETTINGS for part in ("--set", setting)]
        weft("train", "--data", str(parts["train"]), "--eval", str(parts["valid"]), "--out", out, "--quiet", *options)
        found = json.loads(
            weft(
                "eval",
                "--adapter",
                out,
                "--data",
                str(parts["valid"]),
                "--limit",
                "20",
                "--max-new-tokens",
                "48",
                "--json",
                "--quiet",
            )
        )
    before, after = found["base"], found["adapter"]
    return {
        "title": "The embedded base on Chinese medical questions (examples/medical_zh in small)",
        "settings": f"{EXAMPLES} training examples, {', '.join(SETTINGS)}; {TESTED} held-out questions. The base has seen no Chinese: "
        "this shows that the way works, not what a real model reaches",
        "columns": ["", "base", "adapter"],
        "rows": [[name, before.get(name), after.get(name)] for name in after],
        "summary": ", ".join(f"{name} {before[name]:.3g} -> {after[name]:.3g}" for name in after if name in before),
    }
