"""Damaged bases: whatever stands in config.json and in the weights' header, only weft's own errors come out."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.models import tiny_llama
from tests.unit.models.test_load import tokenizer
from weft.errors import BaseError
from weft.models.load import load_base

SCALARS = st.none() | st.booleans() | st.integers(-3, 70) | st.floats(-2, 2) | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
FIELDS = ["hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "rope_parameters",
          "num_hidden_layers", "hidden_act", "rms_norm_eps", "model_type", "architectures", "dtype", "tie_word_embeddings",
          "head_dim", "id2label", "quantization_config", "auto_map", "eos_token_id", "max_position_embeddings"]  # fmt: skip
FUZZ = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(layers=1).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def base(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "base"))


def loads_or_is_refused(base: Path) -> None:
    try:
        load_base(base)
    except BaseError as refusal:
        if str(base) not in str(refusal):
            pytest.fail(f"a refusal that does not name the base: {refusal}")


@FUZZ
@given(changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3))
@pytest.mark.filterwarnings("ignore")  # transformers warns of many values that it then takes
def test_any_config(base: Path, saved: Path, changes: dict[str, Any]) -> None:
    config = json.loads((saved / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))
    loads_or_is_refused(base)


ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F99", ""]) | SCALARS,
        "shape": st.lists(st.integers(-1, 2**62), max_size=3) | SCALARS,
        "data_offsets": st.lists(st.integers(-1, 2**62), max_size=3) | SCALARS,
    },
)


@FUZZ
@given(header=st.dictionaries(st.sampled_from(["lm_head.weight", "__metadata__", "x"]), ENTRY | VALUES, max_size=3))
def test_any_header(base: Path, header: dict[str, Any]) -> None:
    text = json.dumps(header).encode()
    (base / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 64)
    loads_or_is_refused(base)


@FUZZ
@given(data=st.binary(max_size=200))
def test_any_bytes(base: Path, data: bytes) -> None:
    (base / "model.safetensors").write_bytes(data)
    loads_or_is_refused(base)


@FUZZ
@given(data=st.data())
def test_any_damage_to_the_header(base: Path, saved: Path, data: st.DataObject) -> None:
    weights = bytearray((saved / "model.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        weights[data.draw(st.integers(0, 400))] = data.draw(st.integers(0, 255))
    (base / "model.safetensors").write_bytes(weights)
    loads_or_is_refused(base)
