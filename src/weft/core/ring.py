"""Which route is on, where a site asks for it: this thread's own, or, while a checkpoint replays a forward, the one of that forward.

A `Ring` belongs to one bank and all of its sites. `Ring.routed` is a plain flag: False as long as nothing was ever routed, so
that sites look no further, and a compiler has something that it can guard on (it would take a thread's own value for a
constant). This module does not know what a route is.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint

__all__ = ["Call", "Ring"]


@dataclass(frozen=True, slots=True)
class Call:
    """A call of the whole model that is going on.

    Attributes:
        rows: of its batch. tokens: rows times length, where the input has a length; else None.
        grad: whether gradients were on when it began.
    """

    rows: int
    tokens: int | None
    grad: bool


class _Here(threading.local):
    """What is on in this thread."""

    route: Any = None
    call: Call | None = None


class Ring:
    """The routes of one bank, by thread.

    Attributes:
        routed: whether a route may be on somewhere, or may have to be found again by a backward.
        moves: how often a site's weights went to another device.
        moved: called when they did.
    """

    def __init__(self) -> None:
        self.routed = False
        self.moves = 0
        self.moved: Callable[[], None] | None = None
        self._here = _Here()
        self._lock = threading.Lock()
        self._open = 0
        self._marked = False
        self._calls: dict[tuple[Any, ...], Call] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Ring:
        """A copied model starts without routes."""
        memo[id(self)] = new = Ring()
        return new

    @contextlib.contextmanager
    def entered(self, route: Any) -> Iterator[None]:
        """Make a route this thread's; the one before comes back at the end, whatever happens."""
        here = self._here
        before = here.route
        with self._lock:
            self._open += 1
            self.routed = True
        here.route = route
        try:
            yield
        finally:
            here.route = before
            with self._lock:
                self._open -= 1
                self.routed = self._marked or self._open > 0

    @property
    def call(self) -> Call | None:
        """The call of the whole model in this thread, where one is going on."""
        return self._here.call

    def begin(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A call of the whole model begins with these inputs.

        Raises:
            BankError: a batch that the route has not as many entries for.
        """
        if torch.compiler.is_compiling() or not self.routed:
            return
        here = self._here
        here.call = None
        route = self.current()
        if route is None:
            return
        for name in _COUNTED:
            value = kwargs.get(name)
            if isinstance(value, Tensor) and value.dim() >= 2:
                here.call = self._call(value.shape[0], value.shape[0] * value.shape[1])
                break
        else:
            found = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()), None)
            if found is None:
                return
            ids = found.dim() == 2 and not found.is_floating_point()
            tokens = found.shape[0] * found.shape[1] if ids else None
            here.call = self._call(found.shape[0], tokens)
        route.check_call(here.call.rows, here.call.tokens)

    def _call(self, rows: int, tokens: int | None) -> Call:
        """The same object for the same call, which is quick to compare."""
        key = (rows, tokens, torch.is_grad_enabled())
        if len(self._calls) > 256:
            self._calls = {}
        return self._calls.setdefault(key, Call(*key))

    def end(self) -> None:
        """The call is over, well or not."""
        if not torch.compiler.is_compiling():
            self._here.call = None

    def current(self) -> Any:
        """The route that counts for the next operation of this thread; None: there is none."""
        route = self._here.route
        if route is None and not self._marked:
            return None
        if self._marked and torch._C._current_graph_task_id() != -1:
            found, replayed = _replayed(self)
            if found:
                self._mark(replayed)
                return replayed
        if route is not None:
            self._mark(route)
        return route

    def _mark(self, route: Any) -> None:
        """Tell a checkpoint that is being made which route its forward had."""
        if route is None:
            return
        if torch.is_grad_enabled():
            keeper = _hooked()
        else:
            call = self._here.call
            grad = route.grad if call is None else call.grad
            keeper = _reentrant() if grad else None
        if keeper is not None:
            vars(keeper).setdefault("_weft_routes", {})[id(self)] = route
            self._marked = self.routed = True


_COUNTED = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
"""Inputs that have a row and a length."""

_REENTRANT_FORWARD: CodeType = checkpoint.CheckpointFunction.forward.__code__
_REENTRANT_BACKWARD: CodeType = checkpoint.CheckpointFunction.backward.__code__


def _hooked() -> Any:
    """The record of the checkpoint (without reentry) that is saving tensors now, or None."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is None:
        return None
    code = getattr(hooks[0], "__code__", None)
    if code is None or code.co_filename != checkpoint.__file__ or "frame" not in code.co_freevars:
        return None
    return hooks[0].__closure__[code.co_freevars.index("frame")].cell_contents


def _reentrant() -> Any:
    """The node of the reentrant checkpoint whose forward is running, or None."""
    for frame in _stack():
        if frame.f_code is _REENTRANT_FORWARD:
            return frame.f_locals["ctx"]
        if _keeper(frame) is not None:
            return None
    return None


def _replayed(ring: Ring) -> tuple[bool, Any]:
    """Whether a checkpoint is being replayed, and the route of its forward."""
    for frame in _stack():
        keeper = _keeper(frame)
        if keeper is not None:
            return True, vars(keeper).get("_weft_routes", {}).get(id(ring))
    return False, None


def _keeper(frame: FrameType) -> Any:
    """The record or node of the checkpoint that this frame replays; None for all other frames."""
    code = frame.f_code
    if code is _REENTRANT_BACKWARD:
        return frame.f_locals["ctx"]
    if code.co_filename == checkpoint.__file__ and code.co_name == "unpack_hook" and "frame" in code.co_freevars:
        return frame.f_locals["frame"]
    return None


def _stack() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back
