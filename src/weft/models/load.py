"""Load a base and its tokenizer: frozen, in eval mode, nothing of it ever run as code.

The folder is found and checked by `weft.models.source`; this module turns it into a model. It does not know adapters.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from weft.errors import BaseError, did_you_mean, some_names
from weft.models.source import Source, find_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["TASKS", "dtype_named", "load_base", "new_modules", "quiet"]

log = logging.getLogger("weft.models")

TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "masked-lm": "AutoModelForMaskedLM",
    "encoder": "AutoModel",
    "image-classification": "AutoModelForImageClassification",
    "image-text": "AutoModelForImageTextToText",
    "auto": "the class that config.json names in 'architectures'",
}
"""What a base can be loaded for, and the class of transformers that does it."""

_ENCODER_DECODER = (
    ". weft train makes decoders and classifiers; an encoder-decoder is trained by a loop of your own or transformers'"
    " Seq2SeqTrainer, after load_base(…, task='seq2seq') and weft.attach; merge, convert, inspect and the store know its adapters"
)
_TEXT = ("causal-lm", "classification", "seq2seq", "masked-lm")
_LABELLED = ("classification", "image-classification")
_HEAD_SEED = 0
_FOREIGN = (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, ArithmeticError, ImportError, EOFError,
            pickle.PickleError)  # fmt: skip
"""What transformers and torch raise for files that are not what they say."""


def load_base(
    base: str | os.PathLike[str] | None = None,
    *,
    task: str = "causal-lm",
    labels: Sequence[str] | int | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Load a base model and its tokenizer.

    No remote code is run. Weights come from safetensors; only where there are none from ``pytorch_model.bin``, which
    is unpickled with ``weights_only=True``. Weights that the files don't have are an error, but for the head of a
    classification, which is new: drawn from a fixed seed, so that the same base has the same fingerprint every time.
    A tokenizer without a padding token pads with its end-of-text token; the vocabulary never grows.

    Args:
        base: a directory in Hugging Face layout, a hub id, or None: the embedded base.
        task: one of `TASKS`.
        labels: for classification, the labels' names in the order of their ids, or their number; None: those of
            the checkpoint.
        dtype: ``"bfloat16"``, `torch.float32` …; None: as stored.
        device: where to; None: the CPU.
        revision: branch, tag or commit of a hub id.

    Returns:
        The model, all parameters with ``requires_grad=False`` and in eval mode; and its tokenizer (a processor for
        images; None where the task needs none and the folder has none).

    Raises:
        BaseError: the base can't be found, read or used for this task; names the file and the way out.

    Example:
        >>> model, tokenizer = weft.load_base("path/to/model", dtype="bfloat16")  # doctest: +SKIP
    """
    if task not in TASKS:
        raise BaseError(f"unknown task {task!r}.{did_you_mean(task, TASKS)} Tasks: {', '.join(TASKS)}")
    names = _label_names(task, labels)
    stored = _dtype(dtype)
    source = find_source(base, revision)
    with quiet():
        config = _config(source, names, task)
        model = _model(source, config, task, stored, relabelled=names is not None)
        tokenizer = _tokenizer(source, task)
    _give_padding(model, tokenizer, source, task)
    model.requires_grad_(False)
    model.eval()
    return (model if device is None else model.to(device)), tokenizer  # type: ignore[arg-type]


def new_modules(model: nn.Module) -> tuple[str, ...]:
    """Paths of the modules that `load_base` had to draw because the checkpoint lacks them, such as a new head.

    Whoever trains an adapter on the model has to train these whole: they belong into `LoraSpec.save_modules`.
    """
    return tuple(getattr(model, "weft_new_modules", ()))


