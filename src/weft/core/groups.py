"""Sites that share an input are computed together, and a SwiGLU block is computed whole.

A block's forward calls ``q_proj(x)``, ``k_proj(x)``, ``v_proj(x)`` one after another with one and the same tensor. The first call computes
all of them as one autograd node; the others find their result waiting. If a block turns out to call them with different inputs (cross
attention), its group is dissolved at once and each site goes its own way. Results never depend on it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from weft.core import joint, ops
from weft.core.adapted import adapted_linear, is_ours, operand
from weft.core.gated_mlp import gated_mlp
from weft.core.slots import Placed, State, place

__all__ = ["GatedMLPSite", "Group", "form_groups"]

SIBLINGS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
"""Names of children that usually get the same tensor; a wrong guess costs one product once, see `Group`."""

CROSS = ("cross", "encdec", "enc_dec", "encoder_attn", "enc_attn", "attn2")
"""Parts of the paths of attentions whose query gets another tensor than key and value."""


PATIENCE = 8
"""Rounds in a row that may be left unfinished (an exception, a member called alone) before a group is dissolved."""


@dataclass(slots=True)
class _Waiting:
    """Results of one call that siblings will ask for."""

    x: Tensor
    key: tuple[Any, ...]
    outputs: dict[int, Tensor]


class _Round(threading.local):
    """What waits in this thread; a copy of a model starts without."""

    waiting: _Waiting | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Round:
        return _Round()


class Group:
    """Linear sites below one parent that share their input."""

    def __init__(self, members: list[tuple[nn.Module, Placed]]) -> None:
        self.members = members
        self.round = _Round()
        self.unfinished = 0

    def __call__(self, placed: Placed, x: Tensor) -> Tensor:
        """The output of one member: (..., d_in) -> (..., d_out)."""
        waiting, key = self.round.waiting, self._key(x)
        if waiting is not None:
            same = waiting.x is x and waiting.key == key
            found = waiting.outputs.pop(id(placed), None)
            if found is not None and same and not getattr(found.grad_fn, "spent", False):
                self._finish(waiting)
                return found
            self.forget()
            self.unfinished += 1
            if ((found is not None and waiting.x is not x) or self.unfinished > PATIENCE) and not self._is_replayed():
                self.dissolve()
        chosen = [other.chosen for _, other in self.members]
        routed = any(slot is not None and slot.by_row for slot in chosen)
        if x.is_inference() or placed.group is not self or not all(map(_joins, self.members, chosen)):
            return self._alone(placed, x)
        if routed:
            route = next(slot.route for slot in chosen if slot is not None and slot.by_row)
            results: Any = joint.joint_of(route, self, self.members).run(x)
        else:
            pairs = zip(self.members, chosen, strict=True)
            results = ops.linears(x, [operand(module, other, slot) for (module, other), slot in pairs])
        outputs = {id(other): result for (_, other), result in zip(self.members, results, strict=True)}
        result: Tensor = outputs.pop(id(placed))
        self.round.waiting = _Waiting(x, key, outputs)
        return result

    def forget(self) -> None:
        """Nothing waits any more in this thread."""
        self.round.waiting = None

    def dissolve(self) -> None:
        """Each member on its own from now on."""
        self.forget()
        for _, placed in self.members:
            placed.group = None

    def _finish(self, waiting: _Waiting) -> None:
        if not waiting.outputs:
            self.forget()
            self.unfinished = 0

    def _is_replayed(self) -> bool:
        """Whether this call may be run again by gradient checkpointing, or is: what is computed how must not change in between."""
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        blind = not torch.is_grad_enabled() and any(module.training for module, _ in self.members)
        return hooked or blind or torch._C._current_graph_task_id() != -1

    def _alone(self, placed: Placed, x: Tensor) -> Tensor:
        module = next(module for module, other in self.members if other is placed)
        slot = placed.chosen
        return joint.run(module, placed, slot, x) if slot.by_row else adapted_linear(module, placed, slot, x)

    def _key(self, x: Tensor) -> tuple[Any, ...]:
        """What must be the same for a waiting result to be the result."""
        version = 0 if x.is_inference() else x._version
        slots: list[Any] = [torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type), version]
        for module, placed in self.members:
            slot = placed.chosen
            slots += [id(slot), module.training]
            if slot is not None and not slot.by_row and not slot.lora_A.is_inference():
                slots += [slot.lora_A._version, slot.lora_B._version]
        return tuple(slots)


def _joins(member: tuple[nn.Module, Placed], slot: Any) -> bool:
    return slot is not None and (slot.by_row or slot.plain) and not is_watched(member[0])


if TYPE_CHECKING:
    from torch.nn import Module as _Base
else:
    _Base = object


class GatedMLPSite(_Base):
    """A block ``down_proj(act(gate_proj(x)) * up_proj(x))`` with SiLU, computed whole."""

    _weft: State
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        children: tuple[nn.Module, ...] = (self.gate_proj, self.up_proj, self.down_proj)
        if not torch.is_grad_enabled():
            return super().forward(x)  # type: ignore[no-any-return]
        act = self.act_fn
        known = act is self._weft.extra.get("act_fn") and not (isinstance(act, nn.Module) and is_watched(act))
        if torch.compiler.is_compiling() or _has_any_global_hook() or not known:  # type: ignore[no-untyped-call]
            return super().forward(x)  # type: ignore[no-any-return]
        if not all(map(_fits, children)):
            routed = _routed_down(children)
            if routed is None:
                return super().forward(x)  # type: ignore[no-any-return]
            return routed.gated(self.gate_proj(x), self.up_proj(x))
        states: list[State | None] = [child.__dict__.get("_weft") for child in children]
        placed = [None if state is None else state.sites["weight"] for state in states]
        slots = [None if item is None else item.chosen for item in placed]
        if all(slot is None for slot in slots):
            return super().forward(x)  # type: ignore[no-any-return]
        gate, up, down = (
            _operand(child, item, slot) for child, item, slot in zip(children, placed, slots, strict=True)
        )
        return gated_mlp(x, gate, up, down)


def _routed_down(children: tuple[nn.Module, ...]) -> joint.Joint | None:
    """The down projection under a route by rows, where it and its gate can be computed together."""
    if any(is_watched(child) for child in children):
        return None
    state: State | None = children[2].__dict__.get("_weft")
    placed = None if state is None or state.whole else state.sites.get("weight")
    rows = None if placed is None else placed.chosen
    if placed is None or rows is None or not rows.by_row:
        return None
    found = joint.joint_of(rows.route, placed, [(children[2], placed)])
    return found if found.can_gate else None


def _operand(child: nn.Module, placed: Placed | None, slot: Any) -> ops.Operand:
    if placed is None:
        return ops.Operand(child.weight, child.bias, None, None)  # type: ignore[arg-type]
    return operand(child, placed, slot)


def _fits(child: nn.Module) -> bool:
    """A plain product whose hooks nobody would miss."""
    if is_watched(child):
        return False
    state: State | None = child.__dict__.get("_weft")
    if state is None:
        return type(child) is nn.Linear
    placed = state.sites.get("weight") if state.active_whole is None and not state.whole else None
    if placed is None or not is_ours(child, placed):
        return False
    slot = placed.chosen
    return slot is None or bool(slot.plain)


def is_watched(module: nn.Module) -> bool:
    """Hooks on the module, or a forward on the object: both need the real call."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks or "forward" in module.__dict__)  # fmt: skip


