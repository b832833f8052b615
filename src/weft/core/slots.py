"""What stands at a site: a module keeps its identity and its weights, only its class is swapped for a subclass.

The subclass adds one attribute for weft's state (``_weft``) and one child (``weft``) with the slots' parameters, so a slot's
factors are at ``<path>.weft.<slot>.lora_A``. Taking both away and putting the class back gives the module that was there.
This module does not know what any forward computes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weft.core.ring import Ring
from weft.core.site import Site
from weft.errors import BankError

__all__ = ["Placed", "Slot", "State", "hold", "let_go", "place", "restore", "slot_key"]


class Slot(nn.Module):
    """The tensors of one adapter at one site (or at a module of which only a bias is trained).

    Attributes:
        lora_A: (r, d_in), (E, r, d_in), or (r, in_channels, *kernel) for a convolution; lora_B to match.
        magnitude: (d_out,), DoRA's, or None. bias: (d_out,), B's own, or None.
        start_A, start_B: a starting product that is subtracted (PiSSA, OLoRA, LoRA-GA), so that the base stays as it is.
        scale, dropout: numbers.
    """

    scale: float
    dropout: float
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor | None
    bias: Tensor | None
    start_A: Tensor | None
    start_B: Tensor | None
    solo: Any

    def __init__(
        self,
        A: Tensor,
        B: Tensor,
        scale: float,
        *,
        magnitude: Tensor | None = None,
        bias: Tensor | None = None,
        dropout: float = 0.0,
        start: tuple[Tensor, Tensor] | None = None,
        trainable: bool = True,
    ) -> None:
        super().__init__()
        names = {"lora_A": A, "lora_B": B, "magnitude": magnitude, "bias": bias}
        for name, tensor in names.items():  # register_parameter's checks would be half of the time of an attach
            self._parameters[name] = None if tensor is None else nn.Parameter(tensor, requires_grad=trainable)
        self._buffers["start_A"], self._buffers["start_B"] = start or (None, None)
        self.__dict__.update(scale=scale, dropout=dropout, solo=None)

    def pair(self) -> tuple[Tensor, Tensor]:
        """A and B as the forward uses them: with a starting product, its negative is appended (rank 2r)."""
        A, B = self.lora_A, self.lora_B
        assert isinstance(A, Tensor) and isinstance(B, Tensor)
        if self.start_A is None or self.start_B is None:
            return A, B
        assert isinstance(self.start_A, Tensor) and isinstance(self.start_B, Tensor)
        return torch.cat([A, self.start_A.to(A.dtype)], dim=-2), torch.cat([B, -self.start_B.to(B.dtype)], dim=-1)

    by_row = False

    @property
    def plain(self) -> bool:
        """No magnitude and no bias: ``scale · B @ A`` is all."""
        return self.magnitude is None and self.bias is None


@dataclass(eq=False)
class Placed:
    """One site of the running model, and the slot that is in use.

    Attributes:
        site: what `find_sites` said of it.
        ring: says which route is on.
        active: the slot that a forward without a route uses; None: the base.
        group: sites that share this one's input, see `weft.core.groups`.
    """

    site: Site
    ring: Ring
    active: Any = None
    group: Any = None

    @property
    def chosen(self) -> Any:
        """What the next forward of this thread uses: a `Slot`, None (the base), or what a route says by rows."""
        if self.ring.routed:
            route = self.ring.current()
            if route is not None:
                return route.at(self)
        return self.active


@dataclass(eq=False)
class State:
    """weft's state of one module, found at ``module._weft``.

    Attributes:
        original: the module's own class.
        path: of the module. ring: says which route is on; None where no adapter has anything of its own.
        sites: sites by the name of the weight (``"weight"``, ``"gate_up_proj"``).
        values: what a property of that name gives instead of the base's parameter; None: the base's.
        whole: copies of the module that are trained whole, by adapter; ``active_whole`` is the one in use.
        extra: room for a flavour's own things.
    """

    original: type
    path: str = ""
    ring: Ring | None = None
    mixins: tuple[type, ...] = ()
    sites: dict[str, Placed] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    whole: dict[str, nn.Module] = field(default_factory=dict)
    active_whole: nn.Module | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def slot_key(name: str) -> str:
    """An adapter's name as the module tree allows it."""
    return name.replace("%", "%25").replace(".", "%2E").replace(":", "%3A")


