"""Image data sets as arrays in one ``.npz`` file: ``images``, ``labels``, perhaps ``class_names``, each perhaps with a split before it."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from weft.data.sources import Table
from weft.errors import DataError, some_names

__all__ = ["read_arrays"]

_BROKEN = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError, MemoryError)


def read_arrays(path: Path, split: str | None, limit: int | None) -> Table:
    """Rows ``{"image": (H, W, 3) uint8, "label": int}``; nothing in the file is unpickled.

    Args:
        split: the word before ``_images`` and ``_labels``, as in ``"file.npz@train"``; None: there is none, or only one.

    Raises:
        DataError: the file is damaged; its arrays have other names, shapes or types.
    """
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            names = list(file.files)
            splits = [name.removesuffix("images").removesuffix("_") for name in names if name.endswith("images")]
            if split is None and len(splits) > 1:
                raise DataError(f"{path} has the splits {some_names(splits)}; choose one: '{path}@{splits[0]}'")
            prefix = split if split is not None else splits[0] if splits else ""
            keys = [f"{prefix}_{part}" if prefix else part for part in ("images", "labels")]
            for key in keys:
                if key not in names:
                    raise DataError(f"{path}: no array {key!r}; it has {some_names(names)}")
            images, labels = file[keys[0]], file[keys[1]]
            declared = file["class_names"] if "class_names" in names else None
    except _BROKEN as error:
        raise DataError(f"{path}: not a readable file of arrays: {str(error).splitlines()[0]}") from error
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] not in (1, 3)):
        raise DataError(
            f"{path}: {keys[0]!r} is {images.dtype} of shape {images.shape}; expected uint8 of (N, H, W, 3) or (N, H, W)"
        )
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{path}: {keys[1]!r} is {labels.dtype} of shape {labels.shape}; expected {len(images)} whole numbers"
        )
    rows: list[dict[str, Any]] = [
        {"image": image, "label": int(label)} for image, label in zip(images[:limit], labels[:limit], strict=True)
    ]
    classes = {} if declared is None else {"label": tuple(str(name) for name in declared)}
    return Table(rows, list(range(1, len(rows) + 1)), f"{path}@{prefix}" if prefix else str(path), "row", (), classes)
