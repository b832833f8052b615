"""How close is close: the one table of tolerances, a reason for each.

An error is measured against the largest element of what was expected: ``max|actual - expected| <= atol + rtol * max|expected|``.
Element by element would fail on sums that cancel to nearly zero, where no two orders of summation agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TOLERANCES", "Tolerance", "assert_close"]


@dataclass(frozen=True)
class Tolerance:
    """Allowed error: ``atol + rtol * max|expected|``, and why it is not smaller."""

    rtol: float
    atol: float
    reason: str


TOLERANCES: dict[torch.dtype | str, Tolerance] = {
    torch.float64: Tolerance(1e-10, 1e-12, "the reference itself: only the order of summation differs"),
    torch.float32: Tolerance(
        1e-5, 1e-6, "24-bit mantissa, sums of some hundred terms in another order: about 100 units in the last place"
    ),
    torch.bfloat16: Tolerance(
        2e-2, 1e-3, "8-bit mantissa: 0.4 % for one rounding, several roundings in a row between input and output"
    ),
    torch.float16: Tolerance(4e-3, 1e-4, "11-bit mantissa: 0.05 % for one rounding, several in a row"),
    "steps": Tolerance(
        1e-4,
        1e-5,
        "50 optimizer steps in float32: Adam divides by the root of tiny second moments, and so enlarges last bits",
    ),
    "losses": Tolerance(1e-5, 1e-6, "a mean over tokens: errors of single logits average out, also over 50 steps"),
    "svd": Tolerance(
        1e-4, 1e-6, "float32 SVD or QR of an ill-conditioned matrix: errors grow by the gap of singular values"
    ),
    "randomised": Tolerance(5e-2, 1e-4, "randomised SVD with few iterations: an approximation by design"),
}


def assert_close(
    actual: Tensor, expected: Tensor, tolerance: torch.dtype | str | Tolerance | None = None, what: str = ""
) -> None:
    """Compare by the table.

    Args:
        actual: what weft computed.
        expected: the reference; same shape. Any dtype and device: compared in float64 on the CPU.
        tolerance: a key of `TOLERANCES`, or an own one; default: the coarser of both dtypes.
        what: name for the message.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if tolerance is None:
        tolerance = max(actual.dtype, expected.dtype, key=lambda dtype: TOLERANCES[dtype].rtol)
    allowed = tolerance if isinstance(tolerance, Tolerance) else TOLERANCES[tolerance]
    if not actual.numel():
        return
    left, right = actual.detach().cpu().double(), expected.detach().cpu().double()
    assert bool(torch.isfinite(left).all()), f"{what}: NaN or infinity"
    error, size = float((left - right).abs().max()), float(right.abs().max())
    limit = allowed.atol + allowed.rtol * size
    assert error <= limit, f"{what}: off by {error:.3g} of {size:.3g}; allowed {limit:.3g} ({allowed.reason})"
