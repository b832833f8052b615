"""The forward of an adapted layer: Linear and GPT-2's Conv1D, convolutions, embeddings.

Each is a mixin that `weft.core.slots.place` puts before the layer's own class; without an active slot the layer's own
forward runs. Products are in `weft.core.ops` and `weft.core.convs`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.core import joint
from weft.core.adapted import adapted_linear, beside, is_ours, magnitude_factor, row_norms
from weft.core.by_parts import by_rows
from weft.core.convs import convolve
from weft.core.factors import Kind
from weft.core.slots import Placed, Slot, State
from weft.errors import BankError

autocasts = torch._C._is_any_autocast_enabled

__all__ = ["ConvSite", "EmbeddingSite", "LinearSite", "eagerly", "mixin_for", "row_norms"]

if TYPE_CHECKING:
    from torch.nn import Module as _Base
else:
    _Base = object


class LinearSite(_Base):
    """Linear, its subclasses, and transformers' Conv1D."""

    _weft: State

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """(..., d_in) -> (..., d_out); the argument is called ``input``, or ``x`` in Conv1D."""
        placed = self._weft.sites["weight"]
        if placed.ring.routed and torch.compiler.is_compiling():
            return eagerly(LinearSite.forward, self, *args, **kwargs)  # type: ignore[no-any-return]
        slot = placed.chosen
        if slot is None:
            return super().forward(*args, **kwargs)  # type: ignore[no-any-return]
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling() or x.is_inference() or autocasts()):
            home = None if slot.by_row else slot.solo
            found = home.solo(home.number, x) if home else joint.quick(self, placed, slot, x)
            if found is not None:
                return found
        if placed.group is not None and not torch.compiler.is_compiling():
            return placed.group(placed, x)  # type: ignore[no-any-return]
        if slot.by_row:
            return joint.run(self, placed, slot, x)
        if not is_ours(self, placed):
            base: Tensor = super().forward(*args, **kwargs)
            return beside(self, placed, slot, x, base)
        return adapted_linear(self, placed, slot, x)


class ConvSite(_Base):
    """Conv1d, Conv2d, Conv3d with stride, padding (also ``"same"`` and non-zero modes), dilation and groups."""

    _weft: State
    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, *size) or (C, *size) -> the layer's own output shape."""
        placed = self._weft.sites["weight"]
        if placed.ring.routed and torch.compiler.is_compiling():
            return eagerly(ConvSite.forward, self, input)  # type: ignore[no-any-return]
        slot = placed.chosen
        if slot is None:
            return super().forward(input)  # type: ignore[no-any-return]
        if not slot.by_row:
            return self._adapted(placed, slot, input)
        size = len(placed.site.kernel)
        if slot.route.lengths is not None or (not slot.route.whole and input.dim() != size + 2):
            raise BankError(
                f"{placed.site.path!r} is a convolution, which mixes the tokens of its input {tuple(input.shape)}: routes by packed token can't "
                "go through it; route by row, with one batch row an entry"
            )
        channels = (-1, *(1,) * size)
        return by_rows(slot, input, functools.partial(self._adapted, placed), super().forward, size + 1, channels)

    def _adapted(self, placed: Placed, slot: Slot, input: Tensor) -> Tensor:
        bias = self.bias
        ours = is_ours(self, placed)
        if ours and slot.plain:
            return convolve(self, slot, input, bias)
        channels = (-1, *(1 for _ in placed.site.kernel))
        out = convolve(self, slot, input, bias if slot.magnitude is None else None, alone=not ours)
        out = out if ours else out + super().forward(input)
        if slot.bias is not None:
            out = out + (slot.scale * slot.bias).to(out.dtype).view(channels)
        if slot.magnitude is not None:
            out = out * magnitude_factor(placed, slot, self.weight).to(out.dtype).view(channels)
            out = out if bias is None else out + bias.view(channels)
        return out


class EmbeddingSite(_Base):
    """Embedding: the update of row t is ``scale · B A[:, t]``; also embeddings that scale their output."""

    _weft: State
    weight: Tensor
    padding_idx: int | None
    scale_grad_by_freq: bool

    def forward(self, input: Tensor) -> Tensor:
        """(...) of ids -> (..., width)."""
        placed = self._weft.sites["weight"]
        if placed.ring.routed and torch.compiler.is_compiling():
            return eagerly(EmbeddingSite.forward, self, input)  # type: ignore[no-any-return]
        slot = placed.chosen
        if slot is None:
            return super().forward(input)  # type: ignore[no-any-return]
        if not slot.by_row:
            return self._adapted(placed, slot, input)
        return by_rows(slot, input, functools.partial(self._adapted, placed), super().forward, 0)

    def _adapted(self, placed: Placed, slot: Slot, input: Tensor) -> Tensor:
        base: Tensor = super().forward(input)
        A, B = slot.pair()
        thin = F.embedding(input, A.t(), padding_idx=self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        update = F.linear(thin, B) * slot.scale
        multiplier = getattr(self, "embed_scale", 1.0)
        update = update * (multiplier.to(update.dtype) if isinstance(multiplier, Tensor) else multiplier)
        if slot.magnitude is None:
            return base + update.to(base.dtype)
        return (base + update.to(base.dtype)) * magnitude_factor(placed, slot, self.weight.t()).to(base.dtype)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def eagerly(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A forward that a compiler leaves alone: which route is on is a matter of the thread, and no constant."""
    return forward(*args, **kwargs)


_MIXINS: dict[Kind, type] = {"linear": LinearSite, "conv": ConvSite, "embedding": EmbeddingSite}


def mixin_for(kind: Kind) -> type | None:
    """The mixin of a kind of layer; None for attention and parameters, which have modules of their own."""
    return _MIXINS.get(kind)
