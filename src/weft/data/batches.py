"""Features to tensors, and the order in which they come.

Shapes: B rows, T tokens of the longest row.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from weft.data.encoded import IGNORED
from weft.data.kinds import KINDS
from weft.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Collator", "LengthGroupedSampler", "collator", "padding_share"]


@dataclass(frozen=True)
class Collator:
    """Features to a batch for ``model(**batch)``; made by `collator`. Can be pickled for workers.

    Attributes:
        pad_id: the token that fills up; a classifying base with a causal model needs it as ``config.pad_token_id``.
        classify: labels are classes.
        packed: rows hold several examples: no attention mask, ``position_ids`` part them, and no cache, with which
            transformers would not look at them.
        multiple: T is rounded up to a multiple.
    """

    pad_id: int
    classify: bool = False
    packed: bool = False
    multiple: int = 1

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch, padded on the right.

        Returns:
            ``input_ids`` (B, T) int64; ``labels`` (B, T) int64, `IGNORED` at padding, or (B,) for classification;
            ``attention_mask`` (B, T) int64, or when packed ``position_ids`` (B, T) int64 and ``use_cache`` False.

        Raises:
            DataError: packed and separate features are mixed up, or there are none.
        """
        if not features:
            raise DataError("a batch of no features")
        if self.packed != ("position_ids" in features[0]):
            raise DataError(
                f"this collator is for {'packed' if self.packed else 'separate'} features, but got the other; "
                "make it with collator(tokenizer, encoded.kind, packed=encoded.packed)"
            )
        longest = max(len(feature["input_ids"]) for feature in features)
        shape = (len(features), -(-longest // self.multiple) * self.multiple)
        batch = {"input_ids": self._filled(features, "input_ids", shape, self.pad_id)}
        if self.classify:
            batch["labels"] = _tensor(np.array([int(feature["labels"]) for feature in features], dtype=np.int64))
        else:
            batch["labels"] = self._filled(features, "labels", shape, IGNORED)
        if self.packed:
            # Padding is an example of its own: its positions begin again at 0.
            batch["position_ids"] = self._filled(features, "position_ids", shape, None)
            batch["use_cache"] = False  # type: ignore[assignment]
        else:
            lengths = np.array([len(feature["input_ids"]) for feature in features])
            batch["attention_mask"] = _tensor((np.arange(shape[1]) < lengths[:, None]).astype(np.int64))
        return batch

    def _filled(
        self, features: Sequence[Mapping[str, Any]], name: str, shape: tuple[int, int], fill: int | None
    ) -> Tensor:
        out = np.empty(shape, dtype=np.int64)
        for row, feature in enumerate(features):
            values = feature[name]
            out[row, : len(values)] = values
            out[row, len(values) :] = np.arange(shape[1] - len(values)) if fill is None else fill
        return _tensor(out)


def _tensor(array: Any) -> Tensor:
    import torch

    return torch.from_numpy(array)


def collator(tokenizer: Any, kind: str, *, packed: bool = False, pad_to_multiple_of: int | None = None) -> Collator:
    """What makes batches of features.

    Args:
        kind: of the examples.
        packed: for what `pack` made.
        pad_to_multiple_of: round T up; tensor cores like 8.

    Raises:
        DataError: an unknown kind; classification can't be packed.
    """
    if kind not in KINDS:
        raise DataError(f"kind={kind!r}: expected one of {', '.join(KINDS)}.{did_you_mean(kind, KINDS)}")
    if packed and kind == "classification":
        raise DataError("classification has one label a row and can't be packed; group by length instead")
    if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
        raise DataError(f"pad_to_multiple_of={pad_to_multiple_of}: expected at least 1")
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    pad_id = next((token for token in candidates if token is not None), 0)
    return Collator(pad_id, kind == "classification", packed, pad_to_multiple_of or 1)


class LengthGroupedSampler:
    """Indices in random order, but so that a batch holds sequences of about one length.

    An epoch is shuffled, cut into megabatches, each sorted by length and cut into batches, whose order is shuffled
    again; the batch with the longest sequence comes first, so that a lack of memory shows at once, and an incomplete
    one last. The order is a function of seed and epoch alone: to resume, call `set_epoch` and skip.

    Args:
        lengths: of all sequences.
        batch_size: rows of one step over all processes, so that these get rows of one length.
        megabatch: batches to sort together; 1 is plain shuffling.

    Raises:
        DataError: a size below 1.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, *, seed: int = 0, megabatch: int = 50) -> None:
        if batch_size < 1 or megabatch < 1:
            raise DataError(f"batch_size={batch_size}, megabatch={megabatch}: expected at least 1")
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batch_size, self.seed, self.megabatch, self.epoch = batch_size, seed, megabatch, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices(self.epoch))

    def indices(self, epoch: int) -> list[int]:
        """The order of an epoch."""
        generator = random.Random(f"{self.seed}/{epoch}")
        order = list(range(len(self.lengths)))
        generator.shuffle(order)
        if self.megabatch == 1:
            return order
        batches: list[list[int]] = []
        for start in range(0, len(order), self.batch_size * self.megabatch):
            mega = order[start : start + self.batch_size * self.megabatch]
            mega.sort(key=lambda index: -int(self.lengths[index]))
            batches += [mega[at : at + self.batch_size] for at in range(0, len(mega), self.batch_size)]
        last = [batches.pop()] if batches and len(batches[-1]) < self.batch_size else []
        generator.shuffle(batches)
        if batches:
            longest = max(range(len(batches)), key=lambda at: int(self.lengths[batches[at][0]]))
            batches[0], batches[longest] = batches[longest], batches[0]
        return [index for batch in (*batches, *last) for index in batch]


def padding_share(lengths: Sequence[int], order: Sequence[int], batch_size: int) -> float:
    """Share of a run's computed tokens that is padding, with batches taken from an order one after the other."""
    sizes = np.asarray(lengths)[np.asarray(order, dtype=np.int64)]
    computed = sum(
        int(part.max()) * len(part)
        for start in range(0, len(sizes), batch_size)
        if len(part := sizes[start : start + batch_size])
    )
    return 1 - int(sizes.sum()) / computed if computed else 0.0
