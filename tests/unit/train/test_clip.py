"""CLIP and SigLIP through the doors of two towers: trained, evaluated, saved, loaded, each tower alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import weft
from tests.parity.test_images import both_towers
from tests.unit.train.test_image_text import tokenizer
from weft.errors import DataError
from weft.train.pair_evaluation import evaluate_pairs


def directory(kind: str, folder: Path) -> Path:
    """A base as the hub has it."""
    model = both_towers(kind)
    model.text_model.embeddings.token_embedding = torch.nn.Embedding(300, 16)
    model.config.text_config.vocab_size = 300
    model.config.text_config.eos_token_id = 2
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    if kind == "clip":
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor

        Processor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(folder)
    else:
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil as Processor

        Processor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Two colours, and a file of what they are called."""
    lines = []
    for index in range(16):
        name, colour = (("red", (220, 20, 20)), ("blue", (20, 20, 220)))[index % 2]
        noise = np.random.default_rng(index).integers(-15, 15, (10, 12, 3))
        Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(tmp_path / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.png", "text": name, "label": name}) + "\n")
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    return tmp_path / "pairs.jsonl"


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_whole_way(kind: str, pairs: Path, tmp_path: Path) -> None:
    base = directory(kind, tmp_path / "base")
    recipe = weft.Recipe(
        kind="contrastive", spec=weft.LoraSpec(rank=2, targets=["q_proj", "v_proj"]), max_steps=12, batch_size=8, learning_rate=3e-2,
        eval_every=6, device="cpu", two_tower={"loss": "softmax" if kind == "clip" else "sigmoid"},  # type: ignore[arg-type]
    )  # fmt: skip
    run = weft.train(base=base, data=pairs, eval_data=pairs, recipe=recipe, out=tmp_path / "run", progress=False)
    assert run.adapter.towers == ("text_model", "vision_model")
    assert run.report.adapter["loss"] < run.report.base["loss"]
    with pytest.raises(DataError, match="shorter template"):
        evaluate_pairs(run.path, pairs, progress=False)
    found = evaluate_pairs(run.path, pairs, template="{}", progress=False)
    assert found.adapter is not None
    assert found.adapter["recall_at_1"] == pytest.approx(run.report.adapter["recall_at_1"])
    assert "zero_shot_accuracy" in found.adapter
    adapter = weft.load(run.path)
    assert adapter.digest == run.adapter.digest
    model, _ = weft.load_base(str(base), task="auto")
    with weft.attach(model.vision_model, {}) as bank:
        bank.load("half", adapter.tower("vision_model"))
        assert all(path in dict(model.vision_model.named_modules()) for path in bank.adapter("half").factors)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_images_are_prepared_as_the_bases_own_processor_does(kind: str, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    from weft.train.pair_inputs import open_towers, transform_of

    base = directory(kind, tmp_path / "base")
    _, processor = open_towers(weft.Recipe(kind="contrastive"), str(base), None, None)
    image = Image.fromarray(np.random.randint(0, 256, (24, 24, 3), dtype=np.uint8))
    wanted = AutoImageProcessor.from_pretrained(base)(images=[image], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(transform_of(processor)(image), wanted, rtol=0, atol=1e-5)
