"""What a bank changes around its sites, and gives back: requires_grad, PyTorch's transformer fast path, checkpointing's start.

- all parameters of the base are frozen while something is attached
- nn.TransformerEncoderLayer has a fused inference path that reads weights past every forward: it is closed for layers with a site
- normalisations with running statistics are part of the base: in training too they are used, not changed
- gradient checkpointing of the reentrant kind needs an input that requires a gradient; with a frozen base nothing does
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from weft.core.slots import place, restore

__all__ = ["StatisticsSite", "Surroundings"]

if TYPE_CHECKING:
    from torch.nn.modules.batchnorm import _NormBase as _Base
else:
    _Base = object


class StatisticsSite(_Base):
    """Batch and instance norms with running statistics: those of the base, whatever the mode."""

    def forward(self, input: Tensor) -> Tensor:
        """The layer's own shape."""
        if not self.training or self.running_mean is None or self.running_var is None:
            return super().forward(input)  # type: ignore[no-any-return]
        statistics = (self.running_mean, self.running_var, self.weight, self.bias)
        if isinstance(self, nn.modules.instancenorm._InstanceNorm):
            return F.instance_norm(input, *statistics, use_input_stats=False, momentum=0.0, eps=self.eps)
        return F.batch_norm(input, *statistics, training=False, momentum=0.0, eps=self.eps)


class Surroundings:
    """Everything around the sites that `restore` puts back."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._flags: list[tuple[nn.Parameter, bool]] = []
        self._guarded: list[tuple[nn.Module, str, Any]] = []
        self._handles: list[RemovableHandle] = []
        self._norms: list[nn.Module] = []
        self._fused = [
            (path, module, flag)
            for path, module in model.named_modules()
            for kind, flag in _FUSED
            if isinstance(module, kind)
        ]

    def freeze(self) -> None:
        """Freeze the base, once; later calls find it frozen."""
        if self._flags:
            return
        modules = tuple(self.model.named_modules())  # one walk for all that follows
        parameters = {
            id(item): item for _, module in modules for item in module._parameters.values() if item is not None
        }
        self._flags = [(parameter, parameter.requires_grad) for parameter in parameters.values()]
        for parameter, flag in self._flags:
            if flag:
                parameter.requires_grad_(False)
        for path, module in modules:
            if getattr(module, "running_mean", None) is not None and type(module).forward in _NORM_FORWARDS:
                place(module, StatisticsSite, path=path)
                self._norms.append(module)
        found = (_embeddings(module) for _, module in modules)
        embeddings = {id(module): module for module in found if module is not None}
        self._handles = [module.register_forward_hook(self._start_gradient) for module in embeddings.values()]

    def guard(self, owners: Iterable[str]) -> None:
        """Close the fast path of encoders and encoder layers that hold one of these sites."""
        paths = list(owners)
        guarded = {id(module) for module, _, _ in self._guarded}
        for path, module, flag in self._fused:
            inside = f"{path}." if path else ""
            if id(module) not in guarded and any(owner.startswith(inside) for owner in paths):
                self._guarded.append((module, flag, getattr(module, flag)))
                setattr(module, flag, 0)

    def restore(self) -> None:
        """Give everything back."""
        for parameter, required in self._flags:
            parameter.requires_grad_(required)
        for module, flag, value in self._guarded:
            setattr(module, flag, value)
        for handle in self._handles:
            handle.remove()
        for module in self._norms:
            restore(module)
        self._flags, self._guarded, self._handles, self._norms = [], [], [], []

    def _start_gradient(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled() and isinstance(output, Tensor) and not output.requires_grad and self._reentrant():
            output.requires_grad_(True)

    def _reentrant(self) -> bool:
        """Whether reentrant checkpointing is on, as transformers marks it on its layers."""
        if not self.model.training:
            return False
        for module in self.model.modules():
            if module.__dict__.get("gradient_checkpointing"):
                function = module.__dict__.get("_gradient_checkpointing_func")
                return bool(getattr(function, "keywords", {}).get("use_reentrant", True))
        return False


_FUSED = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu"),
    (nn.TransformerEncoder, "use_nested_tensor"),
)
"""Modules with a fused inference path, and the attribute that closes it."""

_NORM_FORWARDS = (
    nn.modules.batchnorm._BatchNorm.forward,
    nn.SyncBatchNorm.forward,
    nn.modules.instancenorm._InstanceNorm.forward,
)


def _embeddings(module: nn.Module) -> nn.Module | None:
    """What a model, or a model inside of it, says its input embeddings are."""
    getter = getattr(type(module), "get_input_embeddings", None)
    if getter is None:
        return None
    try:
        found = getter(module)
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, nn.Module) else None
