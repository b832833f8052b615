"""Usual sites: every row of the table against the architecture itself, and what is said where there is none."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from tests.models import tiny_cnn, tiny_gpt2, tiny_llama, tiny_mixtral
from weft.errors import TargetError
from weft.models.targets import DEFAULT_TARGETS, resolve_default
from weft.spec import LoraSpec

DEFAULT = LoraSpec(rank=2, targets="default")
NEEDS_MORE = {  # configurations whose own defaults build no model
    "ministral": {"head_dim": 32},
    "hunyuan_v1_dense": {"head_dim": 32},
    "nemotron": {"num_key_value_heads": 4, "num_attention_heads": 4},
}
COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
)


def on_meta(kind: str) -> nn.Module:
    """A model of the architecture with one or two layers, without memory."""
    transformers = pytest.importorskip("transformers")
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers does not know {kind!r}")
    config: Any = transformers.CONFIG_MAPPING[kind](**NEEDS_MORE.get(kind, {}))
    for name in COUNTS:
        if isinstance(getattr(config, name, None), int) and name not in type(config).attribute_map:
            setattr(config, name, 2)
    if "layer_types" in vars(config) and config.layer_types:
        config.layer_types = [config.layer_types[0], config.layer_types[-1]]
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config)


@pytest.mark.parametrize("kind", DEFAULT_TARGETS)
def test_every_row_matches_its_architecture(kind: str) -> None:
    model = on_meta(kind)
    targets = resolve_default(model, DEFAULT).targets
    assert isinstance(targets, tuple)
    matched = {path for path, _ in model.named_modules() if path.endswith(tuple(f".{name}" for name in targets))}
    assert len(matched) >= 4
    unwanted = re.compile(r"pooler|lm_head|norm|router|classifier|embeddings|patch")
    assert [path for path in matched if unwanted.search(path)] == []


def test_a_name_is_left_out_where_the_variant_has_it_not() -> None:
    assert resolve_default(tiny_mixtral(), DEFAULT).targets == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert resolve_default(tiny_llama(), DEFAULT).targets == DEFAULT_TARGETS["llama"]


def test_other_targets_stay_as_they_are() -> None:
    spec = LoraSpec(targets=["c_attn"])
    assert resolve_default(tiny_gpt2(), spec) is spec


def test_the_rest_of_the_spec_is_kept() -> None:
    spec = LoraSpec(rank=3, alpha=5, targets="default", dora=True)
    assert resolve_default(tiny_gpt2(), spec) == spec.replace(targets=("c_attn", "c_proj", "c_fc"))


def test_unknown_model_lists_its_layers() -> None:
    with pytest.raises(TargetError, match=r"TinyCNN.*'conv1', 'conv2', 'linear'"):
        resolve_default(tiny_cnn(), DEFAULT)


def test_unknown_architecture_lists_its_layers_and_a_near_name() -> None:
    model = tiny_llama()
    model.config.model_type = "qwen99"
    with pytest.raises(TargetError, match=r"'qwen99'.*Did you mean 'qwen.*'q_proj', 'k_proj'"):
        resolve_default(model, DEFAULT)


def test_an_architecture_with_other_names_says_so() -> None:
    model = tiny_cnn()
    model.config = type("Config", (), {"model_type": "llama"})()
    with pytest.raises(TargetError, match=r"none of the usual 'q_proj'.*'conv1'"):
        resolve_default(model, DEFAULT)


def test_a_model_of_several_parts_is_adapted_in_its_language_model() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        vision = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "patch_size": 8,
        }
        text = {
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        config = transformers.LlavaConfig(
            vision_config={"model_type": "clip_vision_model", "image_size": 16, "vocab_size": 32, **vision},
            text_config={"vocab_size": 64, **text},
        )
        model = transformers.AutoModelForImageTextToText.from_config(config)
    targets = resolve_default(model, DEFAULT).targets
    assert isinstance(targets, str)
    matched = [path for path, _ in model.named_modules() if re.fullmatch(targets, path)]
    assert len(matched) == 7
    assert all("language_model.layers.0." in path for path in matched)
