"""Single files of loralib, diffusers and kohya."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import weft
from weft.errors import FormatError, KeysError, UnsupportedError
from weft.formats import load, resolve

DOWN = "down_blocks.0.attn1"


def saved(at: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, at, metadata=metadata)
    return at


def updates(*names: tuple[str, str], rank: int = 4, d_in: int = 6, d_out: int = 5, ones: int = 0) -> dict[str, Tensor]:
    shape = (1,) * ones
    found = {}
    for A, B in names:
        found |= {A: torch.randn(rank, d_in, *shape), B: torch.randn(d_out, rank, *shape)}
    return found


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(6, 5), nn.Linear(6, 5)
        self.to_out = nn.ModuleList([nn.Linear(6, 5)])
        self.proj_in = nn.Conv2d(6, 5, 1)


class Unet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([nn.ModuleDict({"attn1": Attention(), "conv": nn.Conv2d(3, 5, 3)})])
        self.time_embed = nn.Embedding(6, 5)


# diffusers


@pytest.mark.parametrize(
    ("down", "up", "path"),
    [
        (f"unet.{DOWN}.to_q.lora.down.weight", f"unet.{DOWN}.to_q.lora.up.weight", f"{DOWN}.to_q"),
        (f"unet.{DOWN}.processor.to_q_lora.down.weight", f"unet.{DOWN}.processor.to_q_lora.up.weight", f"{DOWN}.to_q"),
        (f"{DOWN}.processor.to_out_lora.down.weight", f"{DOWN}.processor.to_out_lora.up.weight", f"{DOWN}.to_out.0"),
        (f"unet.{DOWN}.to_q.lora_A.weight", f"unet.{DOWN}.to_q.lora_B.weight", f"{DOWN}.to_q"),
        (f"unet.{DOWN}.to_q.lora_A.default.weight", f"unet.{DOWN}.to_q.lora_B.default.weight", f"{DOWN}.to_q"),
        (
            "transformer.blocks.0.attn1.to_q.lora_A.weight",
            "transformer.blocks.0.attn1.to_q.lora_B.weight",
            "blocks.0.attn1.to_q",
        ),
        (
            "text_encoder.layers.0.self_attn.to_q_lora.down.weight",
            "text_encoder.layers.0.self_attn.to_q_lora.up.weight",
            "layers.0.self_attn.q_proj",
        ),
        (
            "text_encoder.l.0.q_proj.lora_linear_layer.down.weight",
            "text_encoder.l.0.q_proj.lora_linear_layer.up.weight",
            "l.0.q_proj",
        ),
        ("h.0.c_attn.lora_A.weight", "h.0.c_attn.lora_B.weight", "h.0.c_attn"),
        ("transformer.h.0.c_attn.lora_A.weight", "transformer.h.0.c_attn.lora_B.weight", "transformer.h.0.c_attn"),
        (
            "diffusion_model.x.attn1.to_q.lora_down.weight",
            "diffusion_model.x.attn1.to_q.lora_up.weight",
            "x.attn1.to_q",
        ),
    ],
)
def test_names_of_diffusers(down: str, up: str, path: str, tmp_path: Path) -> None:
    tensors = updates((down, up))
    adapter = load(saved(tmp_path / "x.safetensors", tensors))
    assert adapter.sites == (path,)
    assert torch.equal(adapter.factors[path].delta(), tensors[up] @ tensors[down])  # no alpha: scale 1
    assert any("scale 1" in note for note in adapter.provenance.notes)


def test_alphas(tmp_path: Path) -> None:
    tensors = updates(
        (f"unet.{DOWN}.to_q.lora.down.weight", f"unet.{DOWN}.to_q.lora.up.weight"),
        (f"unet.{DOWN}.to_k.lora.down.weight", f"unet.{DOWN}.to_k.lora.up.weight"),
    )
    tensors |= {f"unet.{DOWN}.to_q.alpha": torch.tensor(2.0), f"unet.{DOWN}.to_k.alpha": torch.tensor([8.0])}
    adapter = load(saved(tmp_path / "x.safetensors", tensors))
    assert {path: item.scale for path, item in adapter.factors.items()} == {f"{DOWN}.to_q": 0.5, f"{DOWN}.to_k": 2.0}
    assert all(adapter.spec.scale_at(path) == item.scale for path, item in adapter.factors.items())
    for bad in (torch.tensor(0.0), torch.ones(2)):
        with pytest.raises(FormatError, match="one number other than 0"):
            load(saved(tmp_path / "y.safetensors", tensors | {f"unet.{DOWN}.to_q.alpha": bad}))


def test_settings_in_the_header(tmp_path: Path) -> None:
    tensors = updates(
        (f"unet.{DOWN}.to_q.lora_A.weight", f"unet.{DOWN}.to_q.lora_B.weight"),
        (f"unet.{DOWN}.to_k.lora_A.weight", f"unet.{DOWN}.to_k.lora_B.weight"),
    )
    said = {
        "unet.lora_alpha": 8,
        "unet.r": 4,
        "unet.alpha_pattern": {"to_k": 16},
        "unet.use_rslora": True,
        "text_encoder.lora_alpha": 99,
    }
    adapter = load(saved(tmp_path / "x.safetensors", tensors, {"lora_adapter_metadata": json.dumps(said)}))
    assert {path: item.scale for path, item in adapter.factors.items()} == {f"{DOWN}.to_q": 4.0, f"{DOWN}.to_k": 8.0}
    for value in ({"unet.lora_alpha": "8"}, {"unet.alpha_pattern": {"(": 3}}, {"unet.lora_alpha": 0}):
        with pytest.raises(FormatError, match="lora_adapter_metadata"):
            load(saved(tmp_path / "y.safetensors", tensors, {"lora_adapter_metadata": json.dumps(value)}))
    with pytest.raises(FormatError, match="no JSON"):
        load(saved(tmp_path / "z.safetensors", tensors, {"lora_adapter_metadata": "{"}))


def test_several_components(tmp_path: Path) -> None:
    tensors = updates((f"unet.{DOWN}.to_q.lora.down.weight", f"unet.{DOWN}.to_q.lora.up.weight"),
                      ("text_encoder.l.q_proj.lora_linear_layer.down.weight", "text_encoder.l.q_proj.lora_linear_layer.up.weight"))  # fmt: skip
    path = saved(tmp_path / "x.safetensors", tensors)
    with pytest.raises(FormatError, match=r"text_encoder \(1 sites\), unet \(1 sites\)"):
        load(path)
    assert load(path, component="unet").sites == (f"{DOWN}.to_q",)
    assert load(path, component="text_encoder").sites == ("l.q_proj",)
    with pytest.raises(FormatError, match="no updates for 'vae'"):
        load(path, component="vae")


def test_magnitudes(tmp_path: Path) -> None:
    names = (f"unet.{DOWN}.to_q.lora_A.weight", f"unet.{DOWN}.to_q.lora_B.weight")
    for key, value in (
        (f"unet.{DOWN}.to_q.lora_magnitude_vector", torch.rand(5)),
        (f"unet.{DOWN}.to_q.dora_scale", torch.rand(5, 1)),
    ):
        adapter = load(saved(tmp_path / "x.safetensors", updates(names) | {key: value}))
        assert torch.equal(adapter.factors[f"{DOWN}.to_q"].magnitude, value.flatten())  # type: ignore[arg-type]
        assert adapter.spec.dora
    with pytest.raises(FormatError, match="expected 5 numbers"):  # a norm over the inputs: another method
        load(saved(tmp_path / "y.safetensors", updates(names) | {f"unet.{DOWN}.to_q.dora_scale": torch.rand(1, 6)}))


# kohya


def kohya(ones: int = 0) -> dict[str, Tensor]:
    names = [
        (
            f"lora_unet_down_blocks_0_attn1_{leaf}.lora_down.weight",
            f"lora_unet_down_blocks_0_attn1_{leaf}.lora_up.weight",
        )
        for leaf in ("to_q", "to_out_0", "proj_in")
    ]
    found = updates(*names, ones=ones)
    return found | {
        f"lora_unet_down_blocks_0_attn1_{leaf}.alpha": torch.tensor(2.0) for leaf in ("to_q", "to_out_0", "proj_in")
    }


def test_flattened_names(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors", kohya())
    adapter = load(path)
    assert adapter.sites == ("down_blocks_0_attn1_proj_in", "down_blocks_0_attn1_to_out_0", "down_blocks_0_attn1_to_q")
    assert any("flattened" in note for note in adapter.provenance.notes)
    fitted = load(path, base=Unet())
    assert fitted.sites == (f"{DOWN}.to_q", f"{DOWN}.to_out.0", f"{DOWN}.proj_in")
    assert fitted.factors[f"{DOWN}.proj_in"].kernel == (1, 1)
    assert torch.equal(fitted.factors[f"{DOWN}.to_q"].A, adapter.factors["down_blocks_0_attn1_to_q"].A)
    assert fitted.factors[f"{DOWN}.to_q"].scale == 0.5
    bank = weft.attach(Unet(), {})
    bank.load("style", fitted)
    assert not any("flattened: dots" in note for note in fitted.provenance.notes)


def test_one_by_one_convolutions_fit_linear_layers(tmp_path: Path) -> None:
    adapter = load(saved(tmp_path / "x.safetensors", kohya(ones=2)), base=Unet())
    assert adapter.factors[f"{DOWN}.to_q"].kind == "linear"
    assert adapter.factors[f"{DOWN}.proj_in"].kind == "conv"


def test_convolutions(tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_0_conv"
    tensors = {f"{name}.lora_down.weight": torch.randn(4, 3, 3, 3), f"{name}.lora_up.weight": torch.randn(5, 4, 1, 1)}
    adapter = load(saved(tmp_path / "x.safetensors", tensors), base=Unet())
    assert (adapter.factors["down_blocks.0.conv"].kernel, adapter.factors["down_blocks.0.conv"].d_in) == ((3, 3), 27)
    tensors[f"{name}.lora_mid.weight"] = torch.randn(4, 4, 3, 3)
    with pytest.raises(UnsupportedError, match="LoCon with a core tensor"):
        load(saved(tmp_path / "y.safetensors", tensors))


def test_names_that_fit_two_modules_or_none(tmp_path: Path) -> None:
    twice = nn.Module()
    twice.a_b, twice.a = nn.ModuleDict({"c": nn.Linear(6, 5)}), nn.ModuleDict({"b_c": nn.Linear(6, 5)})
    adapter = load(
        saved(
            tmp_path / "x.safetensors", updates(("lora_unet_a_b_c.lora_down.weight", "lora_unet_a_b_c.lora_up.weight"))
        )
    )
    with pytest.raises(KeysError, match=r"'a_b\.c' or 'a\.b_c'"):
        resolve(adapter, twice)
    with pytest.raises(KeysError, match="no modules for 1 of 1 updates: 'a_b_c'"):
        resolve(adapter, Unet())


METHODS = ["x.hada_w1_a", "x.lokr_w1", "x.lokr_w2_a", "x.oft_blocks", "x.diff", "x.diff_b", "x.w_norm", "x.a1.weight"]


@pytest.mark.parametrize("key", METHODS)
def test_other_methods(key: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="which weft has not") as caught:
        load(saved(tmp_path / "x.safetensors", kohya() | {f"lora_unet_{key}": torch.ones(3)}))
    assert caught.value.key == f"lora_unet_{key}"


def test_broken_files(tmp_path: Path) -> None:
    tensors = kohya()
    lonely = {key: value for key, value in tensors.items() if "to_q.lora_up" not in key}
    with pytest.raises(KeysError, match="has no lora_B"):
        load(saved(tmp_path / "a.safetensors", lonely))
    with pytest.raises(FormatError, match="rank 4 and 3"):
        load(
            saved(
                tmp_path / "b.safetensors",
                tensors | {"lora_unet_down_blocks_0_attn1_to_q.lora_up.weight": torch.randn(5, 3)},
            )
        )
    with pytest.raises(FormatError, match=r"torch\.int32"):
        load(
            saved(
                tmp_path / "c.safetensors",
                tensors | {"lora_unet_down_blocks_0_attn1_to_q.lora_up.weight": torch.ones(5, 4, dtype=torch.int32)},
            )
        )
    with pytest.raises(KeysError, match="a second A"):
        load(
            saved(
                tmp_path / "d.safetensors", tensors | {"unet.down_blocks_0_attn1_to_q.lora_A.weight": torch.randn(4, 6)}
            )
        )
    strange = saved(tmp_path / "e.safetensors", tensors | {"whatever": torch.ones(2)})
    with pytest.raises(KeysError, match="belongs to nothing") as caught:
        load(strange)
    assert caught.value.key == "whatever"
    assert len(load(strange, allow_partial=True).sites) == 3


# loralib


def loralib() -> dict[str, Tensor]:
    return {
        "h.0.attn.lora_A": torch.randn(8, 6), "h.0.attn.lora_B": torch.randn(10, 4),  # fused: two parts of three, r = 4
        "h.0.mlp.lora_A": torch.randn(4, 6), "h.0.mlp.lora_B": torch.randn(5, 4), "h.0.mlp.bias": torch.randn(5),
        "wte.lora_A": torch.randn(4, 20), "wte.lora_B": torch.randn(6, 4),
    }  # fmt: skip


def test_loralib(tmp_path: Path) -> None:
    tensors = loralib()
    torch.save({"model_state_dict": tensors}, tmp_path / "x.pt")
    adapter = load(tmp_path / "x.pt", alpha=8, enable_lora=[True, False, True])
    assert adapter.sites == ("h.0.attn", "h.0.mlp", "wte")
    assert set(adapter.biases) == {"h.0.mlp.bias"}
    assert adapter.factors["wte"].kind == "embedding"
    torch.testing.assert_close(
        adapter.factors["h.0.mlp"].delta(), 2 * tensors["h.0.mlp.lora_B"] @ tensors["h.0.mlp.lora_A"]
    )
    fused = nn.functional.conv1d(tensors["h.0.attn.lora_A"][None], tensors["h.0.attn.lora_B"][..., None], groups=2)[0]
    delta = adapter.factors["h.0.attn"].delta()
    torch.testing.assert_close(delta[:5], 2 * fused[:5])
    torch.testing.assert_close(delta[10:], 2 * fused[5:])
    assert not delta[5:10].any()
    assert all(adapter.spec.scale_at(path) == pytest.approx(item.scale) for path, item in adapter.factors.items())


def test_loralib_says_too_little(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors", loralib())
    with pytest.raises(FormatError, match="pass alpha=…"):
        load(path)
    with pytest.raises(FormatError, match="Pass enable_lora=…") as caught:
        load(path, alpha=8)
    assert caught.value.key == "h.0.attn.lora_A"
    with pytest.raises(FormatError, match="3 of 3 fused parts"):
        load(path, alpha=8, enable_lora=[True, True, True])


def test_loralib_with_a_whole_state_dict(tmp_path: Path) -> None:
    tensors = {key: tensor for key, tensor in loralib().items() if "attn" not in key} | {
        "h.0.mlp.weight": torch.randn(5, 6)
    }
    path = saved(tmp_path / "x.safetensors", tensors)
    with pytest.raises(KeysError, match="lora_state_dict"):
        load(path, alpha=8)
    assert load(path, alpha=8, allow_partial=True).sites == ("h.0.mlp", "wte")


def test_kinds_that_shapes_dont_tell(tmp_path: Path) -> None:
    tensors = {"time_embed.lora_A": torch.randn(4, 6), "time_embed.lora_B": torch.randn(5, 4)}
    path = saved(tmp_path / "x.safetensors", tensors)
    assert load(path, alpha=4).factors["time_embed"].kind == "linear"
    assert load(path, alpha=4, base=Unet()).factors["time_embed"].kind == "embedding"


def test_pefts_weights_without_their_config(tmp_path: Path) -> None:
    tensors = updates(("base_model.model.q_proj.lora_A.weight", "base_model.model.q_proj.lora_B.weight"))
    path = saved(tmp_path / "x.safetensors", tensors)
    with pytest.raises(FormatError, match=r"adapter_config\.json, which says alpha"):
        load(path)


def test_weights_of_a_model_are_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="belongs to nothing"):
        load(saved(tmp_path / "x.safetensors", {"model.layers.0.weight": torch.ones(2, 2)}))
    options: dict[str, Any] = {"allow_partial": True}
    with pytest.raises(FormatError, match="no LoRA factors"):
        load(tmp_path / "x.safetensors", **options)
