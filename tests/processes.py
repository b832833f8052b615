"""Two processes over gloo, for tests: they meet in a folder, and leave together."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import distributed
from torch.multiprocessing import spawn

__all__ = ["in_two_processes", "leave", "meet"]

PATIENCE = timedelta(seconds=120)


def in_two_processes(work: Callable[..., None], folder: str, *given: object) -> None:
    """Run ``work(rank, folder, *given)`` twice at once; an exception in one of them is raised here."""
    spawn(work, (folder, *given), nprocs=2)


def meet(rank: int, folder: str) -> None:
    """Begin: one thread, the loopback device (a host name may resolve to nowhere), an error instead of waiting for ever."""
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=PATIENCE
    )


def leave() -> None:
    """End: gloo's threads abort a process now and then when it is torn down, so nothing is."""
    distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
