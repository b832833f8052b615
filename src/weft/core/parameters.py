"""Adapted bare parameters: a matrix, or the stacked experts of a mixture-of-experts layer.

Such a weight is read by the layer's own forward in a way that nobody can know. While a slot is active, reading the attribute gives a
`LazyWeight`: indexing and transposing stay lazy, a linear product (``F.linear``, ``@``, grouped products) is computed by the factors, and
anything else gets the dense ``W + ΔW``, which is right always and cheap never.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.core import ops
from weft.core.ops import Operand
from weft.core.slots import Placed, Slot

__all__ = ["LazyWeight", "dense_weight", "lazy_weight"]


class LazyWeight:
    """``W + scale · B A`` that is not computed yet.

    Attributes:
        W: (o, i) or (E, o, i), math orientation.
        A: (r, i) or (E, r, i).
        B: (o, r) or (E, o, r).
        scale: number.
        flipped: the layer sees the transpose of the last two dimensions.
    """

    def __init__(self, W: Tensor, A: Tensor, B: Tensor, scale: float, flipped: bool) -> None:
        self.W, self.A, self.B, self.scale, self.flipped = W, A, B, scale, flipped

    def dense(self) -> Tensor:
        """The weight as the layer knows it, built; in the dtype of the base's, also under autocast."""
        W = self.W
        with torch.autocast(W.device.type, enabled=False):
            A, B = self.A.to(W.dtype), self.B.to(W.dtype)
            whole = (torch.baddbmm if W.dim() == 3 else torch.addmm)(W, B, A, alpha=self.scale)
        return whole.mT if self.flipped else whole

    @property
    def shape(self) -> torch.Size:
        """As the layer knows it."""
        return (self.W.mT if self.flipped else self.W).shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the base weight."""
        return self.W.dtype

    @property
    def device(self) -> torch.device:
        """Of the base weight."""
        return self.W.device

    @property
    def ndim(self) -> int:
        """2 or 3."""
        return self.W.dim()

    def size(self, dim: int | None = None) -> Any:
        """As Tensor.size."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """As Tensor.dim."""
        return self.W.dim()

    def transpose(self, first: int, second: int) -> Any:
        """Lazy for the last two dimensions, dense otherwise."""
        dims = {first % self.ndim, second % self.ndim}
        if dims == {self.ndim - 1, self.ndim - 2}:
            return LazyWeight(self.W, self.A, self.B, self.scale, not self.flipped)
        return self.dense().transpose(first, second)

    @property
    def mT(self) -> Any:
        """The lazy transpose."""
        return self.transpose(-1, -2)

    @property
    def T(self) -> Any:
        """The lazy transpose of a matrix."""
        return self.transpose(-1, -2) if self.ndim == 2 else self.dense().T

    def t(self) -> Any:
        """The lazy transpose of a matrix."""
        return self.transpose(0, 1)

    def __getitem__(self, index: Any) -> Any:
        """One expert, or several, lazily; any other index from the dense weight."""
        one = isinstance(index, int) or (isinstance(index, Tensor) and index.dtype != torch.bool and index.dim() <= 1)
        if self.ndim == 3 and one:
            return LazyWeight(self.W[index], self.A[index], self.B[index], self.scale, self.flipped)
        return self.dense()[index]

    def __len__(self) -> int:
        return self.shape[0]

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.dense() @ other

    def __rmatmul__(self, other: Tensor) -> Tensor:
        result: Tensor = _matmul(other, self)
        return result

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        plain = [_dense(item) for item in args]
        return func(*plain, **{name: _dense(item) for name, item in kwargs.items()})


def _on_dense(name: str) -> Callable[..., Any]:
    def operate(self: LazyWeight, *others: Any) -> Any:
        return getattr(self.dense(), name)(*(_dense(other) for other in others))

    return operate


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "rpow", "neg", "pos", "abs",
              "eq", "ne", "lt", "le", "gt", "ge"):  # fmt: skip
    setattr(LazyWeight, f"__{_name}__", _on_dense(f"__{_name}__"))


def lazy_weight(placed: Placed, slot: Slot, weight: Tensor) -> Any:
    """What reading an adapted parameter gives; under a compiler the dense weight."""
    A, B = slot.pair()
    W = weight.mT if placed.site.transposed else weight
    lazy = LazyWeight(W, A, B, slot.scale, placed.site.transposed)
    return lazy.dense() if torch.compiler.is_compiling() else lazy


def dense_weight(weight: Tensor, A: Tensor, B: Tensor, scale: float, transposed: bool) -> Tensor:
    """The slow, obvious form: ``W + scale · B A`` in the layer's own layout."""
    delta = scale * (B @ A)
    return weight + (delta.mT if transposed else delta).to(weight.dtype)


