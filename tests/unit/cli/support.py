"""A tiny base on disk, data beside it, and an adapter of it: what the tests of the command line work on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.models import randomise
from tests.unit.train.support import byte_base, byte_tokenizer, moved
from weft.models.attach import attach
from weft.models.load import load_base
from weft.spec import LoraSpec
from weft.train.proof import last_logits

__all__ = ["World", "make_world", "write_classifier", "write_rows"]


@dataclass(frozen=True)
class World:
    """Paths: a base, another base of the same shape, an adapter of the first, and examples."""

    base: Path
    other: Path
    adapter: Path
    train: Path
    valid: Path


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_world(folder: Path) -> World:
    """Write it all; the adapter's B is away from zero, and it has golden prompts."""
    torch.manual_seed(11)
    for name in ("base", "other"):
        model, tokenizer = byte_base()
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    model, _ = load_base(folder / "base")
    with attach(model, {"t": LoraSpec(rank=2, alpha=4)}, seed=1) as bank:
        moved(bank, "t")
        ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(5))
        adapter = bank.adapter("t").replace(proof={"input_ids": ids, "logits": last_logits(model, ids)})
    adapter.save(folder / "adapter")
    rows = [
        {"prompt": f"say {word} ", "completion": word.upper()}
        for word in "one two three four five six seven eight nine ten".split()
    ]
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "valid.jsonl", rows[:4])
    return World(folder / "base", folder / "other", folder / "adapter", folder / "train.jsonl", folder / "valid.jsonl")


def write_classifier(folder: Path) -> Path:
    """A tiny BERT without a head, over bytes."""
    from transformers import BertConfig, BertModel

    tokenizer = byte_tokenizer()
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    torch.manual_seed(3)
    randomise(BertModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
