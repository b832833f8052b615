"""The loss of mixtures on data: base and data are opened once, adapters come and go."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from weft.adapter import Adapter
from weft.compose.assembling import reported
from weft.compose.job import Job
from weft.compose.methods import METHODS, Options
from weft.compose.mixing import mix
from weft.compose.parents import Parent
from weft.compose.report import Mixture
from weft.core.bank import Bank
from weft.errors import MixError
from weft.models.attach import attach
from weft.train.bars import counter
from weft.train.evaluation import encoded_for, examples_for, scores
from weft.train.opening import open_base, trained_format

__all__ = ["Judge"]

_BATCH = 8


class Judge:
    """A base and encoded data, and the loss of whatever is put on it.

    Attributes:
        model: the base. notes: what the user should know about the comparison.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, encoded: Any, bank: Bank, notes: tuple[str, ...] = ()) -> None:
        self.model = model
        self.notes = notes
        self._tokenizer = tokenizer
        self._encoded = encoded
        self._bank = bank

    @classmethod
    @contextlib.contextmanager
    def opened(cls, base: Any, data: Any, parents: Sequence[Parent]) -> Iterator[Judge]:
        """Open base and data as the first parent was trained to see them; afterwards the base is what it was.

        Raises:
            MixError: a model without its tokenizer. BaseError, DataError: something can't be read.
        """
        if isinstance(base, nn.Module):
            raise MixError("to measure losses on data a tokenizer is needed: pass base=(model, tokenizer), or a path")
        first = parents[0].adapter
        examples = examples_for(first, data)
        labels = list(examples.labels or ()) if examples.kind == "classification" else None
        model, tokenizer = open_base(base, labels=labels)
        encoded, _ = encoded_for(first, examples, model, tokenizer)
        there = model.__dict__.get("_weft_bank")
        bank = attach(model, {}) if there is None else there
        try:
            yield cls(model, tokenizer, encoded, bank, _notes(parents))
        finally:
            if there is None:
                bank.detach()

    def loss(self, adapter: Adapter | None) -> float:
        """Nats a token (or a label) with an adapter; None: of the base."""
        before, slot = self._bank.current, None
        try:
            if adapter is not None:
                slot = next(
                    name
                    for name in (f"judged {i}" for i in range(len(self._bank.names) + 1))
                    if name not in self._bank.names
                )
                self._bank.load(slot, adapter, allow_other_base=True, allow_partial=True)  # both were looked at before
            self._bank.use(slot)
            return scores(self.model, self._tokenizer, self._encoded, _BATCH)["loss"]
        finally:
            self._bank.use(before)
            if slot in self._bank.names:
                self._bank.drop(slot)

    def judged(self, mixture: Mixture, job: Job, progress: bool | None) -> Mixture:
        """The mixture, with the losses of base, parents, exact sum and itself in its report."""
        plain = job.is_plain_sum
        steps = len(job.live) + (2 if plain else 3)
        with counter("losses", steps, progress) as tick:
            found: dict[str, float] = {}
            todo: list[tuple[str, Adapter | None]] = [
                ("base", None),
                *((parent.name, parent.adapter) for parent in job.live),
            ]
            for name, adapter in todo:
                found[name] = self.loss(adapter)
                tick(1)
            mine = self.loss(mixture)
            tick(1)
            if not plain:
                weights = [parent.weight for parent in job.parents]
                found["sum"] = self.loss(mix(job.weighted(weights, METHODS["exact"], Options()), False))
                tick(1)
        found = {**found, "sum": found.get("sum", mine), "mixture": mine}
        notes = tuple(dict.fromkeys((*mixture.report.notes, *self.notes)))
        return reported(mixture, losses=found, notes=notes)


def _notes(parents: Sequence[Parent]) -> tuple[str, ...]:
    formats = [
        {k: v for k, v in trained_format(parent.adapter).items() if k in ("separator", "as_chat", "labels")}
        for parent in parents
    ]
    if all(one == formats[0] for one in formats):
        return ()
    return (
        f"the adapters were trained on examples of different forms; losses are measured as {parents[0].name!r} saw them",
    )
