"""Attach, add, load, use, drop, detach: what a bank promises about the model it hangs on."""

from __future__ import annotations

import contextlib
import copy
import io
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import (
    ARCHITECTURES,
    TinyAttention,
    batch_for,
    tiny_bert,
    tiny_cnn,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
)
from tests.tolerances import assert_close
from tests.unit.core.support import State, fill, grads_of, made, outputs_of, spread
from weft.adapter import Adapter, Provenance
from weft.core.bank import Bank, attach
from weft.core.factors import Factors
from weft.errors import BankError, BaseMismatchError, KeysError, NotFiniteError, ShapeError, SpecError, TargetError
from weft.identity import fingerprint
from weft.spec import LoraSpec

SPECS: dict[str, dict[str, Any]] = {
    "llama": {"targets": "all-linear"},
    "gpt2": {"targets": ["c_attn", "c_fc", "c_proj", "wte"]},
    "bert": {"targets": ["query", "value", "dense", "word_embeddings"], "save_modules": ["classifier"], "bias": "all"},
    "t5": {"targets": ["q", "k", "v", "wi_0", "wo", "shared"]},
    "vit": {"targets": ["query", "value", "q_proj", "v_proj", "projection", "fc1"][2:], "bias": "lora_only"},
    "mixtral": {"targets": ["q_proj", "v_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "cnn": {"targets": ["conv1", "conv2", "linear"], "bias": "all"},
    "attention": {"targets": ["attn", "embed", "head"], "target_parameters": ["mix"], "bias": "lora_only"},
}


def tiny(name: str, **settings: Any) -> nn.Module:
    return ARCHITECTURES[name](**settings)


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return outputs_of(model, batch)


@pytest.fixture(params=list(SPECS))
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_fresh_adapter_changes_nothing_and_detach_leaves_nothing(architecture: str) -> None:
    model = tiny(architecture)
    before, batch = State(model), batch_for(model)
    expected = logits(model, batch)
    bank = attach(model, {"mine": LoraSpec(rank=4, **SPECS[architecture])})
    before.check_bytes()
    assert bank.current == "mine"
    assert_close(logits(model, batch), expected, torch.float32)
    fill(bank)
    assert float((logits(model, batch) - expected).abs().max()) > 1e-3
    before.check_bytes()
    bank.use(None)
    assert torch.equal(logits(model, batch), expected)
    bank.detach()
    before.check()
    assert torch.equal(logits(model, batch), expected)
    bank.detach()


def test_an_attached_model_is_the_dense_model(architecture: str) -> None:
    model = tiny(architecture, dtype=torch.float64)
    if architecture == "cnn":
        model.conv2 = nn.Conv2d(8, 12, (3, 2), stride=2, padding=(2, 1), dilation=2).double()
    spec = {**SPECS[architecture], "bias": "none", "save_modules": []}
    batch = batch_for(model)
    adapter = made(model, LoraSpec(rank=4, **spec))
    expected = logits(spread(model, adapter), batch)
    with attach(model, {}) as bank:
        bank.load("made", adapter)
        bank.use("made")
        assert_close(logits(model, batch), expected, torch.float64)


def test_a_snapshot_loads_into_the_same_function(architecture: str) -> None:
    model = tiny(architecture)
    before, batch = State(model), batch_for(model)
    with attach(model, {"mine": LoraSpec(rank=4, alpha=8, **SPECS[architecture])}, seed=3) as bank:
        fill(bank)
        trained = logits(model, batch)
        adapter = bank.adapter("mine")
        snapshot = {name: tensor.clone() for name, tensor in adapter.tensors().items()}
        assert (adapter.provenance.base == fingerprint(copy_of_base(model))) == (not adapter.modules), (
            "without a replaced head"
        )
        fill(bank)
        assert all(torch.equal(tensor, snapshot[name]) for name, tensor in adapter.tensors().items()), (
            "a value is immutable"
        )
        bank.load("again", adapter)
        bank.use("again")
        assert torch.equal(logits(model, batch), trained)
        assert bank.adapter("again") == adapter
        assert not any(parameter.requires_grad for _, parameter in bank.named_parameters("again"))
    with attach(model, {}) as bank:
        bank.load("later", adapter, trainable=True)
        bank.use("later")
        assert torch.equal(logits(model, batch), trained)
        assert all(parameter.requires_grad for _, parameter in bank.named_parameters("later"))
    before.check()


def copy_of_base(model: nn.Module) -> nn.Module:
    clone = copy.deepcopy(model)
    clone.__dict__["_weft_bank"].detach()
    return clone


def test_only_the_adapters_parameters_train(architecture: str) -> None:
    model = tiny(architecture).train()
    before = State(model)
    bank = attach(model, {"mine": LoraSpec(rank=4, **SPECS[architecture])})
    fill(bank)
    mine = dict(bank.named_parameters("mine"))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(mine)
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in mine.items())
    optimizer = torch.optim.AdamW(mine.values(), 1e-2)
    outputs_of(model, batch_for(model)).square().sum().backward()
    used = [name for name, parameter in mine.items() if parameter.grad is None]
    assert used == ([name for name in used if "shared" in name] if architecture == "t5" else []), (
        "all of them get gradients"
    )
    optimizer.step()
    before.check_bytes()
    bank.detach()
    before.check()


def test_adapters_side_by_side_do_not_notice_each_other() -> None:
    model = tiny_llama()
    batch = batch_for(model)
    one, two = (
        made(model, rank=2, targets=["q_proj", "down_proj"]),
        made(model, rank=5, targets="all-linear", rslora=True),
    )
    alone = {}
    for name, adapter in (("one", one), ("two", two)):
        with attach(model, {}) as bank:
            bank.load(name, adapter)
            bank.use(name)
            alone[name] = logits(model, batch)
    base = logits(model, batch)
    bank = attach(model, {})
    bank.load("one", one)
    bank.load("two", two)
    assert bank.names == ("one", "two")
    assert bank.current is None
    for name in ("two", "one", None, "two", None, "one"):
        bank.use(name)
        assert bank.current == name
        assert torch.equal(logits(model, batch), base if name is None else alone[name])
    bank.drop("one")
    assert bank.current is None
    assert torch.equal(logits(model, batch), base)
    bank.use("two")
    assert torch.equal(logits(model, batch), alone["two"])
    bank.load("one", one)
    bank.use("one")
    assert torch.equal(logits(model, batch), alone["one"])


def test_using_another_adapter_leaves_requires_grad_and_the_optimizers_tensors() -> None:
    model = tiny_llama()
    bank = attach(model, {"a": LoraSpec(rank=2), "b": LoraSpec(rank=3)})
    fill(bank)
    held = {name: dict(bank.named_parameters(name)) for name in "ab"}
    optimizer = torch.optim.SGD([*held["a"].values()], 0.1)
    for use in ("b", None, "a"):
        bank.use(use)
        for name in "ab":
            now = dict(bank.named_parameters(name))
            assert all(now[key] is parameter and parameter.requires_grad for key, parameter in held[name].items())
    outputs_of(model, batch_for(model)).sum().backward()
    assert all(parameter.grad is None for parameter in held["b"].values())
    frozen = {key: parameter.detach().clone() for key, parameter in held["b"].items()}
    optimizer.step()
    assert all(torch.equal(parameter, frozen[key]) for key, parameter in held["b"].items())


# names and mistakes


@pytest.mark.parametrize("name", ["a.b", "train", "forward", "weft", "50 %", "x:biases", "ünï/code", "T", "0"])
def test_any_name_will_do(name: str) -> None:
    model = tiny_bert()
    batch = batch_for(model)
    spec = LoraSpec(rank=2, targets=["query"], bias="all", save_modules=["classifier"])
    with attach(model, {name: spec, "x": spec}) as bank:
        fill(bank)
        first = logits(model, batch)
        names = [leaf for leaf, _ in bank.named_parameters(name)]
        assert set(names) <= set(dict(model.named_parameters()))
        assert set(names).isdisjoint(leaf for leaf, _ in bank.named_parameters("x"))
        model.train().eval()
        assert torch.equal(logits(model, batch), first)
        bank.drop(name)
        bank.use("x")
        assert not torch.equal(logits(model, batch), first)


@pytest.mark.parametrize("name", ["", "a\nb", 3, None])
def test_names_that_are_none(name: Any) -> None:
    with pytest.raises(BankError, match="name is non-empty text"):
        attach(tiny_llama(), {name: LoraSpec(rank=2)})


def test_mistakes_are_named() -> None:
    model = tiny_llama()
    before = State(model)
    bank = attach(model, {"first": LoraSpec(rank=2), "second": LoraSpec(rank=2)})
    with pytest.raises(BankError, match="has an adapter 'first' already"):
        bank.add("first", LoraSpec(rank=2))
    with pytest.raises(BankError, match="has an adapter 'first' already"):
        bank.load("first", bank.adapter("second"))
    with pytest.raises(BankError, match="Did you mean 'first'"):
        bank.use("frist")
    with pytest.raises(BankError, match="no adapter 'other'"):
        bank.drop("other")
    with pytest.raises(BankError, match="which adapter"):
        bank.adapter()
    with pytest.raises(BankError, match="bank.add"):
        attach(model, LoraSpec())
    with pytest.raises(BankError, match="the module 'model' of this model|has a bank already"):
        attach(nn.ModuleDict({"model": model}), LoraSpec())
    with pytest.raises(BankError, match="belongs to a bank already"):
        attach(model.model, LoraSpec())
    assert bank.names == ("first", "second")
    bank.detach()
    before.check()
    with pytest.raises(BankError, match="was detached"):
        bank.add("third", LoraSpec())
    with pytest.raises(TargetError, match="Did you mean 'q_proj'"):
        attach(model, LoraSpec(targets=["qproj"]))
    before.check()


def test_a_failing_second_spec_leaves_the_model_as_it_was() -> None:
    model = tiny_llama()
    before = State(model)
    with pytest.raises(TargetError):
        attach(model, {"good": LoraSpec(rank=2), "bad": LoraSpec(targets=["nothing"])})
    before.check()
    with pytest.raises(SpecError), attach(model, {"good": LoraSpec(rank=2)}) as bank:
        bank.add("bad", LoraSpec(init="eva"))
    before.check()


def test_a_forward_on_the_object_is_refused_and_everything_undone() -> None:
    """As accelerate's hooks and monkey patches do it; the site is in the middle, so that the first ones stand already."""
    model = tiny_llama()
    layer = model.model.layers[1].self_attn.v_proj
    layer.forward = layer.forward
    before = State(model)
    with pytest.raises(BankError, match=r"model\.layers\.1\.self_attn\.v_proj.*replaced on the object"):
        attach(model, LoraSpec(rank=2))
    before.check()
    bank = attach(model, {"fits": LoraSpec(rank=2, exclude=["layers.1.self_attn.v_proj"])})
    with pytest.raises(BankError, match="replaced on the object"):
        bank.add("doesn't", LoraSpec(rank=2))
    assert bank.names == ("fits",)
    batch = batch_for(model)
    fill(bank)
    logits(model, batch)
    bank.detach()
    before.check()


def test_accelerates_hooks_are_refused_with_a_way_out() -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate's hooks")
    model = tiny_llama()
    accelerate.hooks.add_hook_to_module(model.model.layers[0].mlp.up_proj, accelerate.hooks.ModelHook())
    with pytest.raises(BankError, match=r"attach first and dispatch after"):
        attach(model, LoraSpec(rank=2))
    accelerate.hooks.remove_hook_from_module(model.model.layers[0].mlp.up_proj)


def test_a_block_whose_forward_is_patched_is_left_alone() -> None:
    model = tiny_llama(dtype=torch.float64)
    block = model.model.layers[0].mlp
    block.forward = lambda x: 2 * type(block).forward(block, x)
    batch = batch_for(model)
    adapter = made(model, rank=2)
    expected = logits(spread(model, adapter), batch)
    assert not torch.equal(expected, logits(model, batch))


# what a file could bring


def test_adapters_that_do_not_fit_are_refused_before_anything_happens() -> None:
    model = tiny_llama()
    good = made(model, rank=2, targets=["q_proj", "v_proj"]).replace(provenance=Provenance())
    path = good.sites[0]
    item = good.factors[path]

    def changed(**parts: Any) -> Adapter:
        factors = {**good.factors, path: Factors(**{"A": item.A, "B": item.B, "scale": item.scale, **parts})}
        return good.replace(factors=factors)

    nan = item.B.clone()
    nan[3, 1] = torch.nan
    cases: list[tuple[Adapter, type[Exception], str]] = [
        (changed(A=item.A[:, :-1]), ShapeError, "made for another model"),
        (changed(B=item.B[:-1]), ShapeError, "made for another model"),
        (changed(B=nan), NotFiniteError, "lora_B has 1 of 64 values"),
        (changed(scale=float("inf")), NotFiniteError, "scale is inf"),
        (good.replace(factors={p: f for p, f in good.factors.items() if p != path}), KeysError, "no factors for 1 of them"),
        (good.replace(factors={**good.factors, "model.layers.7.self_attn.q_proj": item}), KeysError, "model.layers.7.self_attn.q_proj"),
        (good.replace(modules={"model.nrom": {"weight": torch.ones(32)}}), KeysError, "Did you mean 'model.norm'"),
        (good.replace(modules={"model.norm": {"bias": torch.ones(32)}}), KeysError, "differ in 'bias', 'weight'"),
        (good.replace(modules={"model.norm": {"weight": torch.ones(31)}}), ShapeError, "(31,) in the adapter"),
        (good.replace(modules={"model.norm": {"weight": torch.full((32,), torch.nan)}}), NotFiniteError, "model.norm.weight"),
        (good.replace(biases={"model.norm.bias": torch.ones(32)}), KeysError, "model.norm.bias"),
        (good.replace(modules={path: {"weight": torch.zeros(32, 32)}}), KeysError, "also replaces whole"),
    ]  # fmt: skip
    before = State(model)
    with attach(model, {}) as bank:
        for adapter, error, text in cases:
            with pytest.raises(error) as caught:
                bank.load("x", adapter)
            assert text in str(caught.value)
            assert bank.names == ()
        bank.load("x", good)
    before.check()


def test_a_part_is_loaded_only_on_demand() -> None:
    model = tiny_llama()
    good = made(model, rank=2, targets=["q_proj", "v_proj"])
    part = good.replace(factors=dict(list(good.factors.items())[:2]))
    with attach(model, {}) as bank:
        with pytest.raises(KeysError, match="allow_partial=True"):
            bank.load("part", part)
        bank.load("part", part, allow_partial=True)
        assert bank.adapter("part").sites == part.sites


def test_another_base_is_refused_and_the_message_says_what_differs() -> None:
    model, other, wider = tiny_llama(), tiny_llama(), tiny_llama(layers=3)
    adapter = made(model, rank=2, targets=["q_proj"])
    for base, text in ((other, "bytes of the weights"), (wider, "configuration"), (wider, "names or shapes")):
        with attach(base, {}) as bank:
            with pytest.raises(BaseMismatchError, match=text):
                bank.load("x", adapter)
            bank.load("x", adapter, allow_other_base=True, allow_partial=True)
    unknown = adapter.replace(provenance=Provenance())
    with attach(other, {}) as bank:
        bank.load("x", unknown)
    lower = copy.deepcopy(model).bfloat16()
    with attach(lower, {}) as bank:
        bank.load("x", adapter)
    with (
        attach(copy.deepcopy(other).bfloat16(), {}) as bank,
        pytest.raises(BaseMismatchError, match="values of the weights"),
    ):
        bank.load("x", adapter)


def test_features_that_a_layer_cannot_have_are_refused_at_load_too() -> None:
    model = TinyAttention()
    spec = {"rank": 2, "targets": ["attn"], "target_parameters": ["mix"]}
    good = made(model, LoraSpec(**spec))
    for path in ("attn.in_proj_weight", "mix"):
        item = good.factors[path]
        for part in ("magnitude", "bias"):
            if part == "bias" and path != "mix":
                continue
            wrong = Factors(item.A, item.B, item.scale, item.kind, **{part: torch.ones(item.d_out)})
            with attach(model, {}) as bank, pytest.raises(SpecError, match="is not defined for"):
                bank.load("x", good.replace(factors={**good.factors, path: wrong}))
    for fields in ({"dora": True}, {"dropout": 0.1}, {"lora_bias": True}):
        with pytest.raises(SpecError, match=next(iter(fields))):
            attach(model, LoraSpec(**spec, **fields))
    dropped = good.replace(spec=good.spec.replace(dropout=0.1))
    with attach(model, {}) as bank:
        bank.load("use", dropped)
        with pytest.raises(SpecError, match="dropout"):
            bank.load("train", dropped, trainable=True)


def test_an_embedding_that_does_more_than_look_up_is_refused() -> None:
    class Positions(nn.Embedding):
        def forward(self, mask: Tensor) -> Tensor:
            return super().forward(mask.long().cumsum(1) + 1)

    model = nn.Sequential(Positions(8, 4))
    before = State(model)
    with pytest.raises(SpecError, match="an embedding that does more than look up rows"):
        attach(model, LoraSpec(targets=["0"]))
    before.check()


# paths are exact


def test_paths_of_an_adapter_are_exact_not_suffixes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)))
    adapter = made(model, rank=2, targets="0")
    with attach(model, {}) as bank:
        bank.load("x", adapter)
        assert bank.adapter("x").sites == ("0",)


