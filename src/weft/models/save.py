"""Write a model as a plain directory in Hugging Face layout, and see that it is whole before it has its name.

The directory is written beside its place and read again from there; only if it gives the same weights and the same logits it
is renamed. This module does not know adapters.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import BaseError, MergeError
from weft.models.load import load_base, quiet

__all__ = ["check_free", "probe", "save_base"]

_TOKENS = 8
_SLACK = 8.0
"""Logits of one model, loaded twice, may differ by this many units of the dtype's precision: kernels may sum in another order."""


def check_free(directory: str | os.PathLike[str]) -> Path:
    """See that a model can be written here; changes nothing.

    Raises:
        BaseError: something stands there already, or the place can't be written.
    """
    target = Path(directory).expanduser()
    if target.is_symlink() or target.is_file() or (target.is_dir() and any(target.iterdir())):
        kind = "a file or a link" if not target.is_dir() or target.is_symlink() else "a directory that is not empty"
        raise BaseError(
            f"{target} exists already, as {kind}; a model needs a place of its own: give another name, or remove it"
        )
    above = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise BaseError(f"{target}: a model can't be written here: {above} is no directory that can be written")
    return target


def save_base(
    model: nn.Module, tokenizer: Any, directory: str | os.PathLike[str], *, files: Mapping[str, str] | None = None
) -> Path:
    """Write a model, its tokenizer and its generation settings; what was written is loaded again and compared.

    Args:
        model: a model of transformers, without a bank.
        tokenizer: or processor; None: there is none.
        directory: where to; must not exist, or be empty.
        files: more text files by name, such as ``{"merge_report.json": …}``.

    Returns:
        The directory.

    Raises:
        BaseError: see `check_free`; or a model that transformers can't write.
        MergeError: what was read again is not what was written; nothing is left in the place.
    """
    target = check_free(directory)
    if not hasattr(model, "save_pretrained"):
        raise BaseError(
            f"a {type(model).__name__} has no save_pretrained; write its state_dict() with safetensors instead"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        _write(model, tokenizer, beside)
        for name, text in (files or {}).items():
            (beside / name).write_text(text, encoding="utf-8")
        _compare(model, beside, target)
        os.replace(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def probe(model: nn.Module) -> dict[str, Tensor] | None:
    """A small input that a model can read: a few tokens, or a small image; None where neither fits.

    The same for every model of a shape, so that two of them can be compared.
    """
    config: Any = getattr(model, "config", None)
    draw = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    name = getattr(model, "main_input_name", "input_ids")
    if name == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        shape = (1, getattr(config, "num_channels", 3), config.image_size, config.image_size)
        dtype = next(model.parameters()).dtype
        return {"pixel_values": torch.randn(shape, generator=draw).to(device, dtype)}
    words = getattr(config.get_text_config(), "vocab_size", None) if hasattr(config, "get_text_config") else None
    if name != "input_ids" or not isinstance(words, int):
        return None
    ids = torch.randint(words, (1, min(_TOKENS, _positions(config))), generator=draw).to(device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return batch | ({"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {})


def _positions(config: Any) -> int:
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else _TOKENS


def _write(model: Any, tokenizer: Any, directory: Path) -> None:
    own = getattr(model, "generation_config", None)
    if (
        own is not None
        and not own.do_sample
        and any(getattr(own, name, None) is not None for name in ("temperature", "top_p", "top_k"))
    ):
        own.do_sample = (
            True  # settings of a draw without the draw: transformers reads such a file, and refuses to write it
        )
    try:
        with quiet():
            model.save_pretrained(directory)
            if tokenizer is not None:
                tokenizer.save_pretrained(directory)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as problem:
        raise BaseError(f"transformers can't write this {type(model).__name__}: {problem}") from problem


def _compare(model: nn.Module, written: Path, target: Path) -> None:
    """Every weight, bit by bit, and the logits of a few tokens.

    Raises:
        MergeError: names the first weight that differs.
    """
    again, _ = load_base(written, task="auto")
    here, there = model.state_dict(), again.state_dict()
    for name in sorted(here.keys() | there.keys()):
        if name not in here or name not in there or not _same(here[name], there[name]):
            raise MergeError(f"{target}: read again, the weight {name} is not what was written; nothing was kept. "
                             "Is the disk full, or the weight tied to another one by the configuration?")  # fmt: skip
    batch = probe(model)
    if batch is None:
        return
    again = nn.Module.to(again, next(model.parameters()).device)
    wanted, got = _logits(model, batch), _logits(again, batch)
    allowed = _SLACK * torch.finfo(wanted.dtype).eps * float(wanted.abs().max())
    if wanted.shape != got.shape or not float((wanted - got).abs().max()) <= allowed:
        raise MergeError(f"{target}: read again, the model gives other logits than the merged one, although the weights are equal: "
                         "its configuration doesn't survive being written; nothing was kept")  # fmt: skip


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())


@torch.no_grad()
def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    output = model.eval()(**batch)
    found = getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else output[0]
