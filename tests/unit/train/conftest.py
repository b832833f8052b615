"""Fixtures of the tests of training: a tiny base on disk and a task that it can learn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.unit.train.support import byte_base


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama over bytes, in Hugging Face layout."""
    folder = tmp_path_factory.mktemp("base")
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model, tokenizer = byte_base()
    torch.random.set_rng_state(state)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Training and evaluation files: repeat a letter."""
    folder = tmp_path_factory.mktemp("task")
    words = ["".join(letters) for letters in ("ab", "cd", "ef", "gh", "ij", "kl", "mn", "op", "qr", "st")]
    rows = [
        {"prompt": f"{word * (1 + i % 3)}?", "completion": word[0] * (1 + i % 4)} for i in range(4) for word in words
    ]
    paths = folder / "train.jsonl", folder / "valid.jsonl"
    for path, part in zip(paths, (rows[:32], rows[32:]), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
    return paths


@pytest.fixture(scope="session")
def labelled() -> list[dict[str, str]]:
    """Texts with labels: does it begin with a vowel."""
    words = ["apple", "pear", "orange", "plum", "egg", "bread", "ice", "milk", "olive", "corn", "onion", "rice"]
    return [{"text": word, "label": "vowel" if word[0] in "aeiou" else "consonant"} for word in words]
