"""A base whose linear layers are held in 8 or 4 bits while an adapter is trained beside them (QLoRA).

The layers are bitsandbytes' own; weft's sites stand on them as on any layer whose product isn't ours. Head, embeddings and modules that are
trained whole stay as they are, and factors are wide. The adapter belongs to the base as it is stored: its fingerprint is taken before.
This module does not know how a base is found or trained.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from weft.errors import MissingDependencyError, RecipeError

__all__ = ["quantise", "require", "unsaid"]


def require(kind: str) -> Any:
    """The library.

    Raises:
        MissingDependencyError: it is not here, or doesn't run here.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError) as problem:
        raise MissingDependencyError(
            f"quantize={kind!r} needs bitsandbytes, which can't be used here ({problem}): pip install 'weft[quantize]'"
        ) from problem


@torch.no_grad()
def quantise(model: nn.Module, kind: str, without: Iterable[str] = ()) -> int:
    """Replace the linear layers of a model by quantised ones, one after another; their old weights are let go.

    Args:
        model: a base with plain `nn.Linear` layers, without a bank. Changed in place.
        kind: ``"int8"`` (LLM.int8 with vector-wise scales, without outliers) or ``"nf4"`` (with doubly quantised scales).
        without: paths of modules that stay as they are, all inside of them too.

    Returns:
        How many layers were replaced.

    Raises:
        MissingDependencyError: bitsandbytes is not here.
        RecipeError: there is nothing to quantise.

    Source:
        Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339; Dettmers et al. 2023, QLoRA, arXiv:2305.14314.
    """
    library = require(kind)
    kept = tuple(f"{path}." for path in without)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found = [
        (path, module)
        for path, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and not f"{path}.".startswith(kept or ("\0",))
    ]
    if not found:
        raise RecipeError(
            f"quantize={kind!r}: {type(model).__name__} has no plain linear layers to quantise; leave it out"
        )
    for path, module in found:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, _layer(library, module, kind))
    return len(found)


def _layer(library: Any, module: nn.Linear, kind: str) -> nn.Module:
    """One quantised layer where the plain one was, on its device."""
    sizes, bias, weight = (module.in_features, module.out_features), module.bias is not None, module.weight
    if kind == "int8":
        made = library.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False, threshold=0.0, device="meta")
        made.weight = library.nn.Int8Params(weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        made = library.nn.Linear4bit(
            *sizes, bias=bias, compute_dtype=weight.dtype, compress_statistics=True, quant_type="nf4", device="meta"
        )
        made.weight = library.nn.Params4bit(
            weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=made
        )
    if bias:
        made.bias = module.bias
    layer: nn.Module = made.to(weight.device).requires_grad_(False)
    return layer.train(module.training)


@contextlib.contextmanager
def unsaid() -> Iterator[None]:
    """Without bitsandbytes' remarks about the dtypes that it converts between."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*MatMul8bitLt.*")
        warnings.filterwarnings("ignore", message=".*will be cast from.*during quantization.*")
        warnings.filterwarnings("ignore", message=".*Linear4bit.*")
        yield