def _label_names(task: str, labels: Sequence[str] | int | None) -> list[str] | None:
    if labels is None:
        return None
    if task not in _LABELLED:
        raise BaseError(f"labels={labels!r} are for the tasks {' and '.join(_LABELLED)}; got task={task!r}")
    names = (
        [f"LABEL_{index}" for index in range(labels)] if isinstance(labels, int) else [str(label) for label in labels]
    )
    if not names or len(set(names)) != len(names):
        raise BaseError(f"labels={labels!r}; expected at least one label, and no name twice")
    return names


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | str:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype or "auto"
    named = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise BaseError(
            f"dtype={dtype!r} is no floating-point type of torch; expected 'float32', 'bfloat16' or 'float16'"
        )
    return named


def dtype_named(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype by its name; None stays None.

    Raises:
        BaseError: no floating-point type of torch.
    """
    found = _dtype(dtype)
    return found if isinstance(found, torch.dtype) else None


def _config(source: Source, labels: list[str] | None, task: str) -> Any:
    """The configuration as transformers reads it, with the labels in it."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig, __version__

    kind = source.config["model_type"]
    if kind not in CONFIG_MAPPING:
        own = " It brings code of its own (auto_map), which weft never runs." if "auto_map" in source.config else ""
        raise BaseError(f"{source.name}: transformers {__version__} has no architecture {kind!r}."
                        f"{did_you_mean(kind, CONFIG_MAPPING)}{own} A newer transformers may know it")  # fmt: skip
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except (*_FOREIGN, StrictDataclassError) as problem:
        raise BaseError(f"{source.name}: config.json is no valid {kind} configuration: {_reason(problem)}") from problem
    if labels is not None:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    elif task in _LABELLED and "id2label" not in source.config and not _is_classifier(source.config):
        raise BaseError(
            f"{source.name} has no labels of its own; say them: load_base(…, task={task!r}, labels=['no', 'yes'])"
        )
    config._commit_hash = source.commit
    return config


def _is_classifier(config: dict[str, Any]) -> bool:
    return any("Classification" in str(name) for name in config.get("architectures") or ())


def _model(source: Source, config: Any, task: str, dtype: torch.dtype | str, relabelled: bool) -> PreTrainedModel:
    import transformers
    from safetensors import SafetensorError

    try:
        model, info = _model_class(transformers, source, config, task).from_pretrained(
            source.folder, config=config, dtype=dtype, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=relabelled,
        )  # fmt: skip
    except ImportError as problem:
        raise BaseError(f"{source.name} needs a library that is not here: {_reason(problem)}") from problem
    except (*_FOREIGN, SafetensorError) as problem:
        raise BaseError(f"{source.name} can't be loaded for {task!r}: {_reason(problem)}") from problem
    missing = {_key(item) for item in (*info["missing_keys"], *info["mismatched_keys"])}
    _account(model, source, missing, {_key(item) for item in info["unexpected_keys"]}, task)
    config = model.config
    config._name_or_path = model.name_or_path = source.name
    config._commit_hash = source.commit
    return model  # type: ignore[no-any-return]


def _model_class(transformers: Any, source: Source, config: Any, task: str) -> Any:
    """The class that loads this configuration for this task."""
    if task == "auto":
        for name in source.config.get("architectures") or ():
            found = getattr(transformers, str(name), None)
            if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
                return found
        return transformers.AutoModel
    auto = getattr(transformers, TASKS[task])
    if type(config) not in auto._model_mapping:
        able = [
            name
            for name, cls in TASKS.items()
            if name != "auto" and type(config) in getattr(transformers, cls)._model_mapping
        ]
        hint = _ENCODER_DECODER if task == "causal-lm" and "seq2seq" in able else ""
        raise BaseError(
            f"{source.name}: a {config.model_type} model can't be loaded for {task!r}; it can for {some_names(able)}{hint}"
        )
    return auto


def _key(item: Any) -> str:
    return str(item[0] if isinstance(item, tuple) else item)


def _account(model: Any, source: Source, missing: set[str], unexpected: set[str], task: str) -> None:
    """Weights that the files don't have: an error in the body, a new head for a classification."""
    prefix = f"{model.base_model_prefix}."
    head = {name for name in missing if task in _LABELLED and (not name.startswith(prefix) or ".pooler." in name)}
    lost = sorted(missing - head)
    if lost:
        extra = f" The files hold {some_names(sorted(unexpected))} instead." if unexpected else ""
        raise BaseError(f"{source.name}: the files lack, or have in another shape, {len(lost)} weights of {type(model).__name__}: {some_names(lost)}.{extra} "
                        f"They are of another model, or of another task than {task!r}")  # fmt: skip
    if head:
        _draw(model, head)
        model.weft_new_modules = tuple(sorted({_top(name, prefix) for name in head}))
        log.info("%s: new and untrained: %s", source.name, ", ".join(model.weft_new_modules))
    if unexpected and task not in (*_LABELLED, "encoder"):
        log.warning(
            "%s: %d weights of the files are not used: %s", source.name, len(unexpected), some_names(sorted(unexpected))
        )


def _top(name: str, prefix: str) -> str:
    """The module to train whole for a missing weight: the head's top, or the pooler inside of the body."""
    owner = name.rpartition(".")[0]
    return owner[: owner.index(".pooler") + len(".pooler")] if owner.startswith(prefix) else owner.partition(".")[0]


def _draw(model: Any, names: Iterable[str]) -> None:
    """Fill new weights from a fixed seed, the same on every machine: matrices normal, norms one, biases zero."""
    generator = torch.Generator().manual_seed(_HEAD_SEED)
    spread = getattr(model.config, "initializer_range", None) or 0.02
    with torch.no_grad():
        for name in sorted(names):
            weight = model.get_parameter(name)
            if weight.dim() >= 2:
                weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
            else:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)


