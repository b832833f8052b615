"""A base from its configuration alone: the model's classes and shapes, without a byte of weights.

`find_config` finds the configuration; `skeleton` makes the model on the meta device. Does not know adapters.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import BaseError, did_you_mean

__all__ = ["BaseLike", "find_config", "head_sizes", "in_fake_mode", "skeleton"]

BaseLike = str | os.PathLike[str] | Mapping[str, Any] | Any | None


def find_config(base: BaseLike) -> Any:
    """The configuration of a base, as transformers has it.

    Args:
        base: a directory with a config.json (no weights are needed), the config.json itself, a hub id whose configuration
            is in the cache or can be had, None for the embedded base, a dict with a ``model_type``, or a configuration.

    Raises:
        BaseError: nothing there, or no configuration that transformers knows.
    """
    from transformers import PreTrainedConfig

    if isinstance(base, PreTrainedConfig):
        return base
    if isinstance(base, Mapping):
        return _made(dict(base), "the configuration that was given")
    from weft.models.source import find_config_file

    path = find_config_file(base)
    try:
        values = json.loads(path.read_bytes())
    except ValueError as problem:
        raise BaseError(f"{path} is not JSON ({str(problem).splitlines()[0]}); get it again") from None
    return _made(values, str(base) if base is not None else "the embedded base")


def _made(values: Any, name: str) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig, __version__

    kind = values.get("model_type") if isinstance(values, dict) else None
    if not isinstance(kind, str):
        raise BaseError(f"{name}: no 'model_type' in it, so nobody knows which architecture it is")
    if kind not in CONFIG_MAPPING:
        raise BaseError(
            f"{name}: transformers {__version__} has no architecture {kind!r}.{did_you_mean(kind, CONFIG_MAPPING)} "
            "A newer transformers may know it"
        )
    try:
        return AutoConfig.for_model(**values)
    except (*_FOREIGN, StrictDataclassError) as problem:
        raise BaseError(f"{name}: no valid {kind} configuration: {_first(problem)}") from problem


_FOREIGN = (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError, IndexError)


def _first(problem: BaseException) -> str:
    return next((line.strip() for line in str(problem).splitlines() if line.strip()), type(problem).__name__)


def skeleton(config: Any, *, dtype: torch.dtype | None = None, labels: int | None = None) -> nn.Module:
    """The model of a configuration on the meta device.

    Args:
        config: from `find_config`; not changed.
        dtype: of the weights; None: as the configuration says they are stored.
        labels: of a classification; None: the task that the configuration names, else what the architecture is usually for.

    Raises:
        BaseError: no such model can be made.
    """
    import copy

    config = copy.deepcopy(config)
    if labels is not None:
        config.num_labels = labels
    config.use_cache = False
    wanted = dtype or _stored(config)
    try:
        with torch.device("meta"):
            model: nn.Module = _class_of(config, labels is not None)._from_config(config, dtype=wanted)
    except _FOREIGN as problem:
        raise BaseError(
            f"no {config.model_type} model can be made of this configuration: {_first(problem)}"
        ) from problem
    return model.requires_grad_(False)


def _stored(config: Any) -> torch.dtype:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(config, "dtype", None) or getattr(text, "dtype", None) or torch.float32
    named: torch.dtype = found if isinstance(found, torch.dtype) else getattr(torch, str(found).removeprefix("torch."))
    return named


def _class_of(config: Any, classifies: bool) -> Any:
    """The class of the model: for classification, the one that is named, or what such a configuration is usually for."""
    import transformers

    kind = type(config)
    if classifies:
        for auto in (transformers.AutoModelForSequenceClassification, transformers.AutoModelForImageClassification):
            if kind in auto._model_mapping:
                return auto._model_mapping[kind]
        raise BaseError(f"a {config.model_type} model can't classify; leave the labels out")
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    usual: list[Any] = [transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText,
                        transformers.AutoModelForImageClassification, transformers.AutoModel]  # fmt: skip
    if getattr(config, "is_encoder_decoder", False):
        usual.insert(0, transformers.AutoModelForSeq2SeqLM)
    elif not getattr(config, "is_decoder", False):
        usual.insert(0, transformers.AutoModelForMaskedLM)
    return next(auto._model_mapping[kind] for auto in usual if kind in auto._model_mapping)


def in_fake_mode(model: nn.Module, device: str) -> None:
    """Replace meta tensors of a model by fake ones on a device, in place; inside of a `FakeTensorMode`."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if tensor.device.type != "meta" or type(tensor) not in (Tensor, nn.Parameter):
            return tensor
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        return made[id(tensor)]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = fake(tensor)  # type: ignore[assignment]


def head_sizes(config: Any) -> int:
    """Size of the vocabulary; 0 where there is none."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "vocab_size", 0)
    return int(found) if isinstance(found, int) else 0