@pytest.mark.parametrize(("groups", "rank"), [(3, 3), (3, 6), (2, 2)])
def test_grouped_convolutions_of_any_rank_load(groups: int, rank: int) -> None:
    model = nn.Sequential(nn.Conv2d(6, 6, 3, groups=groups)).double()
    adapter = made(model, rank=rank, targets=["0"])
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    with attach(model, {}) as bank:
        bank.load("x", adapter)
        bank.use("x")
        item = adapter.factors["0"]
        delta = (item.scale * item.B @ item.A).view(6, 6, 3, 3)
        expected = nn.functional.conv2d(x, model[0].weight, model[0].bias, groups=groups) + nn.functional.conv2d(
            x, delta
        )
        assert_close(model(x), expected)


def test_a_module_at_two_paths_is_one_site() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.two = self.one

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    model = Shared()
    before = State(model)
    x = torch.randn(3, 4)
    adapter = made(model, rank=2, targets=["two"])
    assert adapter.sites == ("one",)
    with attach(model, {}) as bank:
        bank.load("x", adapter)
        renamed = adapter.replace(factors={"two": adapter.factors["one"]})
        bank.load("y", renamed)
        outputs = []
        for name in ("x", "y"):
            bank.use(name)
            outputs.append(model(x))
        assert torch.equal(*outputs)
        weight = model.one.weight + adapter.delta("one")
        assert_close(
            outputs[0], nn.functional.linear(nn.functional.linear(x, weight, model.one.bias), weight, model.one.bias)
        )
    before.check()


