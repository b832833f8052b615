"""Leading singular vectors: of a matrix, exact or randomised; and of rows that stream by.

Shapes: r rank, o rows, i columns; N rows of a stream, d its width, k kept directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["PrincipalAxes", "leading"]

_OVERSAMPLE = 8
_ROWS_AT_ONCE = 1024


def leading(
    W: Tensor, rank: int, *, steps: int = 0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` largest singular triplets.

    Args:
        W: (..., o, i), float32 or float64.
        rank: how many; at most min(o, i).
        steps: 0: exact. Else a randomised SVD with so many power iterations.
        generator: of the random test matrix.

    Returns:
        U (..., o, r), S (..., r) largest first, Vh (..., r, i).

    Source:
        Halko, Martinsson and Tropp 2011, Finding structure with randomness, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    width = min(rank + _OVERSAMPLE, *W.shape[-2:])
    if steps:
        device = W.device if generator is None else generator.device
        shape = (*W.shape[:-2], W.shape[-1], width)
        test = torch.randn(shape, dtype=W.dtype, device=device, generator=generator).to(W.device)
        Q = torch.linalg.qr(W @ test).Q
        for _ in range(steps):
            Q = torch.linalg.qr(W @ torch.linalg.qr(W.mT @ Q).Q).Q
        U, S, Vh = torch.linalg.svd(Q.mT @ W, full_matrices=False)
        U = Q @ U
    else:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[..., :rank], S[..., :rank], Vh[..., :rank, :]


class PrincipalAxes:
    """Principal component analysis of rows that stream by, in memory that does not grow with them.

    Exact while ``keep`` directions are enough to hold all rows (keep >= d, or few rows); else the tail beyond ``keep``
    is dropped after each addition.

    Args:
        keep: directions that are kept between additions.

    Attributes:
        count: rows seen.
        axes: (k, d), orthonormal, by falling variance; the largest element of each is positive. float32, or float64 for
            float64 rows; the arithmetic is float64 everywhere but on devices without it.
        squares: (k,), squared singular values of the centred rows.
        total: sum of squares of all centred rows, the dropped tail included.

    Source:
        Ross et al. 2008, Incremental learning for robust visual tracking, doi:10.1007/s11263-007-0075-7.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.count = 0
        self.total = 0.0
        self.mean: Tensor | None = None
        self.axes: Tensor | None = None
        self.squares: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """See more rows, (N, d)."""
        precise = torch.float32 if rows.device.type == "mps" else torch.float64
        at_once = max(_ROWS_AT_ONCE, self.keep)
        for start in range(0, rows.shape[0], at_once):
            self._add(
                rows[start : start + at_once].to(precise),
                torch.float64 if rows.dtype == torch.float64 else torch.float32,
            )

    def _add(self, X: Tensor, stored: torch.dtype) -> None:
        n, mean = X.shape[0], X.mean(0)
        X = X - mean
        self.total += float(X.square().sum())
        if self.mean is None or self.axes is None or self.squares is None:
            self.count, self.mean, stacked = n, mean, X
        else:
            both = self.count + n
            gap = (self.mean - mean) * (self.count * n / both) ** 0.5
            stacked = torch.cat([self.squares.sqrt()[:, None] * self.axes.to(X.dtype), X, gap[None]])
            self.total += float(gap.square().sum())
            self.mean = self.mean + (mean - self.mean) * (n / both)
            self.count = both
        axes, self.squares = _right_vectors(stacked, self.keep)
        self.axes = axes.to(stored)

    @property
    def ratios(self) -> Tensor:
        """(k,): the share of the variance that each axis explains."""
        assert self.squares is not None
        return self.squares / max(self.total, torch.finfo(torch.float64).tiny)


def _right_vectors(M: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Right singular vectors (k, d) and squared singular values (k,) of M (N, d), by the smaller Gram matrix."""
    wide = M.shape[0] < M.shape[1]
    values, vectors = torch.linalg.eigh(M @ M.mT if wide else M.mT @ M)
    values, vectors = values.flip(0), vectors.flip(1)
    floor = values[0] * M.shape[1] * torch.finfo(M.dtype).eps
    real = min(keep, int((values > floor).sum()))
    values, vectors = values[:real], vectors[:, :real]
    axes = (vectors.mT @ M) / values.sqrt()[:, None] if wide else vectors.mT
    peaks = axes.gather(1, axes.abs().argmax(1, keepdim=True)) if real else axes
    return axes * torch.where(peaks < 0, -1.0, 1.0).to(axes.dtype), values
