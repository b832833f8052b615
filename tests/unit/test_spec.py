"""LoraSpec: a frozen value in which nothing wrong survives."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.errors import SpecError
from weft.spec import BIASES, INITS, LoraSpec

FULL: dict[str, Any] = {
    "rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"], "target_parameters": ["experts.gate_up_proj"], "exclude": ["lm_head"],
    "layers": [0, 2], "layers_pattern": "layers", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1.0}, "rslora": True,
    "dora": True, "dropout": 0.1, "bias": "all", "lora_bias": True, "fan_in_fan_out": False, "init": "pissa", "save_modules": ["head"],
    "batch_norm": "saved", "towers": {},
}  # fmt: skip


def test_defaults() -> None:
    spec = LoraSpec()
    assert (spec.rank, spec.alpha, spec.targets) == (8, 8.0, "all-linear")
    assert spec.scale_at("anything") == 1.0
    assert LoraSpec(rank=16).alpha == 16.0, "alpha follows the rank"


def test_every_field_goes_through_plain_data_and_back() -> None:
    assert set(FULL) == {field.name for field in dataclasses.fields(LoraSpec)}
    spec = LoraSpec(**FULL)
    plain = spec.to_dict()
    assert plain == FULL
    assert LoraSpec.from_dict(json.loads(json.dumps(plain))) == spec
    assert LoraSpec.from_dict({}) == LoraSpec()
    assert pickle.loads(pickle.dumps(spec)) == spec  # noqa: S301
    assert copy.deepcopy(spec) == spec


def test_it_is_frozen_and_holds_copies() -> None:
    names, pattern = ["q_proj"], {"q_proj": 2}
    spec = LoraSpec(targets=names, rank_pattern=pattern)
    names.append("v_proj")
    pattern["v_proj"] = 3
    assert spec.targets == ("q_proj",)
    assert spec.rank_pattern == {"q_proj": 2}
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.rank = 3  # type: ignore[misc]
    assert spec.replace(rank=3) == LoraSpec(rank=3, alpha=8, targets=["q_proj"], rank_pattern={"q_proj": 2})
    assert spec.rank == 8


def test_equal_specs_have_equal_hashes() -> None:
    pairs = [
        (LoraSpec(alpha=16), LoraSpec(alpha=16.0)),
        (LoraSpec(dropout=0), LoraSpec(dropout=0.0)),
        (LoraSpec(alpha_pattern={"a": 1}), LoraSpec(alpha_pattern={"a": 1.0})),
        (LoraSpec(targets=["a"]), LoraSpec(targets=("a",))),
        (LoraSpec(targets={"b", "a"}), LoraSpec(targets=["a", "b"])),
        (LoraSpec(layers=3), LoraSpec(layers=[3])),
        (LoraSpec(target_parameters="mix"), LoraSpec(target_parameters=["mix"])),
    ]
    for one, two in pairs:
        assert one == two
        assert hash(one) == hash(two)
        assert one.to_dict() == two.to_dict()
        assert json.dumps(one.to_dict()) == json.dumps(two.to_dict()), "digests are taken over this"
    assert LoraSpec(rank_pattern={"q": 1, ".*q": 2}) != LoraSpec(rank_pattern={".*q": 2, "q": 1}), (
        "the first match wins"
    )
    assert LoraSpec(targets="a") != LoraSpec(targets=["a"])
    assert LoraSpec() != "LoraSpec"


def test_scales() -> None:
    spec = LoraSpec(
        rank=8,
        alpha=16,
        rank_pattern={"down_proj": 2, "layers.1.*": 4},
        alpha_pattern={r"up_\w+": 3, "layers.1.mlp.gate": 5},
    )
    assert spec.scale_at("model.layers.0.mlp.up_proj") == 3 / 8
    assert spec.scale_at("model.layers.0.mlp.down_proj") == 8.0
    assert spec.scale_at("model.layers.1.mlp.down_proj") == 8.0, "the first match wins"
    assert (spec.rank_at("model.layers.1.mlp.gate"), spec.alpha_at("model.layers.1.mlp.gate")) == (4, 5.0)
    assert spec.rank_at("model.layers.0.self_attn.mydown_proj") == 8, "a whole part of a path, or its end after a dot"
    assert spec.scale_at("q_proj", rank=4) == 4.0
    stable = spec.replace(rslora=True)
    assert stable.scale_at("q_proj") == 16 / math.sqrt(8)
    assert stable.scale_at("x.down_proj") == 16 / math.sqrt(2)
    assert stable.scale_at("q_proj", rank=16) == 4.0


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"rank": 0}, "rank: got 0; expected a whole number of at least 1"),
    ({"rank": 2.0}, "rank"),
    ({"rank": True}, "rank"),
    ({"rank": "8"}, "rank"),
    ({"rank": 10**400}, "rank"),
    ({"alpha": 0}, "alpha: got 0; expected a finite number other than 0"),
    ({"alpha": math.nan}, "alpha"),
    ({"alpha": math.inf}, "alpha"),
    ({"alpha": -(10**400)}, "alpha"),
    ({"alpha": "16"}, "alpha"),
    ({"dropout": 1.0}, r"dropout: got 1.0; expected a number in \[0, 1\)"),
    ({"dropout": -0.1}, "dropout"),
    ({"dropout": None}, "dropout"),
    ({"targets": []}, "targets: got (); expected at least one name".replace("(", r"\(").replace(")", r"\)")),
    ({"targets": ""}, "targets"),
    ({"targets": 3}, "targets"),
    ({"targets": [""]}, "targets"),
    ({"targets": ["a", 3]}, "targets"),
    ({"targets": "("}, "targets: .* is not a valid regular expression; give a list for plain names"),
    ({"targets": "a{99999999999999999}"}, "targets"),
    ({"exclude": "["}, "exclude"),
    ({"exclude": None}, "exclude"),
    ({"target_parameters": 3}, "target_parameters"),
    ({"save_modules": [None]}, "save_modules"),
    ({"bias": "some"}, r"bias: got 'some'; expected one of \('none', 'all', 'lora_only'\)"),
    ({"bias": True}, "bias"),
    ({"init": "pisa"}, "init: got 'pisa'; expected one of"),
    ({"init": "pissa_niter_0"}, "init"),
    ({"init": 5}, "init"),
    ({"layers": -1}, "layers"),
    ({"layers": "0"}, "layers"),
    ({"layers": 1.5}, "layers"),
    ({"layers": [True]}, "layers"),
    ({"layers": [0, "1"]}, "layers"),
    ({"layers_pattern": 3}, "layers_pattern"),
    ({"fan_in_fan_out": 1}, "fan_in_fan_out"),
    ({"rslora": 1}, "rslora: got 1; expected True or False"),
    ({"dora": None}, "dora"),
    ({"lora_bias": "no"}, "lora_bias"),
    ({"rank_pattern": ["q"]}, "rank_pattern: got .* expected a mapping"),
    ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]: got 0; expected a whole number"),
    ({"rank_pattern": {"q": 1.5}}, "rank_pattern"),
    ({"rank_pattern": {"q": True}}, "rank_pattern"),
    ({"rank_pattern": {"(": 2}}, r"rank_pattern: '\(' is not a regular expression"),
    ({"rank_pattern": {3: 2}}, "rank_pattern"),
    ({"alpha_pattern": {"q": 0}}, r"alpha_pattern\['q'\]"),
    ({"alpha_pattern": {"q": math.inf}}, "alpha_pattern"),
    ({"alpha_pattern": None}, "alpha_pattern"),
]


@pytest.mark.parametrize(("fields", "text"), WRONG, ids=lambda item: str(item)[:40])
def test_wrong_values_are_refused_by_name(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError, match=rf"LoraSpec\.{text}"):
        LoraSpec(**fields)
    with pytest.raises(ValueError, match="LoraSpec"):
        LoraSpec().replace(**fields)


def test_an_unknown_key_is_an_error_with_a_hint() -> None:
    with pytest.raises(SpecError, match=r"no field 'target'\. Did you mean 'targets'.*Fields: rank, alpha"):
        LoraSpec.from_dict({"target": "x"})
    with pytest.raises(SpecError, match="no field 'r'"):
        LoraSpec().replace(r=3)
    with pytest.raises(SpecError, match="no field 3"):
        LoraSpec.from_dict({3: 1})  # type: ignore[dict-item]


def test_what_is_allowed() -> None:
    for init in (*INITS, "pissa_niter_4"):
        assert LoraSpec(init=init).init == init
    for bias in BIASES:
        assert LoraSpec(bias=bias).bias == bias
    assert LoraSpec(targets=[], target_parameters=["mix"]).targets == ()
    assert LoraSpec(alpha=-2).scale_at("x") == -0.25, "a negative scale is unusual, not wrong"
    assert LoraSpec(layers=range(3)).layers == (0, 1, 2)
    assert LoraSpec(rank_pattern={"q": 4}, alpha_pattern={"q": 0.5}).scale_at("q") == 0.125


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.just(10**400)
    | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([*FULL, "r", "lora_alpha"]), ANYTHING, max_size=4))
def test_any_configuration_is_a_spec_or_an_error_of_wefts_own(values: dict[str, Any]) -> None:
    try:
        spec = LoraSpec.from_dict(values)
    except SpecError:
        return
    assert LoraSpec.from_dict(spec.to_dict()) == spec
    assert hash(spec) == hash(LoraSpec.from_dict(spec.to_dict()))
    assert math.isfinite(spec.scale_at("a.b"))
