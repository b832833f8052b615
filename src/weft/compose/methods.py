"""The methods: one function each, registered by name, with its paper.

A method by factors gets the updates of a site and gives their mixture as an update; a method by elements gets the updates as matrices
and gives a matrix, which is then brought to a rank. This module does not know adapters, files or bases.

To add one: write a function, register it with `by_factors` or `by_elements`, and give it an oracle in ``tests/unit/compose``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.compose.dense import Entries, disjoint_mean, drop, generator_for, trim, weighted_sum
from weft.compose.updates import Update
from weft.core.factors import blocks, concat, from_blocks
from weft.errors import MixError, did_you_mean

__all__ = ["METHODS", "Entry", "Method", "Options", "check_options", "method_named"]

LIMITS = ("rank", "energy", "error")


@dataclass(frozen=True)
class Options:
    """What can be set of a method; None: not given.

    Attributes:
        rank: largest rank of a site. energy: share of ‖target‖² to hold. error: largest relative error. At most one of them.
        density: share of the elements that stays, in (0, 1].
        scaling: what the result is multiplied with (λ in the papers).
        inner: what KnOTS does with the aligned updates: ``"ties"``, ``"dare_ties"`` or ``"sum"``.
        seed: of everything random.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    density: float | None = None
    scaling: float | None = None
    inner: str | None = None
    seed: int = 0

    @property
    def limit(self) -> dict[str, Any]:
        """The limit that was given; none, or one of rank, energy and error."""
        return {name: getattr(self, name) for name in LIMITS if getattr(self, name) is not None}


@dataclass(frozen=True)
class Entry:
    """One adapter's update at one site.

    Attributes:
        key: what its random numbers depend on.
    """

    update: Update
    weight: float
    key: str


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        run: for factors ``(site, entries, options) -> Update``; for elements ``(updates, options) -> matrix``.
        takes: options that mean something to it; the others are refused.
        needs: options without which it can't run; of the limits, any one.
        wide: its result is no sum of the updates: it is compared with the sum as well.
    """

    name: str
    run: Callable[..., Any]
    paper: str
    elementwise: bool
    takes: tuple[str, ...]
    needs: tuple[str, ...]
    wide: bool

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (self.run.__doc__ or "").strip().partition("\n")[0]


METHODS: dict[str, Method] = {}
"""All methods by name."""


def by_factors(
    name: str, paper: str, *, takes: tuple[str, ...] = (), needs: tuple[str, ...] = (), wide: bool = False
) -> Callable[[Callable[..., Update]], Callable[..., Update]]:
    """Register a method that needs no dense matrix."""

    def register(run: Callable[..., Update]) -> Callable[..., Update]:
        METHODS[name] = Method(name, run, paper, False, takes, needs, wide)
        return run

    return register


def by_elements(name: str, paper: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a method that works on the elements of ΔW."""

    def register(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        METHODS[name] = Method(name, run, paper, True, (*LIMITS, "density", "scaling", "seed"), ("density",), True)
        return run

    return register


def method_named(name: str) -> Method:
    """A method by its name.

    Raises:
        MixError: there is none.
    """
    if name not in METHODS:
        raise MixError(
            f"there is no method {name!r}.{did_you_mean(str(name), METHODS)} There are: {', '.join(METHODS)}"
        )
    return METHODS[name]


def check_options(method: Method, options: Options) -> None:
    """Refuse options that the method doesn't take, lack of one that it needs, and values out of range.

    Raises:
        MixError: names the option.
    """
    given = [
        item.name
        for item in dataclasses.fields(Options)
        if item.name != "seed" and getattr(options, item.name) is not None
    ]
    for name in given:
        if name not in method.takes:
            better = "; method='svd' does" if name in LIMITS and method.name in ("exact", "linear") else ""
            raise MixError(
                f"method {method.name!r} doesn't take {name}{better}. It takes {', '.join(method.takes) or 'nothing'}"
            )
    if method.needs and not any(name in given for name in method.needs):
        raise MixError(f"method {method.name!r} needs {', or '.join(_EXAMPLES[name] for name in method.needs)}")
    if len(options.limit) > 1:
        raise MixError(f"{' and '.join(options.limit)} are given: expected one limit")
    positive = isinstance(options.rank, int) and not isinstance(options.rank, bool) and options.rank >= 1
    rules = (
        ("rank", options.rank is None or positive, "a whole number of at least 1"),
        ("energy", _within(options.energy, 0, 1), "a share in (0, 1]"),
        ("error", options.error is None or _within(options.error, 0, 1) or options.error == 0, "a share in [0, 1]"),
        ("density", _within(options.density, 0, 1), "a share in (0, 1]"),
        ("scaling", _within(options.scaling, -math.inf, math.inf), "a finite number"),
        ("seed", isinstance(options.seed, int), "a whole number"),
    )
    for name, ok, expected in rules:
        if not ok:
            raise MixError(f"{name}={getattr(options, name)!r}; expected {expected}")


_EXAMPLES = {  # what an option that is lacking may look like
    "rank": "rank=16 (--rank 16)",
    "energy": "energy=0.99 (--energy 0.99)",
    "error": "error=0.05 (--error 0.05)",
    "density": "density, the share of the elements that stays, as in density=0.3 (--density 0.3)",
}


def _within(value: Any, low: float, high: float) -> bool:
    if value is None:
        return True
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and low < value <= high
    )


