"""Which sites a spec finds, and what it says when it finds none."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import tiny_attention, tiny_bert, tiny_cnn, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_t5
from weft.core.sites import SiteMap, find_sites
from weft.errors import ShapeError, SpecError, TargetError
from weft.spec import LoraSpec

LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def paths(model: nn.Module, **spec: Any) -> list[str]:
    return [site.path for site in find_sites(model, LoraSpec(**spec)).sites]


def refusal(model: nn.Module, **spec: Any) -> str:
    with pytest.raises(TargetError) as caught:
        find_sites(model, LoraSpec(**spec))
    return str(caught.value)


class Inside(nn.Module):
    """A model within a model, as in multimodal wrappers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.language_model = model
        self.projector = nn.Linear(3, 4)


# what matches


def test_all_linear_takes_every_linear_layer_but_the_head() -> None:
    found = paths(tiny_llama())
    assert [path.rpartition(".")[2] for path in found] == [*LLAMA_LINEARS, *LLAMA_LINEARS]
    assert found[0] == "model.layers.0.self_attn.q_proj"


def test_all_linear_leaves_out_the_head_of_a_nested_model() -> None:
    found = paths(Inside(tiny_llama(layers=1)))
    assert "projector" in found
    assert not any("lm_head" in path for path in found)
    assert len(found) == len(LLAMA_LINEARS) + 1


def test_all_linear_takes_conv1d_and_subclasses_of_linear() -> None:
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict({"a": Own(3, 4), "b": nn.Linear(4, 5), "norm": nn.LayerNorm(5), "embed": nn.Embedding(3, 4)})
    assert paths(model) == ["a", "b"]
    assert {path.rpartition(".")[2] for path in paths(tiny_gpt2())} == {"c_attn", "c_proj", "c_fc"}


def test_sites_of_gpt2_are_stored_transposed() -> None:
    site = find_sites(tiny_gpt2(layers=1), LoraSpec(targets=["c_fc"])).sites[0]
    assert (site.kind, site.transposed, site.d_in, site.d_out) == ("linear", True, 32, 48)
    assert site.oriented(site.weight).shape == (48, 32)
    assert site.weight_path == "transformer.h.0.mlp.c_fc.weight"


def test_a_list_matches_whole_paths_and_dotted_suffixes_only() -> None:
    model = tiny_llama()
    assert paths(model, targets=["model.layers.1.self_attn.q_proj"]) == ["model.layers.1.self_attn.q_proj"]
    assert paths(model, targets=["mlp.up_proj"]) == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    assert "matches nothing" in refusal(model, targets=["_proj"])
    assert "matches nothing" in refusal(model, targets=["layers.0.self_attn"[1:]])


def test_a_string_is_a_regular_expression_over_the_whole_path() -> None:
    model = tiny_llama()
    assert paths(model, targets=r".*\.1\.self_attn\.[qv]_proj") == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    message = refusal(model, targets="q_proj")
    assert "['q_proj']" in message
    assert "regular expression" in message
    with pytest.raises(SpecError, match="no regular expression"):
        find_sites(model, LoraSpec(layers=[0], layers_pattern="(h"))


