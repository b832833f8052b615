"""`combine`: adapters become one adapter. Exact by default; whatever is approximate says what it lost, site by site."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapter import Provenance
from weft.compose.dense import dense_blocks, generator_for, nearest
from weft.compose.methods import LIMITS, Entry, Method, Options, method_named
from weft.compose.parents import Parent, Weight, all_sites, check_bases, read_parents
from weft.compose.report import MixReport, Mixture, SiteMix
from weft.compose.rest import mix_biases, mix_modules
from weft.compose.updates import Ground, Update, update_of
from weft.core.factors import Factors, cut, from_blocks
from weft.core.loading import spec_of
from weft.errors import MixError, NotFiniteError
from weft.identity import Fingerprint
from weft.spec import LoraSpec

__all__ = ["Job", "assembled", "carry_out", "check_options", "combine", "mix", "prepare", "reported"]

_FORMAT = ("kind", "separator", "as_chat", "mask_prompt", "max_length")
"""What of a recipe says how examples were written: kept where all parents agree, so that a mixture is evaluated as they were trained."""


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
            ``search``, where None is the embedded base. With it, biases are mixed exactly.
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
        ground = None if base is None else Ground(_model(base))
        return mix(prepare(parents, method, options, whole, ground, allow_other_base), progress)
    from weft.compose.losses import Judge

    with Judge.opened(base, data, parents) as judge:
        job = prepare(parents, method, options, whole, Ground(judge.model), allow_other_base)
        return judge.judged(mix(job, progress), job, progress)


def _model(base: Any) -> nn.Module:
    if isinstance(base, nn.Module):
        return base
    from weft.train.opening import open_base

    return open_base(base)[0]


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
        raise MixError(f"method {method.name!r} needs {' or '.join(method.needs)}")
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


def _within(value: Any, low: float, high: float) -> bool:
    if value is None:
        return True
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and low < value <= high
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """What is to be mixed, checked.

    Attributes:
        parents: all that were given. live: those whose weights are not all 0.
    """

    parents: tuple[Parent, ...]
    method: Method
    options: Options
    whole: str
    ground: Ground | None
    allow_other_base: bool
    notes: tuple[str, ...]

    @property
    def live(self) -> tuple[Parent, ...]:
        """The parents that have a part in it."""
        return tuple(parent for parent in self.parents if not parent.is_idle)

    @property
    def is_plain_sum(self) -> bool:
        """Whether the exact sum is asked for, as it is."""
        plain = self.method.name in ("exact", "layerwise", "task_arithmetic")
        return plain and not self.options.limit and self.options.scaling in (None, 1.0)

    def weighted(self, weights: Sequence[Weight], method: Method | None = None, options: Options | None = None) -> Job:
        """The same with other weights, or another method."""
        parents = tuple(dataclasses.replace(p, weight=w) for p, w in zip(self.parents, weights, strict=True))
        return dataclasses.replace(self, parents=parents, method=method or self.method, options=options or self.options)


def prepare(
    parents: tuple[Parent, ...], method: Method, options: Options, whole: str = "same", ground: Ground | None = None,
    allow_other_base: bool = False,
) -> Job:  # fmt: skip
    """Check that parents fit together, and on the base where it is given.

    Raises:
        MixError, BaseMismatchError: they don't.
    """
    notes: list[str] = []
    if ground is None:
        notes += check_bases(parents, allow_other_base)
    for parent in parents:
        if ground is not None:
            ground.check(parent.adapter, allow_other_base)
        if parent.is_idle:
            notes.append(f"{parent.name!r} has weight 0 and no part in the mixture")
    if method.name == "layerwise" and not any(isinstance(parent.weight, Mapping) for parent in parents):
        raise MixError(
            "method 'layerwise' needs an adapter with weights by pattern; with one weight for all sites, method='exact' is meant"
        )
    return Job(parents, method, options, whole, ground, allow_other_base, tuple(notes))


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
            entries = _entries(live, path, job, as_dora)
            if entries:
                factors[path], row = _site(path, entries, job, as_dora)
                _check_finite(path, factors[path], live)
                rows.append(row)
            tick(1)
    report = MixReport(job.method.name, _settings(job), tuple(rows), (*job.notes, *notes, *more))
    return assembled(job, factors, modules, biases, report)


def _counter(what: str, total: int, progress: bool | None, method: Method) -> Any:
    """A bar for what takes time; the others are done before one is seen."""
    if progress is None and method.elementwise:
        from weft.train.progress import counter

        return counter(what, total, progress)
    return contextlib.nullcontext(lambda count: None)


def _settings(job: Job) -> dict[str, Any]:
    found = {item.name: getattr(job.options, item.name) for item in dataclasses.fields(Options)}
    if "seed" not in job.method.takes:
        del found["seed"]
    return {name: value for name, value in found.items() if value is not None}


def _entries(live: Sequence[Parent], path: str, job: Job, as_dora: bool) -> list[Entry]:
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


def _site(path: str, entries: Sequence[Entry], job: Job, as_dora: bool) -> tuple[Factors, SiteMix]:
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


def assembled(
    job: Job,
    factors: Mapping[str, Factors],
    modules: Mapping[str, Any],
    biases: Mapping[str, Tensor],
    report: MixReport,
) -> Mixture:
    """Factors and the rest, with the spec that describes them and where they come from."""
    live = job.live
    provenance = _provenance(job, tuple(modules), report)
    return Mixture(_spec(live, factors, modules, biases), factors, modules, biases, provenance, report=report)


def _spec(
    live: Sequence[Parent], factors: Mapping[str, Factors], modules: Mapping[str, Any], biases: Mapping[str, Tensor]
) -> LoraSpec:
    bare = tuple(path for path, item in factors.items() if item.kind == "parameter")
    ranks = [item.rank for item in factors.values()]
    rank = max(set(ranks), key=ranks.count) if ranks else 1
    specs = [parent.adapter.spec for parent in live]
    orders = {spec.fan_in_fan_out for spec in specs}
    places = tuple(path for path in factors if path not in bare)
    spec = LoraSpec(
        rank=rank,
        alpha=float(rank),
        targets=places or (() if bare else specs[0].targets),
        target_parameters=bare,
        dora=any(item.magnitude is not None for item in factors.values()),
        lora_bias=any(item.bias is not None for item in factors.values()),
        bias=next((spec.bias for spec in specs if spec.bias != "none"), "none") if biases else "none",
        fan_in_fan_out=orders.pop() if len(orders) == 1 else True if True in orders else None,
        save_modules=tuple(modules),
    )
    return spec_of(spec, factors) if factors else spec


def _provenance(job: Job, modules: tuple[str, ...], report: MixReport) -> Provenance:
    live = job.live
    came = [parent.adapter.provenance for parent in live]
    base: Fingerprint | None
    if job.ground is not None and not job.allow_other_base:
        base = job.ground.fingerprint(modules)
    else:  # a fingerprint leaves out what is trained whole: it holds for the same modules only
        base = next((p.adapter.provenance.base for p in live if tuple(p.adapter.modules) == modules), None)
    recipes = [dict(one.recipe) for one in came if one.recipe]
    common = {
        name: recipes[0][name]
        for name in _FORMAT
        if recipes
        and recipes[0].get(name) is not None
        and all(recipe.get(name) == recipes[0][name] for recipe in recipes)
    }
    data = {str(sorted(part.items(), key=str)): part for one in came for part in one.data}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "weft": _version()}
    return Provenance(
        base=base,
        base_name=next((one.base_name for one in came if one.base_name), None),
        data=tuple(data.values()),
        recipe=common or None,
        parents=tuple(parent.facts() for parent in job.parents),
        versions=versions,
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        mixture=report.to_dict(),
    )


@functools.cache
def _version() -> str:
    try:
        return importlib.metadata.version("weft")
    except importlib.metadata.PackageNotFoundError:
        import weft

        return weft.__version__


def reported(mixture: Mixture, **changes: Any) -> Mixture:
    """A mixture with something added to its report, also where a file keeps it."""
    report = dataclasses.replace(mixture.report, **changes)
    provenance = dataclasses.replace(mixture.provenance, mixture=report.to_dict())
    return dataclasses.replace(mixture, report=report, provenance=provenance)
