"""weft's own directories: they give back the same adapter or an error, and say to PEFT exactly which sites they are for."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.formats.support import linear, simple
from weft.adapter import Adapter, Provenance
from weft.core.factors import Factors, spread_groups
from weft.errors import FormatError, KeysError, NotFiniteError, UnsupportedError
from weft.formats.peft import problem_for_peft, read, write
from weft.formats.peft_config import first_match
from weft.identity import Fingerprint
from weft.spec import LoraSpec


def everything() -> Adapter:
    """An adapter with all kinds of sites that go together, and all that stands beside them."""
    A = torch.randn
    sites = {
        "embed": Factors(A(4, 20), A(8, 4), 0.5, "embedding"),
        "encoder.0.conv": Factors(A(4, 3 * 6), spread_groups(A(8, 2), 2), 1.5, "conv", (2, 3), groups=2),
        "encoder.0.attn.in_proj_weight": Factors(A(4, 8), A(24, 4), 0.75, "attention"),
        "encoder.0.attn.out_proj": Factors(A(4, 8), A(8, 4), 0.75, "attention"),
        "encoder.0.experts.gate_up_proj": Factors(A(3, 4, 8), A(3, 12, 4), 2.0, "parameter"),
        "encoder.0.experts.down_proj": Factors(A(3, 2, 6), A(3, 8, 2), 2.0, "parameter"),
        "encoder.0.experts.router": linear(d_in=8, d_out=3),
        "single.experts.gate_up_proj": Factors(A(1, 4, 8), A(1, 12, 4), 2.0, "parameter"),
        "matrix.weight": Factors(A(4, 8), A(6, 4), 2.0, "parameter"),
        "head": linear(rank=3, scale=1 / 3, d_in=8, dtype=torch.bfloat16),
    }
    spec = LoraSpec(
        rank=4, alpha=8, targets="all-linear", target_parameters=("gate_up_proj",), save_modules=("score",), bias="all"
    )
    base = Fingerprint("TinyModel", "c" * 64, "l" * 64, "w" * 64, "float32", name="org/tiny", commit="abc")
    provenance = Provenance(base=base, data=({"source": "x.jsonl", "examples": 3},), recipe={"epochs": 2, "limit": math.inf}, notes=("a note",),
                            evaluation={"eval_loss": 1.5})  # fmt: skip
    return Adapter(
        spec,
        sites,
        {"score": {"weight": A(2, 8), "bias": A(2), "steps": torch.tensor(7)}},
        {
            "encoder.0.attn.in_proj_bias": A(24),
            "head.bias": A(5),
            "norm.bias": A(8),
            "encoder.0.experts.gate_up_proj_bias": A(3, 12),
        },
        provenance,
        {"input_ids": torch.arange(6).view(2, 3), "logits": A(2, 9)},
    )


def test_the_same_adapter_comes_back(tmp_path: Path) -> None:
    adapter = everything()
    assert write(adapter, tmp_path / "a") == tmp_path / "a"
    back = read(tmp_path / "a")
    assert back.digest == adapter.digest
    assert back.spec == adapter.spec
    assert list(back.factors) == list(adapter.factors)
    for path, item in adapter.factors.items():
        twin = back.factors[path]
        assert (twin.scale, twin.kind, twin.kernel, twin.groups, twin.A.dtype) == (
            item.scale,
            item.kind,
            item.kernel,
            item.groups,
            item.A.dtype,
        )
        assert torch.equal(twin.A, item.A)
        assert torch.equal(twin.B, item.B)
    assert back.provenance.base == adapter.provenance.base
    assert back.provenance.notes == ("a note",)
    assert back.provenance.evaluation == {"eval_loss": 1.5}
    assert torch.equal(back.proof["logits"], adapter.proof["logits"])
    assert back.modules["score"]["steps"] == 7
    write(back, tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors", "weft.json", "weft_proof.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_keys_of_the_file(tmp_path: Path) -> None:
    write(everything(), tmp_path / "a")
    keys = {
        key.removeprefix("base_model.model."): tuple(tensor.shape)
        for key, tensor in load_file(tmp_path / "a" / "adapter_model.safetensors").items()
    }
    assert keys["embed.lora_embedding_A"] == (4, 20)
    assert keys["embed.lora_embedding_B"] == (8, 4)
    assert keys["encoder.0.conv.lora_A.weight"] == (4, 3, 2, 3)
    assert keys["encoder.0.conv.lora_B.weight"] == (8, 2, 1, 1)
    assert keys["encoder.0.attn.lora_B.weight"] == (24, 4)
    assert keys["encoder.0.attn.base_layer.out_proj.lora_A.weight"] == (4, 8)
    assert keys["encoder.0.experts.base_layer.lora_A.weight"] == (12, 8)
    assert keys["encoder.0.experts.lora_B.weight"] == (8, 6)
    assert keys["encoder.0.experts.base_layer.base_layer.router.lora_A.weight"] == (4, 8)
    assert keys["matrix.lora_A.weight"] == (4, 8)
    assert keys["head.base_layer.bias"] == (5,)
    assert keys["encoder.0.attn.base_layer.in_proj_bias"] == (24,)
    assert keys["encoder.0.experts.base_layer.base_layer.gate_up_proj_bias"] == (3, 12)
    assert keys["score.weight"] == (2, 8)
    assert not any("lora_A" in key and "score" in key for key in keys)


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "weft_proof.safetensors", "weft.json"]
)
def test_a_changed_file_is_named(name: str, tmp_path: Path) -> None:
    write(everything(), tmp_path / "a")
    path = tmp_path / "a" / name
    if name.endswith(".json"):
        said = json.loads(path.read_text())
        if name == "weft.json":
            said["sites"][0]["scale"] *= 2
        else:
            said["lora_alpha"] = 99
        path.write_text(json.dumps(said))
    else:
        tensors = load_file(path)
        first = sorted(tensors)[0]
        tensors[first] = tensors[first] + 1
        save_file(tensors, path)
    with pytest.raises(FormatError, match=r"was changed.*since weft wrote the directory.*delete weft\.json") as caught:
        read(tmp_path / "a")
    assert caught.value.path == str(path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "weft_proof.safetensors"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    write(everything(), tmp_path / "a")
    (tmp_path / "a" / name).unlink()
    with pytest.raises(FormatError, match="is missing") as caught:
        read(tmp_path / "a")
    assert caught.value.path.endswith(name)


def test_a_config_with_other_spaces_is_the_same(tmp_path: Path) -> None:
    write(simple(), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=8) + "\r\n")
    assert read(tmp_path / "a").digest


BROKEN_RECORDS: list[tuple[str, Any]] = [
    ("format", 2), ("layout", "x"), ("digest", 3), ("files", [1]), ("spec", {"rank": 0}), ("spec", {"no_such": 1}), ("spec", []), ("sites", [{}]), ("sites", 3),
    ("sites", [{"path": "x"}]), ("modules", [1]), ("biases", [1]), ("provenance", 3), ("provenance", {"base": {"x": 1}}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), BROKEN_RECORDS)
def test_broken_records(key: str, value: Any, tmp_path: Path) -> None:
    write(simple(), tmp_path / "a")
    path = tmp_path / "a" / "weft.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(FormatError, match=r"deleting weft\.json leaves a plain PEFT directory") as caught:
        read(tmp_path / "a")
    assert caught.value.key == key


def test_sites_of_another_record(tmp_path: Path) -> None:
    write(simple(), tmp_path / "a")
    path = tmp_path / "a" / "weft.json"
    for change, words in (
        ({"path": "other"}, "are missing"), ({"A": [4, 7]}, r"saved were \(4, 7\)"), ({"A": [5, 6], "B": [5, 5]}, "rank"), ({"kind": "conv"}, "expected"),
        ({"kind": "parameter"}, "are missing|was changed"), ({"dtypes": ["float16", "float32"]}, "was changed"),
    ):  # fmt: skip
        said = json.loads(path.read_text())
        kept = path.read_text()
        said["sites"][0] |= change
        path.write_text(json.dumps(said))
        with pytest.raises(FormatError, match=words):
            read(tmp_path / "a")
        path.write_text(kept)
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "sites": said["sites"][:1]}))
    with pytest.raises(KeysError, match="2 tensors that belong to nothing"):
        read(tmp_path / "a")


# the config


def settings(adapter: Adapter, tmp_path: Path) -> dict[str, Any]:
    write(adapter, tmp_path / "settings", overwrite=True)
    return json.loads((tmp_path / "settings" / "adapter_config.json").read_text())  # type: ignore[no-any-return]


def test_nothing_stands_against_a_plain_adapter() -> None:
    assert problem_for_peft(simple()) is None
    assert problem_for_peft(everything()) is None


def test_plain_settings(tmp_path: Path) -> None:
    said = settings(simple(), tmp_path)
    assert (said["r"], said["lora_alpha"], said["target_modules"], said["rank_pattern"], said["alpha_pattern"]) == (
        4,
        8,
        ["q_proj"],
        {},
        {},
    )
    assert isinstance(said["lora_alpha"], int)
    assert said["init_lora_weights"] is True
    assert not {"lora_bias", "target_parameters", "exclude_modules"} & set(said)


def test_base_is_named(tmp_path: Path) -> None:
    said = settings(everything(), tmp_path)
    assert (said["base_model_name_or_path"], said["revision"]) == ("org/tiny", "abc")
    assert settings(simple(provenance=Provenance(base_name="gpt2")), tmp_path)["base_model_name_or_path"] == "gpt2"


def test_ranks_and_alphas_that_differ(tmp_path: Path) -> None:
    sites = {
        "a.q-proj": linear(rank=2, scale=1.5),
        "ab.q-proj": linear(rank=4, scale=2.0),
        "x.a.q-proj": linear(rank=4, scale=2.0),
    }
    said = settings(Adapter(LoraSpec(rank=4, alpha=8, targets=("q-proj",)), sites), tmp_path)
    assert said["rank_pattern"] == {r"^a\.q\-proj": 2}
    assert said["alpha_pattern"] == {r"^a\.q\-proj": 3}
    for path, item in sites.items():
        assert first_match(said["rank_pattern"], path, said["r"]) == item.rank
        assert first_match(said["alpha_pattern"], path, said["lora_alpha"]) / item.rank == pytest.approx(
            item.scale, rel=1e-15
        )


def test_patterns_of_the_spec_are_kept_where_they_are_right(tmp_path: Path) -> None:
    spec = LoraSpec(rank=4, alpha=8, targets=("q_proj", "v_proj"), rank_pattern={"v_proj": 2, "nothing": 7})
    sites = {"a.q_proj": linear(), "a.v_proj": linear(rank=2, scale=4.0)}
    assert settings(Adapter(spec, sites), tmp_path)["rank_pattern"] == {"v_proj": 2}


def test_first_match_survives_the_order_of_json(tmp_path: Path) -> None:
    spec = LoraSpec(rank=4, alpha=8, targets=("q_proj",), rank_pattern={"z.q_proj": 2, ".*q_proj": 3})
    sites = {"z.q_proj": linear(rank=2, scale=4.0), "y.q_proj": linear(rank=3, scale=8 / 3)}
    said = settings(Adapter(spec, sites), tmp_path)
    assert {path: first_match(said["rank_pattern"], path, said["r"]) for path in sites} == {
        "z.q_proj": 2,
        "y.q_proj": 3,
    }


def test_rslora(tmp_path: Path) -> None:
    spec = LoraSpec(rank=4, alpha=8, targets=("q_proj",), rslora=True)
    said = settings(Adapter(spec, {"a.q_proj": linear(scale=4.0), "b.q_proj": linear(rank=9, scale=5.0)}), tmp_path)
    assert (said["lora_alpha"], said["alpha_pattern"], said["rank_pattern"]) == (
        8,
        {r"^b\.q_proj": 15},
        {r"^b\.q_proj": 9},
    )


def matched(said: dict[str, Any], names: list[str]) -> list[str]:
    """What PEFT would adapt."""
    targets, exclude = said["target_modules"], said.get("exclude_modules")
    found = [name for name in names if name in targets or any(name.endswith(f".{target}") for target in targets)]
    return [name for name in found if not (exclude and re.fullmatch(exclude, name))]


def test_names_that_end_other_names(tmp_path: Path) -> None:
    modules = ["conv1", "conv2", "layer1.0.conv1", "layer1.0.conv2", "fc"]
    for chosen in (["conv1"], ["conv1", "layer1.0.conv2"], ["layer1.0.conv1"]):
        adapter = Adapter(LoraSpec(rank=4, alpha=8, targets="all-linear"), {path: linear() for path in chosen})
        assert matched(settings(adapter, tmp_path), modules) == chosen
    by_name = Adapter(
        LoraSpec(rank=4, alpha=8, targets=("conv1",)), {path: linear() for path in ("conv1", "layer1.0.conv1")}
    )
    assert settings(by_name, tmp_path)["target_modules"] == ["conv1"]


def test_excluded_and_layers_become_paths(tmp_path: Path) -> None:
    for extra in ({"exclude": ("b",)}, {"layers": (0,)}):
        adapter = Adapter(LoraSpec(rank=4, alpha=8, targets=("q_proj",), **extra), {"model.layers.0.q_proj": linear()})
        assert settings(adapter, tmp_path)["target_modules"] == ["model.layers.0.q_proj"]


def test_a_spec_that_names_more_than_there_is_becomes_paths(tmp_path: Path) -> None:
    adapter = Adapter(LoraSpec(rank=4, alpha=8, targets=("q_proj", "v_proj")), {"a.q_proj": linear()})
    assert settings(adapter, tmp_path)["target_modules"] == ["a.q_proj"]


def test_nothing_but_modules(tmp_path: Path) -> None:
    adapter = Adapter(LoraSpec(targets=("x",), save_modules=("score",)), {}, {"score": {"weight": torch.ones(2, 3)}})
    assert settings(adapter, tmp_path)["target_modules"] == "dummy-target-modules"
    assert read(tmp_path / "settings").digest == adapter.digest
    (tmp_path / "settings" / "weft.json").unlink()
    assert set(read(tmp_path / "settings").modules) == {"score"}


# attention


def attention(**changes: Any) -> Adapter:
    sites = {
        "attn.in_proj_weight": Factors(torch.randn(4, 8), torch.randn(24, 4), 2.0, "attention"),
        "attn.out_proj": Factors(torch.randn(4, 8), torch.randn(8, 4), 2.0, "attention"),
    }
    for path, change in changes.items():
        name = f"attn.{path}"
        sites = {key: item for key, item in sites.items() if key != name} | (
            {name: change} if change is not None else {}
        )
    return Adapter(LoraSpec(rank=4, alpha=8, targets=("attn",)), sites)


def test_out_proj_counts_twice_in_peft(tmp_path: Path) -> None:
    adapter = attention()
    write(adapter, tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")[
        "base_model.model.attn.base_layer.out_proj.lora_B.weight"
    ]
    assert torch.equal(stored, adapter.factors["attn.out_proj"].B / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_half_precision_numbers_survive_halving(dtype: torch.dtype, tmp_path: Path) -> None:
    smallest = torch.finfo(dtype).smallest_normal * torch.tensor([2**-5, 3 * 2**-5, 1.0, 5.0])
    adapter = attention(out_proj=Factors(torch.randn(4, 8, dtype=dtype), smallest.to(dtype).repeat(8, 1), 2.0))
    write(adapter, tmp_path / "a")
    assert read(tmp_path / "a").digest == adapter.digest


@pytest.mark.parametrize("only", ["in_proj_weight", "out_proj"])
def test_one_projection_alone(only: str, tmp_path: Path) -> None:
    adapter = attention(**{name: None for name in ("in_proj_weight", "out_proj") if name != only})
    assert settings(adapter, tmp_path)["target_modules"] == ["attn"]
    stored = load_file(tmp_path / "settings" / "adapter_model.safetensors")
    idle = "attn.base_layer.out_proj" if only == "in_proj_weight" else "attn"
    assert not stored[f"base_model.model.{idle}.lora_B.weight"].any()
    assert stored[f"base_model.model.{idle}.lora_B.weight"].shape == ((8, 4) if only == "in_proj_weight" else (24, 4))
    assert read(tmp_path / "settings").digest == adapter.digest


def test_out_proj_of_another_kind_of_layer(tmp_path: Path) -> None:
    adapter = Adapter(LoraSpec(rank=4, alpha=8, targets=("out_proj",)), {"attn.out_proj": linear(d_in=8, d_out=8)})
    assert settings(adapter, tmp_path)["target_modules"] == ["out_proj"]


def test_projections_of_different_ranks(tmp_path: Path) -> None:
    adapter = attention(out_proj=Factors(torch.randn(2, 8), torch.randn(8, 2), 4.0, "attention"))
    said = settings(adapter, tmp_path)
    assert (said["r"], said["lora_alpha"], said["rank_pattern"]) == (4, 8, {})
    stored = load_file(tmp_path / "settings" / "adapter_model.safetensors")
    assert stored["base_model.model.attn.base_layer.out_proj.lora_A.weight"].shape == (4, 8)
    assert torch.equal(
        stored["base_model.model.attn.base_layer.out_proj.lora_B.weight"][:, :2], adapter.factors["attn.out_proj"].B
    )
    assert read(tmp_path / "settings").digest == adapter.digest


# what PEFT can't hold


def one(item: Factors, path: str = "a.x", **spec: Any) -> Adapter:
    return Adapter(LoraSpec(rank=4, alpha=8, targets=("x",), **spec), {path: item})


IMPOSSIBLE: list[tuple[str, Adapter, str]] = [
    ("a parameter of the model itself", one(Factors(torch.randn(4, 6), torch.randn(5, 4), 2.0, "parameter"), "mix"), "'mix', a parameter of the model itself"),
    ("dora on a parameter", one(Factors(torch.randn(4, 6), torch.randn(5, 4), 2.0, "parameter", magnitude=torch.rand(5))), "no DoRA"),
    ("a bias on a parameter", one(Factors(torch.randn(4, 6), torch.randn(5, 4), 2.0, "parameter", bias=torch.rand(5))), "lora_bias"),
    ("a bias on an embedding", one(Factors(torch.randn(4, 6), torch.randn(5, 4), 2.0, "embedding", bias=torch.rand(5))), "lora_bias"),
    ("a bias under dora", one(linear(magnitude=torch.rand(5), bias=torch.rand(5))), "together with DoRA"),
    ("dora on a grouped convolution", one(Factors(torch.randn(4, 6), spread_groups(torch.randn(4, 2), 2), 2.0, "conv", (3,), torch.rand(4), groups=2)), "no DoRA"),
    ("dora here and not there", Adapter(LoraSpec(targets=("x",)), {"a.x": linear(magnitude=torch.rand(5)), "b.x": linear()}), "for all sites or for none"),
    ("a bias on attention", attention(out_proj=linear(d_in=8, d_out=8, bias=torch.rand(8))), "lora_bias"),
    ("scales of one attention", attention(out_proj=linear(d_in=8, d_out=8, scale=3.0)), "one alpha for both"),
    ("experts stored the other way", one(Factors(torch.randn(2, 4, 6), torch.randn(2, 5, 4), 2.0, "parameter"), fan_in_fan_out=True), "is_transposed"),
    ("a weight adapted twice", Adapter(LoraSpec(targets=("x",)), {"a.x": linear(), "a.x.weight": Factors(torch.randn(4, 6), torch.randn(5, 4), 2.0, "parameter")}), "adapted twice"),
    ("a bias trained twice", simple(modules={"score": {"bias": torch.ones(2)}}, biases={"score.bias": torch.ones(2)}), "trained whole as well"),
    ("numbers across groups", one(Factors(torch.randn(4, 6), torch.ones(4, 4), 2.0, "conv", (3,), groups=2)), "outside of its 2 diagonal blocks"),
]  # fmt: skip


@pytest.mark.parametrize(("adapter", "words"), [pytest.param(*case[1:], id=case[0]) for case in IMPOSSIBLE])
def test_what_peft_has_no_place_for(adapter: Adapter, words: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=words) as caught:
        adapter.save(tmp_path / "a")
    assert "for_peft=False" in str(caught.value)
    assert str(problem_for_peft(adapter)) in str(caught.value)
    assert not (tmp_path / "a").exists()
    if "twice" in words or "as well" in words:
        return  # such an adapter has no use anywhere
    adapter.save(tmp_path / "a", for_peft=False)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"weft_model.safetensors", "weft.json"}
    assert read(tmp_path / "a").digest == adapter.digest


def test_everything_for_weft_alone(tmp_path: Path) -> None:
    adapter = everything()
    write(adapter, tmp_path / "a", for_peft=False)
    assert read(tmp_path / "a").digest == adapter.digest
    tensors = load_file(tmp_path / "a" / "weft_model.safetensors")
    save_file(tensors | {"more": torch.ones(1)}, tmp_path / "a" / "weft_model.safetensors")
    with pytest.raises(FormatError, match="was changed"):
        read(tmp_path / "a")


def test_matrix_stored_the_other_way(tmp_path: Path) -> None:
    item = Factors(torch.randn(4, 6), torch.randn(5, 4), 2.0, "parameter")
    adapter = one(item, fan_in_fan_out=True)
    said = settings(adapter, tmp_path)
    assert said["fan_in_fan_out"] is False
    stored = load_file(tmp_path / "settings" / "adapter_model.safetensors")
    delta = (
        stored["base_model.model.a.lora_B.weight"]
        @ stored["base_model.model.a.lora_A.weight"]
        * said["lora_alpha"]
        / said["r"]
    )
    torch.testing.assert_close(delta, item.delta().T)
    assert read(tmp_path / "settings").digest == adapter.digest


def test_biases_of_some_sites(tmp_path: Path) -> None:
    adapter = Adapter(
        LoraSpec(rank=4, alpha=8, targets=("x",), lora_bias=True), {"a.x": linear(bias=torch.rand(5)), "b.x": linear()}
    )
    assert settings(adapter, tmp_path)["lora_bias"] is True
    assert not load_file(tmp_path / "settings" / "adapter_model.safetensors")["base_model.model.b.x.lora_B.bias"].any()
    assert read(tmp_path / "settings").digest == adapter.digest


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(value: float, tmp_path: Path) -> None:
    bad = linear()
    bad.B[0, 0] = value
    with pytest.raises(NotFiniteError, match="a.x"):
        write(one(bad), tmp_path / "a")
    with pytest.raises(NotFiniteError, match=r"score\.weight"):
        write(simple(modules={"score": {"weight": torch.tensor([value])}}), tmp_path / "a")
    assert not (tmp_path / "a").exists()
