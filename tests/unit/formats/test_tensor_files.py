"""Tensor files as weft writes them: safetensors' own bytes, and the hash of them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weft.adapter import Adapter
from weft.core.factors import Factors
from weft.formats import load
from weft.formats.tensor_files import read_tensors, write_tensors
from weft.hashes import TENSORS, hash_of, is_hash
from weft.identity import TensorHashes, hash_tensor
from weft.spec import LoraSpec


def test_the_bytes_are_those_of_safetensors(tmp_path: Path) -> None:
    tensors = {
        "b.wide": torch.randn(3, 5, dtype=torch.float64),
        "a.narrow": torch.randn(7, 3).to(torch.bfloat16),
        "ä.plain": torch.randn(4, 4),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "turned": torch.randn(6, 2).mT,
    }
    tensors["part"] = tensors["ä.plain"][1:3]  # shares memory
    said = write_tensors(tmp_path / "mine", tensors)
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", {"format": "pt"}
    )
    assert (tmp_path / "mine").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert said == hash_of(tmp_path / "mine", TENSORS)


@pytest.mark.parametrize("kind", ["", TENSORS])
def test_a_hash_of_either_kind_knows_every_byte(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.safetensors"
    written = write_tensors(path, {"a": torch.randn(100), "empty": torch.zeros(0), "b": torch.randn(3).half()})
    said = hash_of(path, kind)
    assert is_hash(said)
    assert (said == written) == bool(kind)
    with TensorHashes() as hashes:
        found = read_tensors(path, like=said, hashes=hashes)
        assert found.hash == said
        assert hashes.ask(found.tensors["a"]).result() == hash_tensor(found.tensors["a"])
    whole = path.read_bytes()
    for place in random.sample(range(len(whole)), 40):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert hash_of(path, kind) != said
    for changed in (whole[:-1], whole + b"\0", whole[:8], b"", b"\xff" * 8 + whole[8:], b"[" * 100_000):
        path.write_bytes(changed)
        assert hash_of(path, kind) != said


def test_each_tensor_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = hash_tensor
    monkeypatch.setattr("weft.identity.hash_tensor", lambda tensor: asked.append(tensor.numel()) or real(tensor))
    factors = {f"s{n}": Factors(torch.randn(2, 5 + n), torch.randn(30 + n, 2), 1.0) for n in range(4)}
    adapter = Adapter(LoraSpec(rank=2, targets=tuple(factors)), factors)
    digest = adapter.replace().digest
    count = len(asked)
    assert count == 8
    adapter.save(tmp_path / "a")
    assert len(asked) == 2 * count
    assert load(tmp_path / "a").digest == digest
    assert len(asked) == 3 * count
