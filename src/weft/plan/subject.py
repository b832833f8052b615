"""One base with one spec, known by its configuration: models of fake tensors, and how many numbers there are.

This module does not know steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weft.core.bank import Bank
from weft.core.slots import Slot
from weft.models.attach import attach
from weft.plan.layers import Stacks
from weft.plan.skeleton import in_fake_mode, skeleton
from weft.spec import LoraSpec
from weft.train.opening import with_head
from weft.train.recipe import Recipe
from weft.train.recompute import above

__all__ = ["SLOT", "Built", "Counts", "Subject"]

SLOT = "planned"
_SUBTRACTED = ("pissa", "olora", "lora_ga")
"""Initialisations with a starting product, which is kept beside the factors."""


@dataclass(frozen=True)
class Counts:
    """How many numbers there are, and what they take.

    Attributes:
        base: parameters of the base, tied ones once. trained: of the adapter, or of all where the base itself is trained.
        sites: that are adapted. layers: of the deepest stack.
        weights: bytes of the base. by_dtype: the same, by dtype. factors: bytes of what is trained.
        linear: (numbers, rows, bytes) of linear weights that quantisation can hold. largest: numbers of the largest of them.
        in_layers: bytes of the weights in stacks of layers. one_layer: of the largest layer.
    """

    base: int
    trained: int
    sites: int
    layers: int
    weights: int
    by_dtype: dict[str, int]
    factors: int
    linear: tuple[int, int, int]
    largest: int
    in_layers: int
    one_layer: int


@dataclass
class Built:
    """A model of fake tensors, with the adapter on it.

    Attributes:
        bank: None where the base itself is trained.
    """

    model: nn.Module
    bank: Bank | None
    spec: LoraSpec | None
    counts: Counts

    @property
    def trained(self) -> list[nn.Parameter]:
        """What is trained."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


@dataclass
class Subject:
    """A base and a spec.

    Attributes:
        config: of the base, see `skeleton.find_config`. spec: None: all weights are trained.
        device: ``"cpu"`` or ``"cuda"``. labels: number of labels of a classification, or None.
    """

    config: Any
    spec: LoraSpec | None
    device: str = "cpu"
    labels: int | None = None
    mode: Any = None
    _built: dict[Any, Built] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.mode = self.mode or FakeTensorMode(allow_non_fake_inputs=True)

    def built(self, recipe: Recipe) -> Built:
        """The model as this recipe has it: dtype and frozen layers.

        Raises:
            BaseError: no such model can be made. TargetError: the spec matches nothing.
        """
        key = (recipe.dtype, recipe.freeze_below if self.spec is not None else None)
        if key not in self._built:
            self._built[key] = self._build(recipe)
        return self._built[key]

    def _build(self, recipe: Recipe) -> Built:
        dtype = None if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
        model = skeleton(self.config, dtype=dtype, labels=self.labels)
        base = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        bank, spec = None, self.spec
        if spec is None:
            model.requires_grad_(True)
        else:
            spec = above(model, with_head(spec, model) if self.labels is not None else spec, recipe.freeze_below)
            bank = attach(model, {SLOT: spec.replace(init="kaiming")})
            _start_products(bank, spec)
        counts = _count(model, bank, base)
        fake = "cuda" if self.device == "cuda" and torch.cuda.is_available() else "cpu"
        with self.mode:
            in_fake_mode(model, fake)
        return Built(model, bank, spec, counts)


def _start_products(bank: Bank, spec: LoraSpec) -> None:
    """The starting products of initialisations that read weights, which are not there: their shapes are those of the factors."""
    if not spec.init.startswith(_SUBTRACTED):
        return
    for module in bank.model.modules():
        if isinstance(module, Slot):
            module._buffers["start_A"] = module.lora_A.detach().clone()
            module._buffers["start_B"] = module.lora_B.detach().clone()


def _count(model: nn.Module, bank: Bank | None, base: set[int]) -> Counts:
    by_dtype: dict[str, int] = {}
    own: list[Tensor] = []
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) in base:
            name = str(tensor.dtype).removeprefix("torch.")
            by_dtype[name] = by_dtype.get(name, 0) + _bytes(tensor)
            own.append(tensor)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    added = [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in base]
    stacks = Stacks.of(model).stacks
    layers = [
        sum(_bytes(tensor) for tensor in layer.parameters() if id(tensor) in base)
        for stack in stacks
        for layer in stack.layers
    ]
    getter: Any = getattr(model, "get_output_embeddings", None)
    head = None if getter is None else getter()
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head and id(m.weight) in base]
    return Counts(
        base=sum(tensor.numel() for tensor in own if isinstance(tensor, nn.Parameter)),
        trained=sum(parameter.numel() for parameter in trained),
        sites=0 if bank is None else len(bank._members[SLOT].sites),
        layers=max((len(stack.layers) for stack in stacks), default=0),
        weights=sum(by_dtype.values()),
        by_dtype=by_dtype,
        factors=sum(_bytes(tensor) for tensor in added),
        linear=(sum(w.numel() for w in linear), sum(int(w.shape[0]) for w in linear), sum(_bytes(w) for w in linear)),
        largest=max((w.numel() for w in linear), default=0),
        in_layers=sum(layers),
        one_layer=max(layers, default=0),
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
