"""adapter_config.json of an adapter, written so that PEFT adapts exactly its sites, with their ranks and scales.

This module does not know tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from weft.adapter import Adapter
from weft.core.patterns import Names, unmatched_patterns
from weft.core.towers import one_spec
from weft.errors import SpecError, UnsupportedError
from weft.formats.peft_config import NOTHING, first_match
from weft.formats.peft_layout import Layout
from weft.spec import LoraSpec

__all__ = ["settings_of"]


def settings_of(
    adapter: Adapter, layout: Layout, scales: Mapping[str, tuple[int, float]], *, leaf_names: bool = False
) -> dict[str, Any]:
    """The fields of adapter_config.json.

    Fields of later PEFT versions are written only where the adapter needs them, so that earlier ones don't complain.

    Args:
        adapter: for its spec and what is trained beside its factors.
        layout: for the modules that PEFT has to target.
        scales: (rank, scale) by the name that PEFT matches patterns against.
        leaf_names: target modules by the last part of their paths, as servers expect it.

    Raises:
        UnsupportedError: towers whose settings differ where PEFT has one.
    """
    try:
        spec = one_spec(adapter.spec, adapter.sites, tuple(adapter.modules))
    except SpecError as problem:
        raise UnsupportedError(f"PEFT has one setting for all sites of a directory, and {problem}") from None
    alphas = {name: _alpha(spec, name, rank, scale) for name, (rank, scale) in scales.items()}
    ranks = {name: rank for name, (rank, _) in scales.items()}
    rank, rank_pattern = _patterns(ranks, spec.rank, spec.rank_pattern)
    alpha, alpha_pattern = _patterns(alphas, spec.alpha or spec.rank, spec.alpha_pattern)
    base = adapter.provenance.base
    bare = bool(layout.parameters)
    targets, extra = _targets(spec, layout, leaf_names)
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": (base.name if base else None) or adapter.provenance.base_name,
        "revision": base.commit if base else None,
        "inference_mode": True,
        "r": int(rank),
        "lora_alpha": _tidy(alpha),
        "lora_dropout": 0.0 if bare else spec.dropout,
        "target_modules": targets,
        "rank_pattern": {name: int(value) for name, value in rank_pattern.items()},
        "alpha_pattern": {name: _tidy(value) for name, value in alpha_pattern.items()},
        "modules_to_save": list(adapter.modules) or None,
        "bias": spec.bias,
        "fan_in_fan_out": spec.fan_in_fan_out is True and not bare,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_rslora": spec.rslora,
        "use_dora": any(item.magnitude is not None for item in adapter.factors.values()),
    }
    if any(item.bias is not None for item in adapter.factors.values()):
        fields["lora_bias"] = True
    if layout.parameters:
        fields["target_parameters"] = list(layout.parameters)
    return fields | extra


def _alpha(spec: LoraSpec, name: str, rank: int, scale: float) -> float:
    """Alpha from rank and scale; the spec's own number where it means the same."""
    alpha = scale * (math.sqrt(rank) if spec.rslora else rank)
    said = spec.alpha_at(name)
    return said if math.isclose(alpha, said, rel_tol=1e-12) else alpha


def _tidy(value: float) -> float | int:
    """16.0 as 16: PEFT's field is a whole number by type."""
    return int(value) if float(value).is_integer() and abs(value) < 2**53 else value


def _patterns(values: Mapping[str, float], default: float, said: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """A default and the exceptions to it: those of the spec where they are right, else one for each name."""
    if not values:
        return default, {}
    lost = set(unmatched_patterns(said, values))
    kept = {
        pattern: said[pattern] for pattern in sorted(said) if pattern not in lost
    }  # as JSON sorts them: the first match wins
    if all(first_match(kept, name, default) == value for name, value in values.items()):
        return default, kept
    found = list(values.values())
    usual = default if default in found else max(dict.fromkeys(found), key=found.count)
    return usual, {f"^{re.escape(name)}": value for name, value in values.items() if value != usual}


def _targets(spec: LoraSpec, layout: Layout, leaf_names: bool) -> tuple[list[str] | str, dict[str, Any]]:
    """target_modules, and exclude_modules where names alone would match more."""
    if not layout.targets:
        return ([] if layout.parameters else NOTHING), {}
    if leaf_names:
        return sorted({path.rpartition(".")[2] for path in layout.targets}), {}
    if _spec_names_them(spec, layout.targets):
        return list(spec.targets), {}
    if all("." in path for path in layout.targets):
        return list(layout.targets), {}
    return list(layout.targets), {"exclude_modules": _all_but(layout.targets)}


def _spec_names_them(spec: LoraSpec, targets: Sequence[str]) -> bool:
    """Whether the spec is a list of names that PEFT reads as weft does: nothing excluded, all layers, every name used."""
    if isinstance(spec.targets, str) or spec.exclude or spec.layers is not None:
        return False
    names = Names("targets", spec.targets)
    found = [names.find(path) for path in targets]
    used = {entry for entries in found for entry in entries}
    return all(found) and used == set(spec.targets)


def _all_but(targets: Sequence[str]) -> str:
    """An expression that matches every path but these: PEFT takes ``conv1`` for ``layer1.0.conv1``, too."""
    return f"(?!(?:{'|'.join(re.escape(path) for path in targets)})$).*"
