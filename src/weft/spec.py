"""LoraSpec: what to adapt, and how.

A frozen value that knows nothing of any model: patterns are turned into sites by `weft.core.sites`. An unknown key
is an error, never ignored.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weft.errors import SpecError, did_you_mean

__all__ = ["BATCH_NORMS", "BIASES", "INITS", "LoraSpec"]

INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva", "lora_ga")
BIASES = ("none", "all", "lora_only")
BATCH_NORMS = ("frozen", "adapted", "saved")


@dataclass(frozen=True)
class LoraSpec:
    """What to adapt and how. Immutable; compare with ``==``; change with `replace`.

    Args:
        rank: rank of every update that `rank_pattern` doesn't name.
        alpha: numerator of the scale, ``alpha / rank`` (rsLoRA: ``alpha / sqrt(rank)``). Defaults to `rank`.
        targets: module names or dotted suffixes; or one regular expression (matched against the whole path); or
            ``"all-linear"`` (every linear layer but the output head); or ``"default"`` (the architecture's usual choice).
        target_parameters: names or suffixes of bare parameters, such as ``"experts.gate_up_proj"``: a matrix
            (d_out, d_in) or stacked experts (E, d_out, d_in).
        exclude: names, suffixes or one regular expression; never adapted, also where `targets` matches.
        layers: indices of the layers to adapt; None: all. `layers_pattern` names the list that they count (``"layers"``,
            ``"h"``); None: the first number in a path.
        rank_pattern: rank by site: a regular expression that matches a path's end, as in ``{"q_proj": 4}``; the
            first match wins.
        alpha_pattern: alpha by site, in the same way.
        rslora: rank-stabilised scale (Kalajdzievski 2023, arXiv:2312.03732).
        dora: learn magnitude and direction apart (Liu et al. 2024, arXiv:2402.09353).
        dropout: probability that an input element of an update is dropped in training.
        bias: which biases of the model are trained with the adapter and saved in it: ``"none"``, ``"lora_only"``
            (those of adapted sites) or ``"all"``.
        lora_bias: give B a bias of its own.
        fan_in_fan_out: weights are stored as (d_in, d_out). None: recognised by the layer's class.
        init: one of `INITS`; ``"pissa_niter_8"`` selects PiSSA's fast randomised decomposition.
        save_modules: names or suffixes of modules that are trained whole and saved with the adapter (a head).
        batch_norm: what becomes of normalisations with running statistics. ``"frozen"``: the base's statistics, in training too;
            ``"adapted"``: the adapter has statistics of its own, which follow its data; ``"saved"``: weights and biases of these
            layers are trained as well. The last two are saved with the adapter, like `save_modules`.
        towers: a spec by part of the model: ``{"text_model": LoraSpec(...), "vision_model": LoraSpec(...)}``. Its paths and
            patterns count from that part. Beside it only `save_modules` may be set, for what stands outside of the parts.

    Raises:
        SpecError: a value of the wrong type or out of range; names the field, what it got and what is allowed.

    Source:
        Hu et al. 2021, LoRA, arXiv:2106.09685.

    Example:
        >>> spec = LoraSpec(rank=8, alpha=16, rank_pattern={"down_proj": 2})
        >>> spec.scale_at("model.layers.0.mlp.up_proj"), spec.scale_at("model.layers.0.mlp.down_proj")
        (2.0, 8.0)
    """

    rank: int = 8
    alpha: float | None = None
    targets: str | tuple[str, ...] = "all-linear"
    target_parameters: tuple[str, ...] = ()
    exclude: str | tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    bias: str = "none"
    lora_bias: bool = False
    fan_in_fan_out: bool | None = None
    init: str = "kaiming"
    save_modules: tuple[str, ...] = ()
    batch_norm: str = "frozen"
    towers: Mapping[str, LoraSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("targets", "exclude"):
            if not isinstance(getattr(self, name), str):
                object.__setattr__(self, name, _names(name, getattr(self, name)))
        for name in ("target_parameters", "save_modules"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        if self.layers is not None:
            object.__setattr__(self, "layers", _indices(self.layers))
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                raise SpecError(f"LoraSpec.{name}: got {value!r}; expected a mapping of patterns to numbers")
            object.__setattr__(self, name, dict(value))
        object.__setattr__(self, "towers", _towers(self.towers))
        if self.alpha is None and _is_rank(self.rank):
            object.__setattr__(self, "alpha", float(self.rank))
        _check(self)
        for name in ("alpha", "dropout"):  # 16 and 16.0 are one spec, also in files and digests
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "alpha_pattern", {key: float(value) for key, value in self.alpha_pattern.items()})
        if self.towers:
            _check_towers(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoraSpec) and repr(self) == repr(
            other
        )  # order counts in patterns: the first match wins

    def __hash__(self) -> int:
        return hash(repr(self))

    def tower_of(self, path: str) -> str | None:
        """The tower that a path is in; None outside of all, and where there are none."""
        return next((name for name in self.towers if path == name or path.startswith(f"{name}.")), None)

    def at(self, path: str) -> LoraSpec:
        """The spec that counts at ``path``: its tower's, or this one."""
        tower = self.tower_of(path)
        return self if tower is None else self.towers[tower]

    def everywhere(self) -> tuple[LoraSpec, ...]:
        """The specs of all towers, or this one."""
        return tuple(self.towers.values()) or (self,)

    def rank_at(self, path: str) -> int:
        """Rank of the site at ``path``."""
        tower = self.tower_of(path)
        if tower is not None:
            return self.towers[tower].rank_at(path[len(tower) + 1 :])
        return int(_first_match(self.rank_pattern, path, self.rank))

    def alpha_at(self, path: str) -> float:
        """Alpha of the site at ``path``."""
        tower = self.tower_of(path)
        if tower is not None:
            return self.towers[tower].alpha_at(path[len(tower) + 1 :])
        return float(_first_match(self.alpha_pattern, path, self.alpha or self.rank))

    def scale_at(self, path: str, rank: int | None = None) -> float:
        """``alpha / rank`` of the site at ``path``, or ``alpha / sqrt(rank)`` with rsLoRA.

        Args:
            path: dotted path of the site.
            rank: the site's real rank where it is not the pattern's (after EVA's redistribution).
        """
        rank = self.rank_at(path) if rank is None else rank
        return self.alpha_at(path) / (math.sqrt(rank) if self.at(path).rslora else rank)

    def replace(self, **changes: Any) -> LoraSpec:
        """A copy with some fields changed. An unknown field raises SpecError."""
        return LoraSpec.from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain data (lists, dicts, numbers, text), ready for JSON and YAML."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        values["towers"] = {name: tower.to_dict() for name, tower in self.towers.items()}
        return {name: list(value) if isinstance(value, tuple) else _plain(value) for name, value in values.items()}

    def changes(self) -> dict[str, Any]:
        """The fields that differ from the defaults, as plain data."""
        defaults = LoraSpec().to_dict()
        changed = {name: value for name, value in self.to_dict().items() if value != defaults[name]}
        if self.towers:
            changed["towers"] = {name: tower.changes() for name, tower in self.towers.items()}
        return changed

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraSpec:
        """The inverse of `to_dict`; missing keys take their defaults.

        Raises:
            SpecError: an unknown key, with the nearest known one.
        """
        known = [item.name for item in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise SpecError(
                    f"LoraSpec has no field {name!r}.{did_you_mean(str(name), known)} Fields: {', '.join(known)}"
                )
        return cls(**values)


def _towers(value: Any) -> dict[str, LoraSpec]:
    if not isinstance(value, Mapping):
        raise SpecError(f"LoraSpec.towers: got {value!r}; expected a mapping of parts of the model to specs")
    found = {}
    for name, spec in value.items():
        if not isinstance(name, str) or not name or not all(name.split(".")):
            raise SpecError(f"LoraSpec.towers: got the name {name!r}; expected the path of a part of the model")
        if not isinstance(spec, LoraSpec | Mapping):
            raise SpecError(f"LoraSpec.towers[{name!r}]: got {spec!r}; expected a LoraSpec")
        found[name] = spec if isinstance(spec, LoraSpec) else LoraSpec.from_dict(spec)
        if found[name].towers:
            raise SpecError(f"LoraSpec.towers[{name!r}] has towers itself; name the inner parts by their whole paths")
    return found


def _check_towers(spec: LoraSpec) -> None:
    """What is said by tower can't be said for all as well."""
    odd = [name for name in spec.changes() if name not in ("towers", "save_modules")]
    if odd:
        raise SpecError(
            f"LoraSpec.{odd[0]} stands beside towers={list(spec.towers)}; say it in the spec of each tower: beside them only "
            "save_modules is read"
        )
    for name in spec.towers:
        inside = next((other for other in spec.towers if other.startswith(f"{name}.")), None)
        if inside is not None:
            raise SpecError(f"LoraSpec.towers: {inside!r} is a part of {name!r}; towers can't stand in each other")


def _indices(value: Any) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,)
    if not isinstance(value, Sequence | set | frozenset | range) or isinstance(value, str):
        raise SpecError(f"LoraSpec.layers: got {value!r}; expected layer indices, whole numbers from 0")
    return tuple(sorted(value)) if isinstance(value, set | frozenset) else tuple(value)


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _names(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Sequence | set | frozenset) or not all(isinstance(item, str) and item for item in value):
        raise SpecError(f"LoraSpec.{name}: got {value!r}; expected a list of names")
    return tuple(sorted(value)) if isinstance(value, set | frozenset) else tuple(value)


@functools.lru_cache(maxsize=4096)
def _ends_with(pattern: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _first_match(patterns: Mapping[str, float], path: str, default: float) -> float:
    return (
        next((value for pattern, value in patterns.items() if _ends_with(pattern, path)), default)
        if patterns
        else default
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _check(spec: LoraSpec) -> None:
    """Every rule of a spec, one line each."""
    init_ok = spec.init in INITS or (isinstance(spec.init, str) and re.fullmatch(r"pissa_niter_[1-9]\d*", spec.init))
    rules: tuple[tuple[str, Any, bool, str], ...] = (
        ("rank", spec.rank, _is_rank(spec.rank), "a whole number of at least 1"),
        ("alpha", spec.alpha, _is_number(spec.alpha) and spec.alpha != 0, "a finite number other than 0"),
        ("targets", spec.targets, len(spec.targets) > 0 or bool(spec.target_parameters or spec.save_modules), "at least one name"),
        ("dropout", spec.dropout, _is_number(spec.dropout) and 0 <= spec.dropout < 1, "a number in [0, 1)"),
        ("bias", spec.bias, spec.bias in BIASES, f"one of {BIASES}"),
        ("batch_norm", spec.batch_norm, spec.batch_norm in BATCH_NORMS, f"one of {BATCH_NORMS}"),
        ("init", spec.init, bool(init_ok), f"one of {INITS} or 'pissa_niter_N'"),
        ("fan_in_fan_out", spec.fan_in_fan_out, spec.fan_in_fan_out is None or isinstance(spec.fan_in_fan_out, bool),
         "True, False or None"),
        ("layers_pattern", spec.layers_pattern, spec.layers_pattern is None or isinstance(spec.layers_pattern, str),
         "a name or None"),
    )  # fmt: skip
    for name, value, ok, expected in rules:
        if not ok:
            raise SpecError(f"LoraSpec.{name}: got {value!r}; expected {expected}")
    for name in ("rslora", "dora", "lora_bias"):
        if not isinstance(getattr(spec, name), bool):
            raise SpecError(f"LoraSpec.{name}: got {getattr(spec, name)!r}; expected True or False")
    if spec.layers is not None and not all(
        _is_rank(index) or (index == 0 and _is_number(index)) for index in spec.layers
    ):
        raise SpecError(f"LoraSpec.layers: got {spec.layers!r}; expected layer indices, whole numbers from 0")
    for name, allowed, expected in (
        ("rank_pattern", _is_rank, "a whole number of at least 1"),
        ("alpha_pattern", lambda value: _is_number(value) and value != 0, "a finite number other than 0"),
    ):
        for pattern, value in getattr(spec, name).items():
            if not isinstance(pattern, str) or not _compiles(rf"(.*\.)?({pattern})$"):
                raise SpecError(f"LoraSpec.{name}: {pattern!r} is not a regular expression")
            if not allowed(value):
                raise SpecError(f"LoraSpec.{name}[{pattern!r}]: got {value!r}; expected {expected}")
    for name in ("targets", "exclude"):
        value = getattr(spec, name)
        if isinstance(value, str) and value not in ("all-linear", "default") and value and not _compiles(value):
            raise SpecError(
                f"LoraSpec.{name}: {value!r} is not a valid regular expression; give a list for plain names"
            )
