"""What a bank changes around its sites, and gives back: requires_grad, PyTorch's transformer fast path, checkpointing's start.

- all parameters of the base are frozen while something is attached
- nn.TransformerEncoderLayer has a fused inference path that reads weights past every forward: it is closed for layers with a site
- gradient checkpointing of the reentrant kind needs an input that requires a gradient; with a frozen base nothing does
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["Surroundings"]


class Surroundings:
    """Everything around the sites that `restore` puts back."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._flags: list[tuple[nn.Parameter, bool]] = []
        self._guarded: list[tuple[nn.TransformerEncoderLayer, Any]] = []
        self._handle: RemovableHandle | None = None

    def freeze(self) -> None:
        """Freeze the base, once; later calls find it frozen."""
        if self._flags:
            return
        self._flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        for parameter, flag in self._flags:
            if flag:
                parameter.requires_grad_(False)
        getter = getattr(self.model, "get_input_embeddings", None)
        embeddings = _quietly(getter) if callable(getter) else None
        if isinstance(embeddings, nn.Module):
            self._handle = embeddings.register_forward_hook(self._start_gradient)

    def guard(self, owners: Iterable[str]) -> None:
        """Close the fast path of encoder layers that hold one of these sites."""
        paths = list(owners)
        guarded = {id(layer) for layer, _ in self._guarded}
        for path, module in self.model.named_modules():
            if isinstance(module, nn.TransformerEncoderLayer) and id(module) not in guarded:
                inside = f"{path}." if path else ""
                if any(owner.startswith(inside) for owner in paths):
                    self._guarded.append((module, module.activation_relu_or_gelu))
                    module.activation_relu_or_gelu = 0

    def restore(self) -> None:
        """Give everything back."""
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        for layer, value in self._guarded:
            layer.activation_relu_or_gelu = value
        if self._handle is not None:
            self._handle.remove()
        self._flags, self._guarded, self._handle = [], [], None

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


def _quietly(getter: Any) -> Any:
    try:
        return getter()
    except (NotImplementedError, AttributeError):
        return None
