"""Single files of others: loralib's state dicts, diffusers' and kohya's LoRA files.

None of them has a config. What a file doesn't say (loralib's alpha, the dots of kohya's names) has to be given, or is kept as it is
and noted. This module builds adapters from sorted names; `resolve` fits one to a model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.adapter import Adapter, Provenance
from weft.core.factors import Factors
from weft.core.loading import spec_of
from weft.errors import FormatError, KeysError, ShapeError, UnsupportedError, some_names
from weft.formats.checks import is_number, parse_object, shortened
from weft.formats.diffusion import Named, sort_names
from weft.formats.peft_config import first_match
from weft.formats.peft_keys import PREFIX, natural
from weft.formats.peft_layout import decode
from weft.formats.peft_sites import fused_factors
from weft.formats.tensor_files import TensorFile, read_tensors
from weft.spec import LoraSpec

__all__ = ["FILES", "read_file"]

FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
"""What diffusers calls its files."""

_EMBEDDINGS = ("wte", "wpe", "embed_tokens", "word_embeddings", "token_embedding", "shared")


def read_file(
    path: Path,
    *,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
    component: str | None = None,
    allow_partial: bool = False,
) -> Adapter:
    """Read a single file; whose it is, is told by its keys.

    Args:
        path: of the file.
        alpha: for files that don't say it: loralib's, and PEFT's weights without their config.
        enable_lora: for loralib's fused layers, which parts are adapted: ``[True, False, True]`` for query and value.
        component: of a pipeline (``"unet"``, ``"text_encoder"`` …), where the file holds several.
        allow_partial: leave out keys that belong to nothing.

    Raises:
        FormatError: damaged, no factors in it, something has to be said by an argument; names it.
        UnsupportedError: another method.
        KeysError: factors without their partner, keys that belong to nothing.
    """
    found = read_tensors(path)
    keys = list(found.tensors)
    if any(key.endswith((".lora_A", ".lora_B")) for key in keys):
        return _loralib(found, alpha, enable_lora, allow_partial)
    if any(key.startswith(PREFIX) for key in keys) and alpha is None:
        raise FormatError(
            "these are PEFT's weights without their adapter_config.json, which says alpha: put the config beside them, or pass alpha=…",
            path=path,
        )
    return _diffusion(found, alpha, component, allow_partial)


def _finished(
    factors: dict[str, Factors], found: TensorFile, notes: list[str], biases: Mapping[str, Tensor] | None = None
) -> Adapter:
    """The adapter, with a spec that names its sites and says their ranks and scales."""
    if not factors:
        raise FormatError(f"holds no LoRA factors; its keys are {some_names(found.tensors, 3)}", path=found.path)
    ordered = {name: factors[name] for name in sorted(factors, key=natural)}
    first = next(iter(ordered.values()))
    dora = any(item.magnitude is not None for item in ordered.values())
    spec = LoraSpec(rank=first.rank, alpha=first.scale * first.rank, targets=tuple(ordered), dora=dora,
                    lora_bias=any(item.bias is not None for item in ordered.values()))  # fmt: skip
    if not any(bool(item.B.any()) for item in ordered.values()):
        notes.append("every B is zero: this adapter was saved before its first step and changes nothing")
    return Adapter(spec_of(spec, ordered), ordered, biases=biases or {}, provenance=Provenance(notes=tuple(notes)))


# loralib


def _loralib(
    found: TensorFile, alpha: float | None, enable_lora: Sequence[bool] | None, allow_partial: bool
) -> Adapter:
    """Keys end in lora_A and lora_B; loralib's state dict keeps neither alpha nor which parts of a fused layer are adapted."""
    if alpha is None:
        raise FormatError(
            "a state dict of loralib doesn't say its alpha: pass alpha=…, the lora_alpha that it was trained with (loralib's default is 1)",
            path=found.path,
        )
    pairs: dict[str, dict[str, str]] = {}
    biases: dict[str, Tensor] = {}
    strange = []
    for key, tensor in found.tensors.items():
        module, _, leaf = key.rpartition(".")
        if leaf in ("lora_A", "lora_B") and module:
            pairs.setdefault(module, {})[leaf.removeprefix("lora_")] = key
        elif leaf == "bias" and module:
            biases[key] = tensor
        else:
            strange.append(key)
    if strange and not allow_partial:
        raise KeysError(
            f"{len(strange)} tensors are neither factors nor biases: a whole state dict? Save it with loralib.lora_state_dict(model), or pass "
            "allow_partial=True to leave them out", path=found.path, key=shortened(strange[0])
        )  # fmt: skip
    factors = {}
    for module, parts in pairs.items():
        factors[module] = _update(found, module, parts, _loralib_factors(alpha, enable_lora))
    notes = [
        f"loralib: alpha={alpha:g} was given, the file doesn't say it; layers with a fused convolution kernel can't be told from others"
    ]
    notes += [f"{len(strange)} tensors that are no factors were left out ({shortened(strange[0])})"] if strange else []
    return _finished(factors, found, notes, biases)


