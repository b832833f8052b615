"""Losses over pairs of texts and images, also where a batch is spread over processes.

Shapes: N pairs of the whole batch (all processes), D dimensions. Embeddings have length one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["DUPLICATES", "LOSSES", "gather_ids", "gathered", "pair_loss", "positives", "sigmoid_loss", "softmax_loss"]

DUPLICATES = ("targets", "mask", "ignore")
"""What becomes of pairs that belong together though they stand in different rows: the same caption twice, or the same image.
``targets``: they count as right, with equal shares; ``mask``: they count neither as right nor as wrong; ``ignore``: as wrong."""


def gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, in their order, with gradients to where they came from.

    Each process then computes the loss of the whole batch. The backward adds up what all processes want of a row; a mean of the
    gradients over processes, as DDP takes it, is then the gradient that one process with the whole batch would have.
    """
    if (
        not (torch.distributed.is_available() and torch.distributed.is_initialized())
        or torch.distributed.get_world_size() == 1
    ):
        return rows
    from torch.distributed.nn.functional import all_gather

    return torch.cat(list(all_gather(rows)))  # type: ignore[no-untyped-call]


def gather_ids(ids: Tensor) -> Tensor:
    """The same for numbers that have no gradient."""
    if (
        not (torch.distributed.is_available() and torch.distributed.is_initialized())
        or torch.distributed.get_world_size() == 1
    ):
        return ids
    found = [torch.empty_like(ids) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(found, ids.contiguous())
    return torch.cat(found)


def positives(text_ids: Tensor, image_ids: Tensor | None = None) -> Tensor:
    """(N, N) whether text i belongs to image j: of one row, of rows with the same caption, or with the same image."""
    same = text_ids[:, None] == text_ids[None, :]
    if image_ids is not None:
        same = same | (image_ids[:, None] == image_ids[None, :])
    return same | torch.eye(len(text_ids), dtype=torch.bool, device=text_ids.device)


def softmax_loss(
    text_ND: Tensor, image_ND: Tensor, scale: Tensor, bias: Tensor, same: Tensor, duplicates: str
) -> Tensor:
    """Symmetric InfoNCE: which image belongs to this text, which text to this image; mean over both and over rows.

    Args:
        scale: what similarities are multiplied with. bias: not used.
        same: (N, N), see `positives`.
        duplicates: one of `DUPLICATES`.

    Source:
        Radford et al. 2021, CLIP, arXiv:2103.00020, figure 3; shared targets as in Yang et al. 2022, UniCL, arXiv:2204.03610.
    """
    logits = (text_ND @ image_ND.T) * scale
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    if duplicates == "mask":
        logits = logits.masked_fill(same & ~own, float("-inf"))
    wanted = (same if duplicates == "targets" else own).to(logits.dtype)
    by_text = _cross_entropy(logits, wanted)
    return (by_text + _cross_entropy(logits.T, wanted.T)) / 2


def _cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    logs = F.log_softmax(logits, dim=1).masked_fill(wanted == 0, 0.0)
    return -(logs * wanted / wanted.sum(1, keepdim=True)).sum(1).mean()


def sigmoid_loss(
    text_ND: Tensor, image_ND: Tensor, scale: Tensor, bias: Tensor, same: Tensor, duplicates: str
) -> Tensor:
    """Each text with each image is a question of its own: do they belong together? Summed over images, mean over rows.

    Args: as `softmax_loss`; bias is added to the scaled similarities.

    Source:
        Zhai et al. 2023, SigLIP, arXiv:2303.15343, algorithm 1.
    """
    logits = (text_ND @ image_ND.T) * scale + bias
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    right = same if duplicates == "targets" else own
    values = F.softplus(torch.where(right, -logits, logits))
    if duplicates == "mask":
        values = values.masked_fill(same & ~own, 0.0)
    return values.sum() / len(logits)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, str], Tensor]] = {
    "softmax": softmax_loss,
    "sigmoid": sigmoid_loss,
}
"""By name."""


def pair_loss(
    text: Tensor,
    image: Tensor,
    scale: Tensor,
    bias: Tensor,
    labels: Tensor,
    image_ids: Tensor | None = None,
    *,
    loss: str = "softmax",
    duplicates: str = "targets",
) -> Tensor:
    """The loss of the pairs of all processes; each process gives its rows.

    Args:
        text, image: (B, D) of length one.
        scale, bias: of similarities.
        labels: (B,) numbers of captions, equal for equal ones. image_ids: (B,) of images.
        loss: a key of `LOSSES`. duplicates: one of `DUPLICATES`.
    """
    ids = gather_ids(labels), None if image_ids is None else gather_ids(image_ids)
    return LOSSES[loss](gathered(text), gathered(image), scale, bias, positives(*ids), duplicates)
