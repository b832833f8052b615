"""Fixtures of the tests of many adapters: a tiny base in memory and on disk, and users with something to learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.many.support import user_rows
from tests.unit.train.support import byte_base


@pytest.fixture(scope="session")
def small() -> tuple[nn.Module, Any]:
    """A Llama of one layer over bytes, and its tokenizer."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    pair = byte_base(layers=1)
    torch.random.set_rng_state(state)
    return pair


@pytest.fixture(scope="session")
def small_dir(tmp_path_factory: pytest.TempPathFactory, small: tuple[nn.Module, Any]) -> Path:
    """The same in Hugging Face layout."""
    folder = tmp_path_factory.mktemp("small")
    model, tokenizer = small
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def users() -> dict[str, list[dict[str, str]]]:
    """Six users with 6 to 15 examples of different lengths."""
    return {f"user {number}": user_rows(number) for number in range(6)}
