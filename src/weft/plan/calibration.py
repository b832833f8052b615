"""How fast this machine is: a short measurement of products of the size that layers have."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

__all__ = ["Speed", "calibrate"]


@dataclass(frozen=True)
class Speed:
    """What was measured.

    Attributes:
        flops: floating point operations a second, in products. dtype: of them. threads: of the CPU.
    """

    flops: float
    dtype: str
    threads: int


def calibrate(device: str, precision: str, dtype: str, seconds: float = 1.0) -> Speed:
    """Measure products of (512, 2048) and (2048, 2048) matrices for about a second; the median of the runs counts.

    Args:
        device: ``"cpu"`` or ``"cuda"``. precision: of autocast, ``"no"``, ``"bf16"``, ``"fp16"``. dtype: of the weights, ``"auto"``: float32.
    """
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "bfloat16": torch.bfloat16, "float16": torch.float16}
    kind = names.get(precision) or names.get(dtype) or torch.float32
    where = device if device == "cpu" or torch.cuda.is_available() else "cpu"
    left, right = (torch.randn(shape, dtype=kind, device=where) for shape in ((512, 2048), (2048, 2048)))
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        left @ right
        if where == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    median = sorted(times[1:])[len(times[1:]) // 2]
    return Speed(2.0 * 512 * 2048 * 2048 / median, str(kind).removeprefix("torch."), torch.get_num_threads())
