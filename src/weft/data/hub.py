"""Data sets of the `datasets` library: objects, saved folders and the hub. Imports it only when it is needed."""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.data.files import ENDINGS, ending
from weft.data.sources import Table
from weft.errors import DataError, MissingDependencyError, some_names

__all__ = ["Address", "parse", "read_dataset", "read_folder", "read_hub"]

_ADDRESS = re.compile(r"(?P<name>[\w][\w.-]*/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[^@\s]+))?")

_ON = frozenset({"1", "ON", "YES", "TRUE"})


@dataclass(frozen=True)
class Address:
    """A data set on the hub: ``org/name:config@split``; the split may have a slice, as in ``train[:10%]``."""

    name: str
    config: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        return self.name + (f":{self.config}" if self.config else "") + (f"@{self.split}" if self.split else "")


def parse(text: str) -> Address | None:
    """The address in a text, or None if it has not the form of one."""
    found = _ADDRESS.fullmatch(text)
    return Address(found["name"], found["config"], found["split"]) if found else None


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError("this data source needs the datasets library; pip install datasets") from error
    return datasets


def read_hub(address: Address, limit: int | None) -> Table:
    """Download (or take from the cache) a data set of the hub. No code of the data set is run.

    Raises:
        DataError: unknown, private, offline, an unknown configuration or split.
    """
    datasets = _library()
    from huggingface_hub import errors

    refusals = (datasets.exceptions.DatasetsError, errors.HTTPError, OSError, ValueError, RuntimeError)
    try:
        loaded = datasets.load_dataset(address.name, address.config, split=address.split)
    except refusals as error:
        raise DataError(f"hub data set {address}: {_reason(error)}") from error
    return _pick(loaded, str(address), address.split, limit)


def _reason(error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    offline = any(os.environ.get(name, "").upper() in _ON for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))
    if "OfflineMode" in first or (offline and isinstance(error, ConnectionError | FileNotFoundError)):
        return (
            f"not in the cache, and the hub is switched off (HF_HUB_OFFLINE); unset it, or give a local file. [{first}]"
        )
    if isinstance(error, ConnectionError):
        return f"the hub can't be reached; check the connection, or give a local file. [{first}]"
    if isinstance(error, FileNotFoundError):
        return f"not on the hub, or not visible to you (`hf auth login`); no such local file either. [{first}]"
    return f"can't be loaded: {first} (written as org/name, org/name:config, org/name@split)"


def _pick(loaded: Any, name: str, split: str | None, limit: int | None) -> Table:
    """One data set of what may be several splits."""
    if not isinstance(loaded, dict):
        return read_dataset(loaded, name, limit)
    if split is not None and split not in loaded:
        raise DataError(f"{name}: no split {split!r}; expected one of {some_names(loaded)}")
    chosen = split or (next(iter(loaded)) if len(loaded) == 1 else "train" if "train" in loaded else None)
    if chosen is None:
        raise DataError(f"{name} has the splits {some_names(loaded)}; choose one: '{name}@{next(iter(loaded))}'")
    note = () if split or len(loaded) == 1 else (f"split 'train' of {some_names(loaded)}; another one: '{name}@SPLIT'",)
    return read_dataset(loaded[chosen], name if split else f"{name}@{chosen}", limit, note)


def read_folder(path: Path, split: str | None, limit: int | None) -> Table:
    """A folder that `Dataset.save_to_disk` wrote.

    Raises:
        DataError: any other folder; names the data files in it.
    """
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        files = sorted(entry.name for entry in path.iterdir() if entry.is_file() and ending(entry) in ENDINGS)
        if files:
            raise DataError(f"{path} is a folder; give one of its files: {some_names(files)}")
        raise DataError(f"{path} is a folder without data; expected a file that ends in {', '.join(ENDINGS)}")
    datasets = _library()
    try:
        loaded = datasets.load_from_disk(str(path))
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise DataError(f"{path}: the saved data set can't be loaded: {error}") from error
    return _pick(loaded, str(path), split, limit)


def read_dataset(dataset: Any, name: str, limit: int | None, notes: tuple[str, ...] = ()) -> Table:
    """A `datasets.Dataset` (or iterable one); integer classes keep the names that its features declare.

    Raises:
        DataError: several splits at once; a row that the library can't decode.
    """
    datasets = _library()
    if isinstance(dataset, dict):
        raise DataError(
            f"a data set with the splits {some_names(dataset)}; give one of them: data[{next(iter(dataset))!r}]"
        )
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        raise DataError(f"no reader for a {type(dataset).__name__} of the datasets library; expected a Dataset")
    try:
        pictures = [key for key, feature in (dataset.features or {}).items() if isinstance(feature, datasets.Image)]
        for key in pictures:  # their bytes, which weft checks before it decodes
            dataset = dataset.cast_column(key, datasets.Image(decode=False))
        rows = [dict(row) for row in itertools.islice(dataset.with_format(None), limit)]
        for row, key in itertools.product(rows, pictures):
            row[key] = _bytes_of(row[key])
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, ImportError) as error:
        raise DataError(f"{name}: a row can't be read: {str(error).splitlines()[0]}") from error
    features = dataset.features or {}
    classes = {
        key: tuple(feature.names) for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)
    }
    return Table(rows, list(range(1, len(rows) + 1)), name, "row", notes, classes)


def _bytes_of(image: Any) -> bytes | None:
    """The file that the library knows, by its bytes or its own path."""
    if not isinstance(image, dict):
        return None
    if image.get("bytes"):
        return bytes(image["bytes"])
    return Path(image["path"]).read_bytes() if image.get("path") else None