# modules trained whole, biases


def test_a_whole_module_is_a_copy_and_the_base_keeps_its_own() -> None:
    model = tiny_bert()
    before, batch = State(model), batch_for(model)
    base = logits(model, batch)
    with attach(model, {"a": LoraSpec(rank=2, targets=["query"], save_modules=["classifier"])}) as bank:
        assert torch.equal(logits(model, batch), base)
        with torch.no_grad():
            bank_modules = {name: p for name, p in bank.named_parameters("a") if name.startswith("classifier")}
            assert set(bank_modules) == {"classifier.weft.a.weight", "classifier.weft.a.bias"}
            for parameter in bank_modules.values():
                parameter.add_(1)
        changed = logits(model, batch)
        assert not torch.allclose(changed, base)
        adapter = bank.adapter("a")
        assert torch.equal(adapter.modules["classifier"]["bias"], model.classifier._parameters["bias"] + 1)
        before.check_bytes()
        bank.use(None)
        assert torch.equal(logits(model, batch), base)
    before.check()


def test_a_fresh_head_does_not_count_for_the_base() -> None:
    """A classification head is drawn anew each time a base is loaded; the adapter brings its own."""
    model = tiny_bert()
    adapter = made(model, rank=2, targets=["query"], save_modules=["classifier"])
    with torch.no_grad():
        model.classifier.weight.normal_()
    with attach(model, {}) as bank:
        bank.load("x", adapter)
    without = made(model, rank=2, targets=["query"])
    with torch.no_grad():
        model.classifier.weight.normal_()
    with attach(model, {}) as bank, pytest.raises(BaseMismatchError):
        bank.load("x", without)


