"""The measures that save memory: each gives the ordinary gradients, and does what it says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.models import tiny_llama
from tests.tolerances import assert_close
from tests.unit.train.support import byte_base, moved, same
from weft.core.bank import Bank
from weft.errors import MissingDependencyError, RecipeError
from weft.models.attach import attach
from weft.train.chunked import ChunkedLoss, reference_sum
from weft.train.offload import Parked, kept_away
from weft.train.opening import as_before
from weft.train.recipe import Recipe
from weft.train.recompute import above, check_below, checkpointing, recomputable
from weft.train.schedule import Facts, settle

Gradients = dict[str, Tensor]
LAYERS = 4


def llama(**settings: Any) -> nn.Module:
    return tiny_llama(hidden_size=128, intermediate_size=192, num_hidden_layers=LAYERS, **settings).double().train()


def rows(seed: int) -> tuple[Tensor, Tensor]:
    """Tokens (3, 11), and labels with a prompt, holes and an end that are not learned."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (3, 11), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
    labels[:, 1], labels[0, :4] = ids[:, 1], -100
    return ids, labels


def gradients(bank: Bank) -> Gradients:
    return {
        name: parameter.grad.clone() for name, parameter in bank.named_parameters("t") if parameter.grad is not None
    }


def step(
    model: nn.Module, spec: weft.LoraSpec, seed: int, around: Callable[[], Any] = contextlib.nullcontext
) -> Gradients:
    """Gradients of one forward and backward, dropout from one stream; the model is left as it was."""
    ids, labels = rows(seed)
    with attach(model, {"t": spec}, seed=seed) as bank, torch.random.fork_rng(devices=[]):
        moved(bank, "t")
        torch.manual_seed(seed)
        with around():
            loss = reference_sum(model(input_ids=ids, use_cache=False).logits, labels)
        loss.backward()
        return gradients(bank)


def equal(actual: Gradients, expected: Gradients) -> None:
    assert actual.keys() == expected.keys()
    assert expected
    for name, tensor in expected.items():
        assert_close(actual[name], tensor, torch.float64, name)


# recomputation


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("kind", [True, 2, "selective"])
def test_recomputed_gradients_are_the_ordinary_ones(kind: Any, dropout: float) -> None:
    seed = int(torch.randint(1 << 30, ()))
    model, spec = llama(), weft.LoraSpec(rank=4, targets="all-linear", dropout=dropout)
    expected = step(model, spec, seed)
    with as_before(model), checkpointing(model, Recipe(gradient_checkpointing=kind)):
        equal(step(model, spec, seed), expected)


@pytest.mark.parametrize("kind", ["selective", True])
def test_recomputation_replays_dropout_by_row(kind: Any) -> None:
    model, (ids, _) = llama(), rows(1)
    found = []
    for recipe in (Recipe(), Recipe(gradient_checkpointing=kind)):
        with as_before(model), attach(model, {"t": weft.LoraSpec(rank=4, dropout=0.3)}, seed=0) as bank:
            moved(bank, "t")
            with checkpointing(model, recipe), bank.route(["t"] * 3, seeds=[5, 6, 7]):
                model(input_ids=ids, use_cache=False).logits.square().sum().backward()
            found.append(gradients(bank))
    equal(found[1], found[0])


def test_some_layers_keep_and_others_do_not() -> None:
    """Bytes by torch's own hooks: whole < two layers < none; each recomputed layer keeps its input alone."""
    model = llama()
    sizes = []
    for kind in (False, 2, True):
        ids, _ = rows(3)
        recipe, saved = Recipe(gradient_checkpointing=kind), []
        with as_before(model), attach(model, {"t": weft.LoraSpec(rank=4)}, seed=0), checkpointing(model, recipe):
            flags = [bool(layer.gradient_checkpointing) for layer in recomputable(model)]
            pack = lambda tensor, saved=saved: saved.append(tensor.nbytes) or tensor  # noqa: E731
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                model(input_ids=ids, use_cache=False)
        assert flags == {False: [False] * LAYERS, 2: [True, True, False, False], True: [True] * LAYERS}[kind]
        sizes.append(sum(saved))
    assert sizes[0] > 1.5 * sizes[1] > 1.5 * 1.5 * sizes[2]


def test_selective_checkpointing_computes_no_product_of_the_base_twice() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    counts = {}
    for kind in (False, "selective", True):
        model, (ids, _) = llama(), rows(4)
        with attach(model, {"t": weft.LoraSpec(rank=1, targets="all-linear")}, seed=0) as bank:
            moved(bank, "t")
            with checkpointing(model, Recipe(gradient_checkpointing=kind)), FlopCounterMode(display=False) as counter:
                model(input_ids=ids, use_cache=False).logits.sum().backward()
        counts[kind] = counter.get_total_flops()
    again, whole = counts["selective"] - counts[False], counts[True] - counts[False]
    assert again < 0.5 * whole, "only the products with B, which sum over the rank, are done twice"
    assert whole > 0.15 * counts[False]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"gradient_checkpointing": 5}, "has 4 layers"), ({"gradient_checkpointing": 1, "reentrant": True}, "older kind")],
)
def test_checkpointing_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    model = llama()
    with pytest.raises(RecipeError, match=message), as_before(model), checkpointing(model, Recipe(**change)):
        pass


