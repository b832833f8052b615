"""Losses of a mixed batch, by token, without ever holding the logits of the whole batch.

Where the head is a plain product that nobody trains, the body runs alone, and the head's product, the loss and its gradient are
made block by block in the forward: what stays is one gradient of the size of the hidden states. Large logits cost memory, and on
a CPU page faults: more time than the product itself.

Shapes: B rows, T tokens, n positions that are learned, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.train.scoring import IGNORED, losses

__all__ = ["Head", "find_head", "head_losses", "model_losses", "reference_head_losses"]

BLOCK = {"cpu": 2**20, "cuda": 2**26}
"""Numbers of logits at a time."""


@dataclass(frozen=True)
class Head:
    """A model in two parts, ``logits = head(body(…))``."""

    body: nn.Module
    linear: nn.Linear


@torch.no_grad()
def find_head(model: nn.Module) -> Head | None:
    """The body and the head of a causal language model, if its logits are nothing else than the head's product.

    Finds out by trying, for some models scale or cap their logits; None: they do, or the head is adapted.
    """
    linear = getattr(model, "get_output_embeddings", lambda: None)()
    decoder = getattr(model, "get_decoder", lambda: None)()
    if decoder is None or decoder is model:
        decoder = getattr(model, getattr(model, "base_model_prefix", "") or "-", None)
    if not isinstance(linear, nn.Linear) or not isinstance(decoder, nn.Module) or "_weft" in linear.__dict__:
        return None
    if linear.weight.requires_grad or linear._forward_hooks or linear._forward_pre_hooks:
        return None
    ids = torch.arange(6, device=linear.weight.device)[None] % linear.weight.shape[0]
    training = model.training
    model.eval()
    try:
        whole = model(input_ids=ids, use_cache=False).logits
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
        parted = F.linear(hidden, linear.weight, linear.bias)
    except (TypeError, AttributeError, RuntimeError):
        return None
    finally:
        model.train(training)
    same = whole.shape == parted.shape and torch.allclose(whole, parted.to(whole.dtype), rtol=1e-3, atol=1e-4)
    return Head(decoder, linear) if same else None


def head_losses(
    head: Head, inputs: Mapping[str, Any], labels_BT: Tensor, weights_B: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward through body and head.

    Args:
        inputs: of the model, without labels.
        labels_BT: -100 where nothing is learned.
        weights_B: what a loss of each row counts.

    Returns:
        the weighted sum, with a gradient; the (n,) losses, without; and the (n,) rows that they belong to.
    """
    hidden: Tensor = head.body(**{**inputs, "use_cache": False}).last_hidden_state
    wanted = labels_BT[:, 1:]
    keep = wanted != IGNORED
    rows = keep.nonzero()[:, 0]
    picked, targets = hidden[:, :-1][keep], wanted[keep]
    total, values = _HeadLoss.apply(picked, head.linear.weight, head.linear.bias, targets, weights_B[rows])  # type: ignore[no-untyped-call]
    return total, values, rows


def model_losses(
    model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, weights_B: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the model's own forward, for every model and for classifications."""
    logits = model(**inputs).logits
    values, rows = losses(logits, labels)
    return (values * weights_B[rows]).sum(), values.detach(), rows


def reference_head_losses(
    hidden_nd: Tensor, weight_Vd: Tensor, bias_V: Tensor | None, targets_n: Tensor, weights_n: Tensor
) -> tuple[Tensor, Tensor]:
    """The slow, obvious form of `_HeadLoss`."""
    logits = F.linear(hidden_nd, weight_Vd, bias_V)
    values = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets_n, reduction="none")
    return (values * weights_n).sum(), values


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy of a frozen head's product, block by block; the gradient is made on the way."""

    @staticmethod
    def forward(
        ctx: Any, hidden_nd: Tensor, weight_Vd: Tensor, bias_V: Tensor | None, targets_n: Tensor, weights_n: Tensor
    ) -> tuple[Tensor, Tensor]:
        device = hidden_nd.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_nd.dtype
        wide = torch.promote_types(dtype, torch.float32)
        size = max(16, BLOCK.get(device, BLOCK["cuda"]) // weight_Vd.shape[0])
        weight = weight_Vd.to(dtype)
        bias = None if bias_V is None else bias_V.to(dtype)
        values = hidden_nd.new_empty(len(targets_n), dtype=wide)
        grad = torch.empty_like(hidden_nd) if ctx.needs_input_grad[0] else None
        with torch.autocast(device, enabled=False):
            for start in range(0, len(targets_n), size):
                part = slice(start, start + size)
                logits = F.linear(hidden_nd[part].to(dtype), weight, bias).to(wide)
                target = targets_n[part, None]
                peak = torch.logsumexp(logits, 1, keepdim=True)
                values[part] = (peak - logits.gather(1, target))[:, 0]
                if grad is not None:
                    share = logits.sub_(peak).exp_()
                    share.scatter_add_(1, target, torch.full_like(peak, -1.0))
                    share.mul_(weights_n[part, None])
                    grad[part] = (share.to(dtype) @ weight).to(grad.dtype)
        ctx.save_for_backward(*([] if grad is None else [grad]))
        ctx.mark_non_differentiable(values)
        return (values * weights_n).sum(), values

    @staticmethod
    def backward(ctx: Any, outer: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * outer, None, None, None, None
