"""What a computation allocates, when, and until when: recorded from fake tensors, so that nothing is allocated.

`Tape` sees every operation below autograd: the birth of each storage and its death, and the floating point operations
of products. Data are not there, so that whatever would read them gets the largest answer: every token counts, every mask is true.
This module does not know models.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

__all__ = ["Storage", "Tape"]


@dataclass(slots=True)
class Storage:
    """One piece of memory.

    Attributes:
        size: bytes. width: last dimension of the tensor that it was made for; 0 for a scalar.
        born, died: places on the tape, counted in births and deaths; None: it outlives the tape.
    """

    size: int
    width: int
    born: int
    died: int | None = None


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records while it is on; stands inside of a `FakeTensorMode`.

    Attributes:
        storages: all that were born on the tape.
        changes: bytes at each place: + a birth, - a death.
        flops: floating point operations so far, a multiplication and an addition counted as two.

    Source:
        The formulas are those of `torch.utils.flop_counter`. `FlopCounterMode` itself is not used because it hangs hooks on all
        modules, which makes sites leave their fast paths.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: list[Storage] = []
        self.changes: list[int] = []
        self.flops = 0
        self._known: dict[int, weakref.ref[Any]] = {}
        self._index: dict[int, int] = {}
        self.stopped = False

    @property
    def now(self) -> int:
        """The place that comes next."""
        return len(self.changes)

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Storages that were there before: they are not born when they are seen."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = weakref.ref(storage)

    def of(self, tensor: Tensor) -> Storage | None:
        """The record of a tensor's storage; None if it was there before."""
        index = self._index.get(tensor.untyped_storage()._cdata)
        return None if index is None else self.storages[index]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, and write down what it made."""
        kwargs = kwargs or {}
        out = _assumed(func, args, kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
        self.flops += _flops(func._overloadpacket, args, kwargs, out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size, index = int(storage.nbytes()), len(self.storages)
        width = int(tensor.shape[-1]) if tensor.dim() else 0
        self.storages.append(Storage(size, width, self.now))
        self.changes.append(size)
        self._index[key] = index

        def died(_: object) -> None:
            self._known.pop(key, None)
            self._index.pop(key, None)
            if not self.stopped:
                self.storages[index].died = self.now
                self.changes.append(-size)

        self._known[key] = weakref.ref(storage, died)


def _flops(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Floating point operations of one call; 0 for all but products, as is usual."""
    aten = torch.ops.aten
    formula = flop_registry.get(_PLAIN.get(packet, packet))
    if formula is not None:
        return int(formula(*args, **kwargs, out_val=out))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))  # type: ignore[no-untyped-call]
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))  # type: ignore[no-untyped-call]
    return 0


_LARGEST = 2**31 - 1
_PLAIN = {torch.ops.aten.addmm_: torch.ops.aten.addmm, torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm}
"""Products in place, which the registry of torch doesn't have, and those that they are."""


def _assumed(func: Any, args: Any, kwargs: Any) -> Any:
    """The largest answer of an operation whose shape or value depends on data; NotImplemented for all others."""
    aten = torch.ops.aten
    if func is aten.nonzero.default:
        return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.long)
    if func is aten.index.Tensor and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
        return aten.index.Tensor(args[0], [part for index in args[1] for part in _places(index)])
    if func is aten._local_scalar_dense.default and not args[0].dtype.is_floating_point:
        return True if args[0].dtype == torch.bool else _LARGEST
    if func is aten._grouped_mm.default:  # torch's own shape function refuses float32, which its kernel takes
        left, right = args[:2]
        groups = () if left.dim() == right.dim() + 1 or right.dim() == left.dim() + 1 else (len(args[2]),)
        return left.new_empty((*groups, *left.shape[-2:-1], right.shape[-1]))
    if func is aten.equal.default:
        return args[0].shape == args[1].shape
    if func is aten.is_nonzero.default:
        return True
    return NotImplemented


def _places(index: Tensor | None) -> list[Tensor | None]:
    """A mask as the index tensors that it means, one a dimension, if all of it is true."""
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    return [index.new_empty(index.numel(), dtype=torch.long) for _ in range(index.dim())]
