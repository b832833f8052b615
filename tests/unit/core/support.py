"""What the tests of the core share: factors that are never zero, the state of a model, saved tensors, dense references."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapter import Adapter
from weft.core.bank import Bank
from weft.core.ops import Operand
from weft.core.sites import find_sites
from weft.spec import LoraSpec

__all__ = [
    "Saved",
    "State",
    "checkpoints",
    "dense",
    "fill",
    "grads_of",
    "made",
    "operand",
    "outputs_of",
    "saved_tensors",
    "spread",
]


def fill(bank: Bank, *names: str, size: float = 0.3) -> None:
    """Random numbers into everything that an adapter trains: with B = 0 nearly every wrong forward passes."""
    with torch.no_grad():
        for name in names or bank.names:
            for leaf, parameter in bank.named_parameters(name):
                noise = torch.randn_like(parameter) * size
                parameter.copy_(parameter + noise if leaf.endswith("magnitude") else noise)


def made(model: nn.Module, spec: LoraSpec | None = None, *, size: float = 0.3, **fields: Any) -> Adapter:
    """An adapter with random factors for a model, which is left as it was."""
    from weft.core.bank import attach

    with attach(model, {"made": spec or LoraSpec(**fields)}) as bank:
        fill(bank, size=size)
        return bank.adapter("made")


def outputs_of(model: nn.Module, batch: Any) -> Tensor:
    """What a model gives for a batch (keywords, or one tensor), as one tensor."""
    out = model(**batch) if isinstance(batch, dict) else model(batch)
    if isinstance(out, tuple):
        return out[0]
    return out if isinstance(out, Tensor) else out.logits


def grads_of(bank: Bank, name: str) -> dict[str, Tensor]:
    """Gradients of an adapter by name of the parameter; all of them must be there."""
    found = {}
    for leaf, parameter in bank.named_parameters(name):
        assert parameter.grad is not None, leaf
        found[leaf] = parameter.grad.detach().clone()
    return found


def operand(
    d_in: int, d_out: int, rank: int, *, dtype: torch.dtype = torch.float32, factors: torch.dtype | None = None,
    bias: bool = True, scale: float = 1.7, p: float = 0.0, grad: bool = True,
) -> Operand:  # fmt: skip
    """A random site: base in ``dtype``, factors in ``factors``; the numbers are O(1) in the output."""
    factors = factors or dtype
    W = (torch.randn(d_out, d_in, dtype=torch.float64) / d_in**0.5).to(dtype)
    b = torch.randn(d_out, dtype=torch.float64).to(dtype) if bias else None
    A = (torch.randn(rank, d_in, dtype=torch.float64) / d_in**0.5).to(factors).requires_grad_(grad)
    B = (torch.randn(d_out, rank, dtype=torch.float64) / rank**0.5).to(factors).requires_grad_(grad)
    return Operand(W, b, A, B, scale, p)


def dense(site: Operand) -> Tensor:
    """W + ΔW in float64, differentiable."""
    assert site.W is not None
    assert site.A is not None
    assert site.B is not None
    return site.W.double() + site.scale * site.B.double() @ site.A.double()


def spread(model: nn.Module, adapter: Adapter) -> nn.Module:
    """A copy of a model with ``W + ΔW`` written into its weights; no part of weft but its list of sites is used.

    For adapters without magnitude and own bias, and convolutions without groups.
    """
    plain = copy.deepcopy(model)
    if "_weft_bank" in plain.__dict__:
        plain.__dict__["_weft_bank"].detach()
    spec = LoraSpec(
        targets=tuple(path for path, item in adapter.factors.items() if item.kind != "parameter"),
        target_parameters=tuple(path for path, item in adapter.factors.items() if item.kind == "parameter"),
        fan_in_fan_out=adapter.spec.fan_in_fan_out,
    )
    with torch.no_grad():
        for site in find_sites(plain, spec).sites:
            item = adapter.factors[site.path]
            delta = item.scale * (item.B.double() @ item.A.double())
            delta = delta.mT if site.transposed else delta
            weight = dict(plain.named_parameters(remove_duplicate=False))[site.weight_path]
            owner = plain.get_submodule(site.owner)
            new = weight.double() + delta.reshape(weight.shape)
            owner._parameters[site.weight_name] = nn.Parameter(new.to(weight.dtype))
    return plain


def checkpoints(model: nn.Module, reentrant: bool) -> None:
    """Switch checkpoints on, by the name that this version of transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


@dataclass
class Saved:
    """What autograd kept."""

    tensors: list[Tensor] = field(default_factory=list)

    def bytes(self, *without: Tensor | None) -> int:
        """Bytes of the distinct storages, those of some tensors left out."""
        known = {tensor.untyped_storage().data_ptr() for tensor in without if tensor is not None}
        sizes = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in self.tensors
            if tensor.untyped_storage().data_ptr() not in known
        }
        return sum(sizes.values())

    def others(self, *without: Tensor | None) -> list[Tensor]:
        """Saved tensors that do not share memory with these."""
        known = {tensor.untyped_storage().data_ptr() for tensor in without if tensor is not None}
        return [tensor for tensor in self.tensors if tensor.untyped_storage().data_ptr() not in known]


@contextlib.contextmanager
def saved_tensors() -> Iterator[Saved]:
    """Everything that is saved for a backward inside of the block."""
    saved = Saved()

    def pack(tensor: Tensor) -> Tensor:
        saved.tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


@dataclass
class State:
    """A model as it stands: modules, classes, bytes, flags, hooks. `check` says that nothing of it has changed."""

    model: nn.Module
    modules: list[tuple[str, int, type]] = field(init=False)
    tensors: dict[str, tuple[int, Tensor]] = field(init=False)
    flags: dict[str, bool] = field(init=False)
    attributes: list[tuple[str, ...]] = field(init=False)
    hooks: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.modules, self.tensors, self.flags, self.attributes, self.hooks = self._read(clone=True)

    def _read(self, clone: bool) -> tuple[Any, ...]:
        modules = [
            (path, id(module), type(module)) for path, module in self.model.named_modules(remove_duplicate=False)
        ]
        named = [
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        ]
        tensors = {name: (id(tensor), tensor.detach().clone() if clone else tensor) for name, tensor in named}
        flags = {
            name: parameter.requires_grad for name, parameter in self.model.named_parameters(remove_duplicate=False)
        }
        attributes = [tuple(sorted(module.__dict__)) for module in self.model.modules()]
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        hooks = [sum(len(getattr(module, kind)) for kind in kinds) for module in self.model.modules()]
        return modules, tensors, flags, attributes, hooks

    def check_bytes(self) -> None:
        """The base's weights are the same tensors with the same bytes, also while something is attached."""
        now = dict(self.model.named_parameters(remove_duplicate=False)) | dict(
            self.model.named_buffers(remove_duplicate=False)
        )
        for name, (key, tensor) in self.tensors.items():
            assert id(now[name]) == key, name
            assert torch.equal(now[name].detach().view(torch.uint8) if now[name].dim() else now[name],
                               tensor.view(torch.uint8) if tensor.dim() else tensor), name  # fmt: skip

    def check(self) -> None:
        """The same modules, classes, bytes, flags and hooks, and nothing else."""
        modules, tensors, flags, attributes, hooks = self._read(clone=False)
        assert modules == self.modules
        assert list(tensors) == list(self.tensors)
        self.check_bytes()
        assert flags == self.flags
        assert attributes == self.attributes
        assert hooks == self.hooks
