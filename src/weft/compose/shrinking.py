"""`shrink`: an adapter of lower rank, the best there is, and what it loses."""

from __future__ import annotations

import dataclasses
from typing import Any

from weft.compose.assembling import assembled
from weft.compose.job import prepare
from weft.compose.methods import METHODS, Options, check_options
from weft.compose.mixing import carry_out
from weft.compose.parents import AdapterLike, read_parents
from weft.compose.report import MixReport, Mixture, SiteMix
from weft.core.factors import truncate

__all__ = ["shrink"]

_DIRECTION = "DoRA: the errors are those of B A, before the magnitude scales the rows; with base=… they are those of the whole update"


def shrink(
    adapter: AdapterLike,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    base: Any = None,
    data: Any = None,
    progress: bool | None = None,
) -> Mixture:
    """Truncate the spectrum of every site. One of the three limits is given.

    Args:
        adapter: an adapter, or its path.
        rank: largest rank of a site.
        energy: share of ‖ΔW‖² that every site holds, with the fewest directions.
        error: largest ‖ΔW - shrunk‖ / ‖ΔW‖ of a site, with the fewest directions.
        base: as in `weft.combine`; for a DoRA adapter the error is then that of its whole update.
        data: measure what it does to the loss on these.
        progress: as in `weft.combine`.

    Returns:
        The adapter, with a ``report``. Modules trained whole and biases are kept.

    Raises:
        MixError: not exactly one limit, or one out of range.

    Source:
        Eckart and Young 1936, The approximation of one matrix by another of lower rank.

    Example:
        >>> small = weft.shrink("runs/medical", energy=0.99)  # doctest: +SKIP
        >>> small.ranks(), small.report.relative_error  # doctest: +SKIP
        ('3-9', 0.0812)
    """
    options, method = Options(rank=rank, energy=energy, error=error), METHODS["svd"]
    check_options(method, options)
    (parent,) = parents = read_parents([adapter])
    value = parent.adapter
    dora = any(item.magnitude is not None for item in value.factors.values())
    if not dora or base is not None or data is not None:
        return carry_out(parents, method, options, base=base, data=data, progress=progress)
    value.check_finite()
    job = prepare(parents, method, options)
    factors, rows = {}, []
    for path, item in value.factors.items():
        factors[path], lost = (item, 0.0) if rank is not None and item.rank <= rank else truncate(item, **options.limit)
        rows.append(SiteMix(path, factors[path].rank, 1, item.norm(), lost, lost))
    report = MixReport("svd", options.limit, tuple(rows), (_DIRECTION,))
    made = assembled(job, factors, value.modules, value.biases, report)
    return made if made.spec.towers else dataclasses.replace(made, spec=made.spec.replace(bias=value.spec.bias))
