"""Losses by token and by row, and what they add up to: the one place for training, evaluation in it, and `evaluate`.

Shapes: B rows, T tokens, K positions whose logits are computed, V vocabulary (or labels). Labels of -100 are not learned.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.train.metrics import accuracy, macro_f1

__all__ = ["IGNORED", "Score", "by_row", "keeps_logits", "losses", "score", "wanted_positions"]

IGNORED = -100


def keeps_logits(model: nn.Module) -> bool:
    """Whether the model can leave out logits that nobody wants (``logits_to_keep``): most of them, where prompts are masked."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def wanted_positions(labels_BT: Tensor) -> Tensor:
    """(K,) positions whose next token is learned in some row."""
    return (labels_BT[:, 1:] != IGNORED).any(dim=0).nonzero()[:, 0]


def losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of what is to be learned, in at least float32.

    Args:
        logits: (B, T, V), or (B, K, V) at `wanted_positions`; or (B, V) for classification.
        labels: (B, T), or (B,) for classification.

    Returns:
        (n,) losses, and the (n,) rows that they belong to. Only the n logits that count are converted and kept.
    """
    if labels.dim() == 1:
        rows = (labels != IGNORED).nonzero()[:, 0]
        picked, targets = logits[rows], labels[rows]
    else:
        if logits.shape[1] == labels.shape[1]:
            logits, wanted = logits[:, :-1], labels[:, 1:]
        else:
            wanted = labels[:, wanted_positions(labels) + 1]
        keep = wanted != IGNORED
        rows, picked, targets = keep.nonzero()[:, 0], logits[keep], wanted[keep]
    wide = torch.promote_types(picked.dtype, torch.float32)
    return F.cross_entropy(picked.to(wide), targets, reduction="none"), rows


def by_row(values: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Losses summed by row in float64, and how many each row has: (count,) and (count,)."""
    sums = values.new_zeros(count, dtype=torch.float64).index_add_(0, rows, values.detach().double())
    return sums, torch.zeros(count, dtype=torch.long, device=rows.device).index_add_(0, rows, torch.ones_like(rows))


class Score:
    """Adds up batches to metrics: a mean over tokens (or labels), never a mean of means.

    Args:
        classifies: labels are one a row.
        gather: brings the rows of all processes together; None: there is one process.
    """

    def __init__(self, classifies: bool, gather: Callable[[Any], Any] | None = None) -> None:
        self.classifies = classifies
        self.rows = 0
        self._gather = gather
        self._sum = 0.0
        self._count = 0
        self._predicted: list[int] = []
        self._wanted: list[int] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count one batch."""
        sums, counts = by_row(*losses(logits, labels), len(labels))
        self.take(sums, counts, logits.argmax(-1) if self.classifies else None, labels)

    def take(self, sums: Tensor, counts: Tensor, predicted: Tensor | None = None, labels: Tensor | None = None) -> None:
        """Count rows whose losses are known: sums and counts by row, and the labels of a classification."""
        parts = [sums, counts]
        if predicted is not None and labels is not None:
            parts += [predicted, labels]
        if self._gather is not None:
            parts = list(self._gather(tuple(parts)))
        self.rows += len(parts[0])
        self._sum += float(parts[0].sum())
        self._count += int(parts[1].sum())
        if self.classifies:
            self._predicted += parts[2].tolist()
            self._wanted += parts[3].tolist()

    def metrics(self) -> dict[str, float]:
        """``loss`` (nats a token, or a label), and ``perplexity``; or ``accuracy`` and ``macro_f1`` (0 to 1)."""
        loss = self._sum / self._count if self._count else math.nan
        if self.classifies:
            return {
                "loss": loss,
                "accuracy": accuracy(self._predicted, self._wanted),
                "macro_f1": macro_f1(self._predicted, self._wanted),
            }
        return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}


@torch.no_grad()
def score(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    classifies: bool,
    tick: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Metrics of a model over batches, in eval mode; the mode is put back.

    Args:
        model: any model that takes the batches and gives logits.
        batches: model inputs with ``labels``; moved to the model's device.
        classifies: labels are one a row.
        tick: called with the number of rows after each batch.
    """
    device = next(model.parameters()).device
    keeps = not classifies and keeps_logits(model)
    total = Score(classifies)
    training = model.training
    model.eval()
    try:
        for batch in batches:
            inputs = {name: value.to(device) for name, value in batch.items()}
            labels = inputs.pop("labels")
            if keeps:
                inputs["logits_to_keep"] = wanted_positions(labels)
            total.add(model(**inputs).logits, labels)
            if tick is not None:
                tick(len(labels))
    finally:
        model.train(training)
    return total.metrics()
