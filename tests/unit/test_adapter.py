"""Adapter: an immutable value, equal where its content is."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from weft.adapter import Adapter, Provenance
from weft.core.factors import Factors
from weft.errors import NotFiniteError, TargetError
from weft.identity import Fingerprint
from weft.spec import LoraSpec

BASE = Fingerprint("Model", "c" * 64, "l" * 64, "w" * 64, "float32", "r" * 64)


def adapter(**changes: Any) -> Adapter:
    torch.manual_seed(0)
    factors = {
        "layers.0.q": Factors(torch.randn(2, 5), torch.randn(4, 2), 0.5, magnitude=torch.ones(4)),
        "layers.1.q": Factors(torch.randn(3, 5), torch.randn(4, 3), 2.0),
    }
    fields: dict[str, Any] = {
        "spec": LoraSpec(rank=2), "factors": factors, "modules": {"head": {"weight": torch.randn(2, 4), "bias": torch.zeros(2)}},
        "biases": {"layers.0.q.bias": torch.randn(4)}, "provenance": Provenance(base=BASE),
    }  # fmt: skip
    return Adapter(**(fields | changes))


def test_what_it_says_of_itself() -> None:
    one = adapter()
    assert one.sites == ("layers.0.q", "layers.1.q")
    assert one.num_parameters == (10 + 8 + 4) + (15 + 12) + (8 + 2) + 4
    assert one.num_parameters == sum(tensor.numel() for tensor in one.tensors().values())
    assert one.ranks() == "2-3"
    assert adapter(factors={}).ranks() == "none"
    assert repr(one) == f"Adapter(2 sites, rank 2-3, 63 parameters, {one.digest[:12]})"
    assert set(one.tensors()) == {
        "layers.0.q.lora_A", "layers.0.q.lora_B", "layers.0.q.magnitude", "layers.1.q.lora_A", "layers.1.q.lora_B", "head.weight",
        "head.bias", "layers.0.q.bias",
    }  # fmt: skip
    assert torch.equal(one.delta("layers.1.q"), one.factors["layers.1.q"].delta())
    with pytest.raises(TargetError, match=r"no site 'layers.2.q'. Did you mean 'layers\.[01]\.q'"):
        one.delta("layers.2.q")


def test_it_is_immutable() -> None:
    factors = dict(adapter().factors)
    one = adapter(factors=factors)
    factors.clear()
    assert len(one.sites) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.spec = LoraSpec()  # type: ignore[misc]
    for mapping in (one.factors, one.modules, one.biases, one.modules["head"]):
        with pytest.raises(TypeError):
            mapping["x"] = 1  # type: ignore[index]


def changed(name: str) -> Adapter:
    one = adapter()
    first = one.factors["layers.0.q"]
    other = first.map(lambda tensor: tensor.clone())
    if name == "A":
        other.A[0, 0] += 1
    if name == "scale":
        other = dataclasses.replace(other, scale=0.25)
    if name == "kind":
        other = dataclasses.replace(other, kind="embedding")
    if name == "magnitude":
        other = dataclasses.replace(other, magnitude=None)
    factors = {**one.factors, "layers.0.q": other}
    return {
        "spec": one.replace(spec=LoraSpec(rank=2, dropout=0.1)),
        "base": one.replace(provenance=Provenance(base=dataclasses.replace(BASE, weights="x" * 64))),
        "no base": one.replace(provenance=Provenance()),
        "head": one.replace(modules={"head": {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}}),
        "no head": one.replace(modules={}),
        "biases": one.replace(biases={}),
        "fewer sites": one.replace(factors=dict(list(one.factors.items())[:1])),
        "dtype": one.map(Tensor.double),
    }.get(name, one.replace(factors=factors))


@pytest.mark.parametrize("name", [
    "A", "scale", "kind", "magnitude", "spec", "base", "no base", "head", "no head", "biases", "fewer sites", "dtype",
])  # fmt: skip
def test_the_digest_sees_every_change(name: str) -> None:
    assert changed(name).digest != adapter().digest
    assert changed(name) != adapter()


def test_the_digest_sees_nothing_else() -> None:
    one, two = adapter(), adapter()
    assert one == two
    assert hash(one) == hash(two)
    assert len({one, two}) == 1
    trained = one.replace(
        provenance=Provenance(base=BASE, recipe={"steps": 3}, evaluation={"loss": 1.0}, created="now")
    )
    assert trained == one
    assert one.replace(factors=dict(reversed(one.factors.items()))) == one
    assert copy.deepcopy(one.spec) == one.spec
    assert one != "adapter"
    assert one.replace(proof={"logits": torch.ones(1)}) == one


def test_map_reaches_every_tensor() -> None:
    half = adapter().map(Tensor.half)
    assert {tensor.dtype for tensor in half.tensors().values()} == {torch.float16}
    assert half.factors["layers.0.q"].scale == 0.5


@pytest.mark.parametrize("where", ["factors", "modules", "biases"])
def test_nan_is_refused_wherever_it_is(where: str) -> None:
    one = adapter()
    one.check_finite()
    broken = {
        "factors": one.replace(
            factors={**one.factors, "layers.1.q": Factors(torch.full((1, 5), torch.nan), torch.ones(4, 1), 1.0)}
        ),
        "modules": one.replace(modules={"head": {"weight": torch.tensor([1.0, torch.inf])}}),
        "biases": one.replace(biases={"layers.0.q.bias": torch.tensor([torch.nan])}),
    }[where]
    with pytest.raises(
        NotFiniteError, match={"factors": "layers.1.q", "modules": "head.weight", "biases": "layers.0.q.bias"}[where]
    ):
        broken.check_finite()


def test_provenance_goes_through_plain_data() -> None:
    full = Provenance(
        base=BASE, data=({"source": "x.jsonl", "digest": "d", "examples": 3},), recipe={"learning_rate": 1e-4},
        parents=({"digest": "p", "weight": 0.5},), versions={"torch": "2"}, evaluation={"eval_loss": 1.5}, created="2026", notes=("a",),
    )  # fmt: skip
    again = Provenance.from_dict(json.loads(json.dumps(full.to_dict())))
    assert again == full
    assert Provenance.from_dict({"of a later version": 1}) == Provenance()
    assert Provenance.from_dict(Provenance().to_dict()) == Provenance()
