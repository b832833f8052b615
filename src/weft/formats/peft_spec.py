"""From an adapter_config.json to a LoraSpec that names exactly the sites of the file, and says their real ranks and scales."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from weft.core.factors import Factors
from weft.core.loading import spec_of
from weft.core.patterns import Layers, Names, unmatched_patterns
from weft.errors import FormatError, SpecError
from weft.formats.peft_config import NOTHING, PeftConfig
from weft.spec import LoraSpec

__all__ = ["read_spec"]

_INITS = {"default": "kaiming", "gaussian": "gaussian", "orthogonal": "orthogonal", "eva": "eva"}


def read_spec(
    config: PeftConfig, factors: Mapping[str, Factors], names: Mapping[str, str], modules: tuple[str, ...]
) -> tuple[LoraSpec, list[str]]:
    """The spec of a file, and notes on where it had to differ from the config.

    Args:
        config: as read.
        factors: by site.
        names: what PEFT calls each site.
        modules: paths of the modules that are in the file whole.

    Raises:
        FormatError: a value that no spec can have.
    """
    notes: list[str] = []
    fields = {
        "rank": config.get("r", 8),
        "alpha": float(config.get("lora_alpha", 8)),
        "target_parameters": _parameters(config, factors),
        "rank_pattern": _used(config.get("rank_pattern", {}), names, "rank_pattern", notes),
        "alpha_pattern": _used(config.get("alpha_pattern", {}), names, "alpha_pattern", notes),
        "rslora": config.rslora,
        "dora": config.get("use_dora", False),
        "dropout": float(config.get("lora_dropout", 0.0)),
        "bias": config.get("bias", "none"),
        "lora_bias": config.get("lora_bias", False),
        "fan_in_fan_out": True if config.get("fan_in_fan_out", False) else None,
        "init": _INITS.get(config.start, "kaiming"),
        "save_modules": modules,
        **_places(config, factors, names, notes),
    }  # fmt: skip
    try:
        spec = LoraSpec(**fields)
    except (SpecError, TypeError) as problem:
        raise FormatError(f"no usable settings: {problem}", path=config.path) from None
    if not all(_agrees(spec, path, item) for path, item in factors.items()):
        spec = spec_of(spec, factors).replace(init=spec.init)
    return spec, notes


def _agrees(spec: LoraSpec, path: str, item: Factors) -> bool:
    return spec.rank_at(path) == item.rank and math.isclose(spec.scale_at(path), item.scale, rel_tol=1e-9)


def _parameters(config: PeftConfig, factors: Mapping[str, Factors]) -> tuple[str, ...]:
    bare = [path for path, item in factors.items() if item.kind == "parameter"]
    if not bare:
        return ()
    wanted = Names("target_parameters", tuple(config.get("target_parameters", [])))
    return wanted.entries if all(wanted.find(path) for path in bare) else tuple(bare)


def _used(patterns: Mapping[str, float], names: Mapping[str, str], field: str, notes: list[str]) -> dict[str, float]:
    """Patterns that match something; the others are noted."""
    lost = set(unmatched_patterns(patterns, names.values()))
    if lost:
        notes.append(
            f"{field} has entries that match nothing in the file, left out: {', '.join(sorted(repr(name) for name in lost)[:6])}"
        )
    return {pattern: value for pattern, value in patterns.items() if pattern not in lost}


def _places(
    config: PeftConfig, factors: Mapping[str, Factors], names: Mapping[str, str], notes: list[str]
) -> dict[str, object]:
    """targets, exclude and layers as the config has them, if they name the sites of the file; else the sites themselves."""
    modules = {names[path]: path for path, item in factors.items() if item.kind != "parameter"}
    if not modules:
        return {"targets": () if factors else (NOTHING,)}
    targets = config.get("target_modules")
    exclude = config.get("exclude_modules", ())
    layers = config.get("layers_to_transform")
    layers = (layers if isinstance(layers, list) else [layers]) if layers is not None else []
    pattern = config.get("layers_pattern") or None
    pattern = "|".join(f"(?:{item})" for item in pattern) if isinstance(pattern, list) else pattern
    said = {
        "targets": targets if isinstance(targets, str) else tuple(sorted(targets or [])),
        "exclude": exclude if isinstance(exclude, str) else tuple(sorted(exclude)),
        "layers": tuple(layers) or None,
        "layers_pattern": pattern if layers else None,
    }  # fmt: skip
    exact: dict[str, object] = {"targets": tuple(path for path, item in factors.items() if item.kind != "parameter")}
    if not targets or targets in ("all-linear", "default"):
        notes.append(f"target_modules is {targets!r}, which doesn't say which modules are adapted; taken from the file")
        return exact
    try:
        names_them = _names_all(modules, said)
    except (SpecError, re.error) as problem:
        raise FormatError(f"no usable pattern: {problem}", path=config.path, key="target_modules") from None
    if not names_them:
        notes.append("target_modules and the modules in the file differ; the spec names those in the file")
        return exact
    return said


def _names_all(modules: Mapping[str, str], said: Mapping[str, object]) -> bool:
    """Whether targets, exclude and layers name all these modules."""
    targets = Names("targets", said["targets"])  # type: ignore[arg-type]
    exclude = Names("exclude", said["exclude"])  # type: ignore[arg-type]
    layers = Layers(said["layers"], said["layers_pattern"])  # type: ignore[arg-type]
    return all(
        targets.find(name) and not exclude.find(name) and (name in targets.entries or layers.allow(name))
        for name in modules
    )