# freezing low layers


def test_below_the_lowest_site_there_is_no_backward() -> None:
    model, spec = llama(), weft.LoraSpec(rank=4, targets="all-linear")
    kept = above(model, spec, 2)
    assert kept.layers == (2, 3)
    reached: list[int] = []
    for number, layer in enumerate(recomputable(model)):
        layer.register_forward_hook(
            lambda module, args, out, number=number: reached.append(number) if out.requires_grad else None
        )
    with as_before(model), checkpointing(model, Recipe(gradient_checkpointing=1)):
        found = step(model, kept, 5)
    assert reached == [2, 3]
    whole = step(model, spec, 5, lambda: contextlib.nullcontext())
    assert found.keys() == {name for name in whole if ".layers.2." in name or ".layers.3." in name}


def test_what_lies_low_is_refused() -> None:
    model = llama()
    with pytest.raises(RecipeError, match="layers 0 to 3"):
        above(model, weft.LoraSpec(rank=4), 4)
    for name in ("model.embed_tokens.weft.t.lora_A", "model.layers.1.mlp.up_proj.bias"):
        with pytest.raises(RecipeError, match="lies below"):
            check_below(model, [name], 2)
    check_below(model, ["model.layers.2.mlp.up_proj.weft.t.lora_A", "lm_head.weft.t.lora_A"], 2)


# the loss in parts


def gemma() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        vocab_size=64, final_logit_softcapping=3.0, pad_token_id=0,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).double().train()


@pytest.mark.parametrize("make", [llama, gemma], ids=["llama", "gemma2"])
@pytest.mark.parametrize(
    "spec",
    [
        weft.LoraSpec(rank=3, targets="all-linear", dropout=0.2), weft.LoraSpec(rank=3, targets=("lm_head",)),
        weft.LoraSpec(rank=3, targets=("q_proj", "lm_head"), dora=True), weft.LoraSpec(rank=3, save_modules=("lm_head",)),
    ],
    ids=["body", "head", "dora", "whole"],
)  # fmt: skip
def test_the_loss_in_parts_is_the_loss(make: Callable[[], nn.Module], spec: weft.LoraSpec) -> None:
    seed = int(torch.randint(1 << 30, ()))
    model, (ids, labels) = make(), rows(seed)
    expected = step(model, spec, seed)
    with attach(model, {"t": spec}, seed=seed) as bank, torch.random.fork_rng(devices=[]):
        moved(bank, "t")
        parts = ChunkedLoss(model, bank, "t", 7)
        largest: list[int] = []
        model.get_output_embeddings().register_forward_hook(  # type: ignore[operator]
            lambda module, args, out: largest.append(out.shape[0] * out.shape[1])
        )
        torch.manual_seed(seed)
        with parts.watching():
            model(**parts.prepare({"input_ids": ids}), use_cache=False)
            total, count = parts.total(labels)
            sums, counts = parts.by_row(labels)
        (2 * total).backward()  # a power of two: norms round in float32
        with torch.no_grad():
            wanted = reference_sum(model.eval()(input_ids=ids).logits, labels)
        found = gradients(bank)
    equal({name: tensor / 2 for name, tensor in found.items()}, expected)
    assert max(largest) <= 11 * 3  # the last entry is the reference's own
    assert sorted(largest)[-2] <= 7
    assert count == int(counts.sum()) == int((labels[:, 1:] != -100).sum())
    assert_close(sums.sum(), total, torch.float64)
    if not spec.dropout:
        assert_close(total, wanted, torch.float64)


def test_parts_are_refused_where_they_cannot_be() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    small = OPTConfig(
        hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32, max_position_embeddings=32,
        word_embed_proj_dim=16,
    )  # fmt: skip
    model = OPTForCausalLM(small)
    with (
        attach(model, {"t": weft.LoraSpec(rank=2, targets=["q_proj"])}) as bank,
        pytest.raises(RecipeError, match="OPTForCausalLM is no causal"),
    ):
        ChunkedLoss(model, bank, "t", 8)
    model = llama()
    with (
        attach(model, {"t": weft.LoraSpec(rank=2, targets=["lm_head"], dropout=0.1)}) as bank,
        pytest.raises(RecipeError, match="the head is a site with dropout"),
    ):
        ChunkedLoss(model, bank, "t", 8)


# off the accelerator


