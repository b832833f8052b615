"""`combine`: adapters become one adapter. Exact by default; whatever is approximate says what it lost, site by site."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from weft.compose.assembling import assembled
from weft.compose.job import Job, prepare
from weft.compose.methods import Method, Options, check_options, method_named
from weft.compose.one_site import entries_at, mix_site
from weft.compose.parents import Parent, Weight, all_sites, read_parents
from weft.compose.report import MixReport, Mixture, SiteMix
from weft.compose.rest import mix_biases, mix_modules
from weft.compose.updates import Ground
from weft.core.factors import Factors
from weft.errors import MixError, NotFiniteError

__all__ = ["carry_out", "combine", "mix", "proved"]


def combine(
    adapters: Iterable[Any],
    weights: Sequence[Weight] | None = None,
    *,
    method: str = "exact",
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    density: float | None = None,
    scaling: float | None = None,
    inner: str | None = None,
    seed: int = 0,
    whole: str = "same",
    base: Any = None,
    data: Any = None,
    search: Any = None,
    evaluations: int = 40,
    allow_other_base: bool = False,
    progress: bool | None = None,
) -> Mixture:
    r"""Mix the updates of adapters, ``Σ weight · ΔW``, or by a method that makes something else of them.

    Args:
        adapters: adapters or paths; or pairs of one and its weight. A weight is a number, 1 if it is left out; or a mapping of patterns to
            numbers for layer-wise weights, as in ``{r"layers\.[0-3]\..*": 0.2, "default": 1.0}``: expressions that match a site's end, as
            in `LoraSpec.rank_pattern`; the first match wins.
        weights: as many as adapters, where they don't stand in pairs.
        method: one of ``weft.compose.METHODS``: exact, svd, linear, task_arithmetic, layerwise, knots, ties, dare, dare_ties, magnitude.
        rank, energy, error: limits of the result, at each site; at most one of them. Methods by elements take the sum of the parents' ranks
            where none is given.
        density: share of the elements that stays, in (0, 1]; for ties, dare, dare_ties, magnitude, knots.
        scaling: what the result is multiplied with (λ in the papers).
        inner: for knots: ``"ties"`` (default), ``"dare_ties"`` or ``"sum"``.
        seed: of everything random. Nothing depends on the order of the adapters.
        whole: what becomes of modules that were trained whole, and of biases: ``"same"``: all adapters have them alike, else it is an error;
            ``"average"``; ``"drop"``; or the name (the path) of the adapter that gives its own.
        base: a model, a (model, tokenizer) pair, a path or a hub id. Needed for DoRA, whose update depends on it, and for ``data`` and
            ``search``, where None is the embedded base. With it, biases are mixed exactly, and the mixture carries golden prompts.
        data: measure what the mixture does to the loss on these; as in `weft.evaluate`.
        search: find the weights with the least loss on these data, see `weft.compose.search`; weights that are given are where it starts.
        evaluations: how often a search may evaluate.
        allow_other_base: mix adapters although their bases differ, or are named differently.
        progress: None: a bar on a terminal; False: silence.

    Returns:
        An `Adapter` with a ``report``: `MixReport.relative_error` over all, ``report.sites`` by site. ``provenance.parents`` has digests and
        weights, ``provenance.mixture`` method, settings and report.

    Raises:
        MixError: an unknown method, options that it doesn't take or that it needs, weights that don't fit, an adapter twice, updates that
            don't add; names the site.
        BaseMismatchError: adapters of different bases.
        NotFiniteError: NaN or infinity in an adapter.
        FormatError, BaseError, DataError: something that can't be read.

    Source:
        See each method.

    Example:
        >>> mixed = weft.combine([(a, 0.7), (b, 0.3)])  # doctest: +SKIP
        >>> small = weft.combine([(a, 1.0), (b, -0.5)], method="svd", rank=16)  # doctest: +SKIP
        >>> small.report.relative_error  # doctest: +SKIP
        0.031
    """
    options = Options(rank, energy, error, density, scaling, inner, seed)
    chosen = method_named(method)
    check_options(chosen, options)
    parents = read_parents(adapters, weights)
    if search is not None:
        from weft.compose.search import find

        return find(parents, chosen, options, whole=whole, base=base, data=search, evaluations=evaluations,
                    allow_other_base=allow_other_base, progress=progress)  # fmt: skip
    return carry_out(parents, chosen, options, whole, base, data, allow_other_base, progress)


def carry_out(
    parents: tuple[Parent, ...], method: Method, options: Options, whole: str = "same", base: Any = None, data: Any = None,
    allow_other_base: bool = False, progress: bool | None = None,
) -> Mixture:  # fmt: skip
    """`combine`, for adapters that were read."""
    if data is None:
        ground = None if base is None else Ground(_model(base, parents))
        job = prepare(parents, method, options, whole, ground, allow_other_base)
        return proved(mix(job, progress), job)
    from weft.compose.losses import Judge

    with Judge.opened(base, data, parents) as judge:
        job = prepare(parents, method, options, whole, Ground(judge.model), allow_other_base)
        return proved(judge.judged(mix(job, progress), job, progress), job)


def _model(base: Any, parents: Sequence[Parent]) -> nn.Module:
    if isinstance(base, nn.Module):
        return base
    from weft.train.opening import open_base, trained_format

    labels = (trained_format(parent.adapter).get("labels") for parent in parents)
    return open_base(base, labels=next(filter(None, labels), None))[0]


def proved(mixture: Mixture, job: Job) -> Mixture:
    """The mixture with golden prompts, where a base was given: those of its parents, with what the mixture says to them on it.

    Without them where that says nothing: on a base that may be another one, or with a module left out that the parents train whole.
    """
    lost = {path for parent in job.live for path in parent.adapter.modules} - set(mixture.modules)
    if job.ground is None or job.allow_other_base or lost:
        return mixture
    from weft.train.proof import proof_of

    proof = proof_of(mixture, job.ground.model, [parent.adapter.proof for parent in job.live])
    return dataclasses.replace(mixture, proof=proof)


def mix(job: Job, progress: bool | None = False) -> Mixture:
    """Carry out a job.

    Raises:
        MixError: nothing is left, or updates don't add. NotFiniteError: NaN or infinity in an adapter.
    """
    live = job.live
    if not live:
        raise MixError("all weights are 0: nothing is left to mix")
    if not job.is_plain_sum:
        for parent in live:
            parent.adapter.check_finite()
    modules, notes = mix_modules(live, job.whole)
    biases, more = mix_biases(live, job.whole, job.ground)
    as_dora = (
        not job.method.elementwise
        and job.ground is not None
        and any(item.magnitude is not None for parent in live for item in parent.adapter.factors.values())
    )
    factors: dict[str, Factors] = {}
    rows: list[SiteMix] = []
    paths = all_sites(live)
    with _counter("mixing", len(paths), progress, job.method) as tick:
        for path in paths:
            entries = entries_at(live, path, job, as_dora)
            if entries:
                factors[path], row = mix_site(path, entries, job, as_dora)
                _check_finite(path, factors[path], live)
                rows.append(row)
            tick(1)
    report = MixReport(job.method.name, _settings(job), tuple(rows), (*job.notes, *notes, *more))
    return assembled(job, factors, modules, biases, report)


def _counter(what: str, total: int, progress: bool | None, method: Method) -> Any:
    """A bar for what takes time; the others are done before one is seen."""
    if progress is None and method.elementwise:
        from weft.train.bars import counter

        return counter(what, total, progress)
    return contextlib.nullcontext(lambda count: None)


def _settings(job: Job) -> dict[str, Any]:
    found = {item.name: getattr(job.options, item.name) for item in dataclasses.fields(Options)}
    if "seed" not in job.method.takes:
        del found["seed"]
    if job.whole != "same":
        found["whole"] = job.whole
    return {name: value for name, value in found.items() if value is not None}


def _check_finite(path: str, item: Factors, live: Sequence[Parent]) -> None:
    """NaN in a parent is NaN in the mixture: only then the parents are searched for it."""
    try:
        item.check_finite(path)
    except NotFiniteError:
        for parent in live:
            parent.adapter.check_finite()
        raise NotFiniteError(
            f"{path}: with these weights the mixture is too large for {item.B.dtype}: take smaller ones"
        ) from None