def test_the_order_is_the_models_not_the_lists() -> None:
    found = paths(tiny_llama(layers=1), targets=["down_proj", "q_proj", "embed_tokens"])
    assert found == ["model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]


def test_kinds_and_sizes() -> None:
    cnn = find_sites(tiny_cnn(), LoraSpec(rank=4, targets=["conv1", "conv2", "linear"])).sites
    assert [(s.kind, s.d_in, s.d_out, s.kernel, s.groups) for s in cnn] == [
        ("conv", 27, 8, (3, 3), 1), ("conv", 48, 12, (3, 2), 2), ("linear", 12, 3, (), 1),
    ]  # fmt: skip
    embed = find_sites(tiny_llama(), LoraSpec(targets=["embed_tokens"])).sites[0]
    assert (embed.kind, embed.d_in, embed.d_out, embed.transposed) == ("embedding", 64, 32, True)


def test_a_grouped_convolution_refuses_a_rank_that_does_not_divide() -> None:
    with pytest.raises(SpecError, match=r"2 groups.*rank_pattern=\{'conv2': 4\}"):
        find_sites(tiny_cnn(), LoraSpec(rank=3, targets=["conv2"]))
    assert find_sites(tiny_cnn(), LoraSpec(rank=3, targets=["conv2"], rank_pattern={"conv2": 4})).sites


def test_a_grouped_convolution_has_no_matrix() -> None:
    site = find_sites(tiny_cnn(), LoraSpec(rank=4, targets=["conv2"])).sites[0]
    with pytest.raises(ShapeError, match="2 groups"):
        site.oriented(site.weight)


def test_quantised_linears_keep_their_logical_size() -> None:
    class Packed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 4)
            self.weight = nn.Parameter(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)

    site = find_sites(nn.ModuleDict({"q": Packed()}), LoraSpec(targets=["q"])).sites[0]
    assert (site.d_in, site.d_out) == (6, 4)
    with pytest.raises(ShapeError, match="quantised"):
        site.oriented(site.weight)


def test_a_lazy_layer_has_to_run_first() -> None:
    model = nn.ModuleDict({"lazy": nn.LazyLinear(3)})
    assert "run one forward pass" in refusal(model, targets=["lazy"])


# attention


def test_multihead_attention_is_two_sites() -> None:
    sites = find_sites(tiny_attention(), LoraSpec(targets=["attn"])).sites
    assert [(s.path, s.owner, s.weight_name, s.kind, s.d_in, s.d_out, s.host) for s in sites] == [
        ("attn.in_proj_weight", "attn", "in_proj_weight", "attention", 16, 48, None),
        ("attn.out_proj", "attn.out_proj", "weight", "linear", 16, 16, "attn"),
    ]
    assert sites[0].weight is sites[0].module.in_proj_weight


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"targets": ["out_proj"]}, ["attn.out_proj"]),
        ({"targets": ["attn.in_proj_weight"]}, ["attn.in_proj_weight"]),
        ({"targets": [], "target_parameters": ["in_proj_weight"]}, ["attn.in_proj_weight"]),
        ({"targets": ["attn"], "exclude": ["out_proj"]}, ["attn.in_proj_weight"]),
        ({"targets": ["attn"], "exclude": ["in_proj_weight"]}, ["attn.out_proj"]),
        ({"targets": "all-linear"}, ["attn.in_proj_weight", "attn.out_proj", "head"]),
        ({"targets": "all-linear", "exclude": ["attn"]}, ["head"]),
        ({"targets": r"attn|head"}, ["attn.in_proj_weight", "attn.out_proj", "head"]),
    ],
)
def test_parts_of_an_attention(spec: dict[str, Any], expected: list[str]) -> None:
    assert paths(tiny_attention(), **spec) == expected


def test_an_attention_of_different_widths_has_no_in_proj() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, kdim=4, vdim=4)})
    assert "different widths" in refusal(model, targets=["attn"])
    assert paths(model, targets=["out_proj"]) == ["attn.out_proj"]
    found = find_sites(model, LoraSpec())
    assert [site.path for site in found.sites] == ["attn.out_proj"]
    assert "not adapted" in found.notes[0]


# bare parameters


def test_a_matrix_parameter_is_rows_by_columns() -> None:
    model = nn.ModuleDict({"mixer": nn.Module()})
    model["mixer"].register_parameter("mix", nn.Parameter(torch.zeros(5, 3)))
    site = find_sites(model, LoraSpec(targets=[], target_parameters=["mixer.mix"])).sites[0]
    assert (site.path, site.owner, site.weight_name, site.kind) == ("mixer.mix", "mixer", "mix", "parameter")
    assert (site.d_in, site.d_out, site.experts, site.transposed) == (3, 5, None, False)
    flipped = find_sites(model, LoraSpec(targets=[], target_parameters=["mix"], fan_in_fan_out=True)).sites[0]
    assert (flipped.d_in, flipped.d_out, flipped.transposed) == (5, 3, True)