def _tokenizer(source: Source, task: str) -> Any:
    """The tokenizer or processor; None where there is none and the task works without."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    loader: Any = AutoTokenizer
    if task == "image-classification" or (source.has_processor and not source.has_tokenizer):
        loader = AutoImageProcessor
    elif source.has_processor and task not in _TEXT:
        loader = AutoProcessor
    if loader is AutoTokenizer and not source.has_tokenizer:
        if task in _TEXT:
            raise BaseError(f"{source.name} has a model but no tokenizer: expected tokenizer.json (or vocab and merges files) "
                            "beside config.json; copy the tokenizer that the model was trained with there")  # fmt: skip
        return None
    if loader is AutoImageProcessor and not source.has_processor:
        return None
    try:
        return loader.from_pretrained(source.folder, trust_remote_code=False)
    except _FOREIGN as problem:
        raise BaseError(f"{source.name}: its tokenizer or processor can't be loaded: {_reason(problem)}") from problem


def _give_padding(model: Any, tokenizer: Any, source: Source, task: str) -> None:
    """A padding token out of those that there are, and a check that the tokenizer is this model's."""
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    embeddings = model.get_input_embeddings()
    rows = embeddings.weight.shape[0] if isinstance(embeddings, nn.Embedding) else None
    if rows is not None and len(tokenizer) > rows:
        raise BaseError(f"{source.name}: the tokenizer has {len(tokenizer):,} tokens, but the model has embeddings for {rows:,}; "
                        "the tokenizer is of another model")  # fmt: skip
    if tokenizer.pad_token is None:
        pad = next((token for token in (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token) if token), None)
        if pad is None:
            raise BaseError(f"{source.name}: the tokenizer has no padding token and no end token to pad with; "
                            "set 'pad_token' in tokenizer_config.json to a token of its vocabulary")  # fmt: skip
        tokenizer.pad_token = pad
        log.info("%s: no padding token; padding with %r, hidden by the attention mask", source.name, pad)
    if getattr(model, "generation_config", None) is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    if task in _LABELLED and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # where a decoder's head finds the last real token


def _reason(problem: BaseException) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return f"{type(problem).__name__}: {' '.join(lines)[:500]}" if lines else type(problem).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and reports of transformers while loading: what matters is said by weft."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