def _loralib_factors(
    alpha: float, enable_lora: Sequence[bool] | None
) -> Callable[[Mapping[str, Tensor], str], Factors]:
    def build(parts: Mapping[str, Tensor], module: str) -> Factors:
        A, B = parts["A"], parts["B"]
        if A.dim() != 2 or B.dim() != 2:
            raise ShapeError(f"lora_A is {tuple(A.shape)}, lora_B {tuple(B.shape)}; expected two matrices")
        rank = B.shape[1]
        if A.shape[0] == rank:
            item = decode(parts, "linear", alpha / rank, rank)
            return (
                item if module.rpartition(".")[2] not in _EMBEDDINGS else decode(parts, "embedding", alpha / rank, rank)
            )
        if A.shape[0] % rank:
            raise ShapeError(f"lora_A is {tuple(A.shape)}, lora_B {tuple(B.shape)}: the ranks differ")
        if enable_lora is None:
            raise ShapeError(
                f"lora_A has {A.shape[0] // rank} times the rank of lora_B: a fused layer (MergedLinear). Pass enable_lora=…, the parts that are adapted, "
                "such as [True, False, True] for query and value"
            )
        return fused_factors(A, B, enable_lora, rank, alpha / rank)

    return build


# diffusers and kohya


def _diffusion(found: TensorFile, alpha: float | None, component: str | None, allow_partial: bool) -> Adapter:
    named, strange = _sorted(found, allow_partial)
    components = sorted({item.component for item in named})
    if component is not None:
        if component not in components:
            raise FormatError(
                f"has no updates for {component!r}; it has them for {some_names(components)}", path=found.path
            )
        named = [item for item in named if item.component == component]
    elif len(components) > 1:
        sizes = ", ".join(
            f"{name or 'no component'} ({sum(item.component == name for item in named)} sites)" for name in components
        )
        raise FormatError(
            f"holds updates for several models of a pipeline: {sizes}. Say which: component={components[-1]!r}",
            path=found.path,
        )
    settings = _metadata(found, named[0].component if named else "")
    factors = {
        item.path: _update(found, item.path, item.parts, _diffusion_factors(item, settings, alpha)) for item in named
    }
    notes = [f"keys of {'kohya' if any(item.flat for item in named) else 'diffusers'}"]
    if named and named[0].component:
        notes[0] += f", for the {named[0].component} of a pipeline; paths count from that model"
    if any(item.flat for item in named):
        notes.append(
            "names are flattened: dots and underscores of the model's paths look the same. weft.load(path, base=model) fits them to a model"
        )
    if not any("alpha" in item.parts for item in named) and not settings and alpha is None:
        notes.append("the file says no alpha: scale 1, as diffusers and kohya's tools take it")
    notes += (
        [f"{len(strange)} tensors that belong to nothing were left out ({shortened(strange[0])})"] if strange else []
    )
    return _finished(factors, found, notes)


