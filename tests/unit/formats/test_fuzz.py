"""Whatever is in a file: an adapter comes out, or one of weft's own errors."""

from __future__ import annotations

import functools
import io
import json
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from tests.unit.formats.support import PREFIX, SMALLEST, folder, pair, simple
from weft.adapter import Adapter
from weft.errors import WeftError
from weft.formats import load
from weft.formats.peft import read, write
from weft.formats.peft_config import _FIELDS, _REFUSED
from weft.formats.tensor_files import parse_header, read_tensors

QUICK = settings(max_examples=60, deadline=None)

numbers = st.one_of(st.integers(), st.integers(-3, 40), st.floats(), st.booleans(), st.none())
names = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["q_proj", "a.b", "(", "[", "a|b", "(?i)x", "*", "(?P<a>x)", r"\1", "layers", "x" * 2000]),
)
values = st.recursive(
    numbers | names, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=8
)


def survives(action: Callable[[], Any]) -> Any:
    """The result, or None where weft refused."""
    try:
        return action()
    except WeftError:
        return None


def in_folder(action: Callable[[Path], Any]) -> Any:
    with tempfile.TemporaryDirectory() as place:
        return survives(lambda: action(Path(place)))


@functools.cache
def valid() -> dict[str, bytes]:
    """Files of a small adapter."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        write(simple(), Path(place) / "a")
        files = {path.name: path.read_bytes() for path in (Path(place) / "a").iterdir()}
    stream = io.BytesIO()
    torch.save(pair("a.q_proj"), stream)
    return files | {"adapter_model.bin": stream.getvalue()}


def mutated(raw: bytes, edits: list[tuple[int, bytes, int]]) -> bytes:
    """Bytes replaced, inserted and removed."""
    for at, new, removed in edits:
        at %= len(raw) + 1
        raw = raw[:at] + new + raw[at + removed :]
    return raw


edits = st.lists(st.tuples(st.integers(0, 2**20), st.binary(max_size=6), st.integers(0, 8)), min_size=1, max_size=4)


@QUICK
@given(st.binary(max_size=300))
def test_any_bytes(raw: bytes) -> None:
    for name in ("x.safetensors", "x.bin", "adapter_config.json"):

        def action(place: Path, name: str = name) -> Any:
            (place / name).write_bytes(raw)
            return load(place if name.endswith(".json") else place / name)

        in_folder(action)


@QUICK
@given(st.dictionaries(names, values | st.fixed_dictionaries({"dtype": st.sampled_from(["F32", "BF16", "I8", "BOOL", "F4"]) | values,
       "shape": st.lists(st.integers(-1, 5), max_size=3) | values, "data_offsets": st.lists(st.integers(-1, 80), min_size=2, max_size=2) | values}), max_size=3),
       st.integers(0, 120), st.integers(-3, 3))  # fmt: skip
def test_any_header(said: dict[str, Any], data: int, lie: int) -> None:
    text = json.dumps(said).encode()
    raw = (len(text) + lie if len(text) + lie >= 0 else 0).to_bytes(8, "little") + text + bytes(data)

    def action(place: Path) -> Any:
        (place / "x.safetensors").write_bytes(raw)
        return read_tensors(place / "x.safetensors")

    found = in_folder(action)
    entries = survives(lambda: parse_header(raw[: 8 + len(text)], len(raw), Path("x")))
    if found is not None and lie == 0:
        assert entries is not None
        assert sum(tensor.numel() * tensor.itemsize for tensor in found.tensors.values()) == data


@QUICK
@given(
    edits,
    st.sampled_from(["adapter_model.safetensors", "adapter_config.json", "weft.json", "adapter_model.bin"]),
    st.booleans(),
)
def test_damaged_files(changes: list[tuple[int, bytes, int]], name: str, keep_record: bool) -> None:
    files = dict(valid())
    if name == "adapter_model.bin":
        files = {"adapter_config.json": json.dumps(SMALLEST).encode(), name: files[name]}
    if not keep_record and name != "weft.json":
        files.pop("weft.json", None)
    damaged = mutated(files[name], changes)

    def action(place: Path) -> Adapter:
        for other, raw in files.items():
            (place / other).write_bytes(damaged if other == name else raw)
        adapter = read(place)
        adapter.check_finite()
        return adapter

    in_folder(action)


@QUICK
@given(st.dictionaries(st.sampled_from(sorted(_FIELDS.keys() | _REFUSED.keys())) | names, values, max_size=6))
def test_any_config(said: dict[str, Any]) -> None:
    in_folder(lambda place: read(folder(place, pair("model.layers.0.q_proj"), {**SMALLEST, **said})))
    in_folder(lambda place: read(folder(place, pair("model.layers.0.q_proj"), said), allow_partial=True))


@QUICK
@given(st.lists(st.tuples(st.lists(st.integers(0, 20), min_size=1, max_size=5), values), min_size=1, max_size=3))
def test_any_record(changes: list[tuple[list[int], Any]]) -> None:
    """Values somewhere in weft.json are replaced."""
    files = dict(valid())
    said = json.loads(files["weft.json"])
    for steps, value in changes:
        inner = said
        for step in steps:
            names_here = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            if not names_here:
                break
            name = names_here[step % len(names_here)]
            if step == steps[-1] or not isinstance(inner[name], dict | list):
                inner[name] = value
                break
            inner = inner[name]
    files["weft.json"] = json.dumps(said).encode()

    def action(place: Path) -> Adapter:
        for name, raw in files.items():
            (place / name).write_bytes(raw)
        return read(place)

    in_folder(action)


pieces = st.sampled_from([
    "base_model", "model", "layers", "0", "q_proj", "base_layer", "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector",
    "weight", "bias", "default", "modules_to_save", "original_module", "score", "out_proj", "attn", "experts", "_orig_mod", "lora_up", "lora_down", "lora", "down", "up",
    "alpha", "unet", "to_q", "processor", "lora_unet_a_b", "hada_w1_a", "",
])  # fmt: skip
shapes = st.sampled_from(
    [
        (),
        (0,),
        (4,),
        (4, 6),
        (5, 4),
        (15, 4),
        (8, 6),
        (4, 6, 1),
        (5, 4, 1),
        (4, 3, 2, 2),
        (5, 2, 1, 1),
        (1, 5, 1, 1),
        (12, 6),
        (5, 12),
        (2, 2, 2, 2, 2),
    ]
)
dtypes = st.sampled_from(
    [torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]
)
states = st.dictionaries(
    st.tuples(st.booleans(), st.lists(pieces, min_size=1, max_size=6)).map(
        lambda item: (PREFIX if item[0] else "") + ".".join(item[1])
    ),
    st.tuples(shapes, dtypes),
    min_size=1,
    max_size=6,
)


@QUICK
@given(states, st.sampled_from([
    {}, {"use_dora": True}, {"lora_bias": True}, {"bias": "all"}, {"enable_lora": [True, False, True]}, {"modules_to_save": ["score"]},
    {"target_parameters": ["experts.a", "experts.b"]}, {"target_parameters": ["weight"], "target_modules": []}, {"target_modules": ["attn"]},
]), st.booleans())  # fmt: skip
def test_any_keys(state: dict[str, tuple[tuple[int, ...], torch.dtype]], config: dict[str, Any], partial: bool) -> None:
    tensors: dict[str, Tensor] = {name: torch.ones(shape).to(dtype) for name, (shape, dtype) in state.items()}

    def action(place: Path) -> Adapter:
        (place / "adapter_config.json").write_text(json.dumps({**SMALLEST, **config}))
        (place / "adapter_model.safetensors").write_bytes(save(tensors))
        adapter = read(place, allow_partial=partial)
        write(adapter, place / "again")
        back = read(place / "again")
        assert back.digest == adapter.digest
        return adapter

    in_folder(action)

    def single(place: Path) -> Adapter:
        (place / "x.safetensors").write_bytes(save(tensors))
        return load(place / "x.safetensors", alpha=4, enable_lora=[True, True], allow_partial=partial)

    in_folder(single)


@QUICK
@given(
    st.one_of(
        st.text(string.printable + "\0", max_size=40),
        st.text(max_size=8),
        st.integers(200, 9000).map(lambda count: "x" * count),
    )
)
def test_any_source(text: str) -> None:
    survives(lambda: load(text))
