"""Tensor files as weft writes them: safetensors' own bytes, and the hash of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weft.errors import FormatError
from weft.formats.tensor_files import read_tensors, write_tensors


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
    assert said == hashlib.sha256((tmp_path / "mine").read_bytes()).hexdigest()


def test_a_known_hash_is_compared(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    said = write_tensors(path, {"a": torch.randn(100)})
    assert read_tensors(path, known=said).sha256 == said
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="was changed"):
        read_tensors(path, known=said)
