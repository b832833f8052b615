"""Foreign files are checked before anything in them is used; each refusal says which file, which key and what to do."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weft.errors import FormatError, NotFiniteError
from weft.formats import checks
from weft.formats.tensor_files import parse_header, read_header, read_tensors, write_tensors


def header(said: Any, data: int = 0, length: int | None = None) -> bytes:
    text = said if isinstance(said, bytes) else json.dumps(said).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


def one(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refusal(path: Path, raw: bytes, read: Callable[[Path], Any] = read_tensors) -> FormatError:
    path.write_bytes(raw)
    with pytest.raises(FormatError) as caught:
        read(path)
    assert caught.value.path == str(path)
    return caught.value


HEADERS: list[tuple[str, bytes, str | None, str]] = [
    ("empty", b"", None, "empty"),
    ("lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n", None, "git lfs pull"),
    ("short", b"\x08\x00", None, "cut short"),
    ("length beyond the file", header({}, length=10_000), None, "10,000 bytes"),
    ("length of an exabyte", header({}, length=2**62), None, "cut short"),
    ("a zip", b"PK\x03\x04" + bytes(200), None, r"end in \.bin"),
    ("a pickle", b"\x80\x04" + bytes(200), None, r"end in \.bin"),
    ("no JSON", header(b"{not json"), None, "no JSON"),
    ("no object", header(b"[1, 2]   "), None, "no header"),
    ("no UTF-8", header(b'{"\xff": 1}'), None, "no JSON"),
    ("a name twice", header(b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}', 4), "a", "twice"),
    ("NaN", header(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', 4), None, "NaN"),
    ("too deep", header(b'{"a":' * 50 + b"1" + b"}" * 50), None, "deeper"),
    ("far too deep", header(b'{"a":' * 30_000 + b"1" + b"}" * 30_000), None, "deeper"),
    ("metadata with a number", header({"__metadata__": {"a": 1}}), "__metadata__", "text only"),
    ("no dtype", header({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8), "a", "expected dtype"),
    ("unknown dtype", header({"a": one("F7")}, 8), "a", "F7"),
    ("eight bits", header({"a": one("F8_E4M3", (8,))}, 8), "a", "widened where they came from"),
    ("dtype of another type", header({"a": one(["F32"])}, 8), "a", "dtype"),
    ("negative shape", header({"a": one(shape=(-2,))}, 8), "a", "whole numbers"),
    ("fractional shape", header({"a": one(shape=(2.0,))}, 8), "a", "whole numbers"),
    ("true for a size", header({"a": one(shape=(True, 2))}, 8), "a", "whole numbers"),
    ("nine dimensions", header({"a": one(shape=(1,) * 9, offsets=(0, 4))}, 4), "a", "9 dimensions"),
    ("a shape that overflows", header({"a": one(shape=(2**40, 2**40))}, 8), "a", "needs"),
    ("shape and bytes disagree", header({"a": one(shape=(3,))}, 8), "a", "needs 12 bytes"),
    ("bytes of another tensor", header({"a": one(), "b": one()}, 8), None, "another tensor"),
    ("a hole", header({"a": one(offsets=(4, 12))}, 12), "a", "belong to nothing"),
    ("more bytes than described", header({"a": one()}, 12), None, "cut short or damaged"),
    ("fewer bytes than described", header({"a": one()}, 4), None, "cut short or damaged"),
    ("control characters", header({"a\x1b[31m": one()}, 8), "a\x1b[31m", "control characters"),
    ("an empty name", header({"": one()}, 8), None, "0 letters"),
    ("a name of a megabyte", header({"a" * 2**20: one()}, 8), None, "letters"),
    ("truth values of 7", header({"a": one("BOOL", (1,), (0, 1))}) + b"\x07", "a", "neither 0 nor 1"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "key", "words"), [pytest.param(*case[1:], id=case[0]) for case in HEADERS])
def test_safetensors_headers(raw: bytes, key: str | None, words: str, tmp_path: Path) -> None:
    problem = refusal(tmp_path / "adapter_model.safetensors", raw)
    assert key is None or problem.key == key
    with pytest.raises(FormatError, match=words):
        raise problem


def test_too_many_tensors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("weft.formats.tensor_files.MAX_TENSORS", 3)
    save_file({str(i): torch.zeros(1) for i in range(4)}, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match="4 tensors"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_not_finite(value: float, suffix: str, tmp_path: Path) -> None:
    tensors = {"fine": torch.ones(3), "bad": torch.tensor([1.0, value, 2.0], dtype=torch.bfloat16)}
    path = tmp_path / f"x{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    with pytest.raises(FormatError, match="1 of 3 values are NaN or infinite") as caught:
        read_tensors(path)
    assert caught.value.key == "bad"
    assert isinstance(caught.value, NotFiniteError)


def test_every_dtype_comes_back(tmp_path: Path) -> None:
    dtypes = [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
    ]
    tensors = {str(dtype): (torch.randn(3, 4) * 10).to(dtype) for dtype in dtypes}
    tensors |= {"bool": torch.rand(5) > 0.5, "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}
    write_tensors(tmp_path / "x.safetensors", tensors, {"who": "me"})
    found = read_tensors(tmp_path / "x.safetensors")
    assert found.metadata == {"format": "pt", "who": "me"}
    assert set(found.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)


def test_write_shared_and_transposed_tensors(tmp_path: Path) -> None:
    whole = torch.randn(4, 6)
    write_tensors(tmp_path / "x.safetensors", {"whole": whole, "again": whole, "part": whole[:2], "turned": whole.t()})
    found = read_tensors(tmp_path / "x.safetensors").tensors
    assert torch.equal(found["again"], whole)
    assert torch.equal(found["part"], whole[:2])
    assert torch.equal(found["turned"], whole.t())


class Evil:
    """Makes a directory when it is unpickled."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.directory),)