def test_a_parameter_of_the_model_itself() -> None:
    site = find_sites(tiny_attention(), LoraSpec(targets=[], target_parameters=["mix"])).sites[0]
    assert (site.path, site.owner, site.weight_path) == ("mix", "", "mix")


@pytest.mark.parametrize("transposed", [False, True])
def test_stacked_experts(transposed: bool) -> None:
    class Experts(nn.Module):
        is_transposed = transposed

        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(4, 3, 5))

    model = nn.ModuleDict({"experts": Experts()})
    site = find_sites(model, LoraSpec(targets=[], target_parameters=["experts.gate_up_proj"])).sites[0]
    assert (site.experts, site.d_out, site.d_in) == ((4, 5, 3) if transposed else (4, 3, 5))
    assert site.oriented(site.weight).shape == (4, site.d_out, site.d_in)


def test_parameters_of_every_layer_and_of_chosen_layers() -> None:
    model = tiny_mixtral()
    found = paths(model, targets=["q_proj"], target_parameters=["experts.down_proj"])
    assert found == [
        "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.down_proj",
        "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.experts.down_proj",
    ]  # fmt: skip
    assert paths(model, targets=[], target_parameters=["experts.down_proj"], layers=1) == [
        "model.layers.1.mlp.experts.down_proj"
    ]


def test_all_linear_says_which_experts_it_leaves_out() -> None:
    found = find_sites(tiny_mixtral(), LoraSpec())
    assert not any(site.experts for site in found.sites)
    note = next(note for note in found.notes if "experts" in note)
    assert "target_parameters=['experts.down_proj', 'experts.gate_up_proj']" in note
    both = LoraSpec(target_parameters=["experts.down_proj", "experts.gate_up_proj"])
    assert not find_sites(tiny_mixtral(), both).notes


def test_wrong_parameters_are_refused() -> None:
    model = tiny_llama()
    assert "Did you mean" in refusal(tiny_mixtral(), targets=[], target_parameters=["experts.down_prj"])
    assert "(32,)" in refusal(model, targets=[], target_parameters=["norm.weight"])
    assert "adapted twice" in refusal(model, targets=["q_proj"], target_parameters=["q_proj.weight"])
    message = refusal(tiny_mixtral(), targets=["q_proj", "experts.down_proj"])
    assert "target_parameters" in message


# exclude, layers, modules to save


def test_exclude_by_name_and_by_expression() -> None:
    model = tiny_llama()
    assert not any("down_proj" in path for path in paths(model, exclude=["down_proj"]))
    assert {path.split(".")[2] for path in paths(model, exclude=r".*layers\.0\..*")} == {"1"}
    assert paths(model, targets=["q_proj"], exclude=["layers.0.self_attn.q_proj"]) == [
        "model.layers.1.self_attn.q_proj"
    ]


def test_excluding_a_container_says_how_to_exclude_what_is_in_it() -> None:
    message = refusal(tiny_llama(), exclude=["mlp"])
    assert "container" in message
    expression = message.partition("exclude='")[2].rpartition("'")[0].replace("\\\\", "\\")
    assert not any(".mlp." in path for path in paths(tiny_llama(), exclude=expression))


def test_layers_are_counted_by_the_first_number() -> None:
    model = tiny_llama(layers=3)
    assert paths(model, targets=["q_proj"], layers=[2, 0]) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 2)]
    assert len(paths(model, layers=1)) == len(LLAMA_LINEARS)
    assert paths(model, targets=["q_proj"], layers=1, layers_pattern="layers") == ["model.layers.1.self_attn.q_proj"]
    assert {path.split(".")[2] for path in paths(tiny_gpt2(), layers=1, layers_pattern="h")} == {"1"}


def test_a_whole_path_is_not_subject_to_layers() -> None:
    found = paths(tiny_llama(), targets=["model.layers.0.self_attn.q_proj", "v_proj"], layers=[1])
    assert found == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]


