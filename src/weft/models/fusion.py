"""Heads that read a text and an image together and say a class: concatenated, gated, or by cross-attention.

Shapes: B rows, D dimensions of both projected features, C classes. Each head is a small module that is trained whole.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["FUSIONS", "ConcatHead", "CrossAttentionHead", "GatedHead"]


class ConcatHead(nn.Module):
    """Both features side by side, one hidden layer.

    Args:
        dim: D. classes: C.
    """

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * dim, dim)
        self.out = nn.Linear(dim, classes)

    def forward(self, text_BD: Tensor, image_BD: Tensor) -> Tensor:
        """(B, D), (B, D) -> (B, C)."""
        return self.out(torch.nn.functional.gelu(self.hidden(torch.cat([text_BD, image_BD], dim=1))))  # type: ignore[no-any-return]


class GatedHead(nn.Module):
    """A gate decides by dimension how much of each: ``g · tanh(text) + (1 - g) · tanh(image)``.

    Source:
        Arevalo et al. 2017, Gated multimodal units, arXiv:1702.01992.
    """

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.text = nn.Linear(dim, dim)
        self.image = nn.Linear(dim, dim)
        self.gate = nn.Linear(2 * dim, dim)
        self.out = nn.Linear(dim, classes)

    def forward(self, text_BD: Tensor, image_BD: Tensor) -> Tensor:
        """(B, D), (B, D) -> (B, C)."""
        gate = torch.sigmoid(self.gate(torch.cat([text_BD, image_BD], dim=1)))
        mixed = gate * torch.tanh(self.text(text_BD)) + (1 - gate) * torch.tanh(self.image(image_BD))
        return self.out(mixed)  # type: ignore[no-any-return]


class CrossAttentionHead(nn.Module):
    """The text asks the image and the image the text: each attends to both, then both answers are read together.

    Source:
        Lu et al. 2019, ViLBERT, arXiv:1908.02265, co-attention, over one vector a modality.
    """

    def __init__(self, dim: int, classes: int, heads: int = 4) -> None:
        super().__init__()
        self.kinds = nn.Parameter(torch.zeros(2, dim))  # tells text from image
        self.attention = nn.MultiheadAttention(dim, heads if dim % heads == 0 else 1, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(2 * dim, classes)

    def forward(self, text_BD: Tensor, image_BD: Tensor) -> Tensor:
        """(B, D), (B, D) -> (B, C)."""
        both = torch.stack([text_BD, image_BD], dim=1) + self.kinds
        answers, _ = self.attention(both, both, both, need_weights=False)
        return self.out(self.norm(both + answers).flatten(1))  # type: ignore[no-any-return]


FUSIONS: dict[str, type[nn.Module]] = {"concat": ConcatHead, "gated": GatedHead, "cross-attention": CrossAttentionHead}
"""By name."""