def test_whole_copies_of_modules_with_sites_of_others_inside_are_plain() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)))
    before, x = State(model), torch.randn(4, 6)
    base = model(x)
    bank = attach(model, {"inside": LoraSpec(rank=2, targets=["1.0", "1.1"])})
    fill(bank)
    inside = model(x)
    bank.add("whole", LoraSpec(rank=2, targets=["0"], save_modules=["1"]))
    assert [type(module) for module in model[1].weft.whole.modules()] == [nn.Sequential, nn.Linear, nn.Linear]
    bank.use("whole")
    assert torch.equal(model(x), base)
    bank.add("later", LoraSpec(rank=2, targets=["1.0"]))
    bank.use("inside")
    assert torch.equal(model(x), inside)
    fill(bank, "whole")
    assert torch.equal(model(x), inside)
    bank.use("whole")
    assert not torch.allclose(model(x), base)
    assert set(bank.adapter("whole").modules["1"]) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    bank.detach()
    before.check()


def test_a_sequence_that_is_trained_whole_still_runs_its_own_children_only() -> None:
    model = nn.ModuleDict({"head": nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), "body": nn.Linear(4, 4)})
    before, x = State(model), torch.randn(3, 4)
    base = model["head"](x)
    with attach(model, {"a": LoraSpec(rank=2, targets=["body"], save_modules=["head"])}) as bank:
        assert torch.equal(model["head"](x), base)
        fill(bank)
        changed = model["head"](x)
        assert not torch.equal(changed, base)
        assert len(model["head"]) == 3
        assert model["head"][-1] is model["head"][2]
        assert [type(module) for module in model["head"][:2]] == [nn.Linear, nn.ReLU]
        bank.use(None)
        assert torch.equal(model["head"](x), base)
    before.check()


