"""Factors: the low-rank update of one site, as a value.

Shapes: r rank, o = d_out, i = d_in, E experts. A convolution's kernel is part of d_in: i = in_channels * prod(kernel).
This module does not know which layer the update is for, only the kind of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from weft.errors import NotFiniteError, ShapeError

__all__ = ["Factors", "Kind", "compact_groups", "concat", "spread_groups", "truncate"]

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

    def check_finite(self, where: str = "") -> None:
        """Refuse NaN and infinity.

        Raises:
            NotFiniteError: names the site and the tensor.
        """
        if not math.isfinite(self.scale):
            raise NotFiniteError(f"{where}: scale is {self.scale}; expected a finite number")
        for name, tensor in self.tensors().items():
            if not bool(torch.isfinite(tensor).all()):
                bad = int((~torch.isfinite(tensor)).sum())
                raise NotFiniteError(
                    f"{where}: {name} has {bad} of {tensor.numel()} values that are NaN or infinite; the training that "
                    "made it diverged: take an earlier checkpoint, or train again with a lower learning rate"
                )


def concat(parts: list[tuple[Factors, float]]) -> Factors:
    """Exact weighted sum ``Σ wᵢ · scaleᵢ · Bᵢ @ Aᵢ`` as one update: the ranks add up.

    Raises:
        ShapeError: parts of different kind or shape, or with DoRA magnitudes or biases, which don't add.
    """
    first = parts[0][0]
    for part, _ in parts:
        same = (part.kind, part.kernel, part.groups, part.d_in, part.d_out, part.A.shape[:-2])
        if same != (first.kind, first.kernel, first.groups, first.d_in, first.d_out, first.A.shape[:-2]):
            raise ShapeError(
                f"updates of different shape can't be summed: {same} and a first part {first.kind} {first.d_out}x{first.d_in}"
            )
        if part.magnitude is not None or part.bias is not None:
            raise ShapeError("an update with a DoRA magnitude or a bias is not linear in its factors: fold it first")
    A = torch.cat([part.A for part, _ in parts], dim=-2)
    B = torch.cat([part.B * (weight * part.scale) for part, weight in parts], dim=-1)
    if first.groups > 1:  # the ranks of one group stand together
        ranks = torch.cat(
            [torch.arange(part.rank, device=A.device) // (part.rank // first.groups) for part, _ in parts]
        )
        order = torch.argsort(ranks, stable=True)
        A, B = A[order], B[:, order]
    return replace(first, A=A, B=B, scale=1.0)


def truncate(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The best update of a lower rank, and what it loses.

    Returns:
        the factors (balanced: both carry the root of the singular values) and the relative error
        ``‖ΔW − truncated‖ / ‖ΔW‖`` (0.0 for a zero update). QR and an r × r SVD; never the dense matrix.

    Raises:
        ShapeError: a convolution with groups: the truncated B would not be block-diagonal.

    Source:
        Eckart and Young 1936, The approximation of one matrix by another of lower rank.
    """
    if factors.groups > 1:
        raise ShapeError(
            f"an update of a convolution with {factors.groups} groups can't be truncated: B has to stay block-diagonal"
        )
    Q_B, R_B = torch.linalg.qr(factors.B.double())
    Q_A, R_A = torch.linalg.qr(factors.A.double().mT)
    U, S, Vh = torch.linalg.svd(factors.scale * (R_B @ R_A.mT), full_matrices=False)
    keep = min(rank, S.shape[-1])
    root = S[..., :keep].sqrt()
    B = (Q_B @ U[..., :keep]) * root[..., None, :]
    A = root[..., :, None] * (Vh[..., :keep, :] @ Q_A.mT)
    total = float(S.square().sum())
    error = math.sqrt(max(0.0, float(S[..., keep:].square().sum())) / total) if total else 0.0
    dtype = factors.A.dtype
    return replace(factors, A=A.to(dtype).contiguous(), B=B.to(dtype).contiguous(), scale=1.0), error


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
