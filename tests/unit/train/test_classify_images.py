"""Adapters for image classifiers: trained, resumed and evaluated through the same doors as text."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import weft
from weft.errors import BaseError, DataError, RecipeError
from weft.models.plain_vision import CifarResNet, load_plain
from weft.train.run import Folder

CLASSES = ("dark", "light")


@pytest.fixture
def images(tmp_path):
    """A folder of 24 images, 12 dark and 12 light ones."""
    for index, name in enumerate(CLASSES):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for number in range(12):
            values = np.random.randint(0, 120, (10, 10, 3)) + 130 * index
            Image.fromarray(values.astype(np.uint8)).save(folder / f"{number:02}.png")
    return tmp_path / "images"


@pytest.fixture
def plain(tmp_path):
    """A plain CNN of two classes, in a folder without config.json."""
    model = CifarResNet(1, 4, 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bn" in name and name.endswith("bias"):
                parameter.fill_(0.5)  # no unit is dead for all images
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    save_file(
        model.state_dict(),
        (tmp_path / "plain" / "model.safetensors").parent.mkdir() or tmp_path / "plain/model.safetensors",
    )
    return tmp_path / "plain"


def vit(folder):
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        id2label={0: "light", 1: "dark"}, label2id={"light": 0, "dark": 1},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def resnet(folder):
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=2)
    ResNetForImageClassification(config).save_pretrained(folder)
    return folder


def recipe(**changes):
    given = {"max_steps": 6, "batch_size": 4, "eval_every": 3, "learning_rate": 2e-2, "targets": "default", "rank": 2}
    return weft.Recipe().replace(**{**given, **changes})


def train(base, images, out, **changes):
    return weft.train(
        base=str(base), data=str(images), eval_data=0.25, recipe=recipe(**changes), out=out, progress=False
    )


def test_a_plain_cnn_is_trained_and_its_statistics_stay(plain, images, tmp_path):
    before = load_plain(plain).state_dict()
    run = train(plain, images, tmp_path / "run", vision={"augment": ["flip", "shift"]})
    assert run.report.adapter.keys() == {"loss", "accuracy", "macro_f1"}
    assert run.report.data["train"]["examples"] + run.report.data["eval"]["examples"] == 24
    assert any("running statistics" in note for note in run.report.notes)
    assert set(run.adapter.modules) == {"linear"}
    assert all("conv" in path for path in run.adapter.factors)
    assert all(bool((value == before[name]).all()) for name, value in load_plain(plain).state_dict().items())
    found = weft.evaluate(base=str(plain), adapter=run.path / "adapter", data=str(images), progress=False)
    assert found.count == 24


@pytest.mark.parametrize("make", [None, resnet])
def test_all_linear_of_a_network_of_convolutions_is_its_usual_sites(make, plain, images, tmp_path):
    base = plain if make is None else make(tmp_path / "base")
    run = train(base, images, tmp_path / "run", max_steps=1, eval_every=None, targets="all-linear")
    assert run.adapter.factors
    assert all("conv" in path for path in run.adapter.factors)


def test_the_head_can_stay(plain, images, tmp_path):
    run = train(plain, images, tmp_path / "run", max_steps=1, vision={"head": "keep"})
    assert not run.adapter.modules


@pytest.mark.parametrize("make", [vit, resnet])
def test_models_of_transformers(make, images, tmp_path):
    base = make(tmp_path / "base")
    run = train(base, images, tmp_path / "run", max_steps=2)
    assert run.adapter.modules
    assert run.adapter.factors
    if make is vit:  # the head's own order
        assert run.report.data["train"]["labels"] == ["light", "dark"]
    else:
        assert any("no image processor" in note for note in run.report.notes)
    again = weft.evaluate(base=str(base), adapter=run.path, data=str(images), progress=False)
    assert set(again.adapter) == {"loss", "accuracy", "macro_f1"}


def test_a_resumed_run_comes_to_the_same_adapter(plain, images, tmp_path):
    settings = {"vision": {"augment": ["flip", "crop"]}, "best": False, "save_every": 3}
    whole = train(plain, images, tmp_path / "whole", **settings)
    train(plain, images, tmp_path / "cut", **settings)
    folder = Folder(tmp_path / "cut")
    for path in (folder.adapter / "adapter_model.safetensors", folder.root / "report.json"):
        path.unlink()
    newest = sorted(folder.checkpoints.iterdir(), key=lambda path: path.name)[-1]
    assert newest.name.endswith("6")
    for path in sorted(newest.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    newest.rmdir()
    again = weft.train(out=tmp_path / "cut", resume=True, progress=False)
    for path, item in whole.adapter.factors.items():
        torch.testing.assert_close(again.adapter.factors[path].B, item.B, rtol=0, atol=0)


def test_what_is_broken_is_counted_and_nothing_leaves_the_folder(plain, images, tmp_path):
    (images / "dark" / "00.png").write_bytes(b"")
    (images / "dark" / "01.png").write_bytes((images / "dark" / "01.png").read_bytes()[:60])
    rows = [{"image": f"{name}/{number:02}.png", "label": name} for name in CLASSES for number in range(12)]
    rows += [{"image": "../secret.png", "label": "dark"}, {"image": None, "label": "dark"}]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    run = weft.train(
        base=str(plain),
        data=str(data),
        images=images,
        recipe=recipe(max_steps=1, eval_every=None),
        out=tmp_path / "run",
        progress=False,
    )
    account = run.report.data["train"]["account"]
    assert account["kept"] == 22
    assert account["broken"]["count"] == 4
    assert account["broken"]["first"] == [1, 2, 25, 26]
    assert "can't be read 4" in run.report.data["train"]["summary"]
    with pytest.raises(DataError, match="--images"):  # paths begin in the data's folder
        weft.train(base=str(plain), data=str(data), recipe=recipe(), out=tmp_path / "none", progress=False)


def test_mistakes_are_refused_before_anything_starts(plain, images, tmp_path):
    with pytest.raises(BaseError, match="vision model"):
        weft.train(data=str(images), recipe=recipe(), out=tmp_path / "a", progress=False)
    for section in ({"augment": ["flop"]}, {"size": 0}, {"heads": 1}, {"language": False}, {"cache_mb": -1}):
        with pytest.raises(RecipeError, match="vision"):
            recipe(vision=section)
    with pytest.raises(DataError, match="--task"):
        weft.train(data=[{"text": "a"}], images=images, out=tmp_path / "b", progress=False)
    save_file({"a.weight": torch.zeros(2, 2)}, plain / "model.safetensors")
    with pytest.raises(BaseError, match="no plain vision model"):
        train(plain, images, tmp_path / "c")


def test_a_folder_an_array_and_a_list_are_one_data_set(images, tmp_path):
    from weft.data import load_examples
    from weft.data.pictures import encode_images

    folder = encode_images(load_examples(str(images)))
    pixels = [np.asarray(folder[index]["image"]) for index in range(24)]
    np.savez(
        tmp_path / "a.npz", train_images=np.stack(pixels), train_labels=folder.classes, class_names=np.array(CLASSES)
    )
    names = [CLASSES[index] for index in folder.classes]
    listed = [
        {"image": (images / name / f"{index % 12:02}.png").read_bytes(), "label": name}
        for index, name in enumerate(names)
    ]
    for source in (f"{tmp_path}/a.npz@train", f"{tmp_path}/a.npz", listed):
        assert encode_images(load_examples(source)).digest == folder.digest
    with pytest.raises(DataError, match="no array"):
        load_examples(f"{tmp_path}/a.npz@test")
