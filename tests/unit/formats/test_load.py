"""What `weft.load` takes for an adapter, what it says to everything else, and `weft.convert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import weft
from tests.unit.formats.support import folder, linear, pair, simple
from weft.adapter import Adapter
from weft.core.factors import Factors
from weft.errors import FormatError, UnsupportedError
from weft.formats import hub, to_vllm
from weft.spec import LoraSpec


def test_directory_run_folder_and_files_in_it(tmp_path: Path) -> None:
    adapter = simple()
    adapter.save(tmp_path / "run" / "adapter")
    for source in (tmp_path / "run", tmp_path / "run" / "adapter", str(tmp_path / "run"), tmp_path / "run" / "adapter" / "adapter_model.safetensors",
                   tmp_path / "run" / "adapter" / "adapter_config.json", tmp_path / "run" / "adapter" / "weft.json"):  # fmt: skip
        assert weft.load(source).digest == adapter.digest


def test_a_single_file_in_a_folder(tmp_path: Path) -> None:
    tensors = {"to_q.lora.down.weight": torch.randn(2, 3), "to_q.lora.up.weight": torch.randn(4, 2)}
    save_file(tensors, tmp_path / "style.safetensors")
    (tmp_path / "README.md").write_text("x")
    adapter = weft.load(tmp_path)
    assert adapter.sites == ("to_q",)
    assert adapter.provenance.notes[0] == "read from style.safetensors"
    save_file(tensors, tmp_path / "another.safetensors")
    with pytest.raises(FormatError, match=r"'another\.safetensors', 'style\.safetensors'\. Name one"):
        weft.load(tmp_path)
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    assert weft.load(tmp_path).provenance.notes[0] == "read from pytorch_lora_weights.safetensors"


def refusal(source: Any, **options: Any) -> str:
    with pytest.raises(FormatError) as caught:
        weft.load(source, **options)
    assert caught.value.path == str(source)
    return str(caught.value)


def test_what_is_no_adapter(tmp_path: Path) -> None:
    assert (
        "looked for adapter_config.json, adapter/ and pytorch_lora_weights.safetensors. The folder holds nothing"
        in refusal(tmp_path)
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert "a model, not an adapter" in refusal(tmp_path / "model")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("")
    assert "weft train --resume" in refusal(tmp_path / "run")
    folder(tmp_path / "half", pair("q_proj"), None)
    assert 'the smallest one is {"peft_type": "LORA"' in refusal(tmp_path / "half")
    (tmp_path / "x.txt").write_text("x")
    assert "expected an adapter directory, or a file that ends in" in refusal(tmp_path / "x.txt")


def test_nothing_there(tmp_path: Path) -> None:
    simple().save(tmp_path / "mine")
    assert "Did you mean 'mine'?" in refusal(tmp_path / "mina")
    assert "no such file or directory" in refusal(tmp_path / "a" / "b" / "c")
    assert "leave it out" in refusal(tmp_path / "mine", revision="main")


def test_hub_ids() -> None:
    assert hub.is_hub_id("org/name")
    assert hub.is_hub_id("org-1/name_2.x")
    for name in ("name", "a/b/c", "../x", "./x", "org/../x", "/a/b", "src/weft", Path("org/name"), "org/", "~/x"):
        assert not hub.is_hub_id(name) or name == "src/weft"


def test_hub_offline() -> None:
    assert "not in the local cache, and HF_HUB_OFFLINE is set" in refusal("nobody-at-all/no-such-adapter")


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    adapter = simple()
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(name=name, **options)
        return str(tmp_path / "snapshots" / "0123abc")

    (tmp_path / "snapshots" / "0123abc").mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert "none of the files of an adapter" in refusal("org/name")
    adapter.save(tmp_path / "snapshots" / "0123abc")
    found = weft.load("org/name", revision="v1")
    assert found.digest == adapter.digest
    assert (asked["name"], asked["revision"]) == ("org/name", "v1")
    assert set(asked["allow_patterns"]) >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapter_model.bin",
        "weft.json",
    }
    assert found.provenance.notes[0] == "from the hub: org/name at commit 0123abc"
    for problem in (OSError("no route to host"), ValueError("bad id")):

        def fail(*_: Any, problem: Exception = problem, **__: Any) -> str:
            raise problem

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        assert str(problem) in refusal("org/name")


# convert


def test_convert_to_peft(tmp_path: Path) -> None:
    adapter = simple()
    adapter.save(tmp_path / "a")
    assert weft.convert(tmp_path / "a", to="peft", out=tmp_path / "b") == tmp_path / "b"
    assert weft.load(tmp_path / "b").digest == adapter.digest
    with pytest.raises(FormatError, match="overwrite=True"):
        weft.convert(adapter, "peft", tmp_path / "b")
    weft.convert(adapter, "peft", tmp_path / "b", overwrite=True)
    with pytest.raises(FormatError, match="to='vlm' is unknown. Did you mean 'vllm'"):
        weft.convert(adapter, "vlm", tmp_path / "c")


def mixed() -> Adapter:
    sites = {
        "model.layers.0.q_proj": linear(rank=4, scale=2.0),
        "model.layers.1.q_proj": linear(rank=2, scale=-0.75, dtype=torch.bfloat16),
        "model.layers.1.v_proj": linear(rank=3, scale=1 / 3),
        "model.embed": Factors(torch.randn(2, 9), torch.randn(5, 2), 1.0, "embedding"),
    }
    return Adapter(LoraSpec(rank=4, alpha=8, targets=("q_proj", "v_proj", "embed"), rslora=True), sites)


def test_for_servers(tmp_path: Path) -> None:
    adapter = mixed()
    served = to_vllm(adapter)
    assert {item.rank for item in served.factors.values()} == {4}
    assert {item.scale for item in served.factors.values()} == {1.0}
    for path, item in adapter.factors.items():
        exact = item.map(lambda tensor: tensor.double()).delta()
        found = served.factors[path].map(lambda tensor: tensor.double()).delta()
        tolerance = 1e-6 if item.B.dtype == torch.float32 else 4e-3
        assert float((found - exact).norm()) <= tolerance * float(exact.norm())
        assert served.factors[path].A.dtype == item.A.dtype
    notes = " ".join(served.provenance.notes)
    assert "ranks 2-4 were filled up to 4 with zeros" in notes
    assert "rounded it by at most" in notes
    assert served.provenance.parents[0]["digest"] == adapter.digest
    weft.convert(adapter, to="vllm", out=tmp_path / "v")
    said = json.loads((tmp_path / "v" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["use_rslora"], said["rank_pattern"], said["alpha_pattern"]) == (
        4,
        4,
        False,
        {},
        {},
    )
    assert said["target_modules"] == ["embed", "q_proj", "v_proj"]
    assert said["modules_to_save"] is None
    assert weft.load(tmp_path / "v").digest == served.digest
    shapes = {key: tensor.shape for key, tensor in load_file(tmp_path / "v" / "adapter_model.safetensors").items()}
    assert shapes["base_model.model.model.layers.1.v_proj.lora_A.weight"] == (4, 6)


def test_a_uniform_adapter_costs_nothing() -> None:
    adapter = simple()
    served = to_vllm(adapter)
    assert not served.provenance.notes
    assert served.num_parameters == adapter.num_parameters


def test_what_servers_dont_have() -> None:
    cases = [
        (simple(factors={"a.x": linear(magnitude=torch.rand(5))}), r"DoRA \('a\.x'\)"),
        (simple(factors={"a.x": linear(bias=torch.rand(5))}), "bias of B"),
        (
            simple(modules={"score": {"weight": torch.ones(2)}}),
            r"modules trained whole \('score'\).*adapter\.replace\(modules=\{\}\)",
        ),
        (simple(biases={"a.bias": torch.ones(2)}), "trained biases"),
        (simple(factors={"a.x": Factors(torch.randn(2, 6), torch.randn(4, 2), 1.0, "conv", (3,))}), "convolutions"),
        (simple(factors={}), "nothing to serve"),
    ]
    for adapter, words in cases:
        with pytest.raises(UnsupportedError, match=words):
            to_vllm(adapter)


def test_scales_beyond_a_dtypes_range() -> None:
    item = Factors(torch.ones(2, 3, dtype=torch.float16), torch.full((3, 2), 60_000.0, dtype=torch.float16), 4.0)
    with pytest.raises(UnsupportedError, match="beyond the range of torch.float16"):
        to_vllm(simple(factors={"a.x": item}))