def place(
    module: nn.Module, mixin: type | None = None, properties: tuple[str, ...] = (), path: str = "", ring: Ring | None = None
) -> State:  # fmt: skip
    """Give a module weft's state; idempotent, and additive in mixins and properties.

    Args:
        module: any module.
        mixin: adds a forward, or None.
        properties: names of parameters that the state may override.
        path: of the module.
        ring: of the bank, where adapters have something of their own here.

    Raises:
        BankError: the module's forward was replaced on the object itself by something that would hide ours.
    """
    state = module.__dict__.get("_weft")
    if state is None or mixin not in state.mixins:
        _check_forward(module, mixin, path)
    if state is None:
        state = module.__dict__["_weft"] = State(type(module), path)
    state.ring = ring or state.ring
    if mixin is not None and mixin not in state.mixins:
        state.mixins = (mixin, *state.mixins)
    for name in properties:
        state.values.setdefault(name, None)
    module.__class__ = _subclass(state.original, state.mixins, tuple(state.values))
    return state


def hold(module: nn.Module, key: str, child: nn.Module) -> None:
    """Put a slot (or a copy that is trained whole) into the module tree, at ``<module>.weft.<key>``."""
    holder = module._modules.get("weft")
    if holder is None:
        holder = module._modules["weft"] = nn.Module()
    holder._modules[key] = child  # add_module would refuse names like "train", which are methods


def let_go(module: nn.Module, key: str) -> None:
    """Take it out again; the last one takes the holder with it."""
    holder = module._modules.get("weft")
    if holder is not None:
        holder._modules.pop(key, None)
        if not holder._modules:
            del module._modules["weft"]


def restore(module: nn.Module) -> None:
    """Give a module back its class, and take weft's state and slots from it."""
    state = module.__dict__.pop("_weft", None)
    if state is None:
        return
    module.__class__ = state.original
    module._modules.pop("weft", None)


@functools.cache
def _subclass(original: type, mixins: tuple[type, ...], properties: tuple[str, ...]) -> type:
    body: dict[str, Any] = {name: _override(name) for name in properties}
    body |= {
        "_apply": _moving(original),
        "_weft_site": True,
        "_weft_original": original,
        "__module__": original.__module__,
        "__doc__": original.__doc__,
    }
    return type(original.__name__, (*mixins, original), body)


def _override(name: str) -> property:
    """Reading the parameter gives what the state says: None the base's, a tensor itself, a function its result."""

    def get(self: nn.Module) -> Any:
        state: State = self.__dict__["_weft"]
        value = state.values[name]
        if state.ring is not None and state.ring.routed:
            route = state.ring.current()
            if route is not None:
                value = route.value_at(self, name)
        base = self._parameters[name]
        if value is None or base is None:
            return base
        return value.to(base.dtype) if isinstance(value, Tensor) else value(base)

    return property(get)


def _moving(original: type) -> Any:
    """``_apply``, which is what ``model.to(…)`` is made of, and word to the bank when it led to another device."""

    def apply(self: nn.Module, fn: Any, *args: Any, **kwargs: Any) -> Any:
        before = _device(self)
        result = original._apply(self, fn, *args, **kwargs)  # type: ignore[attr-defined]
        ring = self.__dict__["_weft"].ring
        if ring is not None and _device(self) != before:
            ring.moves += 1
            if ring.moved is not None:
                ring.moved()
        return result

    return apply


def _device(module: nn.Module) -> torch.device | None:
    return next((tensor.device for tensor in module._parameters.values() if tensor is not None), None)


def _check_forward(module: nn.Module, mixin: type | None, path: str) -> None:
    """A ``forward`` on the object hides a class's, and an adapter there would silently do nothing."""
    if mixin is not None and "forward" in module.__dict__:
        raise BankError(
            f"{path!r}: the forward of this {type(module).__name__} was replaced on the object itself (by a monkey patch, or by accelerate's offloading "
            "hooks), so an adapter at this site would do nothing; attach first and dispatch after, or leave the site out "
            "with exclude=[…]"
        )