@pytest.mark.parametrize("kind", [False])
def test_parked_weights_are_there_when_they_are_used_and_only_then(kind: Any) -> None:
    """A home full of NaN stands for another device: whoever reads a weight that didn't come gets NaN."""
    seed = int(torch.randint(1 << 30, ()))
    model, spec = llama(), weft.LoraSpec(rank=4, targets="all-linear", dropout=0.2)
    expected = step(model, spec, seed)

    class Elsewhere(Parked):
        def _rest(self, layer: nn.Module) -> None:
            super()._rest(layer)
            for parameter in layer.parameters():
                if id(parameter) in self._homes:
                    parameter.data = torch.full((), torch.nan, dtype=parameter.dtype).expand(parameter.shape)

    ids, labels = rows(seed)
    with as_before(model), attach(model, {"t": spec}, seed=seed) as bank, torch.random.fork_rng(devices=[]):
        moved(bank, "t")
        before = bank.fingerprint
        parked = Elsewhere(recomputable(model), torch.device("cpu"), pin=False)
        with checkpointing(model, Recipe(gradient_checkpointing=kind)):
            torch.manual_seed(seed)
            with kept_away(model, lambda tensor: tensor.clone(), parked):
                loss = reference_sum(model(input_ids=ids, use_cache=False).logits, labels)
            assert all(
                parameter.isnan().all()
                for name, parameter in model.model.layers[1].named_parameters()
                if ".weft." not in name
            )
            assert len(parked._out) == 0
            loss.backward()
        equal(gradients(bank), expected)
        parked.give_back()
        bank._fingerprints.clear()
        assert bank.fingerprint == before


def test_activations_wait_elsewhere_and_weights_do_not() -> None:
    model, spec = llama(), weft.LoraSpec(rank=4, targets="all-linear")
    sizes: list[int] = []

    @contextlib.contextmanager
    def away() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("weft.train.offload.SMALL", 1)
            with kept_away(model, lambda tensor: sizes.append(tensor.numel()) or tensor.clone()):  # type: ignore[func-returns-value]
                yield

    expected = step(model, spec, 6)
    equal(step(model, spec, 6, away), expected)
    assert sizes
    assert 128 * 192 not in sizes, "a weight is no activation"


def test_offloading_on_a_cpu_is_refused() -> None:
    with pytest.raises(RecipeError, match="in CPU memory already"):
        settle(Recipe(offload=("base",)), Facts(8, False, "text"))


# quantised bases


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_training_on_a_quantised_base_repeats_and_belongs_to_the_stored_one(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    model, tokenizer = byte_base(hidden_size=64, intermediate_size=128)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    data = [{"text": f"{word} {word} {word}"} for word in ("ab", "cde", "fgh", "ijkl", "mn", "opq", "rs", "tuv")]
    recipe = Recipe(
        spec=weft.LoraSpec(rank=4), quantize=kind, max_steps=4, save_every=2, learning_rate=1e-2, batch_size=4
    )
    settings: dict[str, Any] = {"base": tmp_path / "base", "data": data, "progress": False}
    run = weft.train(recipe=recipe, out=tmp_path / "run", **settings)
    plain, _ = weft.load_base(tmp_path / "base")
    with weft.attach(plain, {}) as bank:
        bank.load("mine", run.adapter)
        assert run.adapter.provenance.base == bank.fingerprint
    assert not run.adapter.proof
    merged, _ = weft.merge(plain, run.adapter)
    assert not torch.equal(
        merged.model.layers[0].self_attn.q_proj.weight, plain.model.layers[0].self_attn.q_proj.weight
    )
    again = weft.train(recipe=recipe, out=tmp_path / "run2", **settings)
    assert same(run.adapter, again.adapter)


def test_quantising_replaces_what_it_says() -> None:
    library = pytest.importorskip("bitsandbytes")
    from weft.train.quantized import quantise, unsaid

    model = llama().float()
    ids, _ = rows(7)
    before, size = model(input_ids=ids).logits, sum(p.nbytes for p in model.model.layers.parameters())
    assert quantise(model, "int8", ["model.layers.0.mlp"]) == 7 * LAYERS - 3
    assert sum(p.nbytes for p in model.model.layers.parameters()) < 0.5 * size
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert type(model.lm_head) is nn.Linear
    assert type(model.model.layers[1].mlp.up_proj) is library.nn.Linear8bitLt
    with unsaid():
        assert (model(input_ids=ids).logits - before).norm() < 0.2 * before.norm()


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.train.quantized import require

    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(MissingDependencyError, match=r"weft\[quantize\]"):
        require("nf4")


# the recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantize": "int4"}, "one of int8, nf4"), ({"offload": "bases"}, "base, activations"), ({"loss_chunk": 0}, "whole number"),
        ({"gradient_checkpointing": "selektive"}, "selective"), ({"gradient_checkpointing": 0}, "selective"), ({"freeze_below": 0}, "whole number"),
        ({"quantize": "nf4", "offload": ("base",)}, "keep one"), ({"loss_chunk": 8, "compile": True}, "compile"),
        ({"loss_chunk": 8, "kind": "classification"}, "one label a row"), ({"freeze_below": 2, "layers": [1]}, "adapt layer 1"),
        ({"quantize": "nf4", "dora": True}, "dora"), ({"quantize": "nf4", "init": "pissa"}, "init"), ({"offload": ("base", "base")}, "twice"),
        ({"offload": ("base",), "gradient_checkpointing": True}, "without its weights"),
        ({"reentrant": True, "gradient_checkpointing": True, "freeze_below": 1}, "older"),
    ],
    ids=str,
)  # fmt: skip
def test_measures_that_contradict_each_other_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe().replace(**change)
