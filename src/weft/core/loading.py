"""What has to be true before an adapter goes into a bank, and what a snapshot of it says.

Each check raises an error that names the sites; none changes anything.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapter import Adapter, Provenance
from weft.core.factors import Factors
from weft.core.site import Site, site_at
from weft.core.sites import SiteMap, find_sites, tie_notes
from weft.core.tree import Node, has_plain_forward
from weft.errors import BaseMismatchError, KeysError, ShapeError, SpecError, TargetError, did_you_mean, some_names
from weft.identity import Fingerprint
from weft.spec import LoraSpec

__all__ = [
    "base_weights",
    "check_base",
    "check_complete",
    "check_others_finite",
    "check_shape",
    "expected_sites",
    "factor_dtype",
    "fill_whole",
    "locate",
    "sees_no_rows",
    "shape_key",
    "spec_of",
    "wide",
    "with_base",
]


def shape_key(adapter: Adapter) -> tuple[Any, ...]:
    """What two adapters must have in common to belong at the same places: paths, shapes, kinds, scales."""
    return (
        tuple(
            (
                path,
                item.A.shape,
                item.B.shape,
                item.kind,
                item.kernel,
                item.groups,
                item.scale,
                item.magnitude is None,
                item.bias is None,
            )
            for path, item in adapter.factors.items()
        ),
        tuple(adapter.modules),
        tuple(adapter.biases),
    )


def check_others_finite(adapter: Adapter) -> None:
    """Refuse NaN and infinity in scales, modules and biases; the factors are checked where they are copied.

    Raises:
        NotFiniteError: names the tensor.
    """
    wrong = any(not math.isfinite(item.scale) for item in adapter.factors.values())
    others = [*(t for module in adapter.modules.values() for t in module.values()), *adapter.biases.values()]
    if wrong or not all(bool(torch.isfinite(tensor).all()) for tensor in others):
        adapter.check_finite()


def sees_no_rows(path: str) -> bool:
    """Whether a layer is one of several experts: it gets the tokens that were chosen for it, from any row."""
    return any(part in ("experts", "expert") for part in path.split("."))


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
            "allow_other_base=True (--allow-other-base) if you know that they are interchangeable"
        )


def locate(nodes: Mapping[str, Node], adapter: Adapter) -> SiteMap:
    """The sites, biases and modules of the model that an adapter's paths name: one lookup a path.

    Args:
        nodes: of the model, see `tree.by_path`.
        adapter: whose paths.

    Raises:
        KeysError: paths that the model has not, with near misses; a site inside of a module that is replaced whole.
        ShapeError, SpecError: an update that doesn't fit its site.
    """
    sites, missing = {}, []
    for path, factors in adapter.factors.items():
        try:
            bare = factors.kind == "parameter"
            site = site_at(nodes, path, bare=bare, fan_in_fan_out=adapter.spec.at(path).fan_in_fan_out)
        except TargetError as problem:
            raise KeysError(f"the adapter's site {path!r} is none in this model: {problem}") from None
        if site is None:
            missing.append(path)
        else:
            check_shape(site, factors)
            check_features(site, dora=factors.magnitude is not None, lora_bias=factors.bias is not None)
            sites[path] = site
    missing += [path for path in adapter.modules if path not in nodes]
    missing += [path for path in adapter.biases if not _has_parameter(nodes, path)]
    if missing:
        known = [*nodes, *(node.path_of(name) for node in nodes.values() for name, _ in node.parameters())]
        raise KeysError(
            f"the adapter has {len(missing)} sites that the model has not: {some_names(missing)}.{did_you_mean(missing[0], known)}"
        )
    inside = [
        path for path in (*sites, *adapter.biases) if any(f"{path}.".startswith(f"{p}.") for p in adapter.modules)
    ]
    if inside:
        raise KeysError(f"{some_names(inside)}: the adapter adapts what it also replaces whole; one of them has to go")
    whole = [(path, nodes[path].module) for path in adapter.modules]
    notes = tie_notes({id(node): node for node in nodes.values()}.values(), sites.values(), whole)
    return SiteMap(tuple(sites.values()), tuple(adapter.modules), tuple(adapter.biases), tuple(notes))


def _has_parameter(nodes: Mapping[str, Node], path: str) -> bool:
    owner, _, name = path.rpartition(".")
    return owner in nodes and nodes[owner].module._parameters.get(name) is not None


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


def check_features(site: Site, *, dora: bool = False, dropout: bool = False, lora_bias: bool = False) -> None:
    """Combinations that a kind of layer can't have, refused by name rather than ignored.

    Raises:
        SpecError: names the feature and the site.
    """
    bare = site.kind in ("attention", "parameter")
    refused = (
        (
            dora and (bare or site.groups > 1),
            "dora",
            "a bare parameter, an attention's in_proj or a grouped convolution",
        ),
        (dropout and site.kind == "parameter", "dropout", "a bare parameter, whose input nobody knows"),
        (lora_bias and site.kind in ("parameter", "embedding"), "lora_bias", "a bare parameter or an embedding"),
    )
    for broken, feature, what in refused:
        if broken:
            raise SpecError(
                f"LoraSpec.{feature} is not defined for {what}: {site.path!r}. Leave it out with exclude=[…], or give it an "
                "adapter of its own"
            )
    own = _original_class(site.module)
    if site.kind == "embedding" and not (has_plain_forward(own) or hasattr(site.module, "embed_scale")):
        raise SpecError(
            f"{site.path!r} is a {own.__name__}, an embedding that does more than look up rows: what its update would be, nobody knows. "
            "Leave it out with exclude=[…], or train it whole with save_modules=[…]"
        )


def _original_class(module: nn.Module) -> type:
    return getattr(type(module), "_weft_original", type(module))


def expected_sites(model: nn.Module, spec: LoraSpec) -> frozenset[str]:
    """The sites that a spec names on this model; none where it can't be told (a foreign list that matches in part)."""
    try:
        return frozenset(site.path for site in find_sites(model, spec).sites)
    except TargetError:
        return frozenset()


def check_complete(found: SiteMap, expected: frozenset[str]) -> None:
    """Refuse an adapter that lacks sites which its own spec names.

    Raises:
        KeysError: names them.
    """
    missing = sorted(expected - {site.path for site in found.sites})
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


def with_base(provenance: Provenance, base: Fingerprint, towers: Mapping[str, Fingerprint]) -> Provenance:
    """Provenance with this base, and its parts where these have specs of their own."""
    return dataclasses.replace(provenance, base=base, towers=towers)


def spec_of(spec: LoraSpec, factors: Mapping[str, Factors]) -> LoraSpec:
    """The spec that describes factors as they are.

    A starting product doubles the ranks, and data-driven initialisations spread them: ranks and alphas are then written down by
    site, and the initialisation, which has been used up, is the plain one.
    """
    if spec.towers:
        parts = {
            name: {path[len(name) + 1 :]: item for path, item in factors.items() if spec.tower_of(path) == name}
            for name in spec.towers
        }
        return spec.replace(towers={name: spec_of(tower, parts[name]) for name, tower in spec.towers.items()})
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
