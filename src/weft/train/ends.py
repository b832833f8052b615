"""Whether a base can learn to stop: a token that it never saw is not told from the others that it never saw.

Vocabularies hold tokens that pretraining didn't meet. Their rows of the output head stay where they were pulled together, so that
they get one and the same logit whatever the adapter does below the head.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from weft.data.affixes import affixes

__all__ = ["same_rows", "unlearned_end"]

_SAME = 1e-2
"""Relative distance below which two rows of a head give the same logit for all that an adapter can do about it."""
_ROWS = 8192


def unlearned_end(model: nn.Module, tokenizer: Any, sites: Collection[str], whole: Collection[str] = ()) -> str | None:
    """A sentence for the user if the end token is one of those that the base never learned and the head isn't adapted.

    Args:
        model: a language model with an output head; others give None.
        tokenizer: its tokenizer.
        sites: paths of what is adapted. whole: paths of what is trained whole.
    """
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    end = affixes(tokenizer).end
    weight = getattr(head, "weight", None)
    if not end or not isinstance(weight, Tensor) or weight.ndim != 2 or end[-1] >= weight.shape[0]:
        return None
    path = next(name for name, module in model.named_modules() if module is head)
    if path in sites or path in whole:
        return None
    others = same_rows(weight.detach(), end[-1])
    if not others:
        return None
    leaf = path.rpartition(".")[2]
    names = ",".join(dict.fromkeys([*(site.rpartition(".")[2] for site in sites), leaf]))
    return (
        f"the base never learned its end token {tokenizer.convert_ids_to_tokens(end[-1])!r}: {others} other tokens have the same row in "
        f"{path!r}, and no adapter below it tells them apart, so that answers won't end by themselves. Adapt it too: targets=[{names}]"
    )


def same_rows(weight: Tensor, row: int) -> int:
    """How many other rows of a (vocabulary, width) weight are one row, up to a hundredth of its norm."""
    own = weight[row].float()
    limit = _SAME * own.norm()
    near = sum(int(((part.float() - own).norm(dim=1) <= limit).sum()) for part in torch.split(weight, _ROWS))
    return near - 1
