"""How many bits there are to learn in the data, and how many an adapter can hold.

Both are bounds: the bits of the data as a code of them takes (of the base, or of a general compressor, whichever is shorter), and the
bits that a parameter was seen to hold.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.data import Encoded

__all__ = ["BITS_A_PARAMETER", "DataBits", "bits_of", "rank_for_bits"]

BITS_A_PARAMETER = 2.0
"""Knowledge that a language model's parameter holds (Allen-Zhu and Li 2024, arXiv:2404.05405)."""

_MOST_TOKENS = 1_000_000


@dataclass(frozen=True)
class DataBits:
    """What there is to learn.

    Attributes:
        examples: in the data. tokens: of them that are learned (labels, in a classification).
        loss: of the base, nats a token or label, on a sample.
        by_base: bits of all of them in the base's own code. packed: in LZMA's; of labels, their entropy.
        seen: share of the examples that the run comes to; 1 from one epoch on.
        classifies: labels are learned, one an example.
        bits: what the run can learn at most: the shorter code, times `seen`.
    """

    examples: int
    tokens: int
    loss: float
    by_base: float
    packed: float
    seen: float
    classifies: bool = False

    @property
    def bits(self) -> float:
        """Bits that the run can learn at most."""
        return self.seen * min(self.by_base, self.packed)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**vars(self), "bits": self.bits}


def bits_of(encoded: Encoded, loss: float, seen: float) -> DataBits:
    """Count the bits of what is learned.

    A classification can't hold more than its labels' own entropy: whatever the base's loss is, the labels can be written down.

    Args:
        encoded: the training data.
        loss: of the base, nats a token or label, on a sample.
        seen: share of the data that the run comes to, above 0, at most 1.
    """
    count = encoded.num_loss_tokens
    by_base = count * loss / math.log(2)
    if encoded.classes is not None:
        return DataBits(len(encoded), count, loss, by_base, count * _entropy(encoded.classes), seen, True)
    assert encoded.learned is not None
    return DataBits(len(encoded), count, loss, by_base, _packed_bits(encoded.tokens[encoded.learned]), seen)


def rank_for_bits(bits: float, numbers: int) -> float:
    """The rank, not rounded, at which an adapter holds so many bits.

    Args:
        numbers: parameters that one rank takes at all sites together.

    Source:
        Schulman et al. 2025, LoRA Without Regret: LoRA learns like full fine-tuning while its capacity is not exceeded.
    """
    return bits / (BITS_A_PARAMETER * numbers)


def _packed_bits(tokens: Sequence[int] | Any) -> float:
    ids = np.asarray(tokens, dtype="<u4")
    kept = ids[:_MOST_TOKENS]
    small = kept.astype("<u2") if kept.size and int(kept.max()) < 2**16 else kept
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lp": 0, "lc": 3, "pb": 1 if small.itemsize == 2 else 2}]
    packed = lzma.compress(small.tobytes(), format=lzma.FORMAT_RAW, filters=filters)
    return 8.0 * len(packed) * ids.size / max(1, kept.size)


def _entropy(classes: Any) -> float:
    """Bits a label."""
    counts = np.bincount(np.asarray(classes)).astype(float)
    shares = counts[counts > 0] / max(1.0, counts.sum())
    return float(-(shares * np.log2(shares)).sum())
