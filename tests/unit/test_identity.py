"""Fingerprints of bases and digests of adapters: what they depend on, and what not."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from tests.models import tiny_bert, tiny_gpt2, tiny_llama
from weft import identity
from weft.identity import Fingerprint, digest_of, fingerprint, hash_tensor


def test_a_base_has_one_fingerprint() -> None:
    model = tiny_llama()
    first = fingerprint(model)
    assert first == fingerprint(model) == fingerprint(copy.deepcopy(model))
    assert first.differences(fingerprint(copy.deepcopy(model))) == []
    assert Fingerprint.from_dict(json.loads(json.dumps(first.to_dict()))) == first
    assert Fingerprint.from_dict(first.to_dict() | {"of a later version": 1}) == first
    assert first.architecture == "LlamaForCausalLM"
    assert first.dtype == "float32"
    assert not first.sampled


def test_mode_flags_names_and_files_do_not_count() -> None:
    model = tiny_llama()
    first = fingerprint(model)
    other = copy.deepcopy(model).train().requires_grad_(False)
    other.config._name_or_path = "elsewhere"
    other.config.use_cache = not other.config.use_cache
    other.set_attn_implementation("eager")
    assert first.differences(fingerprint(other)) == []


def test_what_differs_is_said() -> None:
    model = tiny_llama()
    first = fingerprint(model)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[3, 3] += 1e-3
    assert [text.split(":")[0] for text in fingerprint(changed).differences(first)] == ["bytes of the weights"]
    wider = tiny_llama(intermediate_size=56)
    found = [text.split(":")[0] for text in fingerprint(wider).differences(first)]
    assert found == ["configuration", "names or shapes of weights", "bytes of the weights"]
    assert "model class: BertForSequenceClassification here, LlamaForCausalLM there" in fingerprint(
        tiny_bert()
    ).differences(first)
    theta = copy.deepcopy(model)
    theta.config.rope_theta = 3.0
    assert [text.split(":")[0] for text in fingerprint(theta).differences(first)] == ["configuration"]
    swapped = copy.deepcopy(model)
    one, two = swapped.model.layers
    one.mlp.up_proj.weight, two.mlp.up_proj.weight = two.mlp.up_proj.weight, one.mlp.up_proj.weight
    assert fingerprint(swapped).weights != first.weights, "the place of a weight counts"


def test_one_base_at_two_precisions_is_recognised() -> None:
    model = tiny_llama()
    first, half = fingerprint(model), fingerprint(copy.deepcopy(model).bfloat16())
    assert first.differences(half) == ["dtype of the weights: float32 here, bfloat16 there"]
    assert first.rounded == half.rounded == half.weights
    assert fingerprint(tiny_llama().bfloat16()).rounded != first.rounded


def test_views_of_one_storage_are_told_apart() -> None:
    class Views(nn.Module):
        def __init__(self, tail: float) -> None:
            super().__init__()
            whole = torch.tensor([1.0, 2.0, 3.0, tail])
            self.register_buffer("a", whole[:2])
            self.register_buffer("b", whole)

    assert fingerprint(Views(4.0)).weights != fingerprint(Views(5.0)).weights


def test_tied_weights_are_hashed_once_and_count_by_name() -> None:
    tied = tiny_gpt2(tie=True)
    untied = copy.deepcopy(tied)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    assert fingerprint(tied).weights == fingerprint(untied).weights, "the same numbers for the same input"


def test_a_model_without_config_and_one_without_weights() -> None:
    plain = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    assert fingerprint(plain).config == ""
    assert fingerprint(nn.ReLU()).dtype == "none"
    meta = nn.Linear(3, 2, device="meta")
    assert fingerprint(meta).layout == fingerprint(nn.Linear(3, 2)).layout


def test_huge_models_are_sampled_alike_at_every_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "SAMPLE_ABOVE", 100)
    monkeypatch.setattr(identity, "_SAMPLE_BYTES", 64)
    model = tiny_llama()
    first, half = fingerprint(model), fingerprint(copy.deepcopy(model).bfloat16())
    assert first.sampled
    assert half.sampled
    assert first.rounded == half.rounded
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.lm_head.weight.mul_(2)
    assert fingerprint(changed).differences(first)
    full = Fingerprint(**(first.to_dict() | {"sampled": False}))
    assert full.differences(first), "a sample is not the whole"


def test_hashes_of_tensors() -> None:
    x = torch.randn(4, 6)
    assert hash_tensor(x) == hash_tensor(x.t().contiguous().t()), "row-major, whatever the strides"
    assert hash_tensor(x) != hash_tensor(x.t().contiguous())
    assert hash_tensor(torch.tensor(1.0)) == hash_tensor(torch.tensor([1.0]))
    assert hash_tensor(torch.empty(0)) == hash_tensor(torch.empty(0, 3))
    for dtype in (torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.float64, torch.int64):
        assert len(hash_tensor(x.to(dtype))) == 64
    assert hash_tensor(torch.empty(3, device="meta")) == "meta"


def test_digests() -> None:
    a, b = torch.randn(2, 3), torch.randn(3)
    first = digest_of({"a": a, "b": b}, {"rank": 2})
    assert first == digest_of({"b": b, "a": a}, {"rank": 2})
    others = [
        digest_of({"a": b, "b": a}, {"rank": 2}), digest_of({"a": a}, {"rank": 2}), digest_of({"a": a, "b": b}, {"rank": 3}),
        digest_of({"a": a.double(), "b": b}, {"rank": 2}), digest_of({"a": a.view(3, 2), "b": b}, {"rank": 2}),
        digest_of({"a": a, "c": b}, {"rank": 2}),
    ]  # fmt: skip
    assert len({first, *others}) == 7
