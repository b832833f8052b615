"""Small adapters for the tests of the store, and an index as the first migration left it."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import torch

from weft.adapter import Adapter, Provenance
from weft.core.factors import Factors
from weft.identity import Fingerprint
from weft.spec import LoraSpec

__all__ = ["BASE", "as_of_first_migration", "make_adapter"]

BASE = Fingerprint("TinyForCausalLM", "c0" * 32, "1a" * 32, "b5" * 32, "float32", name="models/tiny")


def make_adapter(
    seed: int, *, width: int = 32, layers: int = 2, rank: int = 4, base: Fingerprint | None = BASE, **facts: Any
) -> Adapter:
    """An adapter of random factors, B too; the same seed gives the same digest.

    Args:
        facts: of the provenance: ``evaluation={"eval_loss": 1.5}``.
    """
    draw = torch.Generator().manual_seed(seed)
    factors = {
        f"model.layers.{layer}.self_attn.q_proj": Factors(
            torch.randn(rank, width, generator=draw), torch.randn(width, rank, generator=draw), 0.5
        )
        for layer in range(layers)
    }
    return Adapter(
        LoraSpec(rank=rank, alpha=rank / 2, targets=("q_proj",)), factors, provenance=Provenance(base=base, **facts)
    )


def as_of_first_migration(index: Path) -> None:
    """Take a store's index back to what it was before aliases had a history."""
    with sqlite3.connect(index) as connection:
        connection.execute("DROP TABLE moves")
        connection.execute("UPDATE alembic_version SET version_num = '0001'")
    connection.close()
