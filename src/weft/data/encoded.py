"""Encoded: tokens and loss masks in a few flat arrays. An immutable sequence of features."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from weft.data.account import Account
from weft.errors import DataError

__all__ = ["IGNORED", "Encoded", "Features"]

IGNORED = -100
"""Label of a token that is not learned; what transformers and torch ignore in a loss."""

Ints = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class Encoded(Sequence[dict[str, Any]]):
    """Features of n sequences with t tokens in all.

    ``encoded[i]`` is ``{"input_ids": (length,) int64, "labels": (length,) int64}``, labels being `IGNORED` where a
    token is not learned; for classification ``"labels"`` is one int; packed rows have ``"position_ids": (length,)
    int64`` as well, which begin again at 0 with each example.

    Attributes:
        kind: of the examples.
        max_length: no sequence is longer.
        account: what happened to the examples.
        labels: names of the classes, for classification.
        tokens: (t,) int32, all sequences one behind the other.
        offsets: (n + 1,) int64: where each begins.
        learned: (t,) bool: which tokens are learned; the first of an example never is, nothing predicts it. None for
            classification.
        classes: (n,) int64, for classification.
        rows: index of the example that each sequence is from; when packed, of each piece in turn.
        begins: (t,) bool: where an example begins inside of a packed row; None when not packed.
    """

    kind: str
    max_length: int
    account: Account
    labels: tuple[str, ...] | None
    tokens: Ints
    offsets: Ints
    learned: npt.NDArray[np.bool_] | None
    classes: Ints | None
    rows: Ints
    begins: npt.NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        at = int(index)
        if not -len(self) <= at < len(self):
            raise IndexError(f"feature {at} of {len(self)}")
        at %= len(self)
        span = slice(int(self.offsets[at]), int(self.offsets[at + 1]))
        ids = self.tokens[span].astype(np.int64)
        if self.classes is not None:
            return {"input_ids": ids, "labels": int(self.classes[at])}
        assert self.learned is not None
        feature = {"input_ids": ids, "labels": np.where(self.learned[span], ids, IGNORED)}
        if self.begins is not None:
            steps = np.arange(len(ids))
            feature["position_ids"] = steps - np.maximum.accumulate(np.where(self.begins[span], steps, 0))
        return feature

    @property
    def features(self) -> Encoded:
        """The features: the object itself."""
        return self

    @property
    def packed(self) -> bool:
        """Whether rows hold several examples."""
        return self.begins is not None

    @functools.cached_property
    def lengths(self) -> Ints:
        """Tokens of each sequence, (n,) int64."""
        return np.diff(self.offsets)

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences, without padding."""
        return len(self.tokens)

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that are learned; for classification, labels."""
        return len(self) if self.learned is None else int(self.learned.sum())

    @property
    def highest_id(self) -> int:
        """The largest token id; a base needs more embeddings than that."""
        return int(self.tokens.max(initial=-1))

    @property
    def fill(self) -> float:
        """Share of ``n x max_length`` that holds tokens; what `pack` brings near 1."""
        return self.num_tokens / (len(self) * self.max_length) if len(self) else 0.0


class Features:
    """Collects sequences, and makes `Encoded` of them. Drops and counts those without a token to learn."""

    def __init__(self, account: Account) -> None:
        self.account = account
        self._ids: list[Ints] = []
        self._learned: list[npt.NDArray[np.bool_]] = []
        self._classes: list[int] = []
        self._rows: list[int] = []

    def add(self, row: int, ids: Sequence[int], learned: Any) -> bool:
        """Add a sequence; ``learned`` says for each token whether it is learned.

        Returns:
            False if no token of it is learned: nothing was added.
        """
        mask = np.array(learned, dtype=np.bool_)
        mask[:1] = False
        if not mask.any():
            return False
        self._ids.append(np.array(ids, dtype=np.int32))
        self._learned.append(mask)
        self._rows.append(row)
        return True

    def add_class(self, row: int, ids: Sequence[int], label: int) -> None:
        """Add a text with its class."""
        self._ids.append(np.array(ids, dtype=np.int32))
        self._classes.append(label)
        self._rows.append(row)

    def finish(self, kind: str, max_length: int, labels: tuple[str, ...] | None, source: str) -> Encoded:
        """The features.

        Raises:
            DataError: nothing was added; the account says why.
        """
        account = self.account
        if not self._ids:
            raise DataError(
                f"{source}: none of {account.examples:,} examples is left to learn from: {account.summary()}. Check max_length="
                f"{max_length} and which columns are read"
            )
        lengths = [len(ids) for ids in self._ids]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        learned = np.concatenate(self._learned) if self._learned else None
        classes = np.array(self._classes, dtype=np.int64) if self._classes else None
        account.features, account.kept = len(lengths), len(set(self._rows))
        account.tokens = int(offsets[-1])
        account.loss_tokens = len(lengths) if learned is None else int(learned.sum())
        return Encoded(
            kind,
            max_length,
            account,
            labels,
            np.concatenate(self._ids),
            offsets,
            learned,
            classes,
            np.array(self._rows),
        )