def _sum(entries: Sequence[Entry], scaling: float | None = None) -> Update:
    factor = 1.0 if scaling is None else scaling
    return Update.sum([(entry.update, entry.weight * factor) for entry in entries])


@by_factors("exact", "Hu et al. 2021, LoRA, arXiv:2106.09685, section 4.1")
def exact(site: str, entries: Sequence[Entry], options: Options) -> Update:
    """The weighted sum of the updates, by concatenating factors: nothing is lost, ranks add up."""
    return _sum(entries)


@by_factors("svd", "Eckart and Young 1936, doi:10.1007/BF02288367", takes=(*LIMITS, "scaling"), needs=LIMITS)
def svd(site: str, entries: Sequence[Entry], options: Options) -> Update:
    """The weighted sum, brought to a rank, an energy or an error: the best there is of its rank."""
    return _sum(entries, options.scaling)


@by_factors("linear", "Wortsman et al. 2022, Model soups, arXiv:2203.05482", takes=("scaling",))
def linear(site: str, entries: Sequence[Entry], options: Options) -> Update:
    """The weighted sum, held to the largest rank of its parents: what adding A's and B's apart only promises."""
    return _sum(entries, options.scaling)


@by_factors("task_arithmetic", "Ilharco et al. 2022, arXiv:2212.04089", takes=(*LIMITS, "scaling"))
def task_arithmetic(site: str, entries: Sequence[Entry], options: Options) -> Update:
    """Sums and differences of tasks, times a scaling: a negative weight unlearns one."""
    return _sum(entries, options.scaling)


@by_factors("layerwise", "Yang et al. 2023, AdaMerging, arXiv:2310.02575", takes=(*LIMITS, "scaling"))
def layerwise(site: str, entries: Sequence[Entry], options: Options) -> Update:
    """The weighted sum, with weights of their own for some layers (all methods take such weights)."""
    return _sum(entries, options.scaling)


@by_factors(
    "knots",
    "Stoica et al. 2024, KnOTS, arXiv:2410.19735",
    takes=(*LIMITS, "density", "scaling", "inner", "seed"),
    wide=True,
)
def knots(site: str, entries: Sequence[Entry], options: Options) -> Update:
    """All updates in one common basis by one SVD; there TIES, or another rule, mixes them. Never dense.

    ``[ΔW₁ … ΔWₙ] = U S [V₁ … Vₙ]ᵀ``; the result is ``U S Vᵀ`` with V mixed by elements from the Vᵢ.
    """
    for entry in entries:
        if entry.update.rows is not None:
            raise MixError(
                f"{site}: a DoRA update has full rank, and KnOTS aligns updates by their factors; use exact or ties"
            )
    inner = options.inner or "ties"
    if inner not in _INNER:
        raise MixError(f"inner={inner!r} is no rule that KnOTS can use; there are {', '.join(_INNER)}")
    if inner == "sum" and options.density is not None:
        raise MixError("method 'knots' with inner='sum' keeps all elements, and doesn't take density")
    if inner != "sum" and options.density is None:
        raise MixError(
            f"method 'knots' with inner={inner!r} needs density: the share of the elements that stays, in (0, 1]"
        )
    parts = [blocks(entry.update.factors) for entry in entries]
    made = []
    for number in range(len(parts[0][0])):
        factors = [
            (A[number].double(), entry.update.factors.scale * B[number].double())
            for entry, (A, B) in zip(entries, parts, strict=True)
        ]
        made.append(_knot(site, number, factors, entries, _INNER[inner], options))
    rank = max(A.shape[0] for A, _ in made)
    A, B = (torch.stack([_padded(pair[side], rank, side) for pair in made]) for side in (0, 1))
    total = concat([(entry.update.factors, entry.weight) for entry in entries])
    return Update(from_blocks(total, A.to(total.A.dtype), B.to(total.B.dtype)))