def _sorted(found: TensorFile, allow_partial: bool) -> tuple[list[Named], list[str]]:
    """Sorted names; with ``allow_partial`` also the keys that belong to nothing."""
    if not allow_partial:
        return sort_names(found.tensors, found.path), []
    known, strange = [], []
    for key in found.tensors:
        try:
            sort_names([key], found.path)
            known.append(key)
        except UnsupportedError:
            raise
        except KeysError:
            strange.append(key)
    return sort_names(known, found.path), strange


def _metadata(found: TensorFile, component: str) -> dict[str, Any]:
    """PEFT's settings where newer diffusers put them: as JSON in the header, with the component before each name."""
    text = found.metadata.get("lora_adapter_metadata")
    if not text:
        return {}
    said = parse_object(
        text.encode(), lambda message, key: FormatError(f"lora_adapter_metadata: {message}", path=found.path, key=key)
    )
    start = f"{component}." if component else ""
    return {name.removeprefix(start): value for name, value in said.items() if name.startswith(start)}


def _diffusion_factors(
    item: Named, settings: Mapping[str, Any], alpha: float | None
) -> Callable[[Mapping[str, Tensor], str], Factors]:
    def build(parts: Mapping[str, Tensor], module: str) -> Factors:
        A = parts["A"]
        rank = int(A.shape[0]) if A.dim() else 0
        if A.dim() < 2 or not rank:
            raise ShapeError(f"its first factor is {tuple(A.shape)}; expected (r, d_in)")
        said = parts.get("alpha")
        if said is not None and (said.numel() != 1 or not float(said)):
            raise ShapeError(f"alpha is {tuple(said.shape)}; expected one number other than 0")
        if said is not None:
            scale = float(said) / rank
        else:
            numerator, root = _setting(settings, module, alpha, rank)
            scale = numerator / (math.sqrt(rank) if root else rank)
        tensors = {name: tensor for name, tensor in parts.items() if name != "alpha"}
        return decode(tensors, "conv" if A.dim() > 2 else "linear", scale, rank)

    return build


def _setting(settings: Mapping[str, Any], module: str, alpha: float | None, rank: int) -> tuple[float, bool]:
    """Alpha, and whether it is divided by the root of the rank."""
    patterns = settings.get("alpha_pattern")
    usual = settings.get("lora_alpha", alpha if alpha is not None else rank)
    try:
        value = first_match(patterns, module, usual) if isinstance(patterns, dict) else usual
    except (ValueError, TypeError, RecursionError, re.error) as problem:
        raise ShapeError(f"lora_adapter_metadata: no usable alpha_pattern ({problem})") from None
    if not is_number(value) or not value:
        raise ShapeError(f"lora_adapter_metadata: alpha is {json.dumps(value)[:60]}; expected a number other than 0")
    return float(value), settings.get("use_rslora") is True


def _update(
    found: TensorFile, module: str, keys: Mapping[str, str], build: Callable[[Mapping[str, Tensor], str], Factors]
) -> Factors:
    """Factors of one site; every complaint names the file and a key."""
    key = shortened(next(iter(keys.values())))
    missing = [part for part in ("A", "B") if part not in keys]
    if missing:
        raise KeysError(f"{module!r} has no lora_{missing[0]}: a part of the file is missing", path=found.path, key=key)
    parts = {part: found.tensors[name] for part, name in keys.items()}
    for part, tensor in parts.items():
        if not tensor.is_floating_point() and not (part == "alpha" and tensor.dtype != torch.bool):
            raise FormatError(
                f"{tensor.dtype}: factors are float64, float32, bfloat16 or float16",
                path=found.path,
                key=shortened(keys[part]),
            )
    try:
        return build(parts, module)
    except ShapeError as problem:
        raise FormatError(f"{module!r}: {problem}", path=found.path, key=key) from None
