"""An adapter as a blob, and a blob as an adapter.

The blob has what is in the digest, in PEFT's layout, and the proof. Where an adapter comes from differs from version to version
and from owner to owner: a provenance stands beside, under the hash of its content, and is put back by `unpack`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from weft.adapter import Adapter, Provenance
from weft.errors import DamagedError, FormatError, StoreError, UnsupportedError
from weft.formats import peft
from weft.formats.checks import parse_object
from weft.formats.record import plain
from weft.hashes import sha256_of
from weft.identity import TensorHashes, digest_of
from weft.store.blobs import MAX_PROVENANCE, FileFacts, Files, disk_problem, is_file
from weft.store.names import check_text
from weft.store.records import Draft, checked_metrics, checked_tags, is_metric

__all__ = ["address_of", "draft_of", "has_digest", "pack", "pack_provenance", "unpack", "unpack_provenance"]


_TENSORS = ".safetensors"


def address_of(adapter: Adapter) -> str:
    """The name of the adapter's blob: its digest, and sixteen digits of its proof's where there is one."""
    return f"{adapter.digest}-{digest_of(adapter.proof, {})[:16]}" if adapter.proof else adapter.digest


def has_digest(adapter: Adapter) -> bool:
    """Whether an adapter's digest was computed already."""
    return "digest" in adapter.__dict__


def pack(adapter: Adapter, folder: Path, name: str, provenance: bytes) -> dict[str, FileFacts]:
    """Write an adapter into a directory that nobody sees yet; gives its files. Whoever wants them to last flushes them.

    A provenance stands beside under its name. What PEFT's files can't hold is written in the layout that weft alone reads. Each tensor is hashed once, for the
    digest and for its file, while the disk is busy.

    Raises:
        NotFiniteError: NaN or infinity in it.
        StoreError: the disk is full, or can't be written.
    """
    base = adapter.provenance.base
    shared = adapter.replace(
        provenance=Provenance(base=base, base_name=adapter.provenance.base_name if base is None else None)
    )
    try:
        with TensorHashes() as hashes, ThreadPoolExecutor(1, "weft-write") as pool:
            files = _writers(shared, hashes)
            large = {
                file: pool.submit(write, folder / file) for file, write in files.items() if file.endswith(_TENSORS)
            }
            (folder / name).parent.mkdir()
            (folder / name).write_bytes(provenance)
            shared.__dict__["digest"] = adapter.digest_with(hashes)  # it counts nothing else of the provenance
            found = {file: write(folder / file) for file, write in files.items() if file not in large}
            found |= {file: done.result() for file, done in large.items()}
            return {
                file: FileFacts((folder / file).stat().st_size, known or sha256_of(folder / file))
                for file, known in found.items()
            }
    except OSError as problem:
        raise disk_problem(problem, str(folder.parent)) from problem


def _writers(adapter: Adapter, hashes: TensorHashes) -> dict[str, peft.Writer]:
    try:
        return peft.writers(adapter, hashes, flushed=False)
    except UnsupportedError:
        return peft.writers(adapter, hashes, for_peft=False, flushed=False)


def unpack(folder: Path, digest: str, provenance: Provenance, files: Files | None = None) -> Adapter:
    """The adapter in a blob's directory, with a version's provenance.

    Args:
        files: as the index knows them: every byte is compared with it. Without, the directory is from elsewhere: numbers are
            checked, and the digest is computed.

    Raises:
        DamagedError: it is not the adapter of this digest.
    """
    try:
        if files is None:
            adapter = peft.read(folder)
        else:
            adapter = peft.read_known(folder, {name: facts.hash for name, facts in files.items()})
    except FormatError as problem:
        raise DamagedError(
            f"the store's copy of {digest[:12]} is damaged: {_harm(folder, files or {}) or problem}. Put the adapter again, or pull it from where it was pushed to"
        ) from problem
    if adapter.digest != digest:
        raise DamagedError(
            f"{folder}: the adapter in it has the digest {adapter.digest[:12]}, expected {digest[:12]}; put it again"
        )
    whole = adapter.replace(provenance=provenance)
    if provenance.base == adapter.provenance.base:
        whole.__dict__["digest"] = adapter.digest
    elif whole.digest != digest:
        raise DamagedError(f"the store's provenance of {digest[:12]} names another base than its adapter; put it again")
    return whole


def _harm(folder: Path, files: Files) -> str:
    """The first file that is not what the index knows; empty: all are."""
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if not is_file(path, facts):
            return f"{path} was changed since the store wrote it"
    return ""


def pack_provenance(provenance: Provenance) -> tuple[str, bytes]:
    """A provenance's name in the blob, by its content, and its bytes.

    Raises:
        StoreError: it is too large.
    """
    data = json.dumps(
        plain(provenance.to_dict()), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False, default=str
    ).encode("utf-8", "replace")
    if len(data) > MAX_PROVENANCE:
        raise StoreError(f"the adapter's provenance has {len(data):,} bytes; at most {MAX_PROVENANCE:,} are kept")
    return hashlib.sha256(data).hexdigest(), data


def unpack_provenance(data: bytes, name: str, where: str) -> Provenance:
    """The inverse of `pack_provenance`.

    Raises:
        DamagedError: the bytes are not those of this name.
    """
    if hashlib.sha256(data).hexdigest() != name:
        raise DamagedError(
            f"{where}: provenance/{name}.json was changed since the store wrote it; put the adapter again"
        )
    return provenance_of(parse_object(data, lambda message, key: FormatError(message, path=where, key=key)), where)


def provenance_of(values: dict[str, Any], where: str) -> Provenance:
    """A provenance from plain data.

    Raises:
        FormatError: it is none.
    """
    try:
        return Provenance.from_dict(values)
    except (TypeError, ValueError, AttributeError, KeyError) as problem:
        raise FormatError(
            f"no provenance of an adapter ({type(problem).__name__}: {str(problem)[:100]})", path=where
        ) from None


def draft_of(
    adapter: Adapter, provenance: str, tags: Mapping[str, str], metrics: Mapping[str, float], note: str
) -> Draft:
    """Read an adapter's facts into columns.

    Raises:
        StoreError: a tag or a metric that can't be kept.
    """
    facts, base = adapter.provenance, adapter.provenance.base
    columns: dict[str, Any] = {
        "provenance": provenance,
        "note": check_text(note, "the note"),
        "base": base.weights if base else "",
        "base_layout": base.layout if base else "",
        "base_name": _line((base.name if base else None) or facts.base_name),
        "architecture": _line(base.architecture if base else ""),
        "rank": max((item.rank for item in adapter.factors.values()), default=0),
        "sites": len(adapter.factors),
        "parameters": adapter.num_parameters,
    }
    own = {name: value for name, value in facts.evaluation.items() if is_metric(name, value)}
    parents = tuple((_line(item.get("digest")), _number(item.get("weight"))) for item in facts.parents)
    columns["base_leaf"] = str(columns["base_name"]).rpartition("/")[2]
    data = tuple({name: _line(item.get(name)) for name in ("digest", "source", "role")} for item in facts.data)
    return Draft(columns, checked_tags(tags), own | checked_metrics(metrics), parents, data)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _line(value: Any) -> str:
    """A fact from a file that anybody may have written, short and printable."""
    text = "" if value is None else str(value)
    return "".join(letter if letter.isprintable() else "�" for letter in text[:512])
