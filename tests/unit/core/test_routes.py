"""Rows of different adapters in one batch: every row has to be what it is alone, whatever is beside it and however the model is run."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.models import (
    ARCHITECTURES,
    batch_for,
    randomise,
    tiny_attention,
    tiny_bert,
    tiny_cnn,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
)
from tests.tolerances import TOLERANCES, assert_close
from tests.unit.core.support import State, checkpoints, fill, grads_of, made, outputs_of, spread
from weft.adapter import Adapter
from weft.core.bank import Bank, attach
from weft.errors import BankError, NotFiniteError
from weft.spec import LoraSpec

ROUTED: dict[str, dict[str, Any]] = {
    "llama": {"targets": "all-linear"},
    "gpt2": {"targets": ["c_attn", "c_fc", "c_proj"], "bias": "lora_only"},
    "bert": {"targets": ["query", "key", "value", "dense"], "save_modules": ["classifier"], "bias": "all"},
    "t5": {"targets": ["q", "k", "v", "wi_0", "wo"]},
    "vit": {"targets": ["q_proj", "v_proj", "fc1", "projection"], "save_modules": ["classifier"]},
    "mixtral": {"targets": ["q_proj", "v_proj"]},
    "cnn": {"targets": ["conv1", "conv2"], "rank": 4, "rank_pattern": {}, "bias": "all"},
    "attention": {"targets": ["attn", "embed", "head"]},
}
"""What each architecture adapts that can be told apart by rows."""


def several(model: nn.Module, architecture: str, **more: Any) -> dict[str, Adapter]:
    """Adapters of different ranks, scales and sites, one with magnitudes where every site can have them."""
    spec = {"rank": 2, **ROUTED[architecture], **more}
    names = {"a": {}, "b": {"alpha": 5}, "c": {"rank": 4 if architecture == "cnn" else 5, "rslora": True}}
    if architecture not in ("cnn", "attention"):
        names["d"] = {"dora": True}
        names["e"] = {"lora_bias": True}
    found = {name: made(model, LoraSpec(**(spec | fields))) for name, fields in names.items()}
    few = spec["targets"][:1] if isinstance(spec["targets"], list) else ["q_proj", "down_proj"]
    found["f"] = made(model, LoraSpec(**(spec | {"targets": few, "save_modules": (), "bias": "none"})))
    return found


def loaded(architecture: str, **more: Any) -> tuple[nn.Module, Bank]:
    model = ARCHITECTURES[architecture](dtype=torch.float64)
    adapters = several(model, architecture, **more)
    bank = attach(model, {})
    for name, adapter in adapters.items():
        bank.load(name, adapter)
    return model, bank


def rows_of(batch: dict[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
    return {name: tensor[list(rows)] for name, tensor in batch.items()}


def alone(model: nn.Module, bank: Bank, entry: Any, batch: dict[str, Tensor]) -> Tensor:
    """One row by itself, by the code of a single adapter; a mixture of adapters that only update by a dense copy of the model."""
    bank.use(entry)
    try:
        return outputs_of(model, batch)
    finally:
        bank.use(None)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("architecture", list(ROUTED))
def test_every_row_is_what_it_is_alone(architecture: str, grad: bool) -> None:
    model, bank = loaded(architecture)
    entries = ["a", None, *[name for name in bank.names if name != "a"], "a", "c"]
    batch = batch_for(model, rows=len(entries), labels=architecture == "t5")
    with torch.set_grad_enabled(grad):
        with bank.route(entries):
            got = outputs_of(model, batch)
        for row, entry in enumerate(entries):
            expected = alone(model, bank, entry, rows_of(batch, [row]))
            assert_close(got[row : row + 1], expected, what=f"row {row}, {entry}")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "cnn", "attention"])
def test_a_mixture_is_the_weighted_sum_of_updates(architecture: str) -> None:
    model = ARCHITECTURES[architecture](dtype=torch.float64)
    plain = {key: value for key, value in ROUTED[architecture].items() if key != "bias"}
    plain = plain | ({"targets": ["conv1"]} if architecture == "cnn" else {})
    one, two = (
        made(model, LoraSpec(**({"rank": 2} | plain))),
        made(model, LoraSpec(**({"rank": 3, "alpha": 7} | plain))),
    )
    whole = one.replace(
        factors={
            path: _sum(item, 0.7, two.factors[path], -0.4) for path, item in one.factors.items()
        }
    )  # fmt: skip
    dense = spread(model, whole)
    bank = attach(model, {})
    bank.load("one", one)
    bank.load("two", two)
    batch = batch_for(model, rows=3, labels=False)
    mixture = {"one": 0.7, "two": -0.4}
    with torch.no_grad():
        expected = outputs_of(dense, batch)
        for entries in (mixture, [mixture, mixture, mixture], ["one", mixture, None]):
            with bank.route(entries):
                got = outputs_of(model, batch)
            rows = [1] if isinstance(entries, list) and None in entries else [0, 1, 2]
            assert_close(got[rows], expected[rows])


def _sum(left: Any, first: float, right: Any, second: float) -> Any:
    from weft.core.factors import concat

    return concat([(left, first), (right, second)])


@pytest.mark.parametrize("lengths", [[3, 1, 4, 2, 5], [4, 4, 4], [2, 2, 3, 3, 3]])
@pytest.mark.parametrize("grad", [False, True])
def test_packed_tokens(lengths: list[int], grad: bool) -> None:
    """A stack of linear sites sees packed tokens as (1, T, d) or (T, d)."""
    model = randomise(nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)), torch.float64)
    adapters = [made(model, LoraSpec(rank=rank, targets=["0", "1", "3"], dora=rank == 3)) for rank in (2, 2, 3)]
    bank = attach(model, {})
    for name, adapter in zip("abc", adapters, strict=True):
        bank.load(name, adapter)
    entries = ["a", "b", None, {"a": 0.5, "c": 0.5}, "c"][: len(lengths)]
    ids = torch.randint(0, 20, (sum(lengths),))
    with torch.set_grad_enabled(grad):
        for shaped in (ids, ids[None]):
            with bank.route(entries, lengths=lengths):
                got = model(shaped).view(len(ids), -1)
            at = 0
            for entry, length in zip(entries, lengths, strict=True):
                with bank.route(entry):
                    assert_close(got[at : at + length], model(ids[at : at + length]), what=str(entry))
                at += length


# scopes


def llama(**more: Any) -> tuple[nn.Module, Bank, dict[str, Tensor]]:
    model, bank = loaded("llama", **more)
    return model, bank, batch_for(model, rows=3, labels=False)


def test_nested_routes_exceptions_and_use() -> None:
    model, bank, batch = llama()
    with torch.no_grad():
        base, a, b = (alone(model, bank, entry, batch) for entry in (None, "a", "b"))
        bank.use("b")
        with bank.route("a"):
            assert torch.equal(outputs_of(model, batch), a)
            with bank.route([None, None, None]):
                assert torch.equal(outputs_of(model, batch), base)
            with pytest.raises(ZeroDivisionError), bank.route(["b"] * 3):
                _ = 1 / 0
            assert torch.equal(outputs_of(model, batch), a)
            bank.use(None)
            assert torch.equal(outputs_of(model, batch), a), "use has no say inside of a route"
            bank.use("b")
        assert torch.equal(outputs_of(model, batch), b)


def test_an_exception_in_a_forward_leaves_nothing_behind() -> None:
    model, bank, batch = llama()
    down = model.model.layers[1].mlp.down_proj

    def fail(module: nn.Module, args: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        expected = alone(model, bank, "a", batch)
        for _ in range(3):
            handle = down.register_forward_pre_hook(fail)
            with pytest.raises(KeyboardInterrupt), bank.route(["a", "b", "c"]):
                outputs_of(model, batch)
            handle.remove()
        assert torch.equal(alone(model, bank, "a", batch), expected)
        with bank.route(["a", "b", "c"]):
            assert_close(outputs_of(model, batch)[:1], expected[:1])


def test_a_route_can_be_entered_again_and_from_within_itself() -> None:
    model, bank, batch = llama()
    with torch.no_grad():
        expected = alone(model, bank, "a", batch)
        route = bank.route("a")
        for _ in range(2):
            with route, route:
                assert torch.equal(outputs_of(model, batch), expected)
        assert torch.equal(outputs_of(model, batch), alone(model, bank, None, batch))


def test_other_threads_have_routes_of_their_own() -> None:
    model, bank, batch = llama()
    with torch.no_grad():
        expected = {entry: alone(model, bank, entry, batch) for entry in (None, "a", "b", "c", "d")}
    wrong: list[Any] = []
    gate = threading.Barrier(len(expected))

    def serve(entry: str | None) -> None:
        with torch.no_grad():
            for turn in range(6):
                gate.wait()
                if entry is None:
                    got = outputs_of(model, batch)
                else:
                    with bank.route(entry if turn % 2 else [entry, None, entry]):
                        got = outputs_of(model, batch)
                rows = [0, 2] if entry is not None and not turn % 2 else [0, 1, 2]
                if not torch.allclose(got[rows], expected[entry][rows], atol=1e-10):
                    wrong.append((entry, turn))

    threads = [threading.Thread(target=serve, args=(entry,)) for entry in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_one_route_in_several_threads() -> None:
    model, bank, batch = llama()
    route = bank.route(["a", "b", "c"])
    with torch.no_grad():
        with route:
            expected = outputs_of(model, batch)
        wrong: list[float] = []

        def serve() -> None:
            with torch.no_grad(), route:
                for _ in range(5):
                    got = outputs_of(model, batch)
                    if not torch.equal(got, expected):
                        wrong.append(float((got - expected).abs().max()))

        threads = [threading.Thread(target=serve) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_route_keeps_what_it_was_made_with() -> None:
    model, bank, batch = llama()
    new = made(model.__class__(model.config).double(), LoraSpec(rank=2, targets="all-linear"))
    with torch.no_grad():
        a = alone(model, bank, "a", batch)
        route = bank.route(["a", None, "a"])
        with route:
            bank.drop("a")
            assert_close(outputs_of(model, batch)[0], a[0])
            bank.load("a", new, allow_other_base=True)
            assert_close(outputs_of(model, batch)[2], a[2])
        with bank.route(["a", None, "a"]):
            assert not torch.allclose(outputs_of(model, batch)[0], a[0])
        with pytest.raises(BankError, match="'b'"), bank.route("c"):
            bank.route(["a", "b_"])


def test_detach_after_a_route_leaves_nothing() -> None:
    model = tiny_llama(dtype=torch.float64)
    before = State(model)
    adapter = made(model, rank=2)
    bank = attach(model, {})
    bank.load("a", adapter)
    with bank.route(["a", None]):
        model(**batch_for(model, rows=2, labels=False))
    bank.detach()
    before.check()
    with pytest.raises(BankError, match="detached"):
        bank.route("a")


# generate


def answers(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> Tensor:
    return model.generate(**batch, max_new_tokens=6, min_new_tokens=6, **options)  # type: ignore[operator, no-any-return]


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"use_cache": False}],
    ids=["greedy", "beams", "beams and returns", "no cache"],
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_generate_gives_each_row_its_own_answer(architecture: str, options: dict[str, Any]) -> None:
    model, bank = loaded(architecture)
    entries = ["a", None, "c", "b", {"a": 0.5, "b": 0.7}]
    batch = batch_for(model, rows=len(entries), labels=False)
    batch = {name: tensor for name, tensor in batch.items() if name in ("input_ids", "attention_mask")}
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    with bank.route(entries):
        got = answers(model, batch, **options)
    each = got.shape[0] // len(entries)
    for row, entry in enumerate(entries):
        with bank.route(entry):
            expected = answers(model, rows_of(batch, [row]), **options)
        assert torch.equal(got[row * each : (row + 1) * each], expected), entry


def test_sampling_with_several_returns() -> None:
    """Rows are sampled from their own distributions: the scores of the first step are those of the row alone."""
    model, bank = loaded("llama")
    entries = ["a", None, "c"]
    batch = rows_of(batch_for(model, rows=3, labels=False), [0, 1, 2])
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    more = {"do_sample": True, "num_return_sequences": 4, "return_dict_in_generate": True, "output_logits": True}
    with bank.route(entries):
        got = answers(model, batch, **more)
    with torch.no_grad():
        for row in range(12):
            expected = alone(model, bank, entries[row // 4], {"input_ids": got.sequences[row : row + 1, :-1]})
            for step, logits in enumerate(got.logits):
                assert_close(logits[row], expected[0, 6 + step], torch.float32, what=f"row {row}, step {step}")


def test_assisted_decoding() -> None:
    model, bank = loaded("llama")
    helper = tiny_llama(layers=1, dtype=torch.float64)
    batch = batch_for(model, rows=1, labels=False)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    with bank.route(["a"]):
        expected = answers(model, batch)
        assert torch.equal(answers(model, batch, assistant_model=helper), expected)
        assert torch.equal(answers(model, batch, prompt_lookup_num_tokens=3), expected)
    assert not torch.equal(answers(model, batch), expected)


# gradients


def slots_and_batch(layers: int = 2, **more: Any) -> tuple[nn.Module, Bank, dict[str, Tensor]]:
    model = tiny_llama(layers=layers, dtype=torch.float64)
    specs = {
        "a": LoraSpec(rank=2),
        "b": LoraSpec(rank=3, alpha=5),
        "c": LoraSpec(rank=2, dora=True, targets=["q_proj", "up_proj"]),
    }
    bank = attach(model, {name: spec.replace(**more) for name, spec in specs.items()})
    fill(bank)
    return model.train(), bank, batch_for(model, rows=4, labels=False)


ENTRIES = ["a", "b", {"a": 0.3, "b": 0.7}, "c"]


def mixed_grads(model: nn.Module, bank: Bank, batch: dict[str, Tensor], entries: Any = ENTRIES) -> dict[str, Tensor]:
    for name in bank.names:
        for _, parameter in bank.named_parameters(name):
            parameter.grad = None
    with bank.route(entries):
        loss = outputs_of(model, batch).square().sum()
    loss.backward()
    return {leaf: grad for name in bank.names for leaf, grad in grads_of(bank, name).items()}


def test_gradients_of_a_mixed_batch_are_the_sum_of_those_alone() -> None:
    model, bank, batch = slots_and_batch()
    got = mixed_grads(model, bank, batch)
    for parameter in model.parameters():
        parameter.grad = None
    for row, entry in enumerate(ENTRIES):
        with bank.route(entry):
            outputs_of(model, rows_of(batch, [row])).square().sum().backward()
    for name in bank.names:
        for leaf, expected in grads_of(bank, name).items():
            assert_close(got[leaf], expected, what=leaf)


def test_a_backward_can_be_differentiated_again() -> None:
    layer = randomise(nn.Sequential(nn.Linear(5, 4)), torch.float64)
    bank = attach(layer, {"a": LoraSpec(rank=2, targets=["0"]), "b": LoraSpec(rank=2, targets=["0"])})
    fill(bank)
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        with bank.route(["a", None, "b"]):
            return layer(x)

    assert torch.autograd.gradgradcheck(run, (x,))
    assert torch.autograd.gradcheck(run, (x,))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_a_replay_has_the_route_of_its_forward(reentrant: bool, inside: bool) -> None:
    """The backward comes after the route has ended, or inside of another one."""
    model, bank, batch = slots_and_batch()
    expected = mixed_grads(model, bank, batch)
    checkpoints(model, reentrant=reentrant)
    for parameter in model.parameters():
        parameter.grad = None
    with bank.route(ENTRIES):
        loss = outputs_of(model, batch).square().sum()
    if inside:
        with bank.route(["c", None, None, "a"]):
            loss.backward()
    else:
        bank.use("b")
        loss.backward()
    for name in bank.names:
        for leaf, grad in grads_of(bank, name).items():
            assert_close(grad, expected[leaf], what=leaf)


@pytest.mark.parametrize("reentrant", [True, False])
def test_forwards_of_several_routes_in_one_backward(reentrant: bool) -> None:
    model, bank, batch = slots_and_batch()
    routes = (ENTRIES, "b", None, ["c", "a", None, "b"])

    def total() -> dict[str, Tensor]:
        for parameter in model.parameters():
            parameter.grad = None
        bank.use("a")
        losses = [outputs_of(model, batch).square().sum()]
        for number, entries in enumerate(routes):
            with bank.route(entries):
                losses.append((number + 2) * outputs_of(model, batch).square().sum())
        worker = threading.Thread(target=lambda: sum(losses).backward())  # type: ignore[union-attr]
        worker.start()
        worker.join()
        return {leaf: grad for name in bank.names for leaf, grad in grads_of(bank, name).items()}

    expected = total()
    checkpoints(model, reentrant=reentrant)
    for leaf, grad in total().items():
        assert_close(grad, expected[leaf], what=leaf)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_of_torch_itself_and_inside_of_each_other(reentrant: bool) -> None:
    blocks = randomise(nn.ModuleList([nn.Linear(6, 6) for _ in range(3)]), torch.float64)
    bank = attach(blocks, {"a": LoraSpec(rank=2, targets=["0", "1", "2"]), "b": LoraSpec(rank=1, targets=["1"])})
    fill(bank)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)

    def inner(x: Tensor) -> Tensor:
        return blocks[1](torch.tanh(blocks[0](x)))

    def outer(x: Tensor) -> Tensor:
        return blocks[2](torch.tanh(checkpoint(inner, x, use_reentrant=reentrant)))

    def run(compute: Any) -> dict[str, Tensor]:
        for parameter in blocks.parameters():
            parameter.grad = None
        with bank.route(["a", "b"]):
            loss = compute(x).square().sum()
        with bank.route(["b", "a"]):
            loss.backward()
        return grads_of(bank, "a") | grads_of(bank, "b")

    expected = run(lambda x: blocks[2](torch.tanh(inner(x))))
    for leaf, grad in run(lambda x: checkpoint(outer, x, use_reentrant=reentrant)).items():
        assert_close(grad, expected[leaf], what=leaf)


@pytest.mark.parametrize("p", [0.05, 0.5])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_dropout_with_seeds_depends_on_the_row_alone(p: float, checkpointed: bool) -> None:
    model, bank, batch = slots_and_batch(dropout=p)
    if checkpointed:
        checkpoints(model, reentrant=False)
    entries, seeds = ["a", "b", "c", "a"], [5, 6, 7, 8]
    with bank.route(entries, seeds=seeds):
        out = outputs_of(model, batch)
    out.square().sum().backward()
    together = {leaf: grad for name in bank.names for leaf, grad in grads_of(bank, name).items()}
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = None
    longer = {name: torch.nn.functional.pad(tensor, (0, 3)) for name, tensor in batch.items()}
    for row in (2, 0, 3, 1):
        with bank.route(entries[row : row + 1], seeds=seeds[row : row + 1]):
            mine = outputs_of(model, rows_of(longer, [row]))[:, :-3]
        assert_close(mine[0], out[row], what=f"row {row}")
        mine.square().sum().backward()
    for name in bank.names:
        for leaf, expected in grads_of(bank, name).items():
            assert_close(together[leaf], expected, what=leaf)
    with bank.route(entries, seeds=[1, 2, 3, 4]):
        assert not torch.allclose(outputs_of(model, batch)[0], out[0])


def test_dropout_without_seeds_follows_torchs_generator() -> None:
    model, bank, batch = slots_and_batch(dropout=0.2)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with bank.route(["a", "b", "c", None]):
            found.append(outputs_of(model, batch).detach())
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0][0], found[2][0])
    assert torch.equal(found[0][3], found[2][3]), "the base has no dropout"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_and_low_precision(dtype: torch.dtype) -> None:
    """A whole model rounds a hundred times: what counts is that a routed row is as near to float64 as the row by itself."""
    model, exact = tiny_llama(layers=1, dtype=dtype), tiny_llama(layers=1, dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    entries = ["a", None, "b"]
    adapters = {name: made(model, LoraSpec(rank=rank), size=0.1) for name, rank in (("a", 2), ("b", 3))}
    bank, reference = attach(model, {}), attach(exact, {})
    for name, adapter in adapters.items():
        bank.load(name, adapter)
        reference.load(name, adapter, allow_other_base=True)
    batch = batch_for(model, rows=3, labels=False)
    with torch.no_grad(), reference.route(entries):
        expected = outputs_of(exact, batch)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            with bank.route(entries):
                got = outputs_of(model, batch)
            for row, entry in enumerate(entries):
                here = slice(row, row + 1)
                by_itself = alone(model, bank, entry, rows_of(batch, [row]))
                error, allowed = ((out.double() - expected[here]).abs().max() for out in (got[here], by_itself))
                one = TOLERANCES[torch.bfloat16]
                assert error <= 2 * allowed + one.atol + one.rtol * expected[here].abs().max()


def test_a_compiled_model_follows_the_route() -> None:
    model = randomise(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)), torch.float64)
    adapters = [made(model, LoraSpec(rank=rank, targets=["0", "2"])) for rank in (2, 3)]
    bank = attach(model, {})
    for name, adapter in zip("ab", adapters, strict=True):
        bank.load(name, adapter)
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    for _ in range(2):
        for entries in (None, ["a", "b"], "a", [None, "b"], {"a": 0.5, "b": 0.5}):
            with torch.no_grad(), bank.route(entries):
                assert_close(compiled(x), model(x))
        bank.use("b")
        with torch.no_grad():
            assert_close(compiled(x), model(x))
        bank.use(None)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own look at inputs
def test_a_compiled_model_learns_under_a_route() -> None:
    """Gradients of a compiled, mixed batch, with magnitudes and a mixture in it, whose forward is replayed."""
    model, bank, batch = slots_and_batch(layers=1)
    expected = mixed_grads(model, bank, batch)
    checkpoints(model, reentrant=False)
    torch._dynamo.reset()
    got = mixed_grads(torch.compile(model, backend="eager"), bank, batch)  # type: ignore[arg-type]
    for leaf, grad in expected.items():
        assert_close(got[leaf], grad, what=leaf)


# refusals


def test_mistakes_are_named() -> None:
    model, bank, batch = llama()
    for entries, message in (
        (["a", "zz"], r"entry 1 .*'zz'"),
        (["a", 3], "entry 1 of the route is 3"),
        ([], "at least one entry"),
        (5, "a route is 5; expected a list"),
        ([{}], "empty mixture"),
        ([{"a": float("nan")}], "weight of 'a' is nan"),
        ([{"a": True}], "weight of 'a' is True"),
        ([{"a": "1"}], "weight of 'a' is '1'"),
        (["a", {"zz": 1.0}], "'zz'"),
    ):
        with pytest.raises(BankError, match=message):
            bank.route(entries)  # type: ignore[arg-type]
    with pytest.raises(BankError, match="2 entries and lengths"):
        bank.route(["a", "b"], lengths=[3])
    with pytest.raises(BankError, match="2 entries and lengths"):
        bank.route(["a", "b"], lengths=[3, -1])
    with pytest.raises(BankError, match="2 entries and 1 seeds"):
        bank.route(["a", "b"], seeds=[3])
    with pytest.raises(BankError, match="one a segment"):
        bank.route("a", lengths=[3])
    with torch.no_grad():
        with pytest.raises(BankError, match="3 rows, the route 2 entries"), bank.route(["a", "b"]):
            model(**batch)
        with (
            pytest.raises(BankError, match="21 tokens, the route's lengths add up to 20"),
            bank.route(["a"], lengths=[20]),
        ):
            model(**batch)
        with bank.route(["a", "b", "c"]):
            model(**batch)


def test_stacked_experts_take_one_adapter_for_all_rows() -> None:
    model = tiny_mixtral(dtype=torch.float64)
    adapters = [
        made(model, LoraSpec(rank=rank, targets=["q_proj"], target_parameters=["experts.gate_up_proj"]))
        for rank in (2, 3)
    ]
    bank = attach(model, {})
    for name, adapter in zip("ab", adapters, strict=True):
        bank.load(name, adapter)
    batch = batch_for(model, rows=2, labels=False)
    with pytest.raises(BankError, match=r"gate_up_proj' is a bare parameter of stacked experts"):
        bank.route(["a", "b"])
    with torch.no_grad():
        for entry in ("a", ["a", "a"]):
            with bank.route(entry):
                assert_close(outputs_of(model, batch), alone(model, bank, "a", batch))
        dense = spread(model, adapters[0].replace(factors={
            path: _sum(item, 0.5, adapters[1].factors[path], 2.0) for path, item in adapters[0].factors.items()}))  # fmt: skip
        with bank.route({"a": 0.5, "b": 2.0}):
            assert_close(outputs_of(model, batch), outputs_of(dense, batch))


def test_experts_that_are_modules_are_refused() -> None:
    model = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    adapters = [made(model, LoraSpec(rank=2, targets=["0", "1"])) for _ in range(2)]
    bank = attach(model, {})
    for name, adapter in zip("ab", adapters, strict=True):
        bank.load(name, adapter)
    with pytest.raises(BankError, match=r"'experts\.0' is one of several experts"):
        bank.route(["a", "b"])
    bank.route("a")


class TimeFirst(nn.Module):
    """A layer that sees (length, rows, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.layer = nn.Linear(4, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.layer(self.embed(input_ids).transpose(0, 1)).transpose(0, 1)


def test_an_input_that_is_not_made_of_rows_is_refused() -> None:
    model = randomise(TimeFirst(), torch.float64)
    adapters = {name: made(model, LoraSpec(rank=1, targets=["layer"])) for name in "ab"}
    bank = attach(model, {})
    for name in "ab":
        bank.load(name, adapters[name])
    with pytest.raises(BankError, match=r"'layer' gets an input of leading shape \(4, 2\)"), bank.route(["a", "b"]):
        model(torch.zeros(2, 4, dtype=torch.int64))


def test_a_mixture_of_heads_that_are_not_linear_is_refused() -> None:
    model = randomise(
        nn.ModuleDict({"head": nn.Sequential(nn.Linear(4, 4), nn.Tanh()), "body": nn.Linear(4, 4)}), torch.float64
    )
    adapters = [made(model, LoraSpec(rank=1, targets=["body"], save_modules=["head"])) for _ in range(2)]
    bank = attach(model, {})
    for name, adapter in zip("ab", adapters, strict=True):
        bank.load(name, adapter)
    x = torch.randn(2, 4, dtype=torch.float64)
    with bank.route(["a", "b"]):
        got = model["head"](x)
    bank.use("b")
    assert_close(got[1], model["head"](x)[1])
    with pytest.raises(BankError, match="no exact mixture"), bank.route([{"a": 0.5, "b": 0.5}, "a"]):
        model["head"](x)


def test_mixtures_of_linear_heads_are_exact() -> None:
    model = tiny_bert(dtype=torch.float64)
    adapters = [made(model, LoraSpec(rank=2, targets=["query"], save_modules=["classifier"])) for _ in range(2)]
    bank = attach(model, {})
    for name, adapter in zip("ab", adapters, strict=True):
        bank.load(name, adapter)
    x = torch.randn(2, 32, dtype=torch.float64)
    base = model.classifier
    with bank.route([{"a": 0.5, "b": 0.7}, None]):
        got = base(x)
    W = (
        base.weight
        + 0.5 * (adapters[0].modules["classifier"]["weight"] - base.weight)
        + 0.7 * (adapters[1].modules["classifier"]["weight"] - base.weight)
    )
    b = (
        base.bias
        + 0.5 * (adapters[0].modules["classifier"]["bias"] - base.bias)
        + 0.7 * (adapters[1].modules["classifier"]["bias"] - base.bias)
    )
    assert_close(got[0], torch.nn.functional.linear(x, W, b)[0])
    assert_close(got[1], torch.nn.functional.linear(x, base.weight, base.bias)[1])


def test_convolutions_refuse_packed_tokens() -> None:
    model = tiny_cnn(dtype=torch.float64)
    adapter = made(model, LoraSpec(rank=2, targets=["conv1"]))
    bank = attach(model, {})
    bank.load("a", adapter)
    with pytest.raises(BankError, match="'conv1' is a convolution"), bank.route(["a", None], lengths=[4, 4]):
        model.conv1(torch.randn(1, 3, 8, 8, dtype=torch.float64))


# loading


def test_a_loaded_adapter_is_one_tensor_outside_of_the_module_tree() -> None:
    model = tiny_llama()
    adapter = made(model, rank=3)
    bank = attach(model, {})
    names = list(model.state_dict())
    for index in range(5):
        bank.load(f"a{index}", adapter)
    assert list(model.state_dict()) == names
    assert bank.adapter("a3").digest == adapter.digest
    assert not list(bank.named_parameters("a3"))
    member = bank._members["a3"]
    assert member.sites.flat.numel() == adapter.num_parameters  # type: ignore[union-attr]


def test_the_hundredth_load_looks_at_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_gpt2()
    adapter = made(model, LoraSpec(rank=2, targets=["c_attn", "c_fc"]))
    bank = attach(model, {})
    bank.load("first", adapter)
    monkeypatch.setattr(nn.Module, "named_modules", lambda *args, **kwargs: pytest.fail("a walk over the model"))
    monkeypatch.setattr(nn.Module, "named_parameters", lambda *args, **kwargs: pytest.fail("a walk over the model"))
    monkeypatch.setattr(nn.Module, "modules", lambda *args, **kwargs: pytest.fail("a walk over the model"))
    monkeypatch.setattr(nn.Module, "state_dict", lambda *args, **kwargs: pytest.fail("a walk over the model"))
    for index in range(20):
        bank.load(f"a{index}", adapter)
        bank.drop(f"a{index}")


def test_what_is_not_finite_is_refused_where_it_is_copied() -> None:
    model = tiny_llama()
    adapter = made(model, rank=2)
    path = adapter.sites[3]
    broken = adapter.factors[path].map(lambda t: t.clone().index_fill_(0, torch.tensor([0]), float("nan")))
    bank = attach(model, {})
    bank.load("fine", adapter)
    with pytest.raises(NotFiniteError, match=path):
        bank.load("broken", adapter.replace(factors={**adapter.factors, path: broken}))
    huge = {name: item.map(lambda t: torch.full_like(t, 3e38)) for name, item in adapter.factors.items()}
    bank.load("huge", adapter.replace(factors=huge))
    assert bank.names == ("fine", "huge")


def test_an_attention_with_time_first_inside() -> None:
    model = tiny_attention(batch_first=False, dtype=torch.float64)
    adapters = [made(model, LoraSpec(rank=rank, targets=["attn", "head"])) for rank in (2, 3)]
    bank = attach(model, {})
    for name, adapter in zip("ab", adapters, strict=True):
        bank.load(name, adapter)
    batch = batch_for(model, rows=3)
    with torch.no_grad():
        with bank.route(["a", None, "b"]):
            got = outputs_of(model, batch)
        for row, entry in enumerate(["a", None, "b"]):
            assert_close(got[row : row + 1], alone(model, bank, entry, rows_of(batch, [row])))


# a model that goes elsewhere


def test_loaded_adapters_follow_the_model_to_another_device() -> None:
    model = randomise(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)), torch.float32)
    adapters = [made(model, LoraSpec(rank=rank, targets=["0", "2"])) for rank in (2, 3)]
    bank = attach(model, {})
    for name, adapter in zip("ab", adapters, strict=True):
        bank.load(name, adapter)
    bank.load("gone", adapters[0])
    bank.use("a")
    route, old = bank.route(["a", "b"]), bank.route(["gone", None])
    x = torch.randn(2, 3, 6)
    with torch.no_grad():
        model(x)
        for each in (route, old):
            with each:
                model(x)
    flats = [weakref.ref(bank._members[name].sites.flat) for name in "ab"]  # type: ignore[attr-defined]
    bank.drop("gone")
    model.to("meta")
    elsewhere = x.to("meta")
    with torch.no_grad():  # autocast, which training asks about, doesn't know this device
        assert model(elsewhere).device.type == "meta"
        for each in (route, old, bank.route({"a": 0.5, "b": 2.0}), bank.route(["b", "b"])):
            with each:
                assert model(elsewhere).device.type == "meta"
    for name in "ab":
        sites = bank._members[name].sites
        assert sites.flat.device.type == "meta"  # type: ignore[attr-defined]
        assert all(slot.lora_A.device.type == "meta" for slot in sites.values())
    del each
    gc.collect()
    assert [ref() for ref in flats] == [None, None]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_loaded_adapters_in_a_model_of_another_dtype(dtype: torch.dtype, dora: bool) -> None:
    """Factors stay what they were, products are the model's; the way back loses nothing."""
    model = randomise(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)), torch.float32)
    adapters = [made(model, LoraSpec(rank=rank, targets=["0", "2"], dora=dora)) for rank in (2, 3)]
    bank = attach(model, {})
    for name, adapter in zip("ab", adapters, strict=True):
        bank.load(name, adapter)
    digests = [bank.adapter(name).digest for name in "ab"]
    bank.use("a")
    route = bank.route(["a", "b"])
    x = torch.randn(2, 3, 6)
    with torch.no_grad():
        model(x)
        with route:
            model(x)
    model.to(dtype)
    assert [bank.adapter(name).digest for name in "ab"] == digests
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            with route:
                got = model(x.to(dtype))
            assert got.dtype == dtype
            for row, name in enumerate("ab"):
                bank.use(name)
                assert_close(got[row], model(x[row].to(dtype)))
