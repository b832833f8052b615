"""A model directory has its name only when it is whole: read again, compared, renamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.models import ARCHITECTURES, tiny_llama
from tests.unit.train.support import byte_base
from weft.errors import BaseError, MergeError
from weft.models import save
from weft.models.load import load_base
from weft.models.save import probe, save_base

TEXT_AND_IMAGES = ("llama", "gpt2", "bert", "t5", "vit", "mixtral")


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in TEXT_AND_IMAGES), ("llama", "bfloat16")])
def test_what_is_written_is_what_is_read(tmp_path: Path, name: str, dtype: str) -> None:
    model, _ = load_base(save_base(ARCHITECTURES[name](), None, tmp_path / "base"), task="auto", dtype=dtype)
    assert save_base(model, None, tmp_path / "m", files={"note.txt": "hello"}) == tmp_path / "m"
    again, _ = load_base(tmp_path / "m", task="auto")
    batch = probe(model)
    assert batch is not None
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert next(again.parameters()).dtype == getattr(torch, dtype)
    assert (tmp_path / "m" / "note.txt").read_text() == "hello"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "m"]


def test_the_tokenizer_and_generation_settings_go_with_it(tmp_path: Path) -> None:
    model, tokenizer = byte_base()
    settings: Any = model.generation_config
    settings.temperature, settings.do_sample = (
        0.6,
        False,
    )  # as many a hub model has it; transformers refuses to write that
    settings.max_new_tokens = 77
    save_base(model, tokenizer, tmp_path / "m")
    again, words = load_base(tmp_path / "m")
    assert words("hello").input_ids == tokenizer("hello").input_ids
    assert again.generation_config.max_new_tokens == 77
    assert again.generation_config.temperature == 0.6


@pytest.mark.parametrize("what", ["file", "folder", "link"])
def test_what_stands_there_stays(tmp_path: Path, what: str) -> None:
    place = tmp_path / "m"
    if what == "file":
        place.write_text("mine")
    elif what == "link":
        place.symlink_to(tmp_path / "elsewhere")
    else:
        place.mkdir()
        (place / "notes.txt").write_text("mine")
    with pytest.raises(BaseError, match=r"m exists already"):
        save_base(tiny_llama(), None, place)
    assert not [path for path in tmp_path.iterdir() if path.name != "m"]


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    save_base(tiny_llama(), None, tmp_path / "m")
    save_base(tiny_llama(), None, tmp_path / "new" / "deep" / "m")
    assert (tmp_path / "new" / "deep" / "m" / "config.json").is_file()


def test_a_model_that_is_not_what_was_written_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_another(*args: Any, **kwargs: Any) -> tuple[nn.Module, None]:
        model, _ = load_base(*args, **kwargs)
        with torch.no_grad():
            model.get_parameter("model.norm.weight")[3] += 1e-6
        return model, None

    monkeypatch.setattr(save, "load_base", load_another)
    with pytest.raises(MergeError, match=r"the weight model\.norm\.weight is not what was written"):
        save_base(tiny_llama(), None, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_is_tied_no_more_survives(tmp_path: Path) -> None:
    model = tiny_llama(tie=True)
    head: Any = model.get_submodule("lm_head")
    head.weight = nn.Parameter(head.weight.detach().clone() + 1.0)
    save_base(model, None, tmp_path / "m")
    again, _ = load_base(tmp_path / "m", task="auto")
    assert torch.equal(again.get_parameter("lm_head.weight"), head.weight)
    assert not torch.equal(again.get_parameter("lm_head.weight"), again.get_parameter("model.embed_tokens.weight"))


def test_other_settings_are_found_by_the_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_another(*args: Any, **kwargs: Any) -> tuple[nn.Module, None]:
        model, _ = load_base(*args, **kwargs)
        model.get_submodule("model.layers.0.input_layernorm").variance_epsilon = 0.5
        return model, None

    monkeypatch.setattr(save, "load_base", load_another)
    with pytest.raises(MergeError, match="other logits"):
        save_base(tiny_llama(), None, tmp_path / "m")


def test_a_plain_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseError, match="Linear has no save_pretrained"):
        save_base(nn.Linear(2, 2), None, tmp_path / "m")


def test_no_input_fits_a_model_that_nobody_knows() -> None:
    assert probe(nn.Linear(2, 2)) is None
