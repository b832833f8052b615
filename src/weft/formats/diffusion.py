"""The names in LoRA files of diffusers and of kohya's trainers, taken apart.

    unet.down_blocks.0….attn1.to_q.lora.down.weight               diffusers; lora_A for "down" in newer ones
    unet.down_blocks.0….attn1.processor.to_q_lora.down.weight     diffusers, first generation
    lora_unet_down_blocks_0_…_attn1_to_q.lora_down.weight         kohya; dots became underscores
    <name>.alpha                                                  a number: scale = alpha / rank; without it the scale is 1

A file may hold updates for several models of a pipeline, its components. This module does not know shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from weft.errors import KeysError, UnsupportedError
from weft.formats.checks import shortened

__all__ = ["COMPONENTS", "Named", "sort_names"]

COMPONENTS = (
    "unet",
    "transformer",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "prior",
    "controlnet",
    "diffusion_model",
)
_FLAT = {"unet": "unet", "te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_3",
         "transformer": "transformer", "prior": "prior"}  # fmt: skip
_ENDS = (
    (r"[._]lora_down\.weight", "A"), (r"[._]lora_up\.weight", "B"),
    (r"\.lora\.down\.weight", "A"), (r"\.lora\.up\.weight", "B"),
    (r"_lora\.down\.weight", "A"), (r"_lora\.up\.weight", "B"),
    (r"\.lora_linear_layer\.down\.weight", "A"), (r"\.lora_linear_layer\.up\.weight", "B"),
    (r"\.lora_A(?:\.(?!weight$)[^.]+)?\.weight", "A"), (r"\.lora_B(?:\.(?!weight$)[^.]+)?\.weight", "B"),
    (r"\.lora_B(?:\.(?!bias$)[^.]+)?\.bias", "bias"),
    (r"\.(?:lora\.)?alpha", "alpha"), (r"\.dora_scale", "magnitude"), (r"\.lora_magnitude_vector(?:\.weight)?", "magnitude"),
)  # fmt: skip
_PARTS = [(re.compile(f"(.+?){end}"), part) for end, part in _ENDS]
_FOREIGN = (
    (re.compile(r".*\.hada_(?:w\d_[ab]|t\d)"), "LoHa"), (re.compile(r".*\.lokr_(?:w\d(?:_[ab])?|t\d)"), "LoKr"),
    (re.compile(r".*\.lora_mid\.weight"), "LoCon with a core tensor (lora_mid)"), (re.compile(r".*\.(?:oft_\w+|oft)(?:\.weight)?"), "OFT"),
    (re.compile(r".*\.(?:diff|diff_b|set_weight|w_norm|b_norm|reshape_weight)"), "whole differences of weights"),
    (re.compile(r".*\.(?:on_input|[ab][12]\.weight|bm\.weight)"), "IA3 or GLoRA"),
)  # fmt: skip
_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass
class Named:
    """Keys of the parts of one update.

    Attributes:
        component: model of the pipeline; empty where the file is for one model.
        path: of the module in it; flattened names have underscores for dots.
        flat: the name is flattened.
        parts: keys by ``A``, ``B``, ``alpha``, ``magnitude``, ``bias``.
    """

    component: str
    path: str
    flat: bool
    parts: dict[str, str] = field(default_factory=dict)


def sort_names(keys: Iterable[str], path: Path) -> list[Named]:
    """Take the keys of a file apart.

    Raises:
        UnsupportedError: updates of another method (LoHa, LoKr …).
        KeysError: a key that belongs to nothing.
    """
    names = list(keys)
    pipeline = any(
        re.search(r"\.(to_[qkv]|to_out|attn1|attn2|single_transformer_blocks|ff\.net)\b", key) for key in names
    )
    found: dict[tuple[str, str], Named] = {}
    for key in names:
        matched = next(((match[1], part) for pattern, part in _PARTS if (match := pattern.fullmatch(key))), None)
        if matched is None:
            _refuse(key, path)
        module, part = matched  # type: ignore[misc]
        component, where, flat = _component(module, pipeline)
        where = _attention(where, key, component)
        item = found.setdefault((component, where), Named(component, where, flat))
        if part in item.parts:
            raise KeysError(
                f"a second {part} for {where!r}, beside {shortened(item.parts[part])!r}", path=path, key=shortened(key)
            )
        item.parts[part] = key
    return list(found.values())


def _refuse(key: str, path: Path) -> None:
    method = next((name for pattern, name in _FOREIGN if pattern.fullmatch(key)), None)
    if method is not None:
        raise UnsupportedError(
            f"an update of {method}, which weft has not: use it with the tool that made it, or merge it there",
            path=path,
            key=shortened(key),
        )
    raise KeysError(
        "no part of an update that weft knows: it belongs to nothing; allow_partial=True leaves such keys out",
        path=path,
        key=shortened(key),
    )


def _component(module: str, pipeline: bool) -> tuple[str, str, bool]:
    """Component, path in it, and whether the path is flattened."""
    flat = re.fullmatch(r"lora_(unet|te[123]?|transformer|prior)_(.+)", module)
    if flat and "." not in module:
        component = _FLAT[flat[1]]
        return component, flat[2].removeprefix(f"{component}_"), True
    first, _, rest = module.partition(".")
    known = first in COMPONENTS and rest and (first != "transformer" or pipeline)
    component = {"diffusion_model": "unet"}.get(first, first)
    return (component, rest, False) if known else ("", module, False)


def _attention(where: str, key: str, component: str) -> str:
    """Names of the first generation: ``attn1.processor.to_q_lora``; in a text encoder ``self_attn.to_q_lora``."""
    if not re.search(r"_lora\.(down|up)\.weight$", key):
        return where
    owner, _, leaf = where.rpartition(".")
    if owner.endswith(".processor"):
        return f"{owner.removesuffix('.processor')}.{'to_out.0' if leaf == 'to_out' else leaf}"
    return f"{owner}.{_ATTENTION.get(leaf, leaf)}" if component.startswith("text_encoder") else where