def test_a_layer_without_a_site_is_an_error() -> None:
    message = refusal(tiny_llama(), targets=["q_proj"], layers=[0, 7])
    assert "[7]" in message
    assert "[0, 1]" in message
    assert "outside layers=[0]" in refusal(tiny_llama(), targets=["q_proj", "embed_tokens"], layers=[0])
    assert "outside layers" in refusal(tiny_llama(), targets=["q_proj"], layers=[0], layers_pattern="blocks")
    with pytest.raises(SpecError, match="without layers"):
        find_sites(tiny_llama(), LoraSpec(layers_pattern="layers"))


def test_modules_to_save_are_never_sites() -> None:
    found = find_sites(tiny_bert(), LoraSpec(save_modules=["classifier"]))
    assert found.save_modules == ("classifier",)
    assert not any(site.path == "classifier" for site in found.sites)
    assert "classifier" in paths(tiny_bert())
    whole = find_sites(tiny_llama(), LoraSpec(save_modules=["layers.1.mlp"]))
    assert whole.save_modules == ("model.layers.1.mlp",)
    assert not any(site.path.startswith("model.layers.1.mlp") for site in whole.sites)
    assert "save_modules" in refusal(tiny_bert(), targets=["query", "classifier"], save_modules=["classifier"])


def test_only_modules_to_save() -> None:
    with pytest.raises(TargetError):
        find_sites(tiny_bert(), LoraSpec(targets=["nothing"], save_modules=["classifier"]))


# never silently nothing


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (
            {"targets": ["q_proj", "k_prj"]},
            ["'k_prj' matches nothing", "Did you mean 'k_proj'", "Linear layers here: 'q_proj'"],
        ),
        ({"targets": ["q_proj", "self_attn"]}, ["container", "LlamaAttention", "did you mean 'q_proj'"]),
        ({"targets": ["input_layernorm"]}, ["LlamaRMSNorm", "can't be adapted"]),
        ({"targets": r".*layers\.0\..*"}, ["can't be adapted", "LlamaAttention"]),
        ({"targets": r".*\.query"}, ["matches nothing"]),
        ({"targets": ["q_proj"], "exclude": ["q_proj"]}, ["'q_proj' yields nothing", "is excluded"]),
        ({"exclude": ["lm_hed"]}, ["exclude", "Did you mean 'lm_head'"]),
        ({"exclude": r".*vision.*"}, ["exclude", "matches nothing"]),
        ({"save_modules": ["scor"]}, ["save_modules", "'scor' matches nothing"]),
        ({"rank_pattern": {"q_prj": 4}}, ["rank_pattern", "'q_prj'", "Did you mean 'q_proj'"]),
        ({"alpha_pattern": {"self_attn": 4}}, ["alpha_pattern", "'self_attn'"]),
        ({"targets": ["lm_head"], "save_modules": ["lm_head"]}, ["'lm_head' yields nothing", "save_modules"]),
        ({"targets": "default"}, ["default", "weft.attach"]),
    ],
)
def test_a_partial_or_empty_match_is_an_error(spec: dict[str, Any], says: list[str]) -> None:
    message = refusal(tiny_llama(), **spec)
    for text in says:
        assert text in message, message


def test_every_entry_that_matched_nothing_is_named() -> None:
    message = refusal(tiny_llama(), targets=["q_prj", "up_proj", "gate"])
    assert "'q_prj'" in message
    assert "'gate'" in message
    assert "'up_proj' matches" not in message


def test_a_model_without_linear_layers() -> None:
    assert "no linear layers" in refusal(nn.ModuleDict({"norm": nn.LayerNorm(3)}))


def test_patterns_may_be_suffixes_or_expressions() -> None:
    assert find_sites(
        tiny_llama(), LoraSpec(rank_pattern={"q_proj": 2, r"layers\.1\..*": 4, "model.layers.0.mlp.up_proj": 3})
    ).sites


# shared weights and modules


