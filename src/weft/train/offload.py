"""What is not in use stays off the accelerator: the weights of the layers, and what the backward needs again.

Weights come layer by layer, for a layer's forward and for its part of the backward, and what autograd keeps of them is a note where they
are. Activations are copied to pinned memory in the forward and back in the backward, on the stream that computes. On a CPU there is
nothing to gain: `weft.train.schedule.settle` refuses both there. This module does not know trainers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["SMALL", "Parked", "kept_away"]

SMALL = 1 << 16
"""Saved tensors of fewer bytes stay where they are: a copy would cost more than it frees."""


@contextlib.contextmanager
def kept_away(
    model: nn.Module, move: Callable[[Tensor], Tensor] | None = None, parked: Parked | None = None
) -> Iterator[None]:
    """Hold what autograd saves in the forward inside in pinned CPU memory. Parameters and buffers, small tensors and tensors on a CPU stay.

    Args:
        model: whose parameters and buffers are not activations.
        move: to where they wait; None: pinned memory. For tests, which then move from a CPU too.
        parked: weights that are off the device; of them a note is kept.

    Source:
        `torch.autograd.graph.save_on_cpu`, which would copy the weights too.
    """
    own = {_memory(tensor) for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Any:
        noted = tensor if parked is None else parked.pack(tensor)
        if noted is not tensor:
            return noted
        stays = tensor.device.type == "cpu" and move is None
        if stays or tensor.numel() * tensor.element_size() < SMALL or _memory(tensor) in own:
            return tensor
        return tensor.device, (_pinned if move is None else move)(tensor)

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if parked is not None and not isinstance(packed, tuple):
            return parked.unpack(packed)
        device, tensor = packed
        return tensor.to(device, non_blocking=True)  # type: ignore[no-any-return]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _pinned(tensor: Tensor) -> Tensor:
    waiting = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return waiting.copy_(tensor, non_blocking=True)


@dataclass(frozen=True)
class _Note:
    """Where a weight that autograd wanted to keep is found again."""

    home: Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class Parked:
    """The frozen weights of some layers, off the device but while their layer computes.

    Args:
        layers: that take turns, such as `weft.train.recompute.recomputable`.
        device: where they compute.
        pin: keep the weights in pinned memory, from where copies are fast.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device, pin: bool = True) -> None:
        self.device = device
        self._homes: dict[int, Tensor] = {}
        self._held: dict[int, int] = {}
        self._out: dict[int, Tensor] = {}  # weights on the device by their memory
        self._handles: list[Any] = []
        self._layers = list(layers)
        for layer in self._layers:
            for parameter in _frozen(layer):
                if id(parameter) not in self._homes:
                    home = parameter.data.cpu()
                    self._homes[id(parameter)] = home.pin_memory() if pin else home
            self._handles += [
                layer.register_forward_pre_hook(self._come),
                layer.register_forward_hook(self._go, always_call=True),
            ]
        for layer in self._layers:
            self._rest(layer)

    def place_rest(self, model: nn.Module) -> None:
        """Everything else of a model to the device; and a mark that tells accelerate not to move it as a whole."""
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) not in self._homes:
                tensor.data = tensor.data.to(self.device)
        model.hf_device_map = {"": str(self.device), "layers": "cpu"}  # type: ignore[assignment]

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Around a forward: autograd keeps a note instead of a weight that came for it."""
        with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
            yield

    def give_back(self) -> None:
        """Take the hooks off; the weights stay in CPU memory."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for layer in self._layers:
            for parameter in _frozen(layer):
                parameter.data = self._homes[id(parameter)]

    def _rest(self, layer: nn.Module) -> None:
        for parameter in _frozen(layer):
            self._out.pop(_memory(parameter), None)
            parameter.data = self._homes[id(parameter)]

    def _come(self, layer: nn.Module, args: Any = ()) -> None:
        held = self._held[id(layer)] = self._held.get(id(layer), 0) + 1
        self._follow_replays(layer)
        if held == 1:
            for parameter in _frozen(layer):
                parameter.data = self._homes[id(parameter)].to(self.device, non_blocking=True, copy=True)
                self._out[_memory(parameter)] = self._homes[id(parameter)]

    def _go(self, layer: nn.Module, args: Any = (), output: Any = None) -> None:
        self._held[id(layer)] -= 1
        if not self._held[id(layer)]:
            self._rest(layer)

    def _follow_replays(self, layer: nn.Module) -> None:
        """A layer that is computed again in the backward is so without its hooks."""
        function = layer.__dict__.get("_gradient_checkpointing_func")
        if function is None or getattr(function, "func", None) == self._replayed:
            return
        reentrant = getattr(function, "keywords", {}).get("use_reentrant", True)
        layer._gradient_checkpointing_func = functools.partial(self._replayed, layer, function, use_reentrant=reentrant)  # type: ignore[assignment]

    def _replayed(self, layer: nn.Module, function: Any, forward: Any, *args: Any, use_reentrant: bool) -> Any:
        def with_weights(*inputs: Any) -> Any:
            self._come(layer)
            try:
                return forward(*inputs)
            finally:
                self._go(layer)

        return function(with_weights, *args)

    def pack(self, tensor: Tensor) -> Any:
        """A note for a weight that is here for a while; the tensor itself for all else."""
        home = self._out.get(_memory(tensor))
        return tensor if home is None else _Note(home, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, packed: Any) -> Tensor:
        """The weight of a note, brought again."""
        if isinstance(packed, Tensor):
            return packed
        there = packed.home.to(self.device, non_blocking=True)
        return torch.as_strided(there, packed.shape, packed.stride, packed.offset)


def _frozen(layer: nn.Module) -> list[nn.Parameter]:
    """The base's own parameters of a layer."""
    return [
        parameter
        for name, parameter in layer.named_parameters()
        if not parameter.requires_grad and ".weft." not in f".{name}"
    ]


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
