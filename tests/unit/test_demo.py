"""The demo's steps on a tiny base: numbers, files, and a folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.train.support import byte_base
from weft.demo import RECIPE, Demo
from weft.errors import RunError
from weft.models.save import save_base
from weft.spec import LoraSpec

TINY = RECIPE.replace(max_steps=2, eval_every=1, batch_size=2, rank=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model, tokenizer = byte_base(max_position_embeddings=512)
    tokenizer.model_max_length = 512
    return save_base(model, tokenizer, tmp_path_factory.mktemp("base") / "b")


def test_the_story(base: Path, tmp_path: Path) -> None:
    demo = Demo(tmp_path / "d", base=base, recipe=TINY, trained=6, checked=2, asked=2)
    plan = demo.plan()
    model, _ = demo.model
    assert plan.base_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert plan.base_bytes == 4 * plan.base_parameters
    assert plan.sites == 14
    assert plan.full.total == 16 * plan.base_parameters
    assert plan.adapter.total == 16 * plan.adapter_parameters
    with pytest.raises(RunError, match="call train"):
        demo.prove()
    run = demo.train()
    assert run.adapter.num_parameters == plan.adapter_parameters
    assert len(run.adapter.sites) == plan.sites
    found = demo.compare()
    assert found.generated == 2
    assert {"exact_match", "loss"} <= set(found.base) & set(found.adapter or {})
    assert {"prompt", "base", "adapter"} <= set(found.examples[0])
    written, report = demo.merge()
    assert (written / "model.safetensors").is_file()
    assert len(report.sites) == 14
    assert demo.prove().ok
    assert [path.name for path in demo.files()] == ["data", "adapter", "run", "merged"]
    assert all(size > 0 for size in demo.files().values())


def test_examples_that_are_asked_are_never_seen_before() -> None:
    demo = Demo("unused", trained=200, checked=20, asked=20)
    prompts = [row["prompt"] for part in (demo.learned, demo.checked, demo.asked) for row in part]
    assert len(set(prompts)) == 240
    assert not [prompt for prompt in prompts if prompt != prompt.strip()]


def test_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Demo().folder == Path("runs/demo")
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    assert Demo().folder == Path("runs/demo-2")
    (tmp_path / "runs" / "demo-2").write_text("")
    assert Demo().folder == Path("runs/demo-3")
    with pytest.raises(RunError, match="demo-2"):
        Demo("runs/demo-2")


def test_the_recipe_says_what_it_adapts() -> None:
    assert isinstance(RECIPE.spec, LoraSpec)
