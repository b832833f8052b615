"""Factors: the low-rank update of one site, as a value.

Shapes: r rank, o = d_out, i = d_in, E experts. A convolution's kernel is part of d_in: i = in_channels * prod(kernel).
This module does not know which layer the update is for, only the kind of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from weft.errors import NotFiniteError, ShapeError

__all__ = [
    "Factors",
    "Kind",
    "blocks",
    "compact_groups",
    "concat",
    "cut",
    "effective_rank",
    "from_blocks",
    "inner",
    "kept",
    "spread_groups",
    "truncate",
]

_NOTHING = 1e-6
"""‖ΔW‖ below this share of |scale|·‖B‖·‖A‖ is rounding, not training."""

Kind = Literal["linear", "conv", "embedding", "attention", "parameter"]


@dataclass(frozen=True, eq=False)
class Factors:
    """``ΔW = scale · B @ A`` of one site.

    Args:
        A: (r, d_in), or (E, r, d_in) for stacked experts.
        B: (d_out, r), or (E, d_out, r).
        scale: the one number between B @ A and ΔW; alpha, rank and rsLoRA are folded in here, once.
        kind: ``linear`` (also GPT-2's Conv1D), ``conv``, ``embedding`` (d_in = vocabulary, d_out = width),
            ``attention`` (in_proj, d_out = 3 · d_in, or out_proj of nn.MultiheadAttention) or ``parameter`` (a bare
            2-D or 3-D parameter).
        kernel: spatial kernel of a convolution; empty for all else.
        magnitude: (d_out,), DoRA's; None for a plain update.
        bias: (d_out,), B's own bias; None without.
        groups: groups of a convolution; B is then block-diagonal, see `spread_groups`.

    Raises:
        ShapeError: A and B disagree on the rank or the experts; names both shapes.
    """

    A: Tensor
    B: Tensor
    scale: float
    kind: Kind = "linear"
    kernel: tuple[int, ...] = ()
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    groups: int = 1

    def __post_init__(self) -> None:
        a, b = tuple(self.A.shape), tuple(self.B.shape)
        if len(a) not in (2, 3) or len(a) != len(b) or a[-2] != b[-1] or a[:-2] != b[:-2]:
            raise ShapeError(f"factors disagree: A is {a}, B is {b}; expected A (r, d_in) and B (d_out, r)")
        if self.d_in % math.prod(self.kernel):
            raise ShapeError(f"A is {a}: d_in is no multiple of the kernel {self.kernel}")
        if self.groups < 1 or (self.groups > 1 and (self.kind != "conv" or a[-2] % self.groups or b[-2] % self.groups)):
            raise ShapeError(
                f"groups={self.groups} with A {a} and B {b} of kind {self.kind!r}: only a convolution has groups, and they divide rank and d_out"
            )
        for name, vector in (("magnitude", self.magnitude), ("bias", self.bias)):
            if vector is not None and tuple(vector.shape) != (self.d_out,):
                raise ShapeError(f"{name} is {tuple(vector.shape)}; B is {b}: expected ({self.d_out},)")

    @property
    def rank(self) -> int:
        """Rank r (by expert)."""
        return int(self.A.shape[-2])

    @property
    def d_in(self) -> int:
        """Columns of ΔW."""
        return int(self.A.shape[-1])

    @property
    def d_out(self) -> int:
        """Rows of ΔW."""
        return int(self.B.shape[-2])

    @property
    def num_parameters(self) -> int:
        """Numbers in A, B, magnitude and bias."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that there are, by the names that files use."""
        named = {"lora_A": self.A, "lora_B": self.B, "magnitude": self.magnitude, "bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> Factors:
        """A copy with ``change(tensor)`` in the place of every tensor."""
        new = {name: change(tensor) for name, tensor in self.tensors().items()}
        return replace(self, A=new["lora_A"], B=new["lora_B"], magnitude=new.get("magnitude"), bias=new.get("bias"))

    def delta(self) -> Tensor:
        """Dense low-rank update, for analysis and export; the forward never builds it. DoRA's magnitude is not in it.

        Returns:
            (d_out, d_in) or (E, d_out, d_in), dtype and device of A; costs d_out * d_in * itemsize bytes.

        Source:
            Hu et al. 2021, LoRA, arXiv:2106.09685, section 4.1.
        """
        return self.scale * (self.B @ self.A)

    def norm(self) -> float:
        """Frobenius norm of ΔW in float64, from two r × r Gram matrices: O((d_in + d_out) r²)."""
        A, B = self.A.double(), self.B.double()
        squared = ((B.mT @ B) * (A @ A.mT).mT).sum().clamp_min(0.0)
        return abs(self.scale) * math.sqrt(float(squared))

    def spectrum(self) -> Tensor:
        """Singular values of ΔW, largest first, by QR of the factors: never the dense matrix.

        Returns:
            (r,) or (E, r), float64; zeros where the rank is above min(d_in, d_out).
        """
        _, R_B = torch.linalg.qr(self.B.double())
        _, R_A = torch.linalg.qr(self.A.double().mT)
        values = torch.linalg.svdvals(R_B @ R_A.mT) * abs(self.scale)
        missing = self.rank - values.shape[-1]
        return torch.nn.functional.pad(values, (0, missing)) if missing else values

    @property
    def moved(self) -> bool:
        """Whether ΔW is more than rounding; what DoRA's magnitude did can't be told without the base."""
        return self.norm() > _NOTHING * abs(self.scale) * float(self.A.double().norm() * self.B.double().norm())

    def check_finite(self, where: str = "") -> None:
        """Refuse NaN and infinity.

        Raises:
            NotFiniteError: names the site and the tensor.
        """
        if not math.isfinite(self.scale):
            raise NotFiniteError(f"{where}: scale is {self.scale}; expected a finite number")
        for name, tensor in self.tensors().items():
            if not math.isfinite(float(tensor.sum())) and not bool(torch.isfinite(tensor).all()):  # a sum is quick
                bad = int((~torch.isfinite(tensor)).sum())
                raise NotFiniteError(
                    f"{where}: {name} has {bad} of {tensor.numel()} values that are NaN or infinite; the training that "
                    "made it diverged: take an earlier checkpoint, or train again with a lower learning rate"
                )


def concat(parts: list[tuple[Factors, float]]) -> Factors:
    """Exact weighted sum ``Σ wᵢ · scaleᵢ · Bᵢ @ Aᵢ`` as one update: the ranks add up, biases of B are summed.

    Returns:
        Factors of scale 1. Their dtype is the widest of the parts, and at least float32 wherever multiplying a narrower B by
        its weight and scale would round it.

    Raises:
        ShapeError: parts of different kind or shape, or with a DoRA magnitude, whose update is not linear in its factors.
    """
    first = parts[0][0]
    for part, _ in parts:
        same = (part.kind, part.kernel, part.groups, part.d_in, part.d_out, part.A.shape[:-2])
        if same != (first.kind, first.kernel, first.groups, first.d_in, first.d_out, first.A.shape[:-2]):
            raise ShapeError(
                f"updates of different shape can't be summed: {same} and a first part {first.kind} {first.d_out}x{first.d_in}"
            )
        if part.magnitude is not None:
            raise ShapeError("an update with a DoRA magnitude is not linear in its factors: fold it first")
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for part, _ in parts for tensor in (part.A, part.B)))
    if not all(_is_lossless(weight * part.scale) for part, weight in parts):
        dtype = torch.promote_types(dtype, torch.float32)
    A = torch.cat([part.A.to(dtype) for part, _ in parts], dim=-2)
    B = torch.cat([part.B.to(dtype) for part, _ in parts], dim=-1)
    sizes: list[float] = []
    for part, weight in parts:
        sizes += [weight * part.scale] * part.rank
    B.mul_(torch.tensor(sizes, dtype=dtype, device=B.device))
    biases = [part.bias.to(dtype) * (weight * part.scale) for part, weight in parts if part.bias is not None]
    bias = torch.stack(biases).sum(0) if biases else None
    if first.groups > 1:  # the ranks of one group stand together
        ranks = torch.cat(
            [torch.arange(part.rank, device=A.device) // (part.rank // first.groups) for part, _ in parts]
        )
        order = torch.argsort(ranks, stable=True)
        A, B = A[order], B[:, order] + 0.0  # a negative weight makes -0.0 beside the blocks
    return replace(first, A=A, B=B, scale=1.0, bias=bias)


def _is_lossless(factor: float) -> bool:
    """Whether a product by this factor never rounds: 0, or a power of two."""
    return math.isfinite(factor) and abs(math.frexp(factor)[0]) in (0.0, 0.5)


def inner(one: Factors, other: Factors) -> float:
    """Inner product ``Σ ΔW₁ ∘ ΔW₂`` of two updates of one site in float64, by r × r products: never the dense matrices.

    With `Factors.norm` it gives the cosine of two updates. DoRA's magnitudes and biases are not in it.
    """
    left = one.B.double().mT @ other.B.double()
    right = one.A.double() @ other.A.double().mT
    return one.scale * other.scale * float((left * right).sum())


def blocks(factors: Factors) -> tuple[Tensor, Tensor]:
    """A (n, r, i) and B (n, o, r) of the independent matrices that an update consists of.

    n = 1 of a plain one; E of stacked experts; of a convolution with groups one matrix by group, of its ranks and rows.
    """
    if factors.A.dim() == 3:
        return factors.A, factors.B
    if factors.groups == 1:
        return factors.A[None], factors.B[None]
    n = factors.groups
    compact = compact_groups(factors.B, n)
    return factors.A.view(n, factors.rank // n, -1), compact.view(n, -1, compact.shape[-1])


def from_blocks(like: Factors, A: Tensor, B: Tensor) -> Factors:
    """The inverse of `blocks`: an update of scale 1 with these matrices, otherwise as ``like``; its bias keeps its size."""
    bias = None if like.bias is None else like.bias * like.scale
    if like.groups > 1:
        return replace(like, A=A.flatten(0, 1), B=spread_groups(B.flatten(0, 1), like.groups), scale=1.0, bias=bias)
    A, B = (A, B) if like.A.dim() == 3 else (A[0], B[0])
    return replace(like, A=A.contiguous(), B=B.contiguous(), scale=1.0, bias=bias)


def truncate(
    factors: Factors, rank: int | None = None, *, energy: float | None = None, error: float | None = None
) -> tuple[Factors, float]:
    """The best update of a lower rank, and what it loses. One of the three limits is given.

    Args:
        factors: any; each expert, and each group of a convolution, is truncated by itself, all to one rank.
        rank: largest rank; of a convolution with groups at least one for each group.
        energy: the fewest directions that hold this share of ‖ΔW‖².
        error: the fewest directions that lose at most this share of ‖ΔW‖.

    Returns:
        the factors (balanced: both carry the root of the singular values; at least float32) and the relative error
        ``‖ΔW − truncated‖ / ‖ΔW‖`` (0.0 for a zero update). Thin QR of the factors and an r × r SVD in float64; never the
        dense matrix.

    Raises:
        ShapeError: not exactly one limit.

    Source:
        Eckart and Young 1936, The approximation of one matrix by another of lower rank.
    """
    return cut(factors, rank, energy=energy, error=error)[:2]


def cut(
    factors: Factors, rank: int | None = None, *, energy: float | None = None, error: float | None = None
) -> tuple[Factors, float, float]:
    """As `truncate`; and ‖ΔW‖, which it knows anyway."""
    if sum(limit is not None for limit in (rank, energy, error)) != 1:
        raise ShapeError("truncate: expected exactly one of rank, energy and error")
    A, B = (tensor.double() for tensor in blocks(factors))
    gram_A, gram_B = A @ A.mT, B.mT @ B
    a, b = (gram.diagonal(dim1=-2, dim2=-1).sqrt() for gram in (gram_A, gram_B))
    even = torch.where(
        (a > 0) & (b > 0), (a / b).sqrt(), 1.0
    )  # one length for both: no direction is small in one alone
    N_B, R_B, X_B = _thin_qr(B, gram_B, even)
    N_A, R_A, X_A = _thin_qr(A.mT, gram_A, 1 / even)
    U, S, Vh = torch.linalg.svd(factors.scale * (R_B @ R_A.mT), full_matrices=False)
    keep = kept(S, factors.groups, rank, energy, error)
    root = S[:, :keep].sqrt()
    new_B = N_B @ (X_B @ (U[..., :keep] * root[:, None, :]))
    new_A = (X_A @ (Vh[:, :keep].mT * root[:, None, :])).mT @ N_A.mT
    squares = S.square()
    total = float(squares.sum())
    lost = math.sqrt(float(squares[:, keep:].sum()) / total) if total else 0.0
    dtype = torch.promote_types(factors.A.dtype, torch.float32)
    return from_blocks(factors, new_A.to(dtype), new_B.to(dtype)), lost, math.sqrt(total)


_WELL_CONDITIONED = 1e4
"""Up to this condition, ‖R‖·‖R⁻¹‖, a QR by Cholesky of the Gram matrix has eight digits; beyond it Householder's is taken."""


def _thin_qr(M: Tensor, gram: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, R, X) with M · diag(scales) = N X R and orthonormal columns in N X; by the Gram matrix where it is well-conditioned.

    Source:
        Yamamoto et al. 2015, Roundoff error analysis of the CholeskyQR2 algorithm.
    """
    if M.shape[-1] <= M.shape[-2]:
        L, failed = torch.linalg.cholesky_ex(scales[:, :, None] * gram * scales[:, None, :])
        if not bool(failed.any()):
            eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device).expand_as(L)
            X = torch.linalg.solve_triangular(L, eye, upper=False).mT
            if float((L.norm(dim=(-2, -1)) * X.norm(dim=(-2, -1))).max()) <= _WELL_CONDITIONED:
                return M, L.mT, scales[:, :, None] * X
    Q, R = torch.linalg.qr(M * scales[:, None, :])
    return Q, R, torch.eye(R.shape[-2], dtype=M.dtype, device=M.device)


def effective_rank(values: Tensor) -> float:
    """How many directions an update really uses: the exponential of the entropy of its singular values.

    Args:
        values: (r,) singular values, or (E, r): the mean over E.

    Returns:
        Between 1 and r; 0 for a zero update.

    Source:
        Roy and Vetterli 2007, The effective rank: a measure of effective dimensionality.

    Example:
        >>> effective_rank(torch.tensor([2.0, 2.0, 0.0])), effective_rank(torch.tensor([5.0, 0.0]))
        (2.0, 1.0)
    """
    shares = values.double() / values.double().sum(-1, keepdim=True)
    ranks = torch.special.entr(shares.nan_to_num(0.0)).sum(-1).exp() * (values.sum(-1) > 0)
    return round(float(ranks.mean()), 6)


def kept(S: Tensor, groups: int, rank: int | None, energy: float | None, error: float | None) -> int:
    """How many singular values of S (n, k) stay, for all n together; at least one."""
    if rank is not None:
        return max(1, min(rank // groups, S.shape[-1]))
    squares = S.square().sum(0)
    total = float(squares.sum())
    allowed = (1 - energy if energy is not None else (error or 0.0) ** 2) * total + 1e-15 * total
    lost = squares.flip(0).cumsum(0).flip(0)  # by dropping this one and all after it
    return max(1, int((lost > allowed).sum()))


def spread_groups(B: Tensor, groups: int) -> Tensor:
    """B of a grouped convolution, (d_out, r / groups) by group, as one block-diagonal (d_out, r)."""
    return B if groups == 1 else torch.block_diag(*B.chunk(groups, dim=0))  # type: ignore[no-untyped-call]


def compact_groups(B: Tensor, groups: int) -> Tensor:
    """The inverse of `spread_groups`.

    Raises:
        ShapeError: B has numbers outside its blocks, or sizes that the groups don't divide.
    """
    if groups == 1:
        return B
    d_out, rank = B.shape
    if d_out % groups or rank % groups:
        raise ShapeError(f"B is {tuple(B.shape)}: {groups} groups divide neither or only one of its sides")
    rows, columns = d_out // groups, rank // groups
    blocks = [B[k * rows : (k + 1) * rows, k * columns : (k + 1) * columns] for k in range(groups)]
    compact = torch.cat(blocks)
    if not torch.equal(spread_groups(compact, groups), B):
        raise ShapeError(
            f"B is {tuple(B.shape)} with numbers outside of its {groups} diagonal blocks: no update of a grouped convolution"
        )
    return compact