def _padded(factor: Tensor, rank: int, side: int) -> Tensor:
    missing = rank - factor.shape[side]
    return torch.nn.functional.pad(factor, (0, 0, 0, missing) if side == 0 else (0, missing))


def _knot(
    site: str, number: int, factors: Sequence[tuple[Tensor, Tensor]], entries: Sequence[Entry], rule: Callable[..., Tensor],
    options: Options,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A and B of one matrix."""
    Q, R = torch.linalg.qr(torch.cat([B for _, B in factors], dim=1))
    cores = [core @ A for core, (A, _) in zip(R.split([A.shape[0] for A, _ in factors], dim=1), factors, strict=True)]
    thin, triangle = torch.linalg.qr(torch.cat(cores, dim=1).mT)
    U, S, Wh = torch.linalg.svd(triangle.mT, full_matrices=False)
    real = max(1, int((S / S[0].clamp_min(1e-300) > 1e-10).sum()))
    aligned = (thin @ Wh[:real].mT).mT.split([A.shape[1] for A, _ in factors], dim=1)

    def updates() -> Any:
        for entry, V in zip(entries, aligned, strict=True):
            yield V, entry.weight, generator_for(options.seed, site, entry.key, number)

    return rule(updates, options) * (1.0 if options.scaling is None else options.scaling), Q @ U[:, :real] * S[:real]


Updates = Callable[[], Any]


def _trimmed(updates: Updates, options: Options) -> Entries:
    def entries() -> Any:
        for update, weight, _ in updates():
            yield trim(update, options.density or 1.0), weight

    return entries


def _dropped(updates: Updates, options: Options) -> Entries:
    def entries() -> Any:
        for update, weight, generator in updates():
            yield drop(update, options.density or 1.0, generator), weight

    return entries


@by_elements("ties", "Yadav et al. 2023, TIES-Merging, arXiv:2306.01708")
def ties(updates: Updates, options: Options) -> Tensor:
    """Trim the small elements, elect a sign, average those that agree with it."""
    return disjoint_mean(_trimmed(updates, options))


@by_elements("dare", "Yu et al. 2023, arXiv:2311.03099")
def dare(updates: Updates, options: Options) -> Tensor:
    """Drop elements at random, rescale the others, and sum."""
    return weighted_sum(_dropped(updates, options))


@by_elements("dare_ties", "Yu et al. 2023, arXiv:2311.03099, and Yadav et al. 2023, arXiv:2306.01708")
def dare_ties(updates: Updates, options: Options) -> Tensor:
    """Drop elements at random, rescale the others, elect a sign, average those that agree with it."""
    return disjoint_mean(_dropped(updates, options))


@by_elements("magnitude", "Han et al. 2015, arXiv:1506.02626")
def magnitude(updates: Updates, options: Options) -> Tensor:
    """Keep each update's largest elements, and sum."""
    return weighted_sum(_trimmed(updates, options))


def _plain_sum(updates: Updates, options: Options) -> Tensor:
    return weighted_sum(_trimmed(updates, Options()))


_INNER: Mapping[str, Callable[..., Tensor]] = {"ties": ties, "dare_ties": dare_ties, "sum": _plain_sum}
