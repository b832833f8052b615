"""What an adapter adds to one weight, also with DoRA: ``ΔW = diag(rows) W + scale · B A``.

A plain update has no rows. DoRA's, ``diag(m / n) (W + scale · B A) - W`` with n the norms of the rows in brackets, has rows
``m / n - 1`` and ``diag(m / n) B`` in the place of B: it is linear in that form, so that updates of both kinds add. Their sum is
again a DoRA update, ``(I + diag(rows)) W + B A = diag(h) (W + diag(1/h) B A)`` with h = 1 + rows: exact, and never dense.

Shapes: o = d_out, i = d_in, r rank. This module does not know methods.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weft.adapter import Adapter
from weft.core import loading
from weft.core.adapted import magnitude_share, row_norms
from weft.core.factors import Factors, concat, inner
from weft.core.site import Site
from weft.core.tree import by_path, walk
from weft.errors import MixError
from weft.identity import Fingerprint, fingerprint

__all__ = ["Ground", "Update", "update_of"]

_SMALLEST = 1e-4
"""A row of the mixture that keeps less than this share of its base's row can't be written as DoRA's."""


class Ground:
    """The base that adapters were made for: weights of sites, biases, fingerprints. It is read, never changed.

    Args:
        model: the base, also one with a bank on it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._nodes = by_path(walk(model))
        self._sites: dict[str, Site] = {}
        self._fingerprints: dict[tuple[str, ...], Fingerprint] = {}

    def fingerprint(self, without: tuple[str, ...]) -> Fingerprint:
        """Of the base without modules that an adapter trains whole."""
        if without not in self._fingerprints:
            self._fingerprints[without] = fingerprint(self.model, loading.base_weights(self.model, without))
        return self._fingerprints[without]

    def check(self, adapter: Adapter, allow_other_base: bool) -> None:
        """Refuse an adapter that doesn't fit.

        Raises:
            BaseMismatchError: it was made for another base. KeysError, ShapeError: its sites are not in this one.
        """
        if not allow_other_base:
            loading.check_base(adapter, self.fingerprint(tuple(adapter.modules)))
        found = loading.locate(self._nodes, adapter)
        self._sites |= dict(zip(adapter.factors, found.sites, strict=True))

    def weight(self, path: str, dtype: torch.dtype) -> Tensor:
        """W of a site, (o, i), on the CPU."""
        site = self._sites[path]
        return site.oriented(site.weight.detach()).to("cpu", dtype)

    def bias(self, path: str) -> Tensor:
        """A bias of the base by its full path, on the CPU."""
        owner, _, leaf = path.rpartition(".")
        value = self._nodes[owner].module._parameters[leaf]
        assert value is not None
        return value.detach().cpu()

    def takes_dora(self, path: str) -> bool:
        """Whether DoRA is defined at a site."""
        site = self._sites[path]
        return site.kind in ("linear", "conv", "embedding") and site.groups == 1


@dataclass(frozen=True, eq=False)
class Update:
    """``diag(rows) W + scale · B A`` of one site.

    Attributes:
        factors: the second part, and the bias of B; without a magnitude.
        rows: (o,), float64; None where there is no first part.
        W: (o, i); there if rows are.
    """

    factors: Factors
    rows: Tensor | None = None
    W: Tensor | None = None

    @classmethod
    def sum(cls, parts: Sequence[tuple[Update, float]]) -> Update:
        """``Σ weight · update``, exact."""
        W = next((part.W for part, _ in parts if part.W is not None), None)
        found = [part.rows * weight for part, weight in parts if part.rows is not None]
        return cls(
            concat([(part.factors, weight) for part, weight in parts]), torch.stack(found).sum(0) if found else None, W
        )

    def norm(self) -> float:
        """‖ΔW‖ in float64, without building it where there are no rows."""
        if self.rows is None or self.W is None:
            return self.factors.norm()
        W, A, B = (tensor.double() for tensor in (self.W, self.factors.A, self.factors.B))
        own = (self.rows.square() * W.square().sum(1)).sum()
        cross = (self.rows[:, None] * B * (W @ A.mT)).sum() * self.factors.scale
        return math.sqrt(max(0.0, float(own + 2 * cross) + self.factors.norm() ** 2))

    def dot(self, other: Update) -> float:
        """Inner product of two updates of one site, never dense."""
        found = inner(self.factors, other.factors)
        for one, two in ((self, other), (other, self)):
            if one.rows is not None and one.W is not None:
                W, A, B = one.W.double(), two.factors.A.double(), two.factors.B.double()
                found += two.factors.scale * float((one.rows[:, None] * B * (W @ A.mT)).sum())
        if self.rows is not None and other.rows is not None and self.W is not None:
            found += float((self.rows * other.rows * self.W.double().square().sum(1)).sum())
        return found

    def distance(self, other: Update) -> float:
        """‖ΔW - other's‖."""
        return Update.sum([(self, 1.0), (other, -1.0)]).norm()

    def settled(self, path: str, as_dora: bool) -> Factors:
        """Factors that mean this update: plain ones, or DoRA's.

        Args:
            as_dora: give a plain update a magnitude, too (its own); W is needed.

        Raises:
            MixError: a row of the weight is taken away whole, which DoRA can't express; names the site.
        """
        rows = (
            self.rows if self.rows is not None or not as_dora else torch.zeros(self.factors.d_out, dtype=torch.float64)
        )
        if rows is None:
            return self.factors
        assert self.W is not None
        left = 1 + rows
        worst = int(left.abs().argmin())
        if float(left.abs()[worst]) < _SMALLEST:
            raise MixError(
                f"{path}: with these weights row {worst} of the base's weight cancels, which no DoRA adapter can express; change a weight a "
                "little, or take an approximate method (ties, magnitude …) with a rank"
            )
        A, B = self.factors.A.double(), self.factors.B.double() / left[:, None]
        magnitude = left * row_norms(self.W.double(), A, B, self.factors.scale)
        dtype, bias = torch.promote_types(self.factors.A.dtype, torch.float32), self.factors.bias
        return dataclasses.replace(
            self.factors,
            A=A.to(dtype),
            B=B.to(dtype),
            magnitude=magnitude.to(dtype),
            bias=None if bias is None else (bias.double() / left).to(dtype),
        )


def update_of(factors: Factors, W: Tensor | None = None) -> Update:
    """An adapter's factors in the linear form.

    Args:
        factors: of the site.
        W: (o, i); needed with a DoRA magnitude.

    Source:
        Liu et al. 2024, DoRA, arXiv:2402.09353.
    """
    if factors.magnitude is None:
        return Update(factors, None, W)
    assert W is not None
    A, B = factors.A.double(), factors.B.double()
    share = magnitude_share(factors.magnitude.double(), row_norms(W.double(), A, B, factors.scale))
    rows = torch.where(W.double().square().sum(1) > 0, share - 1, 0.0)  # of a row that is zero nothing is scaled
    dtype = torch.promote_types(factors.B.dtype, torch.float32)
    plain = dataclasses.replace(
        factors,
        B=(B * share[:, None]).to(dtype),
        magnitude=None,
        bias=None if factors.bias is None else (factors.bias.double() * share).to(dtype),
    )
    return Update(plain, rows, W)
