"""How well texts find their images and images their texts: recall at k, and zero-shot accuracy with class prompts.

Shapes: N texts, M images, D dimensions; embeddings have length one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["recalls", "spread"]

CHUNK = 1024


def recalls(
    text_ND: Tensor, image_MD: Tensor, text_ids: Sequence[int], image_ids: Sequence[int], at: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall at k, both ways, over different texts and different images.

    A query is answered if one of its own is among the first k; of several captions of an image one is enough. What ties with a
    right answer stands before it, so that a model that finds everything alike finds nothing.

    Args:
        text_ND, image_MD: one row a pair, N = M. text_ids, image_ids: equal for equal texts, and images.

    Returns:
        ``image_to_text_r1``, ``text_to_image_r1`` …, and ``recall_at_1``, their mean.
    """
    texts, images = (torch.tensor(list(ids)) for ids in (text_ids, image_ids))
    text_keys, text_place = torch.unique(texts, return_inverse=True)
    image_keys, image_place = torch.unique(images, return_inverse=True)
    first_text = _firsts(text_place, len(text_keys))
    first_image = _firsts(image_place, len(image_keys))
    belongs = torch.zeros(len(text_keys), len(image_keys), dtype=torch.bool)
    belongs[text_place, image_place] = True
    words, pictures = text_ND.float().cpu()[first_text], image_MD.float().cpu()[first_image]
    found = {}
    for name, queries, candidates, right in (
        ("image_to_text", pictures, words, belongs.T),
        ("text_to_image", words, pictures, belongs),
    ):
        ranks = torch.cat(
            [
                _ranks(part @ candidates.T, own)
                for part, own in zip(queries.split(CHUNK), right.split(CHUNK), strict=True)
            ]
        )
        found |= {f"{name}_r{k}": float((ranks < k).double().mean()) for k in at}
    if 1 in at:
        found["recall_at_1"] = (found["image_to_text_r1"] + found["text_to_image_r1"]) / 2
    return found


def _firsts(places: Tensor, count: int) -> Tensor:
    found = torch.full((count,), len(places))
    return found.scatter_reduce(0, places, torch.arange(len(places)), "amin")


def _ranks(similar: Tensor, right: Tensor) -> Tensor:
    """How many wrong candidates are at least as similar as the best right one."""
    best = similar.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return ((similar >= best) & ~right).sum(1)


def spread(rows: Tensor) -> float:
    """How far embeddings of length one are from being all alike: 1 - ‖mean‖²; 0 is a collapse."""
    return float(1 - rows.detach().float().mean(0).square().sum())
