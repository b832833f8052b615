"""How the directions of one site become more, fewer or others while it is trained, and what that does to all that follows them.

A direction is a row of A with its column of B. Everything here is linear maps of A and B, so that an optimizer's moments, which stand
beside A and B entry by entry, go along. What decides about ranks stands elsewhere; this module does not know optimizers.

Shapes: n independent matrices of an update (E of stacked experts, the groups of a convolution, else 1), r directions in each,
o rows, i columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.core.factors import kept
from weft.core.site import Site
from weft.core.slots import Slot
from weft.errors import ShapeError

__all__ = [
    "Resize",
    "Swap",
    "blocks_of",
    "fitted",
    "fresh",
    "grown",
    "kept_directions",
    "rank_of",
    "rescaled",
    "resize_slot",
    "truncated",
]


@dataclass(frozen=True, eq=False)
class Resize:
    """What happens to the directions of one site: ``A' = [left @ A; new_A]`` and ``B' = [ratio · B @ right, new_B]``.

    Attributes:
        left: (n, k, r); right: (n, r, k). None: the directions stay as they are.
        index: (n, k), the directions that stay where ``left`` and ``right`` are no more than a choice of them; exact, nothing is computed.
        new_A: (n, q, i); new_B: (n, o, q); None: no new ones.
        ratio: scale before over scale after; B and its own bias take it over, so that the update is the same.
        scale: the one after, where it is known better than as a quotient.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    index: Tensor | None = None
    new_A: Tensor | None = None
    new_B: Tensor | None = None
    ratio: float = 1.0
    scale: float | None = None

    def A(self, blocks: Tensor) -> Tensor:
        """A' (n, k + q, i) from A (n, r, i)."""
        if self.index is not None:
            blocks = _take(blocks, self.index, -2)
        elif self.left is not None:
            blocks = (self.left.to(blocks.device) @ blocks.double()).to(blocks.dtype)
        return blocks if self.new_A is None else torch.cat([blocks, self.new_A.to(blocks)], dim=-2)

    def B(self, blocks: Tensor) -> Tensor:
        """B' (n, o, k + q) from B (n, o, r)."""
        if self.index is not None:
            blocks = _take(blocks, self.index, -1)
        elif self.right is not None:
            blocks = (blocks.double() @ self.right.to(blocks.device)).to(blocks.dtype)
        blocks = blocks if self.ratio == 1.0 else blocks * self.ratio
        return blocks if self.new_B is None else torch.cat([blocks, self.new_B.to(blocks)], dim=-1)

    def moment_A(self, blocks: Tensor, squared: bool = False) -> Tensor:
        """Mean of the gradient of A', or of its squares, from that of A.

        The gradient of A' is ``rightᵀ`` times that of A, and a mean of gradients goes the same way exactly. A mean of squares goes by
        the squares of the map, as if the gradients of different directions were uncorrelated; exactly where directions are only chosen.
        New directions begin with a mean of 0, and with the mean square of the present ones: with 0 there, whose bias is corrected by the
        steps of the others, their first steps would be several times too long.
        """
        if self.index is not None:
            blocks = _take(blocks, self.index, -2)
        elif self.right is not None:
            turn = self.right.to(blocks.device).mT
            blocks = ((turn.square() if squared else turn) @ blocks.double()).to(blocks.dtype)
        if self.new_A is None:
            return blocks
        count = self.new_A.shape[-2]
        return torch.cat([blocks, _begun(blocks, -2, count, squared)], dim=-2)

    def moment_B(self, blocks: Tensor, squared: bool = False) -> Tensor:
        """The same of B: its gradient goes by ``leftᵀ``, and by one over the ratio."""
        if self.index is not None:
            blocks = _take(blocks, self.index, -1)
        elif self.left is not None:
            turn = self.left.to(blocks.device).mT
            blocks = (blocks.double() @ (turn.square() if squared else turn)).to(blocks.dtype)
        if self.ratio != 1.0:
            blocks = blocks / (self.ratio**2 if squared else self.ratio)
        if self.new_B is None:
            return blocks
        count = self.new_B.shape[-1]
        return torch.cat([blocks, _begun(blocks, -1, count, squared)], dim=-1)


@dataclass(frozen=True, eq=False)
class Swap:
    """A parameter that was replaced by one of another shape.

    Attributes:
        old, new: the parameters.
        moment: from a mean of the old one's gradients (or, with True, of their squares) to the new one's.
    """

    old: nn.Parameter
    new: nn.Parameter
    moment: Callable[[Tensor, bool], Tensor]


def rank_of(site: Site, slot: Slot) -> int:
    """Rank of a slot; by expert where there are experts, of all groups together where there are groups."""
    return int(slot.lora_A.shape[0] if site.kind == "conv" else slot.lora_A.shape[-2])


def blocks_of(site: Site, slot: Slot) -> tuple[Tensor, Tensor]:
    """A (n, r, i) and B (n, o, r) of a slot, as views, without gradients and without a starting product."""
    return _wide(site, "A", slot.lora_A.detach()), _wide(site, "B", slot.lora_B.detach())