def test_a_container_that_is_never_called_cannot_be_trained_whole() -> None:
    model = tiny_llama()
    before = State(model)
    with pytest.raises(SpecError, match=r"has no forward of its own.*'model\.layers\.0'"):
        attach(model, LoraSpec(rank=2, targets=["lm_head"], save_modules=["layers"]))
    before.check()


def test_a_whole_projection_in_a_fused_block_is_used() -> None:
    model = tiny_llama()
    batch = batch_for(model)
    bank = attach(model, {"site": LoraSpec(rank=2, targets=["gate_proj", "up_proj", "down_proj"])})
    bank.add("whole", LoraSpec(rank=2, targets=["gate_proj", "up_proj"], save_modules=["down_proj"]))
    fill(bank, "whole")
    bank.use("whole")
    with torch.enable_grad():
        got = outputs_of(model, batch)
    assert_close(got, logits(model, batch))
    got.sum().backward()
    assert len(grads_of(bank, "whole")) == 2 * (2 * 2 + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_stand_in_for_the_bases(dtype: torch.dtype, bias: str) -> None:
    for name in ("bert", "gpt2", "cnn", "attention"):
        model = tiny(name, dtype=dtype)
        before, batch = State(model), batch_for(model)
        base = logits(model, batch)
        with attach(model, {"a": LoraSpec(rank=2, targets=SPECS[name]["targets"], bias=bias)}) as bank:
            assert_close(logits(model, batch), base, dtype)
            with torch.no_grad():
                for leaf, parameter in bank.named_parameters("a"):
                    if "bias" in leaf.rpartition(".")[2]:
                        assert parameter.dtype == torch.float32
                        parameter.add_(0.5)
            changed = logits(model, batch)
            assert changed.dtype == dtype
            adapter = bank.adapter("a")
            bank.use(None)
            assert torch.equal(logits(model, batch), base)
            plain = copy.deepcopy(model)
            plain.__dict__["_weft_bank"].detach()
            parameters = dict(plain.named_parameters())
            with torch.no_grad():
                for path, value in adapter.biases.items():
                    assert_close(value, parameters[path] + 0.5, dtype)
                    parameters[path].copy_(value)
            assert adapter.biases
            assert_close(changed, logits(plain, batch), dtype)
        before.check()


def test_running_statistics_are_part_of_the_base() -> None:
    model = tiny_cnn()
    before, batch = State(model), batch_for(model)
    with attach(model, {"a": LoraSpec(rank=2, targets=["conv1", "conv2"])}) as bank:
        fill(bank)
        expected = logits(model, batch)
        model.train()
        assert_close(logits(model, batch), expected)
        before.check_bytes()
        model.eval()
    before.check()


# copies, files, threads


def test_a_copy_of_an_attached_model_is_another_attached_model(architecture: str) -> None:
    model = tiny(architecture)
    batch = batch_for(model)
    bank = attach(model, {"mine": LoraSpec(rank=4, **SPECS[architecture])})
    fill(bank)
    with torch.enable_grad():
        outputs_of(model, batch)
    clone = copy.deepcopy(model)
    twin: Bank = clone.__dict__["_weft_bank"]
    assert twin.model is clone
    expected = logits(model, batch)
    assert torch.equal(logits(clone, batch), expected)
    fill(bank)
    assert torch.equal(logits(clone, batch), expected), "the copy has factors of its own"
    assert {id(p) for p in model.parameters()}.isdisjoint(id(p) for p in clone.parameters())
    twin.use(None)
    assert bank.current == "mine"
    twin.detach()
    assert not any("weft" in name for name, _ in clone.named_modules())
    assert float((logits(model, batch) - logits(clone, batch)).abs().max()) > 1e-3


def test_state_dicts_survive_a_file(architecture: str) -> None:
    model = tiny(architecture)
    batch = batch_for(model)
    bank = attach(
        model, {"mine": LoraSpec(rank=4, init="pissa" if architecture == "llama" else "kaiming", **SPECS[architecture])}
    )
    fill(bank)
    expected = logits(model, batch)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fill(bank)
    assert not torch.equal(logits(model, batch), expected)
    assert not any(model.load_state_dict(torch.load(file, weights_only=True)))
    assert torch.equal(logits(model, batch), expected)


def test_the_bases_names_stay_while_something_is_attached(architecture: str) -> None:
    model = tiny(architecture)
    names = list(model.state_dict())
    with attach(model, {"mine": LoraSpec(rank=4, **SPECS[architecture])}):
        assert [name for name in model.state_dict() if ".weft." not in f".{name}"] == names


@pytest.mark.parametrize("name", ["llama", "mixtral", "attention"])
def test_threads_share_one_attached_model(name: str) -> None:
    model = tiny(name)
    bank = attach(model, {"mine": LoraSpec(rank=4, **SPECS[name])})
    fill(bank)
    batches = [batch_for(model) for _ in range(4)]
    expected = [logits(model, batch) for batch in batches]
    wrong: list[str] = []

    def work(index: int) -> None:
        try:
            for turn in range(12):
                with torch.set_grad_enabled(turn % 2 == 0):
                    got = outputs_of(model, batches[index])
                error = float((got.detach() - expected[index]).abs().max())
                if error > 1e-5:
                    wrong.append(f"thread {index}, turn {turn}: off by {error}")
        except Exception as problem:  # noqa: BLE001
            wrong.append(repr(problem))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inference_mode() -> None:
    for name in SPECS:
        model = tiny(name)
        batch = batch_for(model)
        with torch.inference_mode():
            bank = attach(model, {"mine": LoraSpec(rank=4, **SPECS[name])})
            fill(bank)
            inside = outputs_of(model, batch).clone()
        assert_close(logits(model, batch), inside)
        bank.detach()


# exceptions


def test_an_exception_in_the_middle_of_a_forward(architecture: str) -> None:
    model = tiny(architecture)
    before, batch = State(model), batch_for(model)
    bank = attach(model, {"mine": LoraSpec(rank=4, **SPECS[architecture])})
    fill(bank)
    expected = logits(model, batch)
    inner = [
        module for path, module in model.named_modules() if ".weft" not in f".{path}" and not list(module.children())
    ]

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    for module in inner[:: max(1, len(inner) // 7)]:
        handle = module.register_forward_pre_hook(fail)
        for mode in (True, False):
            with torch.set_grad_enabled(mode), contextlib.suppress(RuntimeError):
                outputs_of(model, batch)
        handle.remove()
        assert_close(logits(model, batch), expected)
    bank.detach()
    before.check()


def test_an_exception_inside_the_block_detaches() -> None:
    model = tiny_llama()
    before = State(model)
    with pytest.raises(RuntimeError, match="shapes cannot"), attach(model, LoraSpec(rank=2)):
        model.lm_head(torch.ones(3))
    before.check()


def test_requires_grad_comes_back_as_it_was() -> None:
    model = tiny_gpt2()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 0)
    before = State(model)
    with attach(model, LoraSpec(rank=2, targets=["c_attn"])) as bank:
        assert all(not p.requires_grad for n, p in model.named_parameters() if ".weft." not in n)
        bank.add("more", LoraSpec(rank=2, targets=["c_fc"]))
        bank.drop("more")
    before.check()


def test_seeds_make_the_start_repeatable() -> None:
    found = []
    model = tiny_mixtral()
    for seed in (1, 1, 2):
        with attach(model, {"a": LoraSpec(rank=2, init="gaussian")}, seed=seed) as bank:
            found.append(bank.adapter("a"))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_what_a_person_sees() -> None:
    model = tiny_llama(tie=True)
    with attach(model, {"a": LoraSpec(rank=2, targets=["lm_head", "q_proj"])}) as bank:
        assert repr(bank) == "Bank(['a'] on LlamaForCausalLM, 3 sites, using 'a')"
        assert any("tied" in note for note in bank.notes("a"))
        assert bank.spec("a").rank == 2
        bank.load("b", bank.adapter("a"))
        assert any("tied" in note for note in bank.notes("b"))
        assert bank.fingerprint == fingerprint(copy_of_base(model))
