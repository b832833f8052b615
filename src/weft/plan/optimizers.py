"""What an optimizer holds: the real one, taking a step on fake parameters of the real shapes.

This module does not know models.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import MissingDependencyError
from weft.plan.tape import Tape

__all__ = ["optimizer_bytes"]

Shape = tuple[tuple[int, ...], torch.dtype]


def optimizer_bytes(parameters: Iterable[Tensor], name: str, device: str) -> tuple[int, int]:
    """Bytes of an optimizer's state, and of its buffers in a step.

    Args:
        parameters: all that are trained; only shapes and dtypes are looked at.
        name: as in `Recipe.optimizer`.
        device: where they are; on a GPU torch's optimizers take all parameters at once, on a CPU one after the other.

    Raises:
        MissingDependencyError: the optimizer is of a library that is not here.
    """
    counts: dict[Shape, int] = {}
    for parameter in parameters:
        key = (tuple(parameter.shape), parameter.dtype)
        counts[key] = counts.get(key, 0) + 1
    state = buffers = 0
    for (shape, dtype), count in counts.items():
        own, peak = _one(shape, dtype, name)
        state += own * count
        buffers = buffers + peak * count if device == "cuda" and "fused" not in name else max(buffers, peak)
    return state, buffers


@functools.lru_cache(maxsize=4096)
def _one(shape: tuple[int, ...], dtype: torch.dtype, name: str) -> tuple[int, int]:
    """(state, buffers) of one parameter."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    kind, settings = _kind(name)
    with FakeTensorMode(allow_non_fake_inputs=True):
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype))
        optimizer = kind([parameter], **settings)
        parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        tensors = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
        state = sum(int(tensor.untyped_storage().nbytes()) for tensor in {id(t): t for t in tensors}.values())
        tape = Tape()
        tape.ignore([parameter, parameter.grad, *tensors])
        with tape:
            optimizer.step()
    live = best = 0
    for change in tape.changes:
        live += change
        best = max(best, live)
    return state, best


@functools.lru_cache(maxsize=16)
def _kind(name: str) -> tuple[Any, dict[str, Any]]:
    """The optimizer's class and its settings, as transformers' Trainer takes them."""
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(output_dir=folder, optim=name, report_to="none", use_cpu=True)
        try:
            found: tuple[Any, dict[str, Any]] = Trainer.get_optimizer_cls_and_kwargs(arguments, nn.Linear(1, 1))  # type: ignore[arg-type]
        except (ImportError, ValueError) as problem:
            raise MissingDependencyError(
                f"optimizer={name!r} needs a library that is not here, so its state can't be counted: {problem}"
            ) from problem
    return found
