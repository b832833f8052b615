"""Adapters that released versions wrote, which every later version has to read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import weft

HERE = Path(__file__).parent
WRITTEN = sorted(path.parent for path in HERE.glob("*/*/weft.json"))


def expected(folder: Path) -> dict[str, Any]:
    return json.loads((folder.parent / "expected.json").read_text())[folder.name]  # type: ignore[no-any-return]


def test_there_are_some() -> None:
    assert {folder.parent.name for folder in WRITTEN} >= {"0.1.0"}
    for version in {folder.parent for folder in WRITTEN}:
        assert set(json.loads((version / "expected.json").read_text())) == {
            folder.name for folder in WRITTEN if folder.parent == version
        }


@pytest.mark.parametrize("folder", WRITTEN, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_read(folder: Path) -> None:
    adapter, wanted = weft.load(folder), expected(folder)
    assert adapter.digest == wanted["digest"]
    assert adapter.num_parameters == wanted["parameters"]
    assert {
        path: item.map(lambda tensor: tensor.double()).norm() for path, item in adapter.factors.items()
    } == pytest.approx(wanted["norms"], rel=1e-12)


@pytest.mark.parametrize("folder", WRITTEN, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_read_as_peft_reads_it(folder: Path, tmp_path: Path) -> None:
    """Without weft.json the same numbers come out."""
    if not (folder / "adapter_config.json").exists():
        pytest.skip("a layout of weft's own, for what PEFT has no place for")
    adapter = weft.load(folder)
    shutil.copytree(folder, tmp_path / "plain")
    (tmp_path / "plain" / "weft.json").unlink()
    plain = weft.load(tmp_path / "plain")
    assert set(plain.factors) == set(adapter.factors)
    for path, item in adapter.factors.items():
        twin = plain.factors[path]
        torch.testing.assert_close(
            twin.scale * twin.B, item.scale * item.B, rtol=0, atol=0
        )  # attention's out_proj: half of B, twice the scale
        for name, tensor in item.tensors().items():
            assert name == "lora_B" or torch.equal(twin.tensors()[name], tensor)
    assert set(plain.tensors()) == set(adapter.tensors())
    for name, tensor in plain.biases.items():
        assert torch.equal(tensor, adapter.biases[name])
    for name, module in plain.modules.items():
        assert all(torch.equal(tensor, adapter.modules[name][leaf]) for leaf, tensor in module.items())


def test_small() -> None:
    assert sum(path.stat().st_size for path in HERE.rglob("*") if path.suffix in (".safetensors", ".json")) < 200_000


def test_a_new_field_of_the_spec_changes_no_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version has more settings; adapters from before keep their address."""
    adapter = weft.load(WRITTEN[0])
    original = weft.LoraSpec.to_dict
    monkeypatch.setattr(weft.LoraSpec, "to_dict", lambda self: {**original(self), "a_later_field": None})
    assert adapter.replace().digest == adapter.digest
