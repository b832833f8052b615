"""nn.MultiheadAttention with updates on in_proj, on out_proj, or on both.

PyTorch's own forward takes the weights as arguments and never calls ``out_proj``, so the layer is computed here: the projections by
`weft.core.ops`, the rest by scaled_dot_product_attention. ``W + ΔW`` is never built.

Shapes: N batch, L target length, S source length, E width, H heads.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.core import joint, ops
from weft.core.layers import eagerly
from weft.core.ops import Operand
from weft.core.ring import Ring
from weft.core.routes import Rows
from weft.core.slots import State, place
from weft.errors import ShapeError, SpecError

__all__ = ["AttentionSite", "place_attention"]

if TYPE_CHECKING:
    from torch.nn import MultiheadAttention as _Base
else:
    _Base = object


class AttentionSite(_Base):
    """The forward of nn.MultiheadAttention, same arguments and results."""

    _weft: State

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(L, N, E) or (N, L, E) with ``batch_first``, or (L, E) -> the same, and weights (N, L, S) or None."""
        if _is_routed(self) and torch.compiler.is_compiling():
            result: tuple[Tensor, Tensor | None] = eagerly(
                AttentionSite.forward, self, query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
            return result
        if not _is_adapted(self):
            return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights,
                                   is_causal)  # fmt: skip
        _check_call(query, attn_mask, key_padding_mask, is_causal)
        batched = query.dim() == 3
        q_NLE, k_NSE, v_NSE = _project(self, *(_to_NLE(self, item) for item in (query, key, value)))
        mask = _mask(self, q_NLE, k_NSE.shape[1], attn_mask, key_padding_mask, batched)
        k_NSE, v_NSE, mask = _extend(self, k_NSE, v_NSE, mask)
        q, k, v = (_heads(item, self.num_heads) for item in (q_NLE, k_NSE, v_NSE))
        p = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, p) if p else weights
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        if not batched:
            return out.squeeze(0), weights
        return (out if self.batch_first else out.transpose(0, 1)), weights


def place_attention(module: nn.Module, path: str, ring: Ring) -> nn.Module:
    """Let an attention compute with updates.

    Raises:
        SpecError: a subclass with a forward of its own.
    """
    original = getattr(type(module), "_weft_original", type(module))
    if original.forward is not nn.MultiheadAttention.forward:
        raise SpecError(
            f"{path!r} is a {original.__name__}, an nn.MultiheadAttention with a forward of its own, which weft can't compute; leave it "
            "out with exclude=[…]"
        )
    place(module, AttentionSite, path=path, ring=ring)
    return module


def _is_routed(module: AttentionSite) -> bool:
    return module._weft.ring is not None and module._weft.ring.routed


def _is_adapted(module: AttentionSite) -> bool:
    placed = module._weft.sites.get("in_proj_weight")
    if placed is not None and placed.chosen is not None:
        return True
    out = module.out_proj.__dict__.get("_weft")
    if out is not None and "weight" in out.sites and out.sites["weight"].chosen is not None:
        return True
    return any(
        value is not None for state in (module._weft, out) if state is not None for value in state.values.values()
    )


def _check_call(query: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool) -> None:
    """Refuse what PyTorch's own forward refuses.

    Raises:
        ShapeError: an input of other than 2 or 3 dimensions, a mask of integers, ``is_causal`` without a mask.
    """
    if query.is_nested or query.dim() not in (2, 3):
        raise ShapeError(
            f"an adapted nn.MultiheadAttention takes (L, E) or batches of it, got {'a nested tensor' if query.is_nested else tuple(query.shape)}"
        )
    for name, item in (("attn_mask", mask), ("key_padding_mask", padding)):
        if item is not None and item.dtype != torch.bool and not item.is_floating_point():
            raise ShapeError(f"{name} is {item.dtype}; expected bool (True: may not look) or floating point (is added)")
    if is_causal and mask is None:
        raise ShapeError(
            "is_causal=True is a hint that attn_mask is causal, and there is no attn_mask; pass one, as nn.MultiheadAttention wants it"
        )


def _to_NLE(module: AttentionSite, x: Tensor) -> Tensor:
    if x.dim() == 2:
        return x.unsqueeze(0)
    return x if module.batch_first else x.transpose(0, 1)


def _project(module: AttentionSite, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, all (N, length, E); self-attention is one product."""
    placed = module._weft.sites.get("in_proj_weight")
    slot = None if placed is None else placed.chosen
    width = module.embed_dim
    if slot is not None and slot.by_row:
        return _project_rows(module, slot, query, key, value)
    if not module._qkv_same_embed_dim:
        weights: tuple[Tensor, ...] = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    else:
        weights = module.in_proj_weight.chunk(3)
    A, B = slot.pair() if slot is not None else (None, None)
    p = slot.dropout if slot is not None and module.training else 0.0
    scale = slot.scale if slot is not None else 1.0
    bias = module.in_proj_bias
    if query is key and key is value and module._qkv_same_embed_dim:
        q, k, v = ops.linear(query, Operand(module.in_proj_weight, bias, A, B, scale, p)).chunk(3, dim=-1)
    else:
        parts = []
        for index, x in enumerate((query, key, value)):
            rows = slice(index * width, (index + 1) * width)
            part = Operand(
                weights[index], None if bias is None else bias[rows], A, None if B is None else B[rows], scale, p
            )
            parts.append(ops.linear(x, part))
        q, k, v = parts
    if slot is not None and slot.bias is not None:
        own = (slot.scale * slot.bias).to(q.dtype).chunk(3)
        q, k, v = q + own[0], k + own[1], v + own[2]
    return q, k, v


def _project_rows(
    module: AttentionSite, rows: Rows, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`_project` for rows of different adapters."""
    inputs = (query, key, value)
    whole = {id(x): joint.run(module, rows.placed, rows, x) for x in {id(x): x for x in inputs}.values()}
    q, k, v = (whole[id(x)].chunk(3, dim=-1)[index] for index, x in enumerate(inputs))
    return q, k, v


def _mask(
    module: AttentionSite, query: Tensor, length: int, attn_mask: Tensor | None, padding: Tensor | None, batched: bool
) -> Tensor | None:
    """One additive mask that broadcasts to (N, H, L, S), or None. ``is_causal`` is a hint: the mask says it all."""
    N, L, _ = query.shape
    total: Tensor | None = None
    if attn_mask is not None:
        total = _additive(attn_mask, query)
        total = total.view(N, module.num_heads, L, length) if total.dim() == 3 else total.view(1, 1, L, length)
    if padding is not None:
        padding = padding if batched else padding.unsqueeze(0)
        keys = _additive(padding, query).view(N, 1, 1, length)
        total = keys if total is None else total + keys
    return total


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """True means "may not look", as in nn.MultiheadAttention."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill_(mask, float("-inf"))


def _extend(module: AttentionSite, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Learned key and value biases, and zero attention: one more source position each."""
    N, _, E = k.shape
    if module.bias_k is not None and module.bias_v is not None:
        k = torch.cat([k, module.bias_k.expand(N, 1, E)], dim=1)
        v = torch.cat([v, module.bias_v.expand(N, 1, E)], dim=1)
        mask = None if mask is None else F.pad(mask, (0, 1))
    if module.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        mask = None if mask is None else F.pad(mask, (0, 1))
    return k, v, mask


def _heads(x: Tensor, heads: int) -> Tensor:
    """(N, length, E) -> (N, H, length, E / H)."""
    return x.view(*x.shape[:-1], heads, x.shape[-1] // heads).transpose(1, 2)
