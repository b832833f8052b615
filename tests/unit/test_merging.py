"""From names to a merged directory: dtype, tasks, tied weights, and nothing left after an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.unit.train.support import byte_base, moved
from weft.adapter import Adapter
from weft.core.merge import merge
from weft.errors import BaseError, BaseMismatchError
from weft.merging import REPORT, merge_to_directory
from weft.models.attach import attach
from weft.models.load import load_base
from weft.models.save import save_base
from weft.spec import LoraSpec


def base_and_adapter(folder: Path, tie: bool = False) -> tuple[Path, Adapter]:
    """A base on disk, and an adapter of it that also changes the head."""
    place = save_base(*byte_base(tie=tie), folder / "base")
    model, _ = load_base(place)
    with attach(model, {"t": LoraSpec(rank=2, targets=("q_proj", "lm_head") if tie else "all-linear")}, seed=0) as bank:
        moved(bank, "t")
        return place, bank.adapter("t")


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_directory_is_the_merged_model(tmp_path: Path, tie: bool, dtype: str | None) -> None:
    base, adapter = base_and_adapter(tmp_path, tie)
    written, report = merge_to_directory(base=base, adapter=adapter, out=tmp_path / "m", dtype=dtype)
    merged, _ = merge(load_base(base)[0], adapter, dtype=getattr(torch, dtype) if dtype else None)
    again, tokenizer = load_base(written)
    here, there = merged.state_dict(), again.state_dict()
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert tokenizer("abc").input_ids
    told = json.loads((written / REPORT).read_text())
    assert told["adapter"] == adapter.digest
    assert told["survived"] == pytest.approx(report.survived)
    assert told["untied"] == (["lm_head.weight"] if tie else [])


def test_a_merge_into_bfloat16_keeps_what_a_model_computes_itself(tmp_path: Path) -> None:
    """Rotary frequencies in bfloat16 would be another model, and not the one that is loaded again."""
    base, adapter = base_and_adapter(tmp_path)
    merged, _ = merge(load_base(base)[0], adapter, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in merged.buffers()} == {torch.float32}


def test_another_base_leaves_nothing(tmp_path: Path) -> None:
    _, adapter = base_and_adapter(tmp_path)
    other = save_base(*byte_base(), tmp_path / "other")
    with pytest.raises(BaseMismatchError):
        merge_to_directory(base=other, adapter=adapter, out=tmp_path / "m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "other"]


def test_what_can_be_known_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(BaseError, match="int8"):
        merge_to_directory(base=tmp_path / "none", adapter=tmp_path / "none", out=tmp_path / "m", dtype="int8")
    (tmp_path / "m").write_text("")
    with pytest.raises(BaseError, match="exists already"):
        merge_to_directory(base=tmp_path / "none", adapter=tmp_path / "none", out=tmp_path / "m")