def _dense(item: Any) -> Any:
    if isinstance(item, LazyWeight):
        return item.dense()
    if isinstance(item, list | tuple):
        return type(item)(_dense(part) for part in item)
    return item


def _linear(x: Any, weight: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, LazyWeight) or isinstance(x, LazyWeight) or weight.ndim != 2:
        return NotImplemented
    if weight.flipped:  # x (…, o) against (i, o): the update's factors change places
        return ops.linear(x, Operand(weight.W.mT, bias, weight.B.mT, weight.A.mT, weight.scale))
    return ops.linear(x, Operand(weight.W, bias, weight.A, weight.B, weight.scale))


def _matmul(x: Any, weight: Any) -> Any:
    if not isinstance(weight, LazyWeight) or isinstance(x, LazyWeight):
        return NotImplemented
    if weight.ndim == 2:
        return _linear(x, weight.transpose(0, 1))
    return _batched(x, weight)


def _batched(x: Tensor, weight: LazyWeight) -> Any:
    """(E, n, ·) @ (E, ·, ·) by the factors."""
    W, right, left = (weight.W.mT, weight.A.mT, weight.B.mT) if weight.flipped else (weight.W, weight.B, weight.A)
    if x.dim() != 3 or x.shape[0] != W.shape[0]:
        return NotImplemented
    thin = torch.bmm(x, right.to(x.dtype)) * weight.scale
    return torch.baddbmm(torch.bmm(x, W), thin, left.to(x.dtype))


def _bmm(left: Any, right: Any, **kwargs: Any) -> Any:
    """x @ weight, or weight @ x where x has few columns (one token of each expert)."""
    if isinstance(left, LazyWeight) and isinstance(right, Tensor) and right.dim() == 3 and not kwargs:
        turned = _batched(right.mT, left.mT)
        return turned if turned is NotImplemented else turned.mT
    return NotImplemented if kwargs else _matmul(left, right)


def _grouped_mm(x: Any, weight: Any, *, offs: Tensor | None = None, bias: Tensor | None = None, **kwargs: Any) -> Any:
    if not isinstance(weight, LazyWeight) or isinstance(x, LazyWeight) or weight.ndim != 3 or offs is None:
        return NotImplemented
    W, right, left = (weight.W.mT, weight.A.mT, weight.B.mT) if weight.flipped else (weight.W, weight.B, weight.A)
    if weight.A.shape[1] * x.element_size() % 16:
        return NotImplemented  # grouped products want rows of 16 bytes: such a rank goes the dense way
    base = F.grouped_mm(x, W, offs=offs, bias=bias, **kwargs)
    thin = F.grouped_mm(x, right.to(x.dtype).contiguous(), offs=offs)
    return base + F.grouped_mm(thin * weight.scale, left.to(x.dtype).contiguous(), offs=offs)


_HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    torch.bmm: _bmm,
    Tensor.bmm: _bmm,
    F.grouped_mm: _grouped_mm,
}
if hasattr(torch, "_grouped_mm"):
    _HANDLERS[torch._grouped_mm] = _grouped_mm