def resize_slot(site: Site, slot: Slot, change: Resize) -> list[Swap]:
    """Put new factors into a slot; the update stays what it was, up to what the change itself drops.

    Returns:
        the parameters that were replaced.

    Raises:
        ShapeError: the change is not for this site.
    """
    A, B = blocks_of(site, slot)
    with torch.no_grad():
        new_A, new_B = change.A(A), change.B(B)
    if new_A.shape[-2] != new_B.shape[-1]:
        raise ShapeError(f"{site.path}: A' has {new_A.shape[-2]} directions and B' {new_B.shape[-1]}")
    swaps = [
        _swap(slot, "lora_A", _native(site, "A", new_A), _follow(site, "A", change.moment_A)),
        _swap(slot, "lora_B", _native(site, "B", new_B), _follow(site, "B", change.moment_B)),
    ]
    if change.ratio != 1.0:
        ratio = change.ratio
        if slot.bias is not None:
            swaps.append(
                _swap(slot, "bias", slot.bias.detach() * ratio, lambda m, squared: m / (ratio**2 if squared else ratio))
            )
        start, slot.__dict__["scale"] = rescaled(slot, change)
        if start is not None:
            slot._buffers["start_B"] = start
    slot.__dict__["solo"] = None
    return swaps


def rescaled(slot: Any, change: Resize) -> tuple[Tensor | None, float]:
    """B of the starting product, and the scale, after a change.

    The starting product is always computed from the one that there was first, so that a resumed run, which comes to a scale in one step,
    has the bytes of a run that came to it in several.
    """
    scale = slot.scale / change.ratio if change.scale is None else change.scale
    if slot.start_B is None:
        return None, scale
    first = slot.__dict__.setdefault("first", (slot.start_B, slot.scale))
    return first[0] * (first[1] / scale), scale


