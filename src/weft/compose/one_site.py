"""One site of a mixture: what the parents have there, what a method makes of it, and what that cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.compose.dense import dense_blocks, generator_for, nearest
from weft.compose.job import Job
from weft.compose.methods import Entry
from weft.compose.parents import Parent
from weft.compose.report import SiteMix
from weft.compose.updates import Update, update_of
from weft.core.factors import Factors, cut, from_blocks
from weft.errors import MixError

__all__ = ["entries_at", "mix_site"]


def entries_at(live: Sequence[Parent], path: str, job: Job, as_dora: bool) -> list[Entry]:
    """What the parents have at a site, those of weight 0 left out."""
    found: list[tuple[Parent, Factors, float]] = []
    for parent in live:
        item = parent.adapter.factors.get(path)
        weight = 0.0 if item is None else parent.weight_at(path)
        if item is not None and weight:
            found.append((parent, item, weight))
    dora = [parent.name for parent, item, _ in found if item.magnitude is not None]
    W = None
    if job.ground is not None and (dora or (as_dora and job.ground.takes_dora(path))):
        W = job.ground.weight(path, torch.float64)
    if dora and W is None and not _passes(found, job):
        raise MixError(
            f"{path}: {dora[0]!r} is a DoRA adapter, whose update depends on the weights of the base: pass base=… (--base), with which the "
            "mixture is computed"
        )
    wanted = _facts_of(found[0][1]) if found else None
    for parent, item, _ in found:
        if _facts_of(item) != wanted:
            raise MixError(
                f"{path}: the updates of {found[0][0].name!r} and {parent.name!r} differ in kind or shape: {wanted} and {_facts_of(item)}"
            )
    return [
        Entry(Update(item) if W is None else update_of(item, W), weight, parent.adapter.digest)
        for parent, item, weight in found
    ]


def _facts_of(item: Factors) -> tuple[Any, ...]:
    return (item.kind, tuple(item.A.shape[:-2]), item.d_out, item.d_in, tuple(item.kernel), item.groups)


def _passes(found: Sequence[tuple[Parent, Factors, float]], job: Job) -> bool:
    """Whether a site is taken over as it is: one update, whole, with weight 1."""
    return len(found) == 1 and found[0][2] == 1.0 and job.is_plain_sum


def mix_site(path: str, entries: Sequence[Entry], job: Job, as_dora: bool) -> tuple[Factors, SiteMix]:
    """One site of the mixture, and what it cost."""
    only = entries[0].update
    if only.factors.magnitude is not None:  # taken over as it is, see `_passes`
        return only.factors, SiteMix(path, only.factors.rank, 1, None, 0.0, 0.0)
    if job.method.elementwise:
        made, wanted, lost = _by_elements(path, entries, job)
        norm: float | None = wanted
    else:
        target = job.method.run(path, entries, job.options)
        made, norm, lost = _limited(target, _limit(job, entries))
    error = lost / norm if norm else 0.0
    distance = error
    if job.method.wide:
        total = Update.sum([(entry.update, entry.weight) for entry in entries])
        size = total.norm()
        distance = made.distance(total) / size if size else 0.0
    as_dora = as_dora and job.ground is not None and job.ground.takes_dora(path)
    return made.settled(path, as_dora), SiteMix(path, made.factors.rank, len(entries), norm, error, distance)


def _limit(job: Job, entries: Sequence[Entry]) -> dict[str, Any]:
    if job.method.name == "linear":
        return {"rank": max(entry.update.factors.rank for entry in entries)}
    return job.options.limit


def _limited(target: Update, limit: Mapping[str, Any]) -> tuple[Update, float | None, float]:
    """An update within a limit; ‖target‖, where there is a limit; and what was lost of it."""
    if not limit:
        return target, None, 0.0
    if set(limit) == {"rank"} and target.factors.rank <= limit["rank"]:
        return target, target.norm(), 0.0
    if target.rows is None:
        factors, error, norm = cut(target.factors, **limit)
        return Update(factors), norm, error * norm
    norm, size = target.norm(), target.factors.norm()
    if "error" in limit:  # it is a share of the whole update, rows included
        limit = {"error": min(1.0, limit["error"] * norm / size) if size else 1.0}
    factors, error, _ = cut(target.factors, **limit)
    return dataclasses.replace(target, factors=factors), norm, error * size


def _by_elements(path: str, entries: Sequence[Entry], job: Job) -> tuple[Update, float, float]:
    """A method by elements at one site, matrix by matrix (experts, groups); ‖target‖; and what the limit lost of it."""
    options, method = job.options, job.method
    first = entries[0].update.factors
    limit = options.limit or {"rank": sum(entry.update.factors.rank for entry in entries)}
    if "rank" in limit:
        limit = {"rank": max(1, limit["rank"] // first.groups)}
    pairs: list[tuple[Tensor, Tensor]] = []
    wanted = lost = 0.0
    factor = 1.0 if options.scaling is None else options.scaling
    for number in range(first.groups if first.A.dim() == 2 else first.A.shape[0]):

        def updates(number: int = number) -> Iterable[tuple[Tensor, float, torch.Generator]]:
            for entry in entries:
                yield (
                    dense_blocks(entry.update, number),
                    entry.weight,
                    generator_for(options.seed, path, entry.key, number),
                )

        target = method.run(updates, options) * factor
        A, B = nearest(target, seed=options.seed, **limit)
        wanted += float(target.double().square().sum())
        lost += float((target - B @ A).double().square().sum())
        pairs.append((A, B))
    rank = max(A.shape[0] for A, _ in pairs)
    A, B = (torch.stack([_widened(pair[side], rank, side) for pair in pairs]) for side in (0, 1))
    like = dataclasses.replace(first, scale=1.0, bias=_bias_by_elements(path, entries, job))
    return Update(from_blocks(like, A, B)), math.sqrt(wanted), math.sqrt(lost)


def _widened(factor: Tensor, rank: int, side: int) -> Tensor:
    missing = rank - factor.shape[side]
    return nn.functional.pad(factor, (0, 0, 0, missing) if side == 0 else (0, missing))


def _bias_by_elements(path: str, entries: Sequence[Entry], job: Job) -> Tensor | None:
    """B's bias is mixed by the same method, as a vector of its own."""
    held = [entry.update.factors for entry in entries if entry.update.factors.bias is not None]
    if not held:
        return None
    zero = torch.zeros_like(held[0].bias)  # type: ignore[arg-type]

    def updates() -> Iterable[tuple[Tensor, float, torch.Generator]]:
        for entry in entries:
            item = entry.update.factors
            vector = zero if item.bias is None else item.bias * item.scale
            yield vector, entry.weight, generator_for(job.options.seed, path, entry.key, "bias")

    mixed: Tensor = job.method.run(updates, job.options)
    return mixed * (1.0 if job.options.scaling is None else job.options.scaling)
