"""An optimizer takes parameters of another shape in the place of the old ones, and its state goes along.

Means of gradients and of their squares are carried by `weft.core.resizing`; step counts stay. State of another kind (factored,
quantised, of a name that isn't known here) can't be carried: there it begins anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from weft.core.resizing import Swap

__all__ = ["carry", "rewrap"]


def carry(optimizer: Any, swaps: Sequence[Swap]) -> int:
    """Put new parameters into the groups of an optimizer, at the places of the old ones, with their state.

    Args:
        optimizer: of torch's kind, or a wrapper around one (accelerate's).
        swaps: from `Bank.resize`.

    Returns:
        parameters whose state could not be carried and begins anew.
    """
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    by_old = {id(swap.old): swap for swap in swaps}
    for group in optimizer.param_groups:
        group["params"] = [by_old[id(old)].new if id(old) in by_old else old for old in group["params"]]
    lost = 0
    for swap in swaps:
        state = optimizer.state.pop(swap.old, None)
        if state:
            moved = {name: _moved(name, value, swap) for name, value in state.items()}
            if any(value is None for value in moved.values()):
                lost += 1
            else:
                optimizer.state[swap.new] = moved
    return lost


_MEANS = ("exp_avg", "momentum_buffer", "grad_avg")
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")


def _moved(name: str, value: Any, swap: Swap) -> Any:
    """One entry of a state for the new parameter; None: it can't be had."""
    if not isinstance(value, Tensor) or value.numel() == 1:
        return value  # a step count, a number
    if value.shape != swap.old.shape or not value.is_floating_point() or name not in (*_MEANS, *_SQUARES):
        return None
    return swap.moment(value, name in _SQUARES)


def rewrap(model: Any) -> None:
    """Let torch's DDP know the parameters that its module has now; the same object goes on."""
    if not isinstance(model, DistributedDataParallel):
        return
    model.__init__(  # type: ignore[misc] # its buckets and hooks are made for the parameters of that moment
        model.module,
        device_ids=model.device_ids,
        output_device=model.output_device,
        dim=model.dim,
        broadcast_buffers=model.broadcast_buffers,
        bucket_cap_mb=None if model.bucket_bytes_cap_default else model.bucket_bytes_cap // (1024 * 1024),
        find_unused_parameters=model.find_unused_parameters,
        gradient_as_bucket_view=model.gradient_as_bucket_view,
        static_graph=model.static_graph,
    )
