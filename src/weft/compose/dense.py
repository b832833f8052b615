"""Operations on the elements of ΔW, and the way back to factors. One matrix at a time: memory doesn't grow with the adapters.

Shapes: o = d_out, i = d_in. Works on vectors (biases of B) as on matrices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from weft.compose.updates import Update
from weft.core.decompose import leading
from weft.core.factors import blocks

__all__ = ["Entries", "dense_blocks", "disjoint_mean", "drop", "generator_for", "nearest", "trim", "weighted_sum"]

Entries = Callable[[], Iterator[tuple[Tensor, float]]]
"""Gives the updates of one weight with their weights, from the first on, each computed when it is taken."""

_EXACT_UP_TO = 1024
"""Smaller side of a matrix up to which its singular values are computed exactly."""
_POWER_STEPS = 4


def trim(update: Tensor, density: float) -> Tensor:
    """The share ``density`` of the elements that are largest by magnitude, the others 0; at least one stays.

    Source:
        Yadav et al. 2023, TIES-Merging, arXiv:2306.01708, section 3.2, step 1.
    """
    count = max(1, round(density * update.numel()))
    if count >= update.numel():
        return update
    sizes = update.abs()
    limit = sizes.flatten().kthvalue(update.numel() - count + 1).values
    return torch.where(sizes >= limit, update, 0.0)


def drop(update: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each element stays with probability ``density``, divided by it, so that the mean is what it was.

    Source:
        Yu et al. 2023, Language models are super Mario, arXiv:2311.03099, section 3.1.
    """
    stays = torch.rand(update.shape, generator=generator, dtype=torch.float32) < density
    return torch.where(stays, update / density, 0.0)


def generator_for(seed: int, *names: object) -> torch.Generator:
    """A random stream of its own for each seed and names: a mixture doesn't depend on the order of adapters or sites."""
    text = "\0".join(map(str, (seed, *names)))
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(number)


def weighted_sum(entries: Entries) -> Tensor:
    """``Σ weight · update``."""
    total: Tensor | None = None
    for update, weight in entries():
        total = update * weight if total is None else total.add_(update, alpha=weight)
    assert total is not None
    return total


def disjoint_mean(entries: Entries) -> Tensor:
    """TIES: by element the sign with more mass is elected, and the updates that have it are averaged by weight.

    With equal weights this is the paper's mean; weights are proportions, a negative one turns an update around.

    Source:
        Yadav et al. 2023, TIES-Merging, arXiv:2306.01708, section 3.2, steps 2 and 3.
    """
    elected = weighted_sum(entries).sign_()
    total, mass = torch.zeros_like(elected), torch.zeros_like(elected)
    for update, weight in entries():
        agrees = (update * weight).sign_() == elected
        total.add_(torch.where(agrees, update, 0.0), alpha=weight)
        mass.add_((agrees & (update != 0)).to(mass.dtype), alpha=abs(weight))
    return torch.where(mass > 0, total / mass.where(mass > 0, 1.0), 0.0)


def nearest(
    target: Tensor, rank: int | None = None, *, energy: float | None = None, error: float | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Factors of low rank near a dense matrix: one of the three limits is given, as for `weft.core.factors.truncate`.

    Large matrices are decomposed by a randomised method with power iterations. What is lost has to be measured on the result: nothing
    here is assumed to be the best.

    Returns:
        A (r, i) and B (o, r), balanced.

    Source:
        Halko, Martinsson and Tropp 2011, Finding structure with randomness, arXiv:0909.4061.
    """
    most = min(target.shape)
    bound = error if error is not None else None if energy is None else max(0.0, 1 - energy) ** 0.5
    if bound is None:
        assert rank is not None
        rank = min(rank, most)
        exact = most <= _EXACT_UP_TO or rank > most // 4
        return _halves(
            *leading(target, rank, steps=0 if exact else _POWER_STEPS, generator=generator_for(seed, "nearest"))
        )
    allowed = bound**2 * float(target.double().square().sum())
    guess = most if most <= _EXACT_UP_TO else 64
    while True:
        exact = guess > most // 4
        U, S, Vh = leading(
            target, min(guess, most), steps=0 if exact else _POWER_STEPS, generator=generator_for(seed, "nearest")
        )
        held = S.double().square().cumsum(0)
        lost = float(target.double().square().sum()) - held
        enough = int((lost > allowed).sum()) + 1
        if enough <= len(S) or exact:
            keep = min(enough, len(S))
            return _halves(U[:, :keep], S[:keep], Vh[:keep])
        guess *= 2


def _halves(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    root = S.sqrt()
    return root[:, None] * Vh, U * root


def dense_blocks(update: Update, number: int) -> Tensor:
    """ΔW of one matrix of an update (an expert's, a group's), at least float32: (o, i)."""
    A, B = (tensor[number] for tensor in blocks(update.factors))
    dtype = torch.promote_types(A.dtype, torch.float32)
    delta = update.factors.scale * (B.to(dtype) @ A.to(dtype))
    if update.rows is None or update.W is None:
        return delta
    return delta + (update.rows[:, None] * update.W).to(dtype)
