"""Real trainings of a tiny base, spoilt in one way each, made when a test first asks for one, and kept for the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weft
from tests.unit.diagnosis.support import given_for, halved, words
from tests.unit.train.support import byte_base
from weft.data import collator, encode, load_examples


@pytest.fixture(scope="session")
def skilled() -> tuple[nn.Module, Any]:
    """A tiny base that knows something: whole weights, trained to repeat the first letter."""
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    model, tokenizer = byte_base()
    encoded = encode(load_examples(words(256, 1)), tokenizer, max_length=32)
    batch = collator(tokenizer, encoded.kind)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    model.train()
    for step in range(120):
        start = 32 * step % 256
        optimizer.zero_grad()
        model(**batch(encoded[start : start + 32])).loss.backward()
        optimizer.step()
    model.eval()
    torch.random.set_rng_state(state)
    return model, tokenizer


@pytest.fixture(scope="session")
def spoilt(tmp_path_factory: pytest.TempPathFactory, skilled: tuple[nn.Module, Any]) -> Callable[[str], Path]:
    """The folder of a run by its name in `SPOILT`; of one that ended with an error too."""
    root = tmp_path_factory.mktemp("runs")

    def folder(name: str) -> Path:
        out = root / name.replace(" ", "-")
        if not out.exists():
            data, held, fields = given_for(name, root)
            recipe = weft.Recipe.from_dict(fields)
            base = skilled if name != "float16" else halved(skilled)
            try:
                weft.train(base=base, data=data, eval_data=held, recipe=recipe, out=out, progress=False)
            except weft.WeftError:
                assert name == "not-finite"
        return out

    return folder
