"""Members: the adapters of a bank, each with all that it has. One that is only used is one flat tensor outside of the module tree.

A thousand loaded adapters are a thousand tensors and little else: where in the flat tensor a site's factors stand is said once for all
adapters of the same shape (`Layout`), and the slot of a site is made when it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weft.core.factors import Factors, compact_groups
from weft.core.site import Site
from weft.core.sites import SiteMap
from weft.core.slots import Slot
from weft.errors import NotFiniteError
from weft.spec import LoraSpec

if TYPE_CHECKING:
    from weft.adapter import Adapter, Provenance

__all__ = ["FixedSlot", "FlatSites", "Layout", "Member", "flatten"]


@dataclass(eq=False)
class Member:
    """One adapter in the bank.

    Attributes:
        name, spec: as it came.
        sites: slots by path.
        biases, whole: biases and copies of modules by path.
        fixed: its numbers never change.
    """

    name: str
    spec: LoraSpec
    sites: Mapping[str, Slot | FixedSlot] = field(default_factory=dict)
    biases: dict[str, nn.Parameter] = field(default_factory=dict)
    whole: dict[str, nn.Module] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    provenance: Provenance | None = None
    fixed: bool = False

    def follow(self) -> bool:
        """Take a flat tensor to where the model is now; whether it was elsewhere. What is in the module tree goes by itself."""
        return isinstance(self.sites, FlatSites) and self.sites.follow()


class FixedSlot:
    """A slot whose tensors are views of a flat tensor; the same attributes as `Slot`, and nothing to train.

    Attributes:
        turned: B of a linear site, transposed (r, d_out), as routes gather it; ``lora_B`` is then copied when it is first read,
            so that an adapter that is loaded computes what it computed in training to the last bit.
    """

    __slots__ = ("_B", "bias", "dropout", "lora_A", "magnitude", "scale", "solo", "turned")
    by_row = False
    fixed = True
    start_A = start_B = None

    def __init__(self, A: Tensor, B: Tensor, turned: bool, scale: float, dropout: float) -> None:
        self.lora_A, self.scale, self.dropout = A, scale, dropout
        self.turned: Tensor | None = B if turned else None
        self._B: Tensor | None = None if turned else B
        self.magnitude: Tensor | None = None
        self.bias: Tensor | None = None
        self.solo: Any = None

    @property
    def lora_B(self) -> Tensor:
        """As the layer's forward wants it."""
        if self._B is None:
            assert self.turned is not None
            self._B = self.turned.t().contiguous()
        return self._B

    def pair(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        return self.lora_A, self.lora_B

    @property
    def plain(self) -> bool:
        """No magnitude and no bias."""
        return self.magnitude is None and self.bias is None


@dataclass(frozen=True, eq=False, slots=True)
class Piece:
    """Where the tensors of one site stand in a flat tensor.

    Attributes:
        at: offset of A; B, magnitude and bias follow.
        A, B: shapes. turned: B stands transposed.
        magnitude, bias: numbers in them, 0 for none.
        scale: of the site.
    """

    at: int
    A: tuple[int, ...]
    B: tuple[int, ...]
    turned: bool
    magnitude: int
    bias: int
    scale: float


@dataclass(frozen=True, eq=False, slots=True)
class Layout:
    """What adapters of one shape have in common.

    Attributes:
        found: the sites, biases and modules of the model.
        pieces: by path of the site. size: numbers in all of them.
    """

    found: SiteMap
    pieces: dict[str, Piece]
    size: int

    @classmethod
    def of(cls, adapter: Adapter, found: SiteMap) -> Layout:
        """The layout of an adapter whose sites are found."""
        pieces, at = {}, 0
        for site, item in zip(found.sites, adapter.factors.values(), strict=True):
            A, B, turned = _native_shapes(site, item)
            magnitude, bias = (0 if tensor is None else tensor.numel() for tensor in (item.magnitude, item.bias))
            pieces[site.path] = Piece(at, A, B, turned, magnitude, bias, item.scale)
            at += math.prod(A) + math.prod(B) + magnitude + bias
        return cls(found, pieces, at)


class FlatSites(Mapping[str, FixedSlot]):
    """Slots by path, each made when it is asked for."""

    __slots__ = ("flat", "layout", "spec")

    def __init__(self, layout: Layout, flat: Tensor, spec: LoraSpec) -> None:
        self.layout, self.flat, self.spec = layout, flat, spec

    def __len__(self) -> int:
        return len(self.layout.pieces)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.pieces)

    def __contains__(self, path: object) -> bool:
        return path in self.layout.pieces

    def __getitem__(self, path: str) -> FixedSlot:
        piece = self.layout.pieces[path]
        cut = [math.prod(piece.A), math.prod(piece.B), piece.magnitude, piece.bias]
        A, B, magnitude, bias = torch.split(self.flat.narrow(0, piece.at, sum(cut)), cut)
        slot = FixedSlot(A.view(piece.A), B.view(piece.B), piece.turned, piece.scale, self.spec.at(path).dropout)
        slot.magnitude = magnitude if piece.magnitude else None
        slot.bias = bias if piece.bias else None
        return slot

    def follow(self) -> bool:
        """Go where the weights of the model are; whether there was anything to do. The copy at the old place is freed with its last view."""
        first = next(iter(self.layout.found.sites), None)
        if first is None or first.weight.device == self.flat.device:
            return False
        self.flat = self.flat.to(first.weight.device)
        return True


def flatten(adapter: Adapter, layout: Layout, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """All factors of an adapter as one new tensor, checked for NaN and infinity.

    Args:
        adapter: its sites in the order of the layout.
        dtype: of the result; None: the adapter's own.

    Raises:
        NotFiniteError: names the site and the tensor.
    """
    parts = []
    for site, item in zip(layout.found.sites, adapter.factors.values(), strict=True):
        B = item.B.t() if layout.pieces[site.path].turned else item.B
        B = compact_groups(item.B, site.groups) if site.groups > 1 else B
        parts += [item.A.reshape(-1), B.reshape(-1)]
        parts += [tensor for tensor in (item.magnitude, item.bias) if tensor is not None]
    flat = torch.cat([part.detach() for part in parts]) if parts else torch.empty(0)
    if not math.isfinite(float(flat.sum())) and not bool(torch.isfinite(flat).all()):
        adapter.check_finite()
        raise NotFiniteError("the adapter has values that are NaN or infinite")
    return flat.to(device, dtype or flat.dtype)


def _native_shapes(site: Site, item: Factors) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    """Shapes of A and B as the layer's forward wants them, and whether B stands transposed."""
    A, B = tuple(item.A.shape), tuple(item.B.shape)
    if site.kind == "conv":
        channels = item.d_in // math.prod(site.kernel)
        return (A[0], channels, *site.kernel), (B[0], B[1] // site.groups), False
    if site.experts and len(A) == 2:
        return (1, *A), (1, *B), False
    if site.kind in ("linear", "attention"):
        return A, (B[1], B[0]), True
    return A, B, False
