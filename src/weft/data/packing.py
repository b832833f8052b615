"""Packing: several examples in one row, so that hardly any padding is computed.

Each example begins again at position 0. Without an attention mask and without a cache, transformers reads that as a
border and no token sees another example. A model that doesn't would learn from its neighbours: `require_packing`
finds out by trying.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from weft.data.encoded import Encoded
from weft.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["fit", "pack", "require_packing"]


def fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: the longest first, each into the first row that has room.

    It needs at most 11/9 of the fewest possible rows, plus 6/9.

    Args:
        lengths: n lengths, each at most ``capacity``.

    Returns:
        Indices of each row. O(n log n): a tree over the rows keeps the largest room of each half.

    Source:
        Johnson 1973, Near-optimal bin packing algorithms; the bound: Dosa 2007.
    """
    count = len(lengths)
    leaves = 1
    while leaves < count:
        leaves *= 2
    room = [capacity] * (2 * leaves)
    rows: list[list[int]] = []
    for index in sorted(range(count), key=lambda at: -lengths[at]):
        size = int(lengths[index])
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= size else 2 * node + 1
        if node - leaves == len(rows):
            rows.append([])
        rows[node - leaves].append(index)
        room[node] -= size
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


def pack(encoded: Encoded, max_length: int | None = None) -> Encoded:
    """Put several sequences into each row; nothing is cut, and every token keeps its label.

    Args:
        max_length: of a row; None: that of the encoding.

    Returns:
        The rows. ``.fill`` says how full they are, ``.rows`` which example each piece is from.

    Raises:
        DataError: classification; already packed; a sequence is longer than a row.
    """
    if encoded.learned is None:
        raise DataError("classification has one label a row and can't be packed; group by length instead")
    if encoded.packed:
        raise DataError("these rows are packed already")
    size = encoded.max_length if max_length is None else max_length
    if len(encoded) and int(encoded.lengths.max()) > size:
        raise DataError(
            f"a sequence of {int(encoded.lengths.max())} tokens does not fit into a row of max_length={size}; encode with the same max_length"
        )
    rows = fit([int(length) for length in encoded.lengths], size)
    order = np.array([index for row in rows for index in row], dtype=np.int64)
    lengths = encoded.lengths[order]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    # Where each token of the new order stands in the old one.
    source = np.arange(starts[-1]) + np.repeat(encoded.offsets[order] - starts[:-1], lengths)
    begins = np.zeros(int(starts[-1]), dtype=np.bool_)
    begins[starts[:-1]] = True
    edges = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return dataclasses.replace(
        encoded,
        max_length=size,
        tokens=encoded.tokens[source],
        learned=encoded.learned[source],
        offsets=starts[edges].astype(np.int64),
        rows=encoded.rows[order],
        begins=begins,
    )


def require_packing(model: nn.Module) -> None:
    """Refuse a model that would mix up examples in one row.

    Tries it: an example of its own, against the same one as the second in a row of two. The difference of their
    logits is compared with the one that appears when examples are not parted. Two short forwards of two rows without
    gradients.

    Raises:
        DataError: the model takes no positions, or its attention (or recurrence) reaches into the neighbour.
    """
    parameters = inspect.signature(_innermost(model).forward).parameters
    way_out = "group batches by length instead of packing"
    if "position_ids" not in parameters:
        raise DataError(
            f"{type(model).__name__} takes no position_ids, so examples packed into one row can't be parted; {way_out}"
        )
    import torch

    vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(vocabulary, (2, size), generator=generator).to(device) for size in (7, 9))
    joined = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(7), torch.arange(9)]).expand(2, -1).to(device)
    with _quiet(model), torch.no_grad():
        alone = _logits(model, input_ids=second, position_ids=positions[:, 7:], use_cache=False)
        packed = _logits(model, input_ids=joined, position_ids=positions, use_cache=False)[:, 7:]
        mixed = _logits(
            model, input_ids=joined, position_ids=positions, use_cache=False, attention_mask=torch.ones_like(joined)
        )[:, 7:]
    error, contaminated = float((packed - alone).abs().max()), float((mixed - alone).abs().max())
    rounding = 16 * torch.finfo(next(model.parameters()).dtype).eps * float(alone.abs().max())
    if error > max(0.05 * contaminated, rounding) or not np.isfinite(error):
        attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
        raise DataError(
            f"{type(model).__name__} (attention {attention!r}) lets an example see its neighbour in a packed row: logits differ by "
            f"{error:.2g} from those of the example alone; {way_out}, or load the base with attn_implementation='sdpa'"
        )


def _innermost(model: Any) -> Any:
    """The model inside of wrappers that forward everything."""
    while hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Without dropout, and as it was afterwards, module by module."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _logits(model: nn.Module, **inputs: Any) -> Tensor:
    logits: Tensor = model(**inputs).logits
    return logits.float()