def test_a_tied_head_is_said() -> None:
    found = find_sites(tiny_llama(tie=True), LoraSpec(targets=["q_proj", "embed_tokens"]))
    assert len(found.notes) == 1
    assert "'model.embed_tokens.weight' and 'lm_head.weight' are one tied weight" in found.notes[0]
    head = find_sites(tiny_llama(tie=True), LoraSpec(targets=["lm_head"]))
    assert "the update at 'lm_head' applies to this use only" in head.notes[0]
    saved = find_sites(tiny_llama(tie=True), LoraSpec(save_modules=["lm_head"]))
    assert "trained whole" in saved.notes[0]
    assert not find_sites(tiny_llama(tie=False), LoraSpec(targets=["embed_tokens"])).notes
    assert not find_sites(tiny_llama(tie=True), LoraSpec()).notes


def test_a_module_at_two_paths_is_adapted_once() -> None:
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"first": nn.ModuleDict({"proj": shared}), "second": nn.ModuleDict({"mix": shared})})
    for target in (["proj"], ["mix"], ["proj", "mix"], "all-linear"):
        found = find_sites(model, LoraSpec(targets=target))
        assert [site.path for site in found.sites] == ["first.proj"]
        assert "'second.mix'" in found.notes[0]
        assert "adapted once" in found.notes[0]


def test_t5_shares_its_embedding() -> None:
    found = find_sites(tiny_t5(), LoraSpec(targets=["shared", "q"]))
    assert found.sites[0].path == "shared"
    assert any("shared" in note for note in found.notes)


def test_a_module_that_contains_itself() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    model._modules["me"] = model
    assert paths(model) == ["a"]


# biases


def test_biases() -> None:
    def biases(model: nn.Module, **spec: Any) -> SiteMap:
        return find_sites(model, LoraSpec(**spec))

    bert = tiny_bert(layers=1)
    assert biases(bert).biases == ()
    only = biases(bert, targets=["query"], bias="lora_only").biases
    assert only == ("bert.encoder.layer.0.attention.self.query.bias",)
    every = biases(bert, targets=["query"], bias="all", save_modules=["classifier"]).biases
    expected = [
        name for name, _ in bert.named_parameters() if name.endswith(".bias") and not name.startswith("classifier")
    ]
    assert sorted(every) == sorted(expected)
    attention = biases(tiny_attention(), targets=["attn"], bias="lora_only").biases
    assert attention == ("attn.in_proj_bias", "attn.out_proj.bias")
    none = biases(tiny_llama(), bias="all")
    assert none.biases == ()
    assert "trains nothing" in none.notes[0]


def test_fan_in_fan_out_without_effect_is_said() -> None:
    assert not find_sites(tiny_gpt2(), LoraSpec(fan_in_fan_out=True)).notes
    found = find_sites(tiny_llama(), LoraSpec(fan_in_fan_out=True))
    assert not any(site.transposed for site in found.sites)
    assert "no effect" in found.notes[0]


# running models


def test_what_is_attached_already_is_no_target() -> None:
    model = tiny_llama(layers=1)
    expected = paths(model)
    layer = model.get_submodule(expected[0])
    layer.__class__ = type("Linear", (nn.Linear,), {"_weft_site": True})
    layer.add_module("weft", nn.ModuleDict({"mine": nn.Linear(2, 2)}))
    assert paths(model) == expected
    assert paths(model, targets=r".*q_proj") == expected[:1]


def test_a_weight_that_is_shadowed_by_a_property_is_the_bases() -> None:
    model = tiny_mixtral(layers=1)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    base: Tensor = experts.down_proj
    experts.__class__ = type(
        "Experts", (type(experts),), {"down_proj": property(lambda self: None), "_weft_site": True}
    )
    assert find_sites(model, LoraSpec(targets=[], target_parameters=["down_proj"])).sites[0].weight is base


def test_finding_is_fast() -> None:
    with torch.device("meta"):
        model = tiny_llama_on_meta(32)
    spec = LoraSpec(targets=LLAMA_LINEARS)
    taken = []
    for _ in range(5):
        start = time.process_time()
        assert len(find_sites(model, spec).sites) == 224
        taken.append(time.process_time() - start)
    assert min(taken) < 0.025


def tiny_llama_on_meta(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2, vocab_size=8
    )
    return LlamaForCausalLM(config)
