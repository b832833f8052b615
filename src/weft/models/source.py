"""Where a base is: a directory, a hub id or the embedded base become one checked folder on disk.

A folder in Hugging Face layout holds ``config.json``, weights (``model.safetensors``, shards with an index, or a
``pytorch_model.bin``) and the tokenizer's files. All that can be wrong with it is found here, before anything is
allocated. This module does not know what a model is: it reads names, sizes and headers, never weights.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.errors import BaseError, some_names

__all__ = ["EMBEDDED", "Source", "find_config_file", "find_source"]

EMBEDDED = "weft-embedded"
"""What the embedded base is called in messages and provenance."""

_SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
              "tokenizer_config.json", "tekken.json", "*.tiktoken")  # fmt: skip
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_LFS = b"version https://git-lfs.github.com"
_HUB_WAIT_SECONDS = 10.0


@dataclass(frozen=True)
class Source:
    """A checked folder that holds a base.

    Attributes:
        folder: on disk; of a hub id, its snapshot in the cache.
        name: what the user called it; for messages and provenance.
        config: the parsed ``config.json``.
        commit: the hub's commit; None for a folder of the user's.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    commit: str | None = None

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is any file that a tokenizer is made from."""
        return any(fnmatch.fnmatch(entry, pattern) for entry in _entries(self.folder) for pattern in _TOKENIZER)

    @property
    def has_processor(self) -> bool:
        """Whether there is a processor of images or sound."""
        return any((self.folder / name).is_file() for name in _PROCESSOR)


def find_source(base: str | os.PathLike[str] | None, revision: str | None = None) -> Source:
    """Find a base and check its files.

    Args:
        base: a directory, a hub id (``"org/name"``), or None (also `EMBEDDED`) for the embedded base.
        revision: branch, tag or commit of a hub id.

    Raises:
        BaseError: nothing there; a file or an adapter in the place of a model; a Git LFS pointer, missing or
            truncated weights; the hub can't be reached or doesn't have it. Says what to do.
    """
    if base is None or base == EMBEDDED:
        from weft.models.embedded import PATH

        return _checked(Path(PATH), EMBEDDED, None)
    name = os.fspath(base)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise BaseError(f"{name}: revision={revision!r} is for hub ids, and this is a directory; leave it out")
        return _checked(folder, name, None)
    if folder.is_file():
        hint = " GGUF files are for inference elsewhere;" if folder.suffix == ".gguf" else ""
        raise BaseError(
            f"{name} is a file.{hint} a base is a directory in Hugging Face layout: config.json, weights, tokenizer"
        )
    if isinstance(base, Path) or not _HUB_ID.fullmatch(name) or name.startswith((".", "~")):
        raise BaseError(f"there is no directory {name} (looked for {folder.resolve()}).{_nearby(folder)}")
    return _from_hub(name, revision)


def find_config_file(base: str | os.PathLike[str] | None, revision: str | None = None) -> Path:
    """The config.json of a base, whose weights need not be there.

    Args:
        base: a directory with a config.json, that file itself, a hub id, or None for the embedded base.

    Raises:
        BaseError: there is none; says what was looked for.
    """
    if base is None or base == EMBEDDED:
        from weft.models.embedded import PATH

        return Path(PATH) / "config.json"
    name = os.fspath(base)
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".json":
        return path
    if not path.exists() and not isinstance(base, Path) and _HUB_ID.fullmatch(name):
        if name.count("/") == 1 and path.parent.is_dir():
            raise BaseError(f"there is no directory {name} (looked for {path.resolve()}).{_nearby(path)}")
        path = _download(name, revision, ("config.json",))
    if not path.is_dir():
        raise BaseError(f"there is no directory or config.json {name} (looked for {path.resolve()}).{_nearby(path)}")
    if not (path / "config.json").is_file():
        raise BaseError(f"{name} is no base: {_what_it_is(path)}")
    _refuse_pointer(path / "config.json", name)
    return path / "config.json"


def _nearby(folder: Path) -> str:
    parent = folder.resolve().parent
    while not parent.is_dir():
        parent = parent.parent
    return f" {parent} holds {some_names(sorted(_entries(parent))) or 'nothing'}."


def _entries(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


def _from_hub(name: str, revision: str | None) -> Source:
    """Small files first, so that an adapter or a wrong repository costs no download of weights."""
    if name.count("/") == 1 and Path(name).parent.is_dir():
        raise BaseError(f"there is no directory {name} (looked for {Path(name).resolve()}).{_nearby(Path(name))}")
    folder = _download(name, revision, _SMALL)
    _read_config(folder, name)
    for file in _WEIGHTS:
        if file.endswith(".index.json") and (folder / file).is_file():
            _download(name, revision, tuple(_shards(folder / file, name)))
        elif not file.endswith(".index.json"):
            _download(name, revision, (file,))
        if (folder / file).is_file():
            break
    return _checked(folder, name, folder.name)


def _download(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    failures = (OSError, ValueError, getattr(errors, "HTTPError", OSError))
    try:
        return Path(huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"], etag_timeout=_HUB_WAIT_SECONDS
        ))  # fmt: skip
    except errors.GatedRepoError:
        way_out = (
            f"it is gated: ask for access on its page https://huggingface.co/{name}, then log in with 'hf auth login'"
        )
    except errors.RevisionNotFoundError:
        way_out = f"it has no revision {revision!r}"
    except errors.RepositoryNotFoundError:
        way_out = "the hub has no such model, or it is private: check the spelling, or log in with 'hf auth login'"
    except errors.LocalEntryNotFoundError:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        reason = "HF_HUB_OFFLINE is set" if offline else "the hub can't be reached"
        way_out = (
            f"it is not in the local cache and {reason}: download it where there is a network, or give a directory"
        )
    except failures as problem:
        way_out = f"{type(problem).__name__}: {_first_line(problem)}"
    raise BaseError(f"no directory is called {name!r}, and as a hub id it can't be had: {way_out}")


def _first_line(problem: BaseException) -> str:
    return next((line.strip() for line in str(problem).splitlines() if line.strip()), type(problem).__name__)


def _checked(folder: Path, name: str, commit: str | None) -> Source:
    config = _read_config(folder, name)
    _check_weights(folder, name)
    return Source(folder, name, config, commit)


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise BaseError(f"{name} is no base: {_what_it_is(folder)}")
    if (folder / "adapter_config.json").is_file():
        raise BaseError(
            f"{name} holds a base and an adapter, config.json and adapter_config.json: move the adapter_* files to a "
            "folder of their own, and pass that one as --adapter"
        )
    _refuse_pointer(path, name)
    try:
        config = json.loads(path.read_bytes())
    except ValueError as problem:
        raise BaseError(
            f"{name}: config.json is not JSON ({_first_line(problem)}); get the model's files again"
        ) from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise BaseError(f"{name}: config.json has no 'model_type', so nobody knows which architecture it is")
    return config


def _what_it_is(folder: Path) -> str:
    """What a folder without a config.json seems to be, and what to do."""
    if (folder / "adapter_config.json").is_file():
        return "this is an adapter; pass it as --adapter, and as base the model that it was trained on" + _trained_on(
            folder
        )
    if (folder / "adapter" / "adapter_config.json").is_file():
        return (
            "this is a run folder with an adapter; pass it as --adapter, and as base the model that it was trained on"
        )
    if (folder / "model_index.json").is_file():
        return "this is a diffusers pipeline; its parts, such as text_encoder, are models"
    inside = sorted(entry for entry in _entries(folder) if (folder / entry / "config.json").is_file())
    if inside:
        return f"it has no config.json, but {some_names(inside)} inside of it has"
    return f"it has no config.json; it holds {some_names(sorted(_entries(folder))) or 'nothing'}"


def _trained_on(folder: Path) -> str:
    try:
        config = json.loads((folder / "adapter_config.json").read_bytes())
    except ValueError:
        return ""
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    return f" ({base})" if base else ""


def _check_weights(folder: Path, name: str) -> None:
    """All weight files are there, whole, and no Git LFS pointers."""
    first = next((folder / file for file in _WEIGHTS if (folder / file).is_file()), None)
    if first is None:
        raise BaseError(
            f"{name} has a config.json but no weights: expected model.safetensors (or shards with "
            f"model.safetensors.index.json, or pytorch_model.bin); it holds {some_names(sorted(_entries(folder)))}"
        )
    files = [folder / shard for shard in _shards(first, name)] if first.suffix == ".json" else [first]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise BaseError(f"{name}: {first.name} lists shards that are not there: {some_names(missing)}; get them again")
    for path in [*files, *(folder / entry for entry in _entries(folder) if entry.startswith("tokenizer"))]:
        if path.is_file():
            _refuse_pointer(path, name)
    for path in files:
        if path.suffix == ".safetensors":
            _check_safetensors(path, name)


def _shards(index: Path, name: str) -> list[str]:
    """File names that an index lists; never a path out of the folder."""
    _refuse_pointer(index, name)
    try:
        shards = list(dict.fromkeys(str(shard) for shard in json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BaseError(f"{name}: {index.name} is no index of shards ('weight_map' is missing); get it again") from None
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside or not shards:
        raise BaseError(
            f"{name}: {index.name} lists {some_names(outside) or 'no shard'}; expected file names of this folder"
        )
    return shards


def _refuse_pointer(path: Path, name: str) -> None:
    with path.open("rb") as file:
        head = file.read(len(_LFS))
    if head == _LFS:
        raise BaseError(
            f"{name}: {path.name} is a Git LFS pointer, not the file itself; run 'git lfs pull' in the folder"
        )


def _check_safetensors(path: Path, name: str) -> None:
    """The header can be read, and the file is as long as the header says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as problem:
        size = path.stat().st_size
        raise BaseError(
            f"{name}: {path.name} ({size:,} bytes) is damaged or cut short ({_first_line(problem)}); get it again"
        ) from None
