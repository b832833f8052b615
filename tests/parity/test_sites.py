"""The same targets mean the same sites in weft and in PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from tests.models import tiny_bert, tiny_cnn, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_t5, tiny_vit
from weft.core.sites import find_sites
from weft.spec import LoraSpec

peft = pytest.importorskip("peft", reason="needs peft to compare with")

CASES: list[tuple[Callable[..., nn.Module], dict[str, Any]]] = [
    (tiny_llama, {"targets": "all-linear"}),
    (tiny_llama, {"targets": ["q_proj", "v_proj"]}),
    (tiny_llama, {"targets": ["layers.0.self_attn.q_proj", "mlp.up_proj", "embed_tokens", "lm_head"]}),
    (tiny_llama, {"targets": r".*\.(q|k)_proj"}),
    (tiny_llama, {"targets": ["q_proj", "down_proj"], "layers": [1]}),
    (tiny_llama, {"targets": ["q_proj", "model.layers.0.mlp.down_proj"], "layers": [1], "layers_pattern": "layers"}),
    (tiny_llama, {"targets": "all-linear", "exclude": ["down_proj", "layers.0.mlp.up_proj"]}),
    (tiny_llama, {"targets": "all-linear", "exclude": r".*layers\.0\..*"}),
    (tiny_llama, {"targets": "all-linear", "save_modules": ["lm_head"]}),
    (tiny_gpt2, {"targets": "all-linear"}),
    (tiny_gpt2, {"targets": ["c_attn", "wte"]}),
    (tiny_bert, {"targets": "all-linear"}),
    (tiny_bert, {"targets": ["query", "value"], "save_modules": ["classifier"]}),
    (tiny_t5, {"targets": "all-linear"}),
    (tiny_t5, {"targets": ["q", "v", "wo"]}),
    (tiny_vit, {"targets": "all-linear"}),
    (tiny_cnn, {"targets": ["conv1", "conv2"]}),
    (tiny_mixtral, {"targets": "all-linear"}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "spec"), CASES)
def test_the_same_modules_are_adapted(make: Callable[..., nn.Module], spec: dict[str, Any]) -> None:
    model = make()
    names = {
        "targets": "target_modules", "exclude": "exclude_modules", "layers": "layers_to_transform", "layers_pattern": "layers_pattern",
        "save_modules": "modules_to_save",
    }  # fmt: skip
    config = peft.LoraConfig(r=4, **{names[key]: value for key, value in spec.items()})
    theirs = peft.get_peft_model(copy.deepcopy(model), config).base_model.targeted_module_names
    found = find_sites(model, LoraSpec(rank=4, **spec))
    assert [site.path for site in found.sites] == theirs


@pytest.mark.filterwarnings("ignore")
def test_the_same_parameters_are_adapted() -> None:
    model = tiny_mixtral()
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=names)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).base_model.targeted_parameter_names
    found = find_sites(model, LoraSpec(rank=4, targets=[], target_parameters=names)).sites
    assert sorted(site.path for site in found) == sorted(theirs)
    wrapped = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=4, target_modules=[], target_parameters=names[:1])
    )
    layer = wrapped.get_submodule("base_model.model.model.layers.0.mlp.experts")
    site = next(site for site in found if site.path == "model.layers.0.mlp.experts.gate_up_proj")
    assert (site.d_in, site.d_out, site.experts) == (layer.in_features, layer.out_features, layer.num_experts)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_the_same_biases_are_trained(bias: str) -> None:
    model = tiny_bert()
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, target_modules=["query"], bias=bias))
    trained = {
        name for name, parameter in wrapped.named_parameters() if parameter.requires_grad and name.endswith("bias")
    }
    theirs = {name.removeprefix("base_model.model.").replace(".base_layer", "") for name in trained}
    assert set(find_sites(model, LoraSpec(rank=4, targets=["query"], bias=bias)).biases) == theirs