def grown(
    site: Site, slot: Slot, rank: int, *, rslora: bool = False, init: str = "kaiming", seed: int = 0
) -> Resize | None:
    """New directions beside the present ones, which change nothing yet: their columns of B are zero (an embedding's rows of A).

    Rows of A are random directions orthogonal to the present ones, and among each other, as long as there are that many dimensions; their
    length is that of the initialisation. Alpha stays what it is, so the scale falls by r / r' (rsLoRA: its root) and B grows by as much: a
    learning rate moves the update by alpha, and would be too high for the grown site otherwise. Doubling a rank is exact in any dtype.

    Args:
        rank: the new one, of all groups together; no more than min(d_in, d_out) are taken, which hold every update.
        rslora: the scale goes by the root of the rank.
        init: whose length the new rows have: "gaussian" its own, all others that of "kaiming".
        seed: of the directions; the same on every process.

    Returns:
        None where nothing is to be done.
    """
    before = rank_of(site, slot)
    A, B = blocks_of(site, slot)
    n, r = A.shape[0], A.shape[1]
    per_block = before // r  # groups of a convolution share its rank; experts have it each
    most = max(before, min(site.d_in, site.d_out // max(1, site.groups)) * per_block)
    count = (min(rank, most) - before) // per_block
    if count <= 0:
        return None
    after = before + count * per_block
    generator = torch.Generator().manual_seed(seed)
    ratio = math.sqrt(after / before) if rslora else after / before
    flipped = site.kind == "embedding"
    known = B.mT if flipped else A
    rows = fresh(known, count, generator)
    width = known.shape[-1]
    if flipped:
        length = math.sqrt(width)  # the initialisation: B standard normal
        new_A, new_B = A.new_zeros(n, count, A.shape[-1]), (rows * length).mT
    else:
        length = math.sqrt(width) / after if init == "gaussian" else 1 / math.sqrt(3)
        new_A, new_B = rows * length, B.new_zeros(n, B.shape[-2], count)
    return Resize(new_A=new_A, new_B=new_B, ratio=ratio)


def fresh(known: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random rows of length 1, orthogonal to known ones and to each other while there is room; beyond it merely random.

    Args:
        known: (n, r, i). count: rows by block.

    Returns:
        (n, count, i), float64 on the CPU.
    """
    n, r, width = known.shape
    drawn = torch.randn(n, count, width, dtype=torch.float64, generator=generator)
    room = max(0, min(count, width - r))
    if room:
        Q = torch.linalg.qr(known.detach().cpu().double().mT).Q
        first = drawn[:, :room]
        for _ in range(2):  # the second pass takes away what rounding left of the first
            first = first - (first @ Q) @ Q.mT
            first = torch.linalg.qr(first.mT).Q.mT
        drawn[:, :room] = first
    rows: Tensor = drawn / drawn.norm(dim=-1, keepdim=True)
    return rows


def kept_directions(index: Tensor) -> Resize:
    """The directions (n, k) stay, the others go; the scale stays, so what remains is what it was."""
    return Resize(index=index)


def truncated(
    site: Site,
    slot: Slot,
    *,
    energy: float | None = None,
    error: float | None = None,
    rank: int | None = None,
    least: int = 1,
) -> tuple[Resize, float] | None:
    """The strongest directions of the update, in the basis of its singular vectors; the scale stays.

    One of the limits is given, see `factors.truncate`. A and B keep the ratio of their lengths, so that learning goes on at its pace. An
    update of zero keeps its first directions.

    Returns:
        the change and the share of ‖ΔW‖ that it loses; None where nothing would go.

    Source:
        Eckart and Young 1936, The approximation of one matrix by another of lower rank.
    """
    A, B = (blocks.double() for blocks in blocks_of(site, slot))
    n, r = A.shape[0], A.shape[1]
    U, S, V = _svd(A, B)
    groups = rank_of(site, slot) // r
    per_block = max(1, math.ceil(least / groups))
    if not bool((S[:, 0] > 0).all()):
        if float(S.square().sum()) > 0:  # an expert that learned nothing yet beside others that did
            return None
        keep = min(r, per_block if rank is None else max(per_block, rank // groups))
        return None if keep == r else (kept_directions(torch.arange(keep, device=A.device).expand(n, keep)), 0.0)
    keep = max(min(per_block, r), kept(S, groups, rank, energy, error))
    solid = int((1e-12 * S[:, :1] < S).all(0).sum())
    keep = min(keep, max(1, solid))
    if keep >= r:
        return None
    lost = math.sqrt(float(S[:, keep:].square().sum()) / float(S.square().sum()))
    root = S[:, :keep].sqrt()
    lean = (A.norm(dim=(-2, -1)) / B.norm(dim=(-2, -1))).sqrt()[:, None]
    left = (U[..., :keep] * (lean / root)[:, None, :]).mT @ B
    right = A @ (V[..., :keep] / (root * lean)[:, None, :])
    return Resize(left=left, right=right), lost


def fitted(site: Site, slot: Slot, rank: int, scale: float) -> Resize | None:
    """Room for factors of this rank and scale, whose numbers will be filled in."""
    A, B = blocks_of(site, slot)
    n, per_block = A.shape[0], rank_of(site, slot) // A.shape[1]
    r, ratio = rank // per_block, slot.scale / scale
    if r == A.shape[1] and ratio == 1.0:
        return None
    index = torch.zeros(n, 0, dtype=torch.long, device=A.device)
    return Resize(
        index=index,
        new_A=A.new_zeros(n, r, A.shape[-1]),
        new_B=B.new_zeros(n, B.shape[-2], r),
        ratio=ratio,
        scale=scale,
    )


def _svd(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (n, o, k), S (n, k) and V (n, i, k) of B @ A; the scale is not in it."""
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Q_B @ U, S, Q_A @ Vh.mT


def _take(blocks: Tensor, index: Tensor, dim: int) -> Tensor:
    """Entries of each block along the dimension of its directions."""
    index = index.to(blocks.device)
    shape = [blocks.shape[0], blocks.shape[1], blocks.shape[2]]
    shape[dim] = index.shape[1]
    index = index[:, :, None] if dim == -2 else index[:, None, :]
    return blocks.gather(dim, index.expand(shape))


def _begun(blocks: Tensor, dim: int, count: int, squared: bool) -> Tensor:
    """Moments of new directions: 0, or the mean of the squares of those that are there."""
    shape = [*blocks.shape]
    shape[dim] = count
    if squared and blocks.shape[dim]:
        return blocks.mean(dim, keepdim=True).expand(shape)
    return blocks.new_zeros(shape)


def _wide(site: Site, leaf: str, tensor: Tensor) -> Tensor:
    """A slot's tensor (or one of its shape) as blocks."""
    if site.kind == "conv":
        first = tensor.shape[0]
        return tensor.reshape(site.groups, first // site.groups, -1)
    return tensor if tensor.dim() == 3 else tensor[None]


def _native(site: Site, leaf: str, blocks: Tensor) -> Tensor:
    """The inverse of `_wide`."""
    if site.kind == "conv":
        flat = blocks.flatten(0, 1)
        return flat.reshape(flat.shape[0], -1, *site.kernel) if leaf == "A" else flat
    return blocks if site.experts is not None else blocks[0]


def _follow(site: Site, leaf: str, moment: Callable[[Tensor, bool], Tensor]) -> Callable[[Tensor, bool], Tensor]:
    return lambda tensor, squared: _native(site, leaf, moment(_wide(site, leaf, tensor), squared)).contiguous()


def _swap(slot: Slot, name: str, tensor: Tensor, moment: Callable[[Tensor, bool], Tensor]) -> Swap:
    old = slot._parameters[name]
    assert old is not None
    new = nn.Parameter(tensor.contiguous().clone(), requires_grad=old.requires_grad)
    slot._parameters[name] = new
    return Swap(old, new, moment)


Resizes = Mapping[str, Resize]
"""Changes by path of the site."""
