"""Mixed factors become an adapter: with the spec that describes them, and where they come from."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.adapter import Provenance
from weft.compose.job import Job
from weft.compose.parents import Parent
from weft.compose.report import MixReport, Mixture
from weft.core.factors import Factors
from weft.core.loading import spec_of
from weft.identity import Fingerprint
from weft.spec import LoraSpec

__all__ = ["assembled", "reported"]

_FORMAT = ("kind", "separator", "as_chat", "mask_prompt", "max_length")
"""What of a recipe says how examples were written: kept where all parents agree, so that a mixture is evaluated as they were trained."""


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
    towers = tuple(live[0].adapter.spec.towers)
    if towers and all(set(parent.adapter.spec.towers) == set(towers) for parent in live):
        return _spec_by_tower(live, towers, factors, modules, biases)
    return _one_spec([parent.adapter.spec for parent in live], factors, tuple(modules), bool(biases))


def _spec_by_tower(
    live: Sequence[Parent],
    towers: Sequence[str],
    factors: Mapping[str, Factors],
    modules: Mapping[str, Any],
    biases: Mapping[str, Tensor],
) -> LoraSpec:
    """Towers stay towers where all parents have the same ones."""
    specs = {}
    for name in towers:
        inner: list[dict[str, Any]] = [
            {path[len(name) + 1 :]: value for path, value in values.items() if path.startswith(f"{name}.")}
            for values in (factors, modules, biases)
        ]
        specs[name] = _one_spec([p.adapter.spec.towers[name] for p in live], inner[0], tuple(inner[1]), bool(inner[2]))
    outer = tuple(path for path in modules if not any(path.startswith(f"{name}.") for name in towers))
    return LoraSpec(towers=specs, save_modules=outer)


def _one_spec(
    specs: Sequence[LoraSpec], factors: Mapping[str, Factors], modules: tuple[str, ...], biased: bool
) -> LoraSpec:
    bare = tuple(path for path, item in factors.items() if item.kind == "parameter")
    ranks = [item.rank for item in factors.values()]
    rank = max(set(ranks), key=ranks.count) if ranks else 1
    specs = [part for spec in specs for part in spec.everywhere()]
    orders = {spec.fan_in_fan_out for spec in specs}
    places = tuple(path for path in factors if path not in bare)
    spec = LoraSpec(
        rank=rank,
        alpha=float(rank),
        targets=places or (() if bare or modules else specs[0].targets),
        target_parameters=bare,
        dora=any(item.magnitude is not None for item in factors.values()),
        lora_bias=any(item.bias is not None for item in factors.values()),
        bias=next((spec.bias for spec in specs if spec.bias != "none"), "none") if biased else "none",
        fan_in_fan_out=orders.pop() if len(orders) == 1 else True if True in orders else None,
        save_modules=modules,
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
    towers = live[0].adapter.provenance.towers
    same = all(one.towers.keys() == towers.keys() for one in came)
    return Provenance(
        base=base,
        towers=towers if same else {},
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