def _assigned(self, x):  # type: ignore[no-untyped-def]  # the two usual ways to write this block, to be recognised by
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


def _returned(self, x):  # type: ignore[no-untyped-def]
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


_SIGNATURES = {(form.__code__.co_code, form.__code__.co_names) for form in (_assigned, _returned)}


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether the block's forward is, instruction for instruction, the SwiGLU that `gated_mlp` computes."""
    if "forward" in module.__dict__:
        return False
    state: State | None = module.__dict__.get("_weft")
    cls: Any = type(module) if state is None else state.original
    code = getattr(cls.forward, "__code__", None)
    if code is None or (code.co_code, code.co_names) not in _SIGNATURES:
        return False
    act = getattr(module, "act_fn", None)
    if not callable(act):
        return False
    probe = torch.linspace(-4, 4, 9)
    return torch.equal(act(probe), torch.nn.functional.silu(probe))


def form_groups(model: nn.Module, parents: dict[str, dict[str, tuple[nn.Module, Placed]]]) -> list[nn.Module]:
    """Group sites below the same parent, and take over whole SwiGLU blocks.

    Args:
        model: the base.
        parents: linear sites by path of the parent and name of the child.

    Returns:
        the blocks that were placed, to be restored on detach.
    """
    blocks = []
    for path, children in parents.items():
        for names in SIBLINGS:
            crossed = len(names) == 3 and any(part in path.lower() for part in CROSS)
            members = [children[name] for name in names[crossed:] if name in children]
            fits = [(module, placed) for module, placed in members if is_ours(module, placed)]
            if len(fits) > 1 and len({placed.site.d_in for _, placed in fits}) == 1:
                group = Group(fits)
                for _, placed in fits:
                    placed.group = group
        if "gate_proj" in children or "up_proj" in children or "down_proj" in children:
            block = model.get_submodule(path)
            if is_gated_mlp(block):
                place(block, GatedMLPSite).extra["act_fn"] = block.act_fn
                blocks.append(block)
    return blocks