def test_pickles_run_nothing(tmp_path: Path) -> None:
    evil = Evil(tmp_path / "was-here")
    torch.save({"a": evil}, tmp_path / "x.bin")
    with pytest.raises(FormatError, match="pickles can run code"):
        read_tensors(tmp_path / "x.bin")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps({"a": evil}))
    with pytest.raises(FormatError, match="no zip"):
        read_tensors(tmp_path / "plain.bin")
    assert not evil.directory.exists()


def test_pickles_of_other_things(tmp_path: Path) -> None:
    cases: list[tuple[Any, str]] = [
        ([torch.ones(1)], "got list"),
        ({}, "got dict"),
        ({"a": 3}, "got int"),
        ({3: torch.ones(1)}, "int as a key"),
        ({"a": torch.eye(3).to_sparse()}, "sparse"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "complex64"),
        ({"a": torch.ones(2).to(torch.float8_e4m3fn)}, "float8"),
        ({"a\nb": torch.ones(1)}, "control characters"),
    ]
    for value, words in cases:
        torch.save(value, tmp_path / "x.bin")
        with pytest.raises(FormatError, match=words):
            read_tensors(tmp_path / "x.bin")


def test_pickles_that_claim_more_than_they_hold(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1).expand(10**12)}, tmp_path / "x.bin")
    with pytest.raises(FormatError, match="more bytes than the file has") as caught:
        read_tensors(tmp_path / "x.bin")
    assert caught.value.key == "a"


def test_compressed_zip(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "x.bin")
    with (
        zipfile.ZipFile(tmp_path / "x.bin") as old,
        zipfile.ZipFile(tmp_path / "y.bin", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(FormatError, match="compressed"):
        read_tensors(tmp_path / "y.bin")


def test_pickle_is_a_copy(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.arange(6.0).view(2, 3).t()}}, tmp_path / "x.bin")
    found = read_tensors(tmp_path / "x.bin").tensors
    (tmp_path / "x.bin").write_bytes(b"")
    assert torch.equal(found["a"], torch.arange(6.0).view(2, 3).t())


def test_links(tmp_path: Path) -> None:
    outside, folder = tmp_path / "secret.json", tmp_path / "adapter"
    folder.mkdir()
    outside.write_text("{}")
    (folder / "config.json").symlink_to(outside)
    with pytest.raises(FormatError, match="outside of its folder"):
        checks.read_json(folder / "config.json", folder)
    (folder / "up.json").symlink_to("../secret.json")
    with pytest.raises(FormatError, match="outside of its folder"):
        checks.read_json(folder / "up.json", folder)
    (folder / "lost.json").symlink_to("nowhere")
    with pytest.raises(FormatError, match="leads nowhere"):
        checks.read_json(folder / "lost.json", folder)
    (folder / "loop.json").symlink_to("loop.json")
    with pytest.raises(FormatError, match="leads nowhere"):
        checks.read_json(folder / "loop.json", folder)
    (folder / "real.json").write_text('{"a": 1}')
    (folder / "near.json").symlink_to("real.json")
    assert checks.read_json(folder / "near.json", folder) == {"a": 1}


def test_links_of_the_hub_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "abc").write_text('{"a": 1}')
    (snapshot / "adapter_config.json").symlink_to("../../blobs/abc")
    assert checks.read_json(snapshot / "adapter_config.json", snapshot) == {"a": 1}
    (tmp_path / "other").write_text("{}")
    (snapshot / "b.json").symlink_to("../../other")
    with pytest.raises(FormatError, match="outside of its folder"):
        checks.read_json(snapshot / "b.json", snapshot)


def test_not_a_plain_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not a plain file"):
        checks.plain_file(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="not a plain file"):
        checks.plain_file(tmp_path / "pipe")


JSON: list[tuple[str, bytes, str]] = [
    ("no JSON", b"r: 8", "no JSON"),
    ("a list", b"[]", "got list"),
    ("a key twice", b'{"r": 8, "r": 16}', "twice"),
    ("infinity", b'{"r": Infinity}', "Infinity"),
    ("UTF-16", '{"r": 8}'.encode("utf-16"), "no JSON"),
    ("deep", b'{"r": ' + b"[" * 100 + b"]" * 100 + b"}", "deeper than 32"),
    ("very deep", b"[" * 100_000, "deeper than 32|no JSON"),
    ("a number of 5,000 digits", b'{"r": ' + b"9" * 5000 + b"}", "no JSON"),
]


@pytest.mark.parametrize(("raw", "words"), [pytest.param(*case[1:], id=case[0]) for case in JSON])
def test_json(raw: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(raw)
    with pytest.raises(FormatError, match=words):
        checks.read_json(tmp_path / "x.json")


def test_json_too_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks, "MAX_JSON_BYTES", 10)
    (tmp_path / "x.json").write_text('{"abcdefghij": 1}')
    with pytest.raises(FormatError, match="too large"):
        checks.read_json(tmp_path / "x.json")


def test_json_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"r": 8}')
    assert checks.read_json(tmp_path / "x.json") == {"r": 8}


def test_header_says_what_it_checked(tmp_path: Path) -> None:
    raw = header({"__metadata__": {"format": "pt"}, "b": one(offsets=(8, 16)), "a": one()}, 16)
    entries, metadata = parse_header(raw[:-16], len(raw), tmp_path)
    assert list(entries) == ["a", "b"]
    assert metadata == {"format": "pt"}
    assert entries["b"].shape == (2,)
