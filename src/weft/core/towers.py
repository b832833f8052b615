"""Parts of a model that have a spec each: found by path, and paths in a part as paths in the whole, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from torch import nn

from weft.core.site import Site
from weft.errors import SpecError, TargetError, did_you_mean, some_names
from weft.spec import LoraSpec

__all__ = ["moved", "one_spec", "towers_of", "under"]


def towers_of(model: nn.Module, spec: LoraSpec) -> dict[str, nn.Module]:
    """The parts of a model that a spec names.

    Raises:
        TargetError: a name that the model has not; names near ones and the parts that there are.
    """
    there = {path: module for path, module in model.named_modules(remove_duplicate=False) if path}
    for name in spec.towers:
        if name not in there:
            parts = [
                path
                for path, child in model.named_children()
                if path != "weft" and any(True for _ in child.parameters())
            ]
            raise TargetError(
                f"LoraSpec.towers: {type(model).__name__} has no part {name!r}.{did_you_mean(name, there)} Its parts: {some_names(parts)}"
            )
    return {name: there[name] for name in spec.towers}


def under(tower: str, paths: Iterable[str]) -> tuple[str, ...]:
    """Paths in a tower as paths in the whole model."""
    return tuple(f"{tower}.{path}" for path in paths)


def one_spec(spec: LoraSpec, sites: Sequence[str], whole: Sequence[str] = ()) -> LoraSpec:
    """A spec by tower as one spec without towers: sites by their whole paths. Ranks and scales are said elsewhere, by site.

    Raises:
        SpecError: settings that one spec has for all sites, and that differ between the towers.
    """
    if not spec.towers:
        return spec
    parts = list(spec.towers.values())
    for name in ("dropout", "bias", "fan_in_fan_out", "dora"):
        said = {tower: getattr(part, name) for tower, part in spec.towers.items()}
        if len(set(said.values())) > 1:
            raise SpecError(
                f"{name} differs between the towers: {', '.join(f'{value!r} in {tower}' for tower, value in said.items())}"
            )
    first = parts[0]
    plain = all(part.rslora for part in parts)
    return LoraSpec(
        rank=first.rank, alpha=first.alpha, targets=tuple(sites) or "all-linear", rslora=plain, dora=first.dora, dropout=first.dropout, bias=first.bias,
        lora_bias=any(part.lora_bias for part in parts), fan_in_fan_out=first.fan_in_fan_out, save_modules=tuple(whole),
    )  # fmt: skip


def moved(site: Site, tower: str) -> Site:
    """A site of a tower as a site of the whole model."""
    owner = f"{tower}.{site.owner}" if site.owner else tower
    host = None if site.host is None else f"{tower}.{site.host}" if site.host else tower
    return dataclasses.replace(site, path=f"{tower}.{site.path}", owner=owner, host=host)
