"""What has to be true before an adapter goes into a bank, and what a snapshot of it says.

Each check raises an error that names the sites; none changes anything.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from weft.adapter import Adapter, Provenance
from weft.core.factors import Factors
from weft.core.sites import Site, SiteMap, find_sites
from weft.errors import BaseMismatchError, KeysError, ShapeError, SpecError, TargetError, did_you_mean, some_names
from weft.identity import Fingerprint
from weft.spec import LoraSpec

__all__ = [
    "base_weights",
    "check_base",
    "check_complete",
    "check_shape",
    "expected_sites",
    "factor_dtype",
    "fill_whole",
    "locate",
    "spec_of",
    "wide",
    "with_base",
]


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is trained beside weights of ``dtype``: at least float32."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.float32


def factor_dtype(model: nn.Module) -> torch.dtype:
    """Dtype of factors on this base: at least float32, float64 on a float64 base."""
    first = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)
    return wide(first)


def base_weights(model: nn.Module, without: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of everything that is the base: not slots, and not below the paths in ``without``."""
    for name, tensor in model.state_dict().items():
        mine = ".weft." in f".{name}"
        if not mine and not any(name == path or name.startswith(f"{path}.") for path in without):
            yield name, tensor


def check_base(adapter: Adapter, here: Fingerprint) -> None:
    """Refuse an adapter of another base.

    The same architecture, configuration and layout in another dtype passes: one base, loaded at another precision.

    Raises:
        BaseMismatchError: says what differs.
    """
    made_for = adapter.provenance.base
    if made_for is None:
        return
    differences = here.differences(made_for)
    if here.dtype != made_for.dtype:
        differences = [item for item in differences if not item.startswith("dtype")]
        same = here.rounded == made_for.rounded
        if not same:
            differences.append("values of the weights, compared at the precision that both dtypes have")
    if differences:
        name = f" ({made_for.name})" if made_for.name else ""
        raise BaseMismatchError(
            f"the adapter was made for another base{name}: {'; '.join(differences)}. Load the base that it was trained on, or pass "
            "allow_other_base=True if you know that they are interchangeable"
        )


def locate(model: nn.Module, adapter: Adapter) -> SiteMap:
    """The sites, biases and modules of the model that an adapter's paths name.

    Raises:
        KeysError: paths that the model has not, with near misses.
    """
    bare = tuple(path for path, item in adapter.factors.items() if item.kind == "parameter")
    named = tuple(path for path in adapter.factors if path not in set(bare))
    fan = adapter.spec.fan_in_fan_out
    spec = LoraSpec(targets=named, target_parameters=bare, save_modules=tuple(adapter.modules), fan_in_fan_out=fan)
    if named or bare or adapter.modules:
        try:
            found = find_sites(model, spec) if named or bare else find_whole(model, spec)
        except SpecError as problem:
            raise KeysError(f"the adapter has sites that {type(model).__name__} has not: {problem}") from None
    else:
        found = SiteMap(())
    exact = tuple(site for site in found.sites if site.path in adapter.factors)
    missing = [path for path in adapter.factors if path not in {site.path for site in exact}]
    parameters = dict(model.named_parameters())
    missing += [path for path in adapter.biases if path not in parameters]
    missing += [path for path in adapter.modules if path not in set(found.save_modules)]
    if missing:
        raise KeysError(
            f"the adapter has {len(missing)} sites that {type(model).__name__} has not: {some_names(missing)}."
            f"{did_you_mean(missing[0], parameters)}"
        )
    return dataclasses.replace(found, sites=exact, biases=tuple(adapter.biases), save_modules=tuple(adapter.modules))


def find_whole(model: nn.Module, spec: LoraSpec) -> SiteMap:
    """The modules that an adapter without factors names."""
    there = dict(model.named_modules())
    return SiteMap((), tuple(path for path in spec.save_modules if path in there))


def check_shape(site: Site, factors: Factors) -> None:
    """Refuse factors that don't fit their site.

    Raises:
        ShapeError: names the site and both shapes.
    """
    experts = (site.experts,) if site.experts else ()
    got = (*factors.A.shape[:-2], factors.d_out, factors.d_in)
    expected = (*experts, site.d_out, site.d_in)
    if site.experts == 1 and got == expected[1:]:
        got = expected
    if got != expected or tuple(factors.kernel) != tuple(site.kernel) or factors.groups != site.groups:
        raise ShapeError(
            f"{site.path}: the adapter's update is {got} {factors.kernel or ''}, the site of the base is {expected} {site.kernel or ''}"
            " (d_out, d_in): it was made for another model"
        )


def expected_sites(model: nn.Module, spec: LoraSpec) -> frozenset[str]:
    """The sites that a spec names on this model; none where it can't be told (a foreign list that matches in part)."""
    try:
        return frozenset(site.path for site in find_sites(model, spec).sites)
    except TargetError:
        return frozenset()


def check_complete(adapter: Adapter, expected: frozenset[str]) -> None:
    """Refuse an adapter that lacks sites which its own spec names.

    Raises:
        KeysError: names them.
    """
    missing = sorted(expected - set(adapter.factors))
    if missing:
        raise KeysError(
            f"the adapter's spec names {len(expected)} sites of this model, its file has no factors for {len(missing)} of them: "
            f"{some_names(missing)}. A part of the file is missing; pass allow_partial=True to load the rest"
        )


def fill_whole(clone: nn.Module, tensors: Mapping[str, Tensor], path: str) -> None:
    """Put an adapter's module into a copy of the base's.

    Raises:
        KeysError: other names than the module has. ShapeError: other shapes.
    """
    own = clone.state_dict()
    wrong = sorted(set(own) ^ set(tensors))
    if wrong:
        raise KeysError(f"{path}: the adapter's module and the base's differ in {some_names(wrong)}")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise ShapeError(
                f"{path}.{name}: {tuple(tensor.shape)} in the adapter, {tuple(own[name].shape)} in the base"
            )
    clone.load_state_dict(dict(tensors))


def with_base(provenance: Provenance, base: Fingerprint) -> Provenance:
    """Provenance with this base."""
    return dataclasses.replace(provenance, base=base)


def spec_of(spec: LoraSpec, factors: Mapping[str, Factors]) -> LoraSpec:
    """The spec that describes factors as they are.

    A starting product doubles the ranks, and data-driven initialisations spread them: ranks and alphas are then written down by
    site, and the initialisation, which has been used up, is the plain one.
    """
    if all(
        item.rank == spec.rank_at(path) and _near(item.scale, spec.scale_at(path)) for path, item in factors.items()
    ):
        return spec

    def alpha(item: Factors) -> float:
        return item.scale * (math.sqrt(item.rank) if spec.rslora else item.rank)

    ranks = sorted(item.rank for item in factors.values())
    usual = max(set(ranks), key=ranks.count)
    alphas = [alpha(item) for item in factors.values()]
    usual_alpha = max(set(alphas), key=alphas.count)
    return spec.replace(
        rank=usual,
        alpha=usual_alpha,
        rank_pattern={_literal(path): item.rank for path, item in factors.items() if item.rank != usual},
        alpha_pattern={
            _literal(path): alpha(item) for path, item in factors.items() if not _near(alpha(item), usual_alpha)
        },
        init="kaiming",
    )


def _literal(path: str) -> str:
    return "^" + path.replace(".", r"\.")


def _near(left: float, right: float) -> bool:
    return math.isclose(left, right, rel_tol=1e-9)
