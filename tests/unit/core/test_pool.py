"""Adapters that are trained together: started, stepped and snapshotted as each would be alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import ARCHITECTURES, batch_for, randomise, tiny_gpt2, tiny_llama, tiny_mixtral
from tests.tolerances import assert_close
from tests.unit.core.support import State, checkpoints, made, outputs_of
from weft.core.bank import Bank, attach
from weft.core.pool import Pool
from weft.errors import BankError, SpecError
from weft.spec import LoraSpec

SPECS = {
    "u0": LoraSpec(rank=3, alpha=5, dropout=0.1),
    "u1": LoraSpec(rank=3, alpha=7, dropout=0.3),
    "u2": LoraSpec(rank=5, dora=True),
    "u3": LoraSpec(rank=2, targets=["q_proj", "down_proj"], dropout=0.05, lora_bias=True),
}


def pooled(model: nn.Module, specs: dict[str, LoraSpec]) -> tuple[Bank, Pool]:
    bank = attach(model, {})
    pool = bank.pool()
    for number, (name, spec) in enumerate(specs.items()):
        pool.add(name, spec, seed=number)
    scatter(pool)
    return bank, pool


def scatter(pool: Pool) -> None:
    """Random numbers for whatever is zero at the start."""
    with torch.no_grad():
        for leaf in pool.leaves:
            noise = torch.randn_like(leaf.parameter) * 0.3
            leaf.parameter.copy_(leaf.parameter + noise if leaf.part == "magnitude" else noise)


def lines(pool: Pool, name: str, of: str = "value") -> dict[str, Tensor]:
    found = {}
    for leaf in pool.leaves:
        if name in leaf.lines:
            tensor = leaf.parameter if of == "value" else leaf.parameter.grad
            assert tensor is not None
            found[f"{leaf.path}.{leaf.part}"] = tensor.detach()[leaf.lines[name]].clone()
    return found


def llama() -> nn.Module:
    return tiny_llama(dtype=torch.float64).train()


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_a_pool_starts_an_adapter_as_the_bank_does(init: str) -> None:
    model = llama()
    bank = attach(model, {"plain": LoraSpec(rank=3, init=init)}, seed=4)
    pool = bank.pool()
    pool.add("pooled", LoraSpec(rank=3, init=init), seed=4)
    assert bank.adapter("pooled").digest == bank.adapter("plain").digest
    batch = batch_for(model, rows=2, labels=False)
    with bank.route(["pooled", "plain"]):
        got = outputs_of(model, {name: tensor[[0, 0]] for name, tensor in batch.items()})
    assert_close(got[0], got[1])


@pytest.mark.parametrize(
    "order", [["u0", "u1", "u2", "u3"], ["u3", "u1", "u1", "u0", None, "u2", "u1"], ["u2", "u0", "u2"]]
)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_together_are_those_alone(order: list[str | None], checkpointed: bool) -> None:
    model = llama()
    bank, pool = pooled(model, SPECS)
    batch, seeds = batch_for(model, rows=len(order), labels=False), list(range(3, 3 + len(order)))
    weights = torch.randn(len(order), 7, 64, dtype=torch.float64)
    snapshots = {name: bank.adapter(name) for name in SPECS}
    if checkpointed:
        checkpoints(model, reentrant=False)
    with bank.route(order, seeds=seeds):
        out = outputs_of(model, batch)
    (out * weights).sum().backward()
    found = {name: lines(pool, name, "grad") for name in SPECS if name in order}
    bank.detach()
    for name, grads in found.items():
        other = attach(model, {})
        single = other.pool()
        single.load("alone", snapshots[name])
        rows = [row for row, entry in enumerate(order) if entry == name]
        with other.route(["alone"] * len(rows), seeds=[seeds[row] for row in rows]):
            mine = outputs_of(model, {key: tensor[rows] for key, tensor in batch.items()})
        (mine * weights[rows]).sum().backward()
        assert_close(mine, out[rows], what=name)
        expected = lines(single, "alone", "grad")
        assert grads.keys() == expected.keys()
        assert any(float(grad.abs().max()) > 0 for grad in expected.values())
        for leaf, grad in expected.items():
            assert_close(grads[leaf], grad, what=f"{name} {leaf}")
        other.detach()


@pytest.mark.parametrize("lengths", [[3, 1, 4, 2], [2, 2, 2, 2]])
def test_packed_gradients_are_those_of_the_rows(lengths: list[int]) -> None:
    model = randomise(
        nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)), torch.float64
    ).train()
    specs = {
        "a": LoraSpec(rank=2, targets=["0", "1", "3"]),
        "b": LoraSpec(rank=2, alpha=5, targets=["1", "3"], dropout=0.2),
        "c": LoraSpec(rank=3, targets=["1"], dora=True),
    }
    bank, pool = pooled(model, specs)
    ids, entries = torch.randint(0, 20, (sum(lengths),)), ["a", "b", "c", "b"]
    with bank.route(entries, lengths=lengths, seeds=[1, 2, 3, 4]):
        model(ids[None]).square().sum().backward()
    together = {name: lines(pool, name, "grad") for name in specs}
    for leaf in pool.leaves:
        leaf.parameter.grad = None
    at = 0
    for seed, (entry, length) in enumerate(zip(entries, lengths, strict=True), 1):
        with bank.route([entry], seeds=[seed]):
            model(ids[None, at : at + length]).square().sum().backward()
        at += length
    for name in specs:
        for leaf, grad in lines(pool, name, "grad").items():
            assert_close(together[name][leaf], grad, what=f"{name} {leaf}")


def test_two_tensors_a_site_whatever_the_number() -> None:
    model = llama()
    bank = attach(model, {})
    pool = bank.pool()
    for number in range(9):
        pool.add(f"u{number}", LoraSpec(rank=1 + number % 3, targets="all-linear"), seed=number)
    assert len(pool.leaves) == 2 * 14
    leaf = pool.leaves[0]
    assert leaf.parameter.shape == (18, 32)
    assert leaf.owner.tolist() == [number for number in range(9) for _ in range(1 + number % 3)]
    assert pool.names == tuple(f"u{number}" for number in range(9))
    assert pool.capacity == 9


def test_comers_and_goers_leave_the_others_alone() -> None:
    model = llama()
    before = State(model)
    bank, pool = pooled(model, SPECS)
    kept = {name: lines(pool, name) for name in ("u0", "u2")}
    for number, tensor in enumerate(pool.companion("first")):
        tensor.copy_(torch.arange(tensor.numel(), dtype=tensor.dtype).view(tensor.shape) + number)
    moments = {name: _companion(pool, name) for name in ("u0", "u2")}
    objects = [id(leaf.parameter) for leaf in pool.leaves]
    pool.drop("u1")
    pool.add("new", SPECS["u1"], seed=7)
    assert [id(leaf.parameter) for leaf in pool.leaves] == objects, "one of the same shape takes the lines over"
    assert pool.number("new") == 1
    assert all(float(value.abs().max()) == 0 for value in _companion(pool, "new").values())
    pool.drop("u3")
    pool.add("wide", LoraSpec(rank=9, targets=["q_proj", "o_proj"]), seed=8)
    assert pool.names == ("u0", "new", "u2", "wide")
    for name, values in kept.items():
        now, moved = lines(pool, name), _companion(pool, name)
        assert all(torch.equal(now[leaf], value) for leaf, value in values.items())
        assert all(torch.equal(moved[leaf], value) for leaf, value in moments[name].items())
    for name in ("u0", "new", "wide"):
        bank.drop(name)
    assert pool.names == ("u2",)
    assert all(leaf.parameter.shape[0] in (5, 1) for leaf in pool.leaves)
    pool.drop("u2")
    assert pool.leaves == ()
    bank.detach()
    before.check()


def _companion(pool: Pool, name: str) -> dict[str, Tensor]:
    pairs = zip(pool.leaves, pool.companion("first"), strict=True)
    return {
        f"{leaf.path}.{leaf.part}": tensor[leaf.lines[name]].clone() for leaf, tensor in pairs if name in leaf.lines
    }


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "cnn"])
def test_a_snapshot_is_bit_equal_and_loads_back(architecture: str) -> None:
    targets: dict[str, Any] = {
        "llama": {"targets": "all-linear"},
        "gpt2": {"targets": ["c_attn", "c_fc"], "bias": "lora_only"},
        "bert": {"targets": ["query", "dense"], "save_modules": ["classifier"]},
        "cnn": {"targets": ["conv1", "linear"]},
    }
    model = ARCHITECTURES[architecture](dtype=torch.float64)
    adapter = made(model, LoraSpec(rank=3, **targets[architecture]))
    bank = attach(model, {})
    pool = bank.pool()
    pool.load("mine", adapter)
    pool.add("other", LoraSpec(rank=2, **targets[architecture]), seed=1)
    assert bank.adapter("mine").digest == adapter.digest
    batch = batch_for(model, rows=2, labels=False)
    bank.load("fixed", adapter)
    with torch.no_grad():
        with bank.route(["mine", "other"]):
            got = outputs_of(model, batch)
        bank.use("fixed")
        assert_close(got[:1], outputs_of(model, batch)[:1])
        bank.use("mine")
        assert_close(got[:1], outputs_of(model, batch)[:1])
    own = dict(pool.own_parameters("mine"))
    assert bool(own) == (architecture in ("gpt2", "bert"))


def test_steps_together_are_steps_alone() -> None:
    """Twenty steps of plain gradient descent, each adapter at its own rate, rows in changing order."""
    model = llama()
    specs = {
        f"u{n}": LoraSpec(rank=1 + n, alpha=3, targets=["q_proj", "v_proj", "up_proj"], dropout=0.1 * n)
        for n in range(4)
    }
    data = [batch_for(model, rows=2, length=5 + n, labels=False)["input_ids"] for n in range(4)]

    def train(names: list[str]) -> dict[str, Any]:
        bank = attach(model, {})
        pool = bank.pool()
        for name in names:
            pool.add(name, specs[name], seed=int(name[1]))
        width = max(data[int(name[1])].shape[1] for name in names)
        for step in range(20):
            order = names if step % 2 else names[::-1]
            ids = torch.cat([nn.functional.pad(data[int(n[1])], (0, width - data[int(n[1])].shape[1])) for n in order])
            entries = [name for name in order for _ in range(2)]
            seeds = [1000 * int(name[1]) + 2 * step + row for name in order for row in range(2)]
            with bank.route(entries, seeds=seeds):
                logits = model(input_ids=ids).logits
            losses = [logits[row, : data[int(name[1])].shape[1]].square().mean() for row, name in enumerate(entries)]
            sum(losses).backward()  # type: ignore[union-attr]
            with torch.no_grad():
                rates = torch.tensor([0.1 + 0.1 * int(name[1]) for name in pool.names], dtype=torch.float64)
                for leaf in pool.leaves:
                    leaf.parameter -= rates[leaf.owner][:, None] * leaf.parameter.grad
                    leaf.parameter.grad = None
        found = {name: bank.adapter(name) for name in names}
        bank.detach()
        return found

    together = train(list(specs))
    for name in specs:
        expected = train([name])[name]
        assert any(float(item.B.abs().max()) > 1e-3 for item in expected.factors.values())
        for key, tensor in expected.tensors().items():
            assert_close(together[name].tensors()[key], tensor, what=f"{name} {key}")


def test_evaluation_without_gradients_sees_every_change() -> None:
    model = llama().eval()
    bank, pool = pooled(model, {name: SPECS[name] for name in ("u0", "u1")})
    batch = batch_for(model, rows=2, labels=False)
    with torch.no_grad(), bank.route(["u0", "u1"]):
        first = outputs_of(model, batch)
        for leaf in pool.leaves:
            leaf.parameter.data.mul_(1.5)
        second = outputs_of(model, batch)
    assert not torch.allclose(first, second)
    with bank.route(["u0", "u1"]):
        assert_close(outputs_of(model, batch), second)


def test_mistakes_are_named() -> None:
    model = tiny_mixtral()
    bank = attach(model, {"plain": LoraSpec(rank=2, targets=["q_proj"])})
    pool = bank.pool()
    pool.add("a", LoraSpec(rank=2, targets=["q_proj"]))
    with pytest.raises(BankError, match="has an adapter 'a' already"):
        pool.add("a", LoraSpec(rank=2, targets=["q_proj"]))
    with pytest.raises(BankError, match="has an adapter 'plain' already"):
        pool.add("plain", LoraSpec(rank=2, targets=["q_proj"]))
    with pytest.raises(BankError, match="no adapter 'plain' in this pool"):
        pool.number("plain")
    with pytest.raises(SpecError, match="gate_up_proj' is a bare parameter"):
        pool.add("b", LoraSpec(rank=2, targets=["q_proj"], target_parameters=["experts.gate_up_proj"]))
    route = bank.route(["a", None])
    pool.drop("a")
    batch = batch_for(model, rows=2, labels=False)
    with pytest.raises(BankError, match="'a' has left this pool"), route:
        model(**batch)
    assert pool.names == ()
    other = tiny_gpt2()
    with pytest.raises(SpecError, match="2 groups"):
        attach(ARCHITECTURES["cnn"](), {}).pool().add("a", LoraSpec(rank=2, targets=["conv2"]))
    attach(other, {}).pool()
