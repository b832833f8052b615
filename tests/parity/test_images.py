"""Convolutions of every kind, and models with a text and a vision tower, as in PEFT."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tolerances import assert_close
from weft.core.bank import attach
from weft.spec import LoraSpec

peft = pytest.importorskip("peft", reason="needs peft to compare with")
pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONVS: list[dict[str, Any]] = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2, "groups": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": 3, "padding": 1, "groups": 4, "bias": False},
    {"kernel_size": 2, "padding": "same"},
]


class One(nn.Module):
    """A convolution under a name."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def twins(
    model: nn.Module, targets: list[str], rank: int = 4
) -> tuple[nn.Module, nn.Module, dict[str, tuple[Tensor, Tensor]]]:
    """The model with weft's and with peft's adapter, the same random factors in both; and pairs of them by name."""
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=rank, lora_alpha=6, target_modules=targets))
    bank = attach(model, {"default": LoraSpec(rank=rank, alpha=6, targets=targets)})
    theirs = {
        name.removeprefix("base_model.model."): tensor for name, tensor in wrapped.named_parameters() if "lora_" in name
    }
    pairs = {}
    for name, tensor in bank.named_parameters("default"):
        path = name.replace(".weft.default.lora_A", ".lora_A.default.weight").replace(
            ".weft.default.lora_B", ".lora_B.default.weight"
        )
        with torch.no_grad():
            tensor.normal_(0, 0.3)
            theirs[path].copy_(tensor.view_as(theirs[path]))
        pairs[path] = tensor, theirs[path]
    assert len(pairs) == len(theirs)
    return model, wrapped, pairs


def same_gradients(pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
    for path, (mine, theirs) in pairs.items():
        assert mine.grad is not None, path
        assert_close(mine.grad.reshape(theirs.shape), theirs.grad, what=path)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("conv", CONVS, ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()))
def test_a_convolution(dimensions: int, conv: dict[str, Any]) -> None:
    """Forward and gradients in float64. Dilation is left out: PEFT's A ignores it, and its output has another size."""
    mine, theirs, pairs = twins(One(KINDS[dimensions](4, 8, **conv)).double(), ["conv"])
    x = torch.randn(2, 4, *(9, 8, 7)[:dimensions], dtype=torch.float64)
    left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, wanted = mine(left), theirs(right)
    assert_close(out, wanted)
    grad = torch.randn_like(out)
    out.backward(grad)
    wanted.backward(grad)
    assert_close(left.grad, right.grad)
    same_gradients(pairs)


def both_towers(kind: str) -> nn.Module:
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {**small, "image_size": 8, "patch_size": 4}
    if kind == "clip":
        return CLIPModel(CLIPConfig(text_config=small | words, vision_config=vision, projection_dim=6))
    return SiglipModel(SiglipConfig(text_config=small | words, vision_config=vision))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_model_with_both_towers(kind: str) -> None:
    """Loss and gradients, with sites in the attention, the feed-forward, the patches and the projections."""
    targets = ["q_proj", "v_proj", "fc1", "patch_embedding"] + (["visual_projection"] if kind == "clip" else [])
    mine, theirs, pairs = twins(both_towers(kind).double().eval().requires_grad_(False), targets)
    assert any("vision" in path for path in pairs)
    assert any("text" in path for path in pairs)
    inputs = {"input_ids": torch.randint(2, 20, (3, 5)), "pixel_values": torch.randn(3, 3, 8, 8, dtype=torch.float64)}
    left, right = mine(**inputs, return_loss=True).loss, theirs(**inputs, return_loss=True).loss
    assert_close(left, right)
    left.backward()
    right.backward()
    same_gradients(pairs)
