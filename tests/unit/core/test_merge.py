"""Merge: a new plain model with the adapter in its weights, the base as it was, and an honest report."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import (
    ARCHITECTURES,
    batch_for,
    tiny_bert,
    tiny_cnn,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
)
from tests.tolerances import assert_close
from tests.unit.core.support import State, fill, made, outputs_of
from weft.adapter import Adapter, Provenance
from weft.core.bank import attach
from weft.core.factors import Factors
from weft.core.merge import dense_update, merge
from weft.core.sites import find_sites
from weft.errors import BaseMismatchError, KeysError, MergeError, NotFiniteError
from weft.spec import LoraSpec

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {}),
    "rslora, patterns": ("llama", {"rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"up_proj": 5}}),
    "dora": ("llama", {"dora": True}),
    "pissa": ("llama", {"init": "pissa"}),
    "Conv1D": ("gpt2", {"targets": ["c_attn", "c_proj", "wte"]}),
    "Conv1D, dora": ("gpt2", {"targets": ["c_attn", "c_fc"], "dora": True}),
    "embedding, dora": ("bert", {"targets": ["word_embeddings"], "dora": True}),
    "biases and a head": ("bert", {"targets": ["query", "dense"], "bias": "all", "save_modules": ["classifier"]}),
    "own biases": ("bert", {"targets": ["query", "dense"], "lora_bias": True}),
    "own biases and the base's": ("bert", {"targets": ["query"], "lora_bias": True, "bias": "lora_only"}),
    "t5": ("t5", {"targets": ["q", "v", "wi_0", "wo"]}),
    "experts": ("mixtral", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "conv": ("cnn", {"targets": ["conv1", "linear"]}),
    "conv, dora": ("cnn", {"targets": ["conv1"], "dora": True}),
    "attention": ("attention", {"targets": ["attn", "embed"], "target_parameters": ["mix"]}),
    "attention, own biases": ("attention", {"targets": ["attn"], "lora_bias": True}),
    "vit": ("vit", {"targets": "all-linear", "save_modules": ["classifier"]}),
}


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return outputs_of(model, batch)


@pytest.mark.parametrize("case", list(CASES))
def test_a_merged_model_is_the_attached_model(case: str) -> None:
    name, fields = CASES[case]
    model = ARCHITECTURES[name](dtype=torch.float64)
    before, batch = State(model), batch_for(model)
    base = logits(model, batch)
    adapter = made(model, LoraSpec(rank=4, alpha=3, **fields))
    with attach(model, {}) as bank:
        bank.load("a", adapter)
        bank.use("a")
        expected = logits(model, batch)
        merged, report = merge(model, adapter)
        assert torch.equal(logits(model, batch), expected), "attached, and still as it was"
    assert float((expected - base).abs().max()) > 1e-3
    assert_close(logits(merged, batch), expected)
    before.check()
    assert not any("weft" in path for path, _ in merged.named_modules())
    assert "_weft_bank" not in merged.__dict__
    assert [type(module) for module in merged.modules()] == [type(module) for module in model.modules()]
    assert {id(p) for p in merged.parameters()}.isdisjoint(id(p) for p in model.parameters())
    assert list(merged.state_dict()) == list(model.state_dict())
    assert not merged.training
    assert [site.path for site in report.sites] == list(adapter.sites)
    assert report.survived == pytest.approx(1.0, abs=1e-6)
    assert report.dtype == "float64"
    again, _ = merge(model, adapter)
    assert all(torch.equal(left, right) for left, right in zip(merged.parameters(), again.parameters(), strict=True))


def test_the_report_measures_what_was_written() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = tiny_llama(dtype=torch.float32)
        adapter = made(model, rank=4, size=1e-3)
        merged, report = merge(model, adapter, dtype=dtype)
        assert report.dtype == str(dtype).removeprefix("torch.")
        for row in report.sites:
            W = model.get_submodule(row.path).weight.detach().double()
            written = merged.get_submodule(row.path).weight.detach()
            assert written.dtype == dtype
            wanted = adapter.delta(row.path).double()
            got = written.double() - W.to(dtype).double()
            assert row.norm == pytest.approx(float(wanted.norm()), rel=1e-3)
            assert row.relative == pytest.approx(float(wanted.norm() / W.norm()), rel=1e-3)
            lost = float((got - wanted).norm() / wanted.norm())
            assert row.survived == pytest.approx(max(0.0, 1 - lost), abs=1e-2)
        assert 0 <= report.survived < 0.99
        assert report.worst == min(report.sites, key=lambda row: row.survived)


def test_a_large_update_survives_and_a_small_one_does_not() -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    shares = [merge(model, made(model, rank=4, size=size))[1].survived for size in (1.0, 1e-1, 1e-2, 1e-4)]
    assert shares[0] > 0.98
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.1
    assert all(0 <= share <= 1 for share in shares)


def test_a_zero_update_survives() -> None:
    model = tiny_llama()
    with attach(model, LoraSpec(rank=2)) as bank:
        adapter = bank.adapter()
    merged, report = merge(model, adapter)
    assert report.survived == 1.0
    assert all(torch.equal(left, right) for left, right in zip(merged.parameters(), model.parameters(), strict=True))


def test_the_report_for_people_and_machines() -> None:
    model = tiny_llama(tie=True)
    adapter = made(model, rank=2, targets=["lm_head", "q_proj"])
    _, report = merge(model, adapter)
    told = json.loads(json.dumps(report.to_dict()))
    assert told["untied"] == ["lm_head.weight"]
    assert len(told["sites"]) == 3
    assert "3 sites merged in float32" in report.summary()
    assert "no longer tied: lm_head.weight" in report.summary()
    assert report.worst is not None
    assert report.worst.path in report.summary()


# tied weights


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tied_weight_is_untied_in_the_copy(target: str) -> None:
    model = tiny_llama(tie=True, dtype=torch.float64)
    before, batch = State(model), batch_for(model)
    adapter = made(model, rank=2, targets=[target])
    with attach(model, {}) as bank:
        bank.load("a", adapter)
        bank.use("a")
        expected = logits(model, batch)
    merged, report = merge(model, adapter)
    assert_close(logits(merged, batch), expected)
    assert report.untied == ((f"model.{target}.weight",) if target == "embed_tokens" else ("lm_head.weight",))
    other = merged.model.embed_tokens if target == "lm_head" else merged.lm_head
    assert torch.equal(other.weight, model.lm_head.weight)
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    assert not merged.config.tie_word_embeddings
    assert model.config.tie_word_embeddings
    before.check()


def test_a_tie_that_nothing_touches_stays() -> None:
    model = tiny_gpt2(tie=True)
    merged, report = merge(model, made(model, rank=2, targets=["c_attn"]))
    assert report.untied == ()
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert merged.config.tie_word_embeddings
    lower, _ = merge(model, made(model, rank=2, targets=["c_attn"]), dtype=torch.bfloat16)
    assert lower.lm_head.weight is lower.transformer.wte.weight


def test_both_of_a_tied_pair_trained_whole_stay_one() -> None:
    model = tiny_llama(tie=True, dtype=torch.float64)
    batch = batch_for(model)
    adapter = made(model, rank=2, targets=["q_proj"], save_modules=["lm_head", "embed_tokens"])
    assert torch.equal(adapter.modules["lm_head"]["weight"], adapter.modules["model.embed_tokens"]["weight"])
    with attach(model, {}) as bank:
        bank.load("a", adapter)
        bank.use("a")
        expected = logits(model, batch)
    merged, report = merge(model, adapter)
    assert report.untied == ()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert_close(logits(merged, batch), expected)


def test_one_of_a_tied_pair_trained_whole_is_a_weight_of_its_own() -> None:
    model = tiny_llama(tie=True, dtype=torch.float64)
    batch = batch_for(model)
    adapter = made(model, rank=2, targets=["q_proj"], save_modules=["lm_head"])
    with attach(model, {}) as bank:
        bank.load("a", adapter)
        bank.use("a")
        expected = logits(model, batch)
    merged, report = merge(model, adapter)
    assert report.untied == ("lm_head.weight",)
    assert torch.equal(merged.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert_close(logits(merged, batch), expected)


@pytest.mark.parametrize("tie", [True, False])
def test_t5_whose_output_is_scaled_by_its_tie(tie: bool) -> None:
    model = tiny_t5(tie=tie, dtype=torch.float64)
    batch = batch_for(model)
    adapter = made(model, rank=2, targets=["lm_head", "q"])
    with attach(model, {}) as bank:
        bank.load("a", adapter)
        bank.use("a")
        expected = logits(model, batch)
    merged, _ = merge(model, adapter)
    assert_close(logits(merged, batch), expected)


def test_a_forward_that_asks_for_the_tie_is_refused() -> None:
    class Config:
        tie_word_embeddings = True

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = Config()
            self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids) * (0.5 if self.config.tie_word_embeddings else 1))

    model = Tied()
    adapter = made(model, rank=2, targets=["head"])
    with pytest.raises(MergeError, match=r"head\.weight: this weight is tied, and the forward of Tied"):
        merge(model, adapter)


# dtypes


def test_a_lower_dtype_is_everything_that_a_file_holds() -> None:
    model = tiny_llama()
    adapter = made(model, rank=2)
    merged, _ = merge(model, adapter, dtype=torch.bfloat16)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {b.dtype for b in merged.buffers()} == {b.dtype for b in model.buffers()}, (
        "rotary frequencies are computed, not stored"
    )
    norm, _ = merge(tiny_cnn(), made(tiny_cnn(), rank=2, targets=["conv1"]), dtype=torch.float64, allow_other_base=True)
    assert norm.bn1.running_mean.dtype == torch.float64


def test_half_precision_factors_are_summed_in_float32() -> None:
    model = tiny_llama()
    adapter = made(model, rank=4).map(Tensor.half)
    merged, _ = merge(model, adapter)
    for path in adapter.sites:
        item = adapter.factors[path]
        expected = model.get_submodule(path).weight.double() + item.scale * item.B.double() @ item.A.double()
        assert_close(merged.get_submodule(path).weight, expected, torch.float32)


# refusals


def test_grouped_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)).double()
    adapter = made(model, rank=4, targets=["0"])
    with pytest.raises(MergeError, match="reads channels across groups"):
        merge(model, adapter)
    item = adapter.factors["0"]
    A = item.A.view(4, 4, 9).clone()
    A[:2, 2:], A[2:, :2] = 0, 0
    inside = adapter.replace(factors={"0": Factors(A.flatten(1), item.B, item.scale, "conv", (3, 3), groups=2)})
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    with attach(model, {}) as bank:
        bank.load("a", inside)
        bank.use("a")
        expected = model(x)
    assert_close(merge(model, inside)[0](x), expected)


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_what_a_plain_weight_cannot_hold_is_refused_with_a_way_out() -> None:
    def adapted(model: nn.Module, **spec: Any) -> tuple[nn.Module, Adapter]:
        return model, made(model, LoraSpec(**({"rank": 2, "targets": "0"} | spec)))

    parametrised = nn.Sequential(nn.Linear(4, 4))
    nn.utils.parametrizations.spectral_norm(parametrised[0])
    cases = [
        (adapted(nn.Sequential(nn.Linear(4, 4, bias=False)), lora_bias=True), "no bias to take it"),
        (adapted(nn.Sequential(nn.Linear(4, 4)), lora_bias=True, dora=True), "under DoRA's magnitude"),
        (adapted(nn.Sequential(Own(4, 4))), "a forward of its own"),
        (adapted(parametrised), "computes its weight from other parameters"),
    ]
    for (model, adapter), text in cases:
        before = State(model)
        with pytest.raises(MergeError, match=text) as caught:
            merge(model, adapter)
        assert "0" in str(caught.value)
        assert "beside the base" in str(caught.value)
        before.check()


def test_nan_and_overflow_are_refused() -> None:
    model = tiny_llama()
    adapter = made(model, rank=2)
    path = adapter.sites[0]
    item = adapter.factors[path]
    broken = {**adapter.factors, path: Factors(item.A * torch.nan, item.B, 1.0)}
    with pytest.raises(NotFiniteError, match=path):
        merge(model, adapter.replace(factors=broken))
    huge = {**adapter.factors, path: Factors(item.A * 1e9, item.B, 1.0)}
    with pytest.raises(NotFiniteError, match="overflows torch.float16; merge with dtype=torch.float32"):
        merge(model, adapter.replace(factors=huge), dtype=torch.float16)
    endless = {**adapter.factors, path: Factors(item.A * 1e25, item.B * 1e25, 1.0)}
    with pytest.raises(NotFiniteError, match="merged weight has NaN or infinite"):
        merge(model, adapter.replace(factors=endless))


def test_another_base_is_refused() -> None:
    model, other = tiny_llama(), tiny_llama()
    adapter = made(model, rank=2)
    with pytest.raises(BaseMismatchError):
        merge(other, adapter)
    merge(other, adapter, allow_other_base=True)
    with pytest.raises(KeysError, match="the model has not"):
        merge(tiny_bert(), adapter.replace(provenance=Provenance()))


def test_a_model_with_an_attached_part_inside() -> None:
    outer = nn.ModuleDict({"inner": tiny_llama(dtype=torch.float64)})
    adapter = made(outer, rank=2, targets=["q_proj"])
    bank = attach(outer["inner"], {"other": LoraSpec(rank=2)})
    fill(bank)
    merged, _ = merge(outer, adapter)
    assert not any("weft" in path for path, _ in merged.named_modules())
    batch = batch_for(outer["inner"])
    bank.detach()
    plain, _ = merge(outer, adapter)
    assert torch.equal(logits(merged["inner"], batch), logits(plain["inner"], batch))


@pytest.mark.parametrize("name", ["llama", "gpt2", "cnn", "attention", "mixtral"])
def test_dense_updates_are_laid_out_like_the_weights(name: str) -> None:
    model = ARCHITECTURES[name]()
    spec = {
        "llama": {"targets": ["embed_tokens", "q_proj"]}, "gpt2": {"targets": ["c_fc"]}, "cnn": {"targets": ["conv1"]},
        "attention": {"targets": ["attn"], "target_parameters": ["mix"]}, "mixtral": {"target_parameters": ["experts.down_proj"]},
    }[name]  # fmt: skip
    adapter = made(model, LoraSpec(rank=2, **spec))
    for site in find_sites(model, adapter.spec).sites:
        update = dense_update(site, adapter.factors[site.path])
        assert update.shape == site.weight.shape
        assert_close(site.oriented(update), adapter.delta(site.path))


def test_merging_twice_adds_twice() -> None:
    """A merged model is a base like any other."""
    model = tiny_llama(dtype=torch.float64)
    one, two = made(model, rank=2), made(model, rank=3, targets=["q_proj"])
    merged, _ = merge(merge(model, one)[0], two, allow_other_base=True)
    path = two.sites[0]
    expected = model.get_submodule(path).weight + one.delta(path) + two.delta(path)
    assert_close(merged.get_submodule(path).weight, expected)
