"""Training on texts and images: a run, resumed; retrieval; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import weft
from tests.unit.models.test_two_tower import Small, Words
from weft import LoraSpec, Recipe
from weft.data.pairs import load_pairs
from weft.errors import BaseError, DataError, RecipeError
from weft.train.pair_evaluation import evaluate_pairs
from weft.train.retrieval import recalls, spread


class Letters:
    """A tokenizer of letters."""

    pad_token_id = 0
    model_max_length = 16

    def __call__(self, text: str, **settings: Any) -> dict[str, list[int]]:
        return {"input_ids": [1 + ord(letter) % 19 for letter in text][:16]}


COLOURS = {"red": (255, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def rows(count: int) -> list[dict[str, Any]]:
    names = list(COLOURS)
    found = []
    for index in range(count):
        name = names[index % 4]
        noise = np.random.default_rng(index).integers(-20, 20, (6, 6, 3))
        image = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
        found.append({"image": image, "text": name, "label": name})
    return found


def bases() -> dict[str, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return {"text_model": (Words(), Letters()), "vision_model": (Small(), None)}


RECIPE = Recipe(
    kind="contrastive", batch_size=8, max_steps=30, eval_every=10, learning_rate=1e-2, two_tower={"dim": 8, "image_size": 6, "augment": ["flip"]},
    device="cpu", spec=LoraSpec(rank=2), log_every=5,
)  # fmt: skip


def fit(out: Path, recipe: Recipe = RECIPE, **rest: Any) -> weft.Run:
    return weft.train(base=bases(), data=rows(32), eval_data=rows(8), recipe=recipe, out=out, progress=False, **rest)


def test_a_run_learns_which_text_belongs_to_which_image(tmp_path: Path) -> None:
    run = fit(tmp_path / "run")
    assert run.adapter.towers == ("text_model", "vision_model")
    assert run.report.adapter["recall_at_1"] > 0.7
    logged = next(row for row in run.log if "loss" in row)
    assert {"grad_norm_text_model", "grad_norm_vision_model", "grad_norm_heads", "spread_text", "spread_image"} <= set(
        logged
    )
    found = evaluate_pairs(run.path, rows(8), base=bases(), progress=False)
    assert found.adapter is not None
    assert found.adapter["image_to_text_r1"] == pytest.approx(run.report.adapter["image_to_text_r1"])
    assert found.adapter["zero_shot_accuracy"] >= 0.25
    assert "recall_at_1" in found.text()


def test_a_stopped_run_goes_on_to_the_same_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.train import pair_trainer

    whole = fit(tmp_path / "whole")
    step = pair_trainer.PairTrainer.training_step

    def dying(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 14:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pair_trainer.PairTrainer, "training_step", dying)
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "broken")
    again = weft.train(
        base=bases(), data=rows(32), eval_data=rows(8), out=tmp_path / "broken", resume=True, progress=False
    )
    assert again.adapter.digest == whole.adapter.digest


def test_towers_have_rates_of_their_own_or_none(tmp_path: Path) -> None:
    section = {
        "dim": 8,
        "image_size": 6,
        "text_model": {"frozen": True},
        "vision_model": {"learning_rate": 1e-6},
        "loss": "sigmoid",
    }
    run = fit(tmp_path / "run", RECIPE.replace(two_tower=section, max_steps=4, eval_every=4))
    assert run.adapter.towers == ("vision_model",)
    assert max(float(item.B.abs().max()) for item in run.adapter.factors.values()) < 1e-5
    assert not any("grad_norm_text_model" in row for row in run.log)


def test_a_head_over_both_classifies(tmp_path: Path) -> None:
    section = {"dim": 8, "image_size": 6, "fusion": "gated", "modality_dropout": 0.1}
    run = fit(
        tmp_path / "run",
        RECIPE.replace(kind="fused", two_tower=section, max_steps=60, eval_every=20, learning_rate=3e-2),
    )
    assert run.report.adapter["accuracy"] > 0.7
    found = evaluate_pairs(run.path, rows(8), base=bases(), progress=False)
    assert found.adapter is not None
    assert found.adapter["accuracy"] == run.report.adapter["accuracy"]


def test_recall_is_over_different_texts_and_images_and_counts_ties_as_wrong() -> None:
    words = nn.functional.normalize(torch.randn(3, 5), dim=1)
    text, image = words[[0, 1, 1, 2]], words[[0, 1, 2, 2]]
    found = recalls(text, image, [0, 1, 1, 2], [0, 1, 2, 3], at=(1,))
    assert found["image_to_text_r1"] == pytest.approx(3 / 4), "the third image looks like the other text"
    assert found["text_to_image_r1"] == pytest.approx(2 / 3), "the last text has a wrong image that is as near"
    alike = torch.ones(4, 5) / 5**0.5
    assert recalls(alike, alike, [0, 1, 2, 3], [0, 1, 2, 3], at=(1,))["recall_at_1"] == 0
    assert spread(alike) == pytest.approx(0, abs=1e-6)


def test_classes_that_were_not_learned_are_evaluated(tmp_path: Path) -> None:
    few = [row for row in rows(32) if row["label"] != "white"]
    run = weft.train(base=bases(), data=few, eval_data=rows(8), recipe=RECIPE.replace(max_steps=2, eval_every=2), out=tmp_path / "run",
                     progress=False)  # fmt: skip
    found = evaluate_pairs(run.path, rows(8), base=bases(), progress=False)
    assert found.adapter is not None
    assert "zero_shot_accuracy" in found.adapter


def test_images_that_cant_be_read_are_counted(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    lines = [{"image": name, "text": "a"} for name in ("good.png", "bad.png", "../good.png", "gone.png")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = load_pairs(tmp_path / "data.jsonl")
    assert len(pairs) == 1
    assert "3 of 4 pairs were left out" in pairs.notes[-1]
    with pytest.raises(DataError, match="none of 1 pairs"):
        load_pairs([lines[1]], tmp_path)
    with pytest.raises(DataError, match="'image'"):
        load_pairs([{"picture": "good.png", "text": "a"}], tmp_path)


def test_what_cant_be_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(BaseError, match="two towers"):
        weft.train(data=rows(4), recipe=RECIPE, out=tmp_path / "a")
    with pytest.raises(RecipeError, match="batch_size=1"):
        fit(tmp_path / "b", RECIPE.replace(batch_size=1))
    with pytest.raises(RecipeError, match="losss"):
        RECIPE.replace(two_tower={"losss": "sigmoid"})
    with pytest.raises(RecipeError, match="two_tower is for"):
        Recipe(two_tower={"dim": 3})
    assert RECIPE.set(["two_tower.text_model.learning_rate=3e-4"]).two_tower.text_model.learning_rate == 3e-4  # type: ignore[union-attr]
    assert not (tmp_path / "a").exists()
    text = weft.load_base(None, task="encoder")
    with pytest.raises(BaseError, match="each other's place"):
        weft.train(
            base={"text_model": text, "vision_model": (text[0], None)}, data=rows(4), recipe=RECIPE, out=tmp_path / "c"
        )


def test_odd_images_are_counted_and_what_does_not_fit_is_decoded_again(tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(np.random.randint(0, 256, (6, 6, 4), dtype=np.uint8)).save(tmp_path / "alpha.png")
    Image.fromarray(np.random.randint(0, 256, (6, 6, 3), dtype=np.uint8)).convert("CMYK").save(tmp_path / "cmyk.jpg")
    (tmp_path / "empty.png").write_bytes(b"")
    rows = [{"image": name, "text": name} for name in ("alpha.png", "cmyk.jpg", "empty.png", "alpha.png")]
    pairs = load_pairs(rows, tmp_path, cache_bytes=3 * 36)
    assert len(pairs) == 3
    assert [note.partition(":")[0] for note in pairs.notes[1:]] == ["images transparent", "images CMYK"]
    assert pairs.images.album.decoded == 2
    assert np.array_equal(pairs.images[1], pairs.images[1])
    assert pairs.images.album.decoded == 4, "the second one did not fit"
    again = load_pairs(rows, tmp_path)
    assert again.digest == pairs.digest
    Image.fromarray(np.random.randint(0, 256, (6, 6, 3), dtype=np.uint8)).save(tmp_path / "alpha.png")
    assert load_pairs(rows, tmp_path).digest != pairs.digest, "another image under the same name is other data"
