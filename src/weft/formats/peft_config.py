"""adapter_config.json of PEFT 0.2 to 0.21: checked field by field, and read the way PEFT reads it.

This module does not know tensors: what a config means for a file's keys is in `weft.formats.peft_keys`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.errors import FormatError, UnsupportedError, did_you_mean
from weft.formats.checks import is_number, read_json, shortened

__all__ = ["CONFIG", "NOTHING", "PeftConfig", "first_match", "read_config"]

CONFIG = "adapter_config.json"

NOTHING = "dummy-target-modules"
"""What PEFT takes for an adapter that adapts no module."""

MAX_PATTERN = 65_536
"""Letters in a regular expression."""

Check = tuple[Callable[[Any], bool], str]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return _is_int(value) and 1 <= value < 1 << 31


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def _is_pattern(value: Any) -> bool:
    if not isinstance(value, str) or len(value) > MAX_PATTERN:
        return False
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _is_ending(value: Any) -> bool:
    """An expression for the end of a path, as patterns have it: ``(?i)`` can't stand in the middle."""
    return _is_pattern(value) and _is_pattern(rf"(.*\.)?({value})$")


def _is_targets(value: Any) -> bool:
    return _is_pattern(value) or _is_names(value)


def _is_ranks(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_ending(key) and _is_rank(item) for key, item in value.items())


def _is_alphas(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_ending(key) and is_number(item) and item != 0 for key, item in value.items()
    )


def _is_layers(value: Any) -> bool:
    return all(_is_int(item) and item >= 0 for item in (value if isinstance(value, list) else [value]))


