"""Random streams that belong to an adapter: what is drawn in a step depends on seed and step, and on nothing else.

So a resumed run draws what it would have drawn, an evaluation in between changes nothing, and an adapter that is trained
beside others draws what it draws alone (`weft.core.dropout.own_stream` draws from them). This module does not know models.
"""

from __future__ import annotations

import hashlib

__all__ = ["stream_seed"]


def stream_seed(seed: int, step: int, micro: int = 0, process: int = 0, row: int | None = None) -> int:
    """The seed of one forward, or of one of its rows: 63 bits.

    Args:
        seed: of the recipe.
        step: optimizer steps that were done before.
        micro: which forward of the step.
        process: rank of the process; each has rows of its own.
        row: of the batch; None: of the whole forward.
    """
    text = f"{seed}/{step}/{micro}/{process}" if row is None else f"{seed}/{step}/{micro}/{process}/{row}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
