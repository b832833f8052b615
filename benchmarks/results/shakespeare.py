"""tinyshakespeare by speaker: 32 adapters on stories260k in one pass; every speaker's held-out lines with every adapter."""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import weft
from benchmarks.results.heatmap import heatmap

__all__ = ["measure", "speeches"]

SPEAKERS, HELD_OUT, LONGEST = 32, 0.15, 128
RECIPE = {
    "max_steps": 150,
    "batch_size": 4,
    "learning_rate": 3e-3,
    "max_length": LONGEST,
    "eval_every": 25,
    "patience": 2,
    "warmup_ratio": 0.05,
    "schedule": "cosine",
}
"""As many steps for those with few speeches as for those with many; a tenth of the training speeches says which checkpoint is kept."""
SPEC = {"rank": 8, "alpha": 16, "dropout": 0.1}


def measure(shared: Path, folder: Path) -> dict[str, Any]:
    """Train, then measure 32 speakers × (32 adapters and the base)."""
    said = speeches((shared / "data/text/tinyshakespeare.txt").read_text(encoding="utf-8"))
    base = shared / "models/stories260k"
    train, test = {}, {}
    for name, texts in said.items():
        order = list(texts)
        random.Random(0).shuffle(order)
        cut = max(1, round(HELD_OUT * len(order)))
        test[name], train[name] = order[:cut], [{"text": text} for text in order[cut:]]
    with tempfile.TemporaryDirectory() as place:
        runs = weft.train_many(
            base=base,
            data=train,
            eval_data=0.1,
            spec=weft.LoraSpec(**SPEC),
            recipe=weft.Recipe(kind="text", **RECIPE),
            out=Path(place) / "runs",
        )
        losses = cross_losses(base, {name: runs[name].adapter for name in said}, test)
        report = runs.report
    names = list(said)
    own = [losses[name][name] for name in names]
    beats_base = sum(losses[name][name] < losses[name][None] for name in names)
    best = sum(min(names, key=lambda other: losses[name][other]) == name for name in names)
    pairs = [(losses[name][name], losses[name][other]) for name in names for other in names if other != name]
    better = sum(mine < other for mine, other in pairs) / len(pairs)
    matrix = [[losses[name][other] - losses[name][name] for other in names] for name in names]
    (folder / "shakespeare.svg").write_text(heatmap(names, matrix), encoding="utf-8")
    mean = {
        "own": sum(own) / len(own), "base": sum(losses[name][None] for name in names) / len(names),
        "others": sum(other for _, other in pairs) / len(pairs),
    }  # fmt: skip
    rows = [
        [name, len(said[name]), losses[name][None], losses[name][name], sum(losses[name][other] for other in names if other != name) / (len(names) - 1),
         min((other for other in names if other != name), key=lambda other: losses[name][other]),
         1 + sum(losses[name][other] < losses[name][name] for other in names if other != name)]
        for name in names
    ]  # fmt: skip
    return {
        "title": "tinyshakespeare by speaker on stories260k: 32 adapters in one pass",
        "settings": (
            f"the {SPEAKERS} speakers with most lines; {HELD_OUT:.0%} of each one's speeches held out; one adapter each, all in one pass: {SPEC}, {RECIPE}; "
            f"{report.tokens:,} tokens in {report.seconds:.0f} s on one thread. Losses are nats a token on the speaker's held-out speeches"
        ),
        "columns": [
            "speaker",
            "speeches",
            "base",
            "own adapter",
            "other adapters (mean)",
            "best other",
            "rank of the own among 32",
        ],
        "rows": rows,
        "picture": "results/shakespeare.svg",
        "caption": caption(losses),
        "summary": (
            f"own {mean['own']:.3f}, others {mean['others']:.3f}, base {mean['base']:.3f}; own beats the base for {beats_base} of {len(names)}, is the best of all "
            f"adapters for {best} of {len(names)}, and beats {better:.1%} of the others"
        ),
        "losses": {
            name: {other or "(base)": round(value, 5) for other, value in found.items()}
            for name, found in losses.items()
        },
    }


def caption(losses: Mapping[str, Mapping[Any, float]]) -> str:
    """What the picture shows, and how the diagonal does where the amount of data is taken out.

    An adapter with more lines is better for everybody: the mean over speakers of each adapter, and that over adapters of each speaker, are taken off.
    """
    names = list(losses)
    table = torch.tensor([[losses[name][other] for other in names] for name in names], dtype=torch.float64)
    rest = table - table.mean(0, keepdim=True) - table.mean(1, keepdim=True) + table.mean()
    itself = torch.arange(len(names))
    plain, fair = (int((found.argmin(1) == itself).sum()) for found in (table, rest))
    return (
        "Row: whose speeches; column: whose adapter; colour: loss above that of the own adapter. The diagonal is the own adapter. It is the best of all for "
        f"{plain} of {len(names)} speakers: adapters of speakers with many lines are better for everybody. With each adapter's and each speaker's mean taken off, "
        f"it is for {fair}."
    )


def speeches(text: str) -> dict[str, list[str]]:
    """Speeches by speaker, of the speakers with most lines, most first."""
    said: dict[str, list[str]] = {}
    for block in re.split(r"\n\s*\n", text.strip()):
        heading, _, speech = block.partition("\n")
        if heading.endswith(":") and speech.strip():
            said.setdefault(heading[:-1].strip(), []).append(speech.strip())
    most = sorted(said, key=lambda name: -sum(speech.count("\n") + 1 for speech in said[name]))[:SPEAKERS]
    return {name: said[name] for name in most}


def cross_losses(
    base: Path, adapters: dict[str, Any], test: dict[str, list[str]]
) -> dict[str, dict[str | None, float]]:
    """Loss of each speaker's held-out speeches with each adapter (None: the base), in mixed batches."""
    from weft.data import encode, load_examples
    from weft.many.engine import Engine, Settings
    from weft.many.pieces import Piece

    model, tokenizer = weft.load_base(base)
    found: dict[str, dict[str | None, float]] = {name: {} for name in test}
    with weft.attach(model, {}) as bank, torch.no_grad():
        for name, adapter in adapters.items():
            bank.load(name, adapter)
        engine = Engine(model, bank, tokenizer, Settings(budget=2048))
        encoded = {
            name: encode(load_examples([{"text": text} for text in texts], kind="text"), tokenizer, max_length=LONGEST)
            for name, texts in test.items()
        }
        for name, features in encoded.items():
            pieces = [Piece(key, [features[index] for index in range(len(features))]) for key in (None, *adapters)]
            parts = [
                Piece(piece.key, piece.features[start : start + 16])
                for piece in pieces
                for start in range(0, piece.rows, 16)
            ]
            totals: dict[str | None, list[float]] = {piece.key: [0.0, 0.0] for piece in pieces}
            for part, measured in zip(parts, engine.measure(parts), strict=True):
                totals[part.key][0] += float(measured.sums.sum())
                totals[part.key][1] += float(measured.counts.sum())
            found[name] = {key: total / count for key, (total, count) in totals.items()}
    return found
