"""A base and an adapter, as a caller names them, become a plain model directory.

The mathematics is in `weft.core.merge`, the writing in `weft.models.save`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from weft.adapter import Adapter
from weft.core.merge import MergeReport, merge
from weft.errors import BaseError
from weft.models.load import load_base
from weft.models.save import check_free, save_base
from weft.train.opening import BaseLike, open_base, trained_format

__all__ = ["REPORT", "merge_to_directory"]

REPORT = "merge_report.json"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def merge_to_directory(
    *,
    base: BaseLike = None,
    adapter: Adapter | str | os.PathLike[str],
    out: str | os.PathLike[str],
    dtype: str | None = None,
    task: str | None = None,
    allow_other_base: bool = False,
) -> tuple[Path, MergeReport]:
    """Merge, write, and see that what was written is what was merged.

    Args:
        base: as in `weft.train`.
        adapter: an adapter, or its path (a run folder too).
        out: the model directory; must not exist, or be empty. Holds ``merge_report.json`` as well.
        dtype: of the merged weights: a name of torch's; None: each weight's own.
        task: what the base is loaded for, see `weft.load_base`; None: as the adapter was trained.
        allow_other_base: merge into a base with another fingerprint; shapes have to agree.

    Returns:
        The directory and the report.

    Raises:
        BaseError: the base can't be loaded, or ``out`` can't be written.
        BaseMismatchError: the adapter was made for another base.
        MergeError: an update that no plain weight holds; or the written model is not the merged one.
    """
    target = _dtype(dtype)
    check_free(out)
    from weft.formats import load

    value = adapter if isinstance(adapter, Adapter) else load(adapter)
    labels = trained_format(value).get("labels")
    if task is None or isinstance(base, tuple):
        model, tokenizer = open_base(base, labels=labels, kind=trained_format(value).get("kind"))
    else:
        model, tokenizer = load_base(base, task=task, labels=labels if "classification" in task else None)
    merged, report = merge(model, value, dtype=target, allow_other_base=allow_other_base)
    del model
    facts = {"adapter": value.digest, **report.to_dict()}
    written = save_base(merged, tokenizer, out, files={REPORT: json.dumps(facts, indent=2, ensure_ascii=False) + "\n"})
    return written, report


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in _DTYPES:
        raise BaseError(f"dtype={name!r} is no type to merge into; expected {', '.join(_DTYPES)}")
    return None if name is None else _DTYPES[name]