_BOOL: Check = (lambda value: isinstance(value, bool), "true or false")
_TEXT: Check = (lambda value: isinstance(value, str), "text")
_TARGETS: Check = (_is_targets, "a list of names or one regular expression")
_FIELDS: dict[str, Check] = {
    "peft_type": _TEXT,
    "r": (_is_rank, "a whole number of at least 1"),
    "lora_alpha": (lambda value: is_number(value) and value != 0, "a number other than 0"),
    "lora_dropout": (lambda value: is_number(value) and 0 <= value < 1, "a number in [0, 1)"),
    "target_modules": _TARGETS,
    "exclude_modules": _TARGETS,
    "modules_to_save": (_is_names, "a list of names"),
    "target_parameters": (_is_names, "a list of names"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
    "rank_pattern": (_is_ranks, "whole numbers of at least 1 by regular expressions"),
    "alpha_pattern": (_is_alphas, "numbers other than 0 by regular expressions"),
    "layers_to_transform": (_is_layers, "layer indices, whole numbers from 0"),
    "layers_pattern": (lambda value: _is_pattern(value) or _is_names(value), "a name or a list of names"),
    "init_lora_weights": (lambda value: isinstance(value, bool | str), "true, false or a name"),
    "enable_lora": (lambda value: isinstance(value, list) and bool(value) and all(isinstance(v, bool) for v in value), "truth values"),
    "fan_in_fan_out": _BOOL,
    "use_rslora": _BOOL,
    "use_dora": _BOOL,
    "lora_bias": _BOOL,
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
    "peft_version": _TEXT,
}  # fmt: skip
"""Fields that decide what a file means: their check, and what is expected."""

_WITHOUT_EFFECT = frozenset({
    "auto_mapping", "task_type", "inference_mode", "merge_weights", "megatron_core", "runtime_config", "qalora_group_size",
    "eva_config", "corda_config", "lora_ga_config", "loftq_config", "velora_config", "ensure_weight_tying",
})  # fmt: skip
"""Fields that decide about training and convenience, not about what the tensors in the file do."""

_MERGE = "merge it into its base with the PEFT that made it, and train on from there"
_REFUSED = {
    "use_qalora": ("QALoRA pools the inputs of a quantised base", _MERGE),
    "layer_replication": ("it stacks layers of the base several times", "build the replicated base as a model of its own, and set this field to null"),
    "megatron_config": ("it is made for Megatron's parallel layers", "gather its factors with Megatron first"),
    "alora_invocation_tokens": ("an activated LoRA acts only behind certain tokens", "use it with PEFT; weft applies an adapter to all tokens"),
    "arrow_config": ("Arrow routes between several adapters", "load its adapters one by one"),
    "use_bdlora": ("BD-LoRA stores block-diagonal factors", _MERGE),
    "kasa_config": ("KaSA removes parts of the base's weights", _MERGE),
    "monteclora_config": ("Monteclora draws random updates", _MERGE),
    "trainable_token_indices": ("it replaces single rows of an embedding by values that don't add to the base", _MERGE),
}  # fmt: skip
"""Features that change what the factors mean; each with the reason and the way out."""

_PLAIN_STARTS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
REWRITES = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Initialisations by which PEFT writes into the base: the file's factors count from that other base."""


@dataclass(frozen=True)
class PeftConfig:
    """What an adapter_config.json says, with PEFT's defaults for what it doesn't say.

    Attributes:
        path: the file.
        fields: the checked fields that are there and not null.
        notes: what the reader has to tell the user.
    """

    path: Path
    fields: Mapping[str, Any]
    notes: tuple[str, ...]

    def get(self, name: str, default: Any = None) -> Any:
        """A field, or PEFT's default for it."""
        return self.fields.get(name, default)

    @property
    def rslora(self) -> bool:
        """Whether scales are alpha / sqrt(rank)."""
        return bool(self.get("use_rslora", False))

    @property
    def start(self) -> str:
        """Name of the initialisation; ``"default"`` for PEFT's true and false."""
        start = self.get("init_lora_weights", True)
        return start.lower() if isinstance(start, str) else "default"

    def rank_at(self, key: str) -> int:
        """Rank of the module (or parameter) that PEFT calls ``key``."""
        return int(first_match(self.get("rank_pattern", {}), key, self.get("r", 8)))

    def alpha_at(self, key: str) -> float:
        """Alpha of the module (or parameter) that PEFT calls ``key``."""
        return float(first_match(self.get("alpha_pattern", {}), key, self.get("lora_alpha", 8)))

    def scale_at(self, key: str) -> float:
        """What multiplies B @ A there."""
        rank = self.rank_at(key)
        return self.alpha_at(key) / (math.sqrt(rank) if self.rslora else rank)


def first_match(patterns: Mapping[str, float], key: str, default: float) -> float:
    """The value of the first pattern that matches the end of a dotted path, as PEFT chooses it."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", key):
            return value
    return patterns.get(key, default)


def read_config(folder: Path) -> PeftConfig:
    """Read and check the config of an adapter directory.

    Raises:
        FormatError: no JSON object, a field of the wrong type.
        UnsupportedError: another method than LoRA, or a feature that weft has not; each with the way out.
    """
    path = folder / CONFIG
    said = read_json(path, folder)
    method = said.get("peft_type")
    if method is None:
        raise FormatError(
            'missing: nobody can know which method this is; add "peft_type": "LORA" if it is LoRA',
            path=path,
            key="peft_type",
        )
    if method != "LORA":
        raise UnsupportedError(
            f"this is {shortened(str(method))}, not LORA: weft reads LoRA adapters only; use it with PEFT, or merge it there",
            path=path,
            key="peft_type",
        )
    fields = {name: value for name, value in said.items() if value is not None and name in _FIELDS}
    for name, value in fields.items():
        ok, expected = _FIELDS[name]
        if not ok(value):
            raise FormatError(f"got {shortened(repr(value))}; expected {expected}", path=path, key=name)
    for name, (reason, way_out) in _REFUSED.items():
        if said.get(name) not in (None, False, [], {}):
            raise UnsupportedError(f"{reason}, which weft has not: {way_out}", path=path, key=name)
    if isinstance(fields.get("target_modules"), str) and fields.get("layers_to_transform") is not None:
        raise FormatError(
            "can't stand beside a regular expression in target_modules; PEFT refuses this, too",
            path=path,
            key="layers_to_transform",
        )
    return PeftConfig(path, fields, tuple(_notes(said, fields)))


def _notes(said: Mapping[str, Any], fields: Mapping[str, Any]) -> list[str]:
    """What the user has to know about a config that is fine."""
    notes = []
    base = fields.get("base_model_name_or_path")
    if base:
        revision = f" at revision {fields['revision']}" if fields.get("revision") else ""
        notes.append(f"{CONFIG} names the base {shortened(base)}{revision}; there is no fingerprint to compare with")
    mapping = said.get("auto_mapping")
    if isinstance(mapping, dict) and isinstance(mapping.get("base_model_class"), str):
        notes.append(f"auto_mapping says that the base is a {shortened(mapping['base_model_class'])}")
    if said.get("velora_config"):
        notes.append("velora_config compresses activations in training only; ignored")
    if said.get("ensure_weight_tying"):
        notes.append("ensure_weight_tying: the updates of tied layers are read as updates of their own")
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _PLAIN_STARTS and not start.lower().startswith(REWRITES):
        notes.append(f"init_lora_weights={shortened(start)!r} is unknown; read as a plain LoRA")
    unknown = [name for name in said if name not in _FIELDS and name not in _WITHOUT_EFFECT and name not in _REFUSED]
    if unknown:
        hints = "".join(dict.fromkeys(did_you_mean(name, _FIELDS) for name in unknown[:3]))
        notes.append(
            f"fields that weft doesn't know, ignored: {', '.join(repr(shortened(name)) for name in sorted(unknown)[:20])}.{hints}"
        )
    return notes
