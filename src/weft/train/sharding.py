"""Parameters that FSDP or DeepSpeed's ZeRO-3 have cut up, whole for a moment.

With one process, with DDP and with ZeRO-1 and -2 every process has whole parameters, and nothing happens here.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from weft.adapter import Adapter
from weft.errors import RunError

__all__ = ["check_whole", "whole_parameters"]


@contextlib.contextmanager
def whole_parameters(model: nn.Module, trained: Mapping[str, Tensor]) -> Iterator[None]:
    """Gather what is sharded; to be read only, and by all processes together.

    Args:
        model: as the trainer wrapped it.
        trained: the parameters that are wanted.
    """
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            yield
        return
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if parts:
        for part in parts:
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.reshard()
        return
    if any(hasattr(tensor, "ds_id") for tensor in trained.values()):
        zero: Any = importlib.import_module("deepspeed").zero
        with zero.GatheredParameters(list(trained.values())):
            yield
        return
    yield


def check_whole(adapter: Adapter, begin: Adapter) -> None:
    """See that a snapshot after a training has the shapes of the one before.

    Raises:
        RunError: it holds pieces.
    """
    before = {name: tuple(tensor.shape) for name, tensor in begin.tensors().items()}
    after = {name: tuple(tensor.shape) for name, tensor in adapter.tensors().items()}
    pieces = [name for name, tensor in adapter.tensors().items() if hasattr(tensor, "device_mesh")]
    if before != after or pieces:
        odd = next(iter([*pieces, *dict(before.items() ^ after.items())]))
        raise RunError(
            f"after the training {odd} is {after.get(odd)}{' in pieces' if pieces else ''}, before it was {before.get(odd)}: the parameters are sharded and were not "
            "gathered. The checkpoints are whole; train with DDP or ZeRO-2 to get the adapter in one piece"
        )
