"""What can't be mixed is refused before anything is computed, by name; what is trained whole follows the rule that was given."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import tiny_bert, tiny_llama
from tests.tolerances import assert_close
from tests.unit.compose.support import adapter_of, three
from weft.adapter import Adapter
from weft.compose import combine, compare, shrink
from weft.errors import BaseMismatchError, FormatError, MixError, NotFiniteError


@pytest.fixture(scope="module")
def adapters() -> list[Adapter]:
    return three(tiny_llama(dtype=torch.float64))


@pytest.mark.parametrize(("weights", "said"), [
    ([1.0, 2.0], "3 adapters and 2 weights"),
    ([1.0, 2.0, 3.0, 4.0], "3 adapters and 4 weights"),
    ([1.0, math.nan, 1.0], "is nan; expected a finite number"),
    ([1.0, math.inf, 1.0], "is inf; expected a finite number"),
    ([1.0, "0.5", 1.0], "is '0.5'; expected a finite number"),
    ([1.0, True, 1.0], "is True; expected a finite number"),
    ([0.0, 0.0, 0.0], "all weights are 0"),
    ([1.0, {"q_prj": 1.0}, 1.0], r"'q_prj' matches the end of none of its 14 sites\. Did you mean"),
    ([1.0, {"q_proj": 1.0}, 1.0], "say nothing about its site 'model.layers.0.self_attn.k_proj'"),
    ([1.0, {"(": 1.0}, 1.0], "is no regular expression"),
    ([1.0, {"q_proj": math.nan, "default": 1.0}, 1.0], "at 'q_proj' is nan"),
], ids=str)  # fmt: skip
def test_weights_that_fit_nothing(adapters: list[Adapter], weights: list[Any], said: str) -> None:
    with pytest.raises(MixError, match=said):
        combine(adapters, weights)


@pytest.mark.parametrize(("settings", "said"), [
    ({"method": "tise"}, "no method 'tise'. Did you mean 'ties'"),
    ({"method": "svd"}, "needs rank=16 .--rank 16., or energy=0.99 .*, or error=0.05"),
    ({"method": "ties"}, "needs density"),
    ({"method": "knots"}, "needs density"),
    ({"method": "knots", "inner": "average", "density": 0.5}, "inner='average' is no rule"),
    ({"rank": 4}, "'exact' doesn't take rank; method='svd' does"),
    ({"density": 0.4}, "'exact' doesn't take density"),
    ({"method": "svd", "rank": 4, "energy": 0.9}, "expected one limit"),
    ({"method": "svd", "rank": 0}, "rank=0; expected a whole number"),
    ({"method": "svd", "rank": 2.5}, "rank=2.5; expected a whole number"),
    ({"method": "svd", "rank": True}, "rank=True; expected a whole number"),
    ({"method": "svd", "energy": 1.5}, "energy=1.5; expected a share"),
    ({"method": "svd", "error": -0.1}, "error=-0.1; expected a share"),
    ({"method": "ties", "density": 0.0}, r"density=0.0; expected a share in \(0, 1\]"),
    ({"method": "ties", "density": math.nan}, "density=nan"),
    ({"method": "ties", "density": 0.5, "scaling": math.inf}, "scaling=inf"),
    ({"method": "layerwise"}, "needs an adapter with weights by pattern"),
    ({"whole": "sme"}, "whole='sme' is no rule"),
    ({"method": "knots", "inner": "sum", "density": 0.3}, "keeps all elements, and doesn't take density"),
], ids=str)  # fmt: skip
def test_methods_and_options(adapters: list[Adapter], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(MixError, match=said):
        combine(adapters, **settings)


def test_lists_that_are_none(adapters: list[Adapter], tmp_path: Path) -> None:
    with pytest.raises(MixError, match="expected a list of adapters"):
        combine(adapters[0])
    with pytest.raises(MixError, match="expected a list of adapters"):
        combine("runs/a")
    with pytest.raises(MixError, match="got 0 adapters"):
        combine([])
    with pytest.raises(MixError, match="expected an adapter or its path"):
        combine([3])
    with pytest.raises(MixError, match="give them once"):
        combine([(adapters[0], 1.0)], [1.0])
    with pytest.raises(MixError, match="got 1 adapters; expected at least 2"):
        compare([adapters[0]])
    with pytest.raises(FormatError, match="no such file"):
        combine([tmp_path / "none"])


def test_the_same_adapter_twice(adapters: list[Adapter], tmp_path: Path) -> None:
    place = adapters[0].save(tmp_path / "a")
    for twice in ([adapters[0], adapters[0]], [place, adapters[0]], [(place, 0.5), (str(place), 0.5)]):
        with pytest.raises(MixError, match="are the same adapter"):
            combine(twice)


def test_an_adapter_of_weight_0_has_no_part(adapters: list[Adapter]) -> None:
    mixed = combine([(adapters[0], 1.0), (adapters[1], 0.0)])
    assert mixed.ranks() == "2"
    assert "weight 0" in mixed.report.notes[0]


# bases


def test_adapters_of_different_bases() -> None:
    one, two = adapter_of(tiny_llama(), 1), adapter_of(tiny_llama(), 2)
    with pytest.raises(BaseMismatchError, match=r"different bases: bytes of the weights.*don't add"):
        combine([one, two])
    with pytest.raises(BaseMismatchError):
        compare([one, two])
    assert combine([one, two], allow_other_base=True).ranks() == "6"
    with pytest.raises(BaseMismatchError):
        combine([one], base=tiny_llama())


def test_one_base_at_two_precisions_is_one_base() -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    one = adapter_of(model, 1)
    two = adapter_of(model.float(), 2)
    assert combine([one, two]).ranks() == "6"


def test_names_of_bases_where_there_are_no_fingerprints(adapters: list[Adapter]) -> None:
    def named(adapter: Adapter, name: str | None) -> Adapter:
        return adapter.replace(provenance=dataclasses.replace(adapter.provenance, base=None, base_name=name))

    left, right = adapters[0], adapters[1]
    with pytest.raises(BaseMismatchError, match="name different bases: llama-8b and qwen-7b"):
        combine([named(left, "org/Llama-8B"), named(right, "/models/qwen-7b")])
    mixed = combine([named(left, "org/Llama-8B"), named(right, "/models/llama-8b/")])
    assert "names and shapes were compared, not weights" in mixed.report.notes[0]
    assert mixed.provenance.base_name == "org/Llama-8B"
    combine([named(left, None), right])


def test_shapes_that_differ_are_named_by_site() -> None:
    one, two = adapter_of(tiny_llama(), 1), adapter_of(tiny_llama(hidden_size=64), 2)
    with pytest.raises(
        MixError, match=r"model\.layers\.0\.self_attn\.q_proj: the updates of .* differ in kind or shape"
    ):
        combine([one, two], allow_other_base=True)
    with pytest.raises(MixError, match=r"q_proj: the updates"):
        compare([one, two], allow_other_base=True)


@pytest.mark.parametrize("method", ["exact", "svd", "ties", "knots"])
def test_nan_is_refused(adapters: list[Adapter], method: str) -> None:
    path = adapters[0].sites[3]
    item = adapters[0].factors[path]
    A = item.A.clone()
    A[0, 0] = math.nan
    broken = adapters[0].replace(factors={**adapters[0].factors, path: dataclasses.replace(item, A=A)})
    options: dict[str, Any] = {"exact": {}, "svd": {"rank": 2}}.get(method, {"density": 0.5})
    with pytest.raises(NotFiniteError, match=path):
        combine([broken, adapters[1]], method=method, **options)
    with pytest.raises(NotFiniteError, match=path):
        shrink(broken, rank=1)
    with pytest.raises(NotFiniteError, match=path):
        compare([broken, adapters[1]])


# what is trained whole


def heads() -> tuple[Any, list[Adapter]]:
    model = tiny_bert(dtype=torch.float64)
    settings: dict[str, Any] = {"targets": ["query", "value"], "save_modules": ["classifier"]}
    return model, [adapter_of(model, seed, **settings) for seed in (1, 2)]


def test_heads_that_differ_are_an_error_that_names_the_ways_out() -> None:
    _, (one, two) = heads()
    with pytest.raises(MixError, match=r"module 'classifier' .* different numbers.*whole='average'.*whole='drop'"):
        combine([one, two])


def test_heads_by_rule(tmp_path: Path) -> None:
    _, (one, two) = heads()
    mean = combine([(one, 3.0), (two, 1.0)], whole="average")
    for name, tensor in mean.modules["classifier"].items():
        assert_close(tensor, 0.75 * one.modules["classifier"][name] + 0.25 * two.modules["classifier"][name])
    assert mean.provenance.base == one.provenance.base
    assert mean.spec.save_modules == ("classifier",)
    assert mean.report.settings == {"whole": "average"}
    places = [one.save(tmp_path / "one"), two.save(tmp_path / "two")]
    chosen = combine(places, whole=str(places[1]))
    assert torch.equal(chosen.modules["classifier"]["weight"], two.modules["classifier"]["weight"])
    dropped = combine([one, two], whole="drop")
    assert not dropped.modules
    assert dropped.provenance.base is None, "the fingerprint was of the base without its head"
    assert any("classifier" in note for note in dropped.report.notes)
    with pytest.raises(MixError, match="have no mean"):
        combine([(one, 1.0), (two, -0.5)], whole="average")
    same = two.replace(modules=one.modules)
    assert torch.equal(combine([one, same]).modules["classifier"]["bias"], one.modules["classifier"]["bias"])


def test_a_head_that_only_one_has() -> None:
    model, (one, _) = heads()
    plain = adapter_of(model, 3, targets=["query"])
    with pytest.raises(BaseMismatchError, match="train different modules whole"):
        combine([one, plain])
    with pytest.raises(MixError, match=r"trained whole in .* and not in"):
        combine([one, plain], base=model)
    chosen = combine([one, plain], base=model, whole=one.digest[:12])
    assert "classifier" in chosen.modules
    import weft

    with weft.attach(model, {}) as bank:
        bank.load("chosen", chosen)
    dropped = combine([one, plain], base=model, whole="drop")
    with weft.attach(model, {}) as bank:
        bank.load("dropped", dropped)
