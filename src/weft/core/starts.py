"""What an initialisation is: from a `Plan` of one site to the `Start` of its factors; and the register of all.

Shapes: r rank, o = d_out, i = d_in, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weft.core.site import Site
from weft.errors import NotFiniteError, ShapeError, SpecError
from weft.spec import LoraSpec

if TYPE_CHECKING:
    from torch import nn

__all__ = ["INITIALISERS", "Data", "Initialiser", "Plan", "Start", "initialiser"]


@dataclass(frozen=True, eq=False)
class Start:
    """Where training starts at one site; the update is ``scale · (B @ A - start_B @ start_A)``.

    Attributes:
        A: (r, i), or (E, r, i) for stacked experts.
        B: (o, r), or (E, o, r).
        scale: of the update.
        start_A: what A was, where B @ A doesn't start at zero: subtracting the starting product keeps the base as it is.
        start_B: what B was.
    """

    A: Tensor
    B: Tensor
    scale: float
    start_A: Tensor | None = None
    start_B: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """All that an initialisation may know of one site.

    Attributes:
        site: the site; its weight is only read.
        rank: r.
        scale: of the update.
        dtype: what the result is stored in; computed in `compute`.
        generator: of random numbers; None: torch's own.
        steps: the number in a name such as ``"pissa_niter_4"``; 0 without.
        statistics: what the data pass of a data-driven initialisation found.
    """

    site: Site
    rank: int
    scale: float
    dtype: torch.dtype
    generator: torch.Generator | None = None
    steps: int = 0
    statistics: Tensor | None = None

    @property
    def compute(self) -> torch.dtype:
        """float64 for a float64 base, else float32."""
        return torch.float64 if self.site.weight.dtype == torch.float64 else torch.float32

    @property
    def shape_A(self) -> tuple[int, ...]:
        """(r, i) or (E, r, i)."""
        experts = () if self.site.experts is None else (self.site.experts,)
        return (*experts, self.rank, self.site.d_in)

    @property
    def shape_B(self) -> tuple[int, ...]:
        """(o, r) or (E, o, r)."""
        return (*self.shape_A[:-2], self.site.d_out, self.rank)

    def weight(self) -> Tensor:
        """The base's weight as (o, i) or (E, o, i), in `compute`: a copy, or a view that must not be written into.

        Raises:
            SpecError: a quantised weight; a rank above min(d_in, d_out).
            NotFiniteError: NaN or infinity in the weight.
        """
        self.check_rank()
        try:
            weight = self.site.oriented(self.site.weight.detach())
        except ShapeError as problem:
            raise SpecError(f"{problem}. This initialisation reads the weight; init='kaiming' doesn't") from None
        return self.checked(weight.to(self.compute), "the weight")

    def check_rank(self) -> None:
        """Refuse a rank above min(d_in, d_out), for initialisations that need that many singular vectors.

        Raises:
            SpecError: names the site and the largest rank that it can have.
        """
        most = min(self.site.d_in, self.site.d_out)
        if self.rank > most:
            raise SpecError(
                f"rank {self.rank} at {self.site.path!r}, a {self.site.d_out} x {self.site.d_in} matrix: this initialisation takes "
                f"singular vectors, of which there are {most}; lower the rank there, rank_pattern={{{self.site.path!r}: {most}}}"
            )

    def checked(self, found: Tensor, what: str) -> Tensor:
        """The same tensor.

        Raises:
            NotFiniteError: NaN or infinity in it.
        """
        if not bool(torch.isfinite(found).all()):
            raise NotFiniteError(
                f"{what} of {self.site.path!r} has NaN or infinite values; no initialisation can start from it"
            )
        return found

    def drawn(self, shape: tuple[int, ...], fill: Callable[..., Tensor], *arguments: float) -> Tensor:
        """Random numbers by a method such as `Tensor.normal_`, on the device of the generator, then of the weight."""
        device = self.site.weight.device
        source = device if self.generator is None else self.generator.device
        empty = torch.empty(shape, dtype=self.compute, device=source)
        return fill(empty, *arguments, generator=self.generator).to(device)

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Zeros as the result stores them."""
        return torch.zeros(shape, dtype=self.dtype, device=self.site.weight.device)

    def start(self, A: Tensor, B: Tensor, *, subtract: bool = False) -> Start:
        """The result in its dtype; with ``subtract`` the starting product is taken away again."""
        A, B = A.to(self.dtype).contiguous(), B.to(self.dtype).contiguous()
        return Start(A, B, self.scale, A.clone() if subtract else None, B.clone() if subtract else None)


@dataclass(frozen=True, eq=False)
class Data:
    """What a data-driven initialisation passes over.

    Attributes:
        model: the whole model, with all sites in it.
        batches: inputs of the model, by keyword; passed over more than once.
        spec: for ranks.
    """

    model: nn.Module
    batches: list[Any]
    spec: LoraSpec


Prepare = Callable[["tuple[Site, ...]", Data], Iterator[tuple[Site, int, Tensor]]]


@dataclass(frozen=True)
class Initialiser:
    """One initialisation.

    Attributes:
        name: as `LoraSpec.init` has it.
        paper: link to its source.
        kinds: kinds of sites that it knows.
        groups: whether it knows convolutions with groups.
        function: from a plan to a start.
        prepare: data pass: yields site, rank and statistics; None: none is needed.
    """

    name: str
    paper: str
    kinds: tuple[str, ...]
    groups: bool
    function: Callable[[Plan], Start]
    prepare: Prepare | None = None

    def check(self, sites: Iterable[Site]) -> None:
        """Refuse sites that this initialisation doesn't know.

        Raises:
            SpecError: names the site, and the initialisations that know its kind.
        """
        for site in sites:
            if not self.knows(site):
                fitting = [item.name for item in INITIALISERS.values() if item.knows(site)]
                what = f"a convolution with {site.groups} groups" if site.groups > 1 else f"of kind {site.kind!r}"
                raise SpecError(
                    f"LoraSpec.init={self.name!r} does not know the site {site.path!r}, which is {what}; use one of {fitting}, or "
                    "exclude the site"
                )

    def knows(self, site: Site) -> bool:
        """Whether the site is of a kind that this initialisation can start."""
        return site.kind in self.kinds and (site.groups == 1 or self.groups)


INITIALISERS: dict[str, Initialiser] = {}
"""Every initialisation by name."""


def initialiser(
    name: str, *, paper: str, kinds: tuple[str, ...], groups: bool = False, prepare: Prepare | None = None
) -> Callable[[Callable[[Plan], Start]], Callable[[Plan], Start]]:
    """Register a function as an initialisation; see `Initialiser` for the arguments."""

    def register(function: Callable[[Plan], Start]) -> Callable[[Plan], Start]:
        INITIALISERS[name] = Initialiser(name, paper, kinds, groups, function, prepare)
        return function

    return register
