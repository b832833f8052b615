"""Files of named tensors: safetensors, and PyTorch's pickles read without running them.

A safetensors header is parsed and checked by hand before anything is allocated; then each tensor is read from its
own bytes of the same open file. A pickle is opened with ``weights_only=True`` and mapped, never copied blindly. This
module does not know what the names mean.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from weft.errors import FormatError, NotFiniteError
from weft.formats.checks import check_name, parse_object, plain_file, shortened
from weft.hashes import MAX_HEADER_BYTES, TENSORS, of_tensors
from weft.identity import TensorHashes

__all__ = [
    "Entry",
    "NotFiniteFileError",
    "TensorBytes",
    "TensorFile",
    "parse_header",
    "read_header",
    "read_tensors",
    "write_tensors",
]

MAX_TENSORS = 500_000
MAX_DIMENSIONS = 8

_PIECE = 1 << 18
"""Bytes that are written with one call: from a megabyte on Linux looks for large pages, which can take ten times the writing."""

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_BROKEN = (
    RuntimeError, pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, struct.error,
    ArithmeticError, MemoryError, OSError, ImportError, zipfile.BadZipFile, SyntaxError,
)  # fmt: skip
"""What torch raises for a pickle that is not what it says."""


class NotFiniteFileError(FormatError, NotFiniteError):
    """A file with NaN or infinity where finite numbers were expected."""


@dataclass(frozen=True)
class Entry:
    """What a safetensors header says of one tensor; ``start`` and ``stop`` count from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class TensorFile:
    """A file that was read.

    Attributes:
        tensors: by name, in the order of the file.
        metadata: text that stands in a safetensors header.
        hash: of the whole file, of the kind that was asked for; empty where none was.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    hash: str = ""


def read_header(path: Path, folder: Path | None = None) -> tuple[dict[str, Entry], dict[str, str]]:
    """Names, dtypes and shapes of a safetensors file, all checked; nothing else is read.

    Raises:
        FormatError: see `parse_header`.
    """
    size = plain_file(path, folder)
    with path.open("rb") as file:
        return parse_header(_head(file, size, path), size, path)


def _head(file: BinaryIO, size: int, path: Path) -> bytes:
    """The length and the header, once the length is plausible."""
    first = file.read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
        what = (
            "a PyTorch file (zip or pickle): its name should end in .bin"
            if first[:1] in (b"P", b"\x80")
            else "cut short or damaged"
        )
        raise FormatError(
            f"not a safetensors file of {size:,} bytes: the header would have {length:,} bytes; {what}", path=path
        )
    return first + file.read(length)


def parse_header(head: bytes, size: int, path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Check a safetensors header against the size of its file.

    Args:
        head: the first eight bytes and the header.
        size: of the whole file, in bytes.
        path: for messages.

    Returns:
        Entries by name in the order of their bytes, and the metadata.

    Raises:
        FormatError: no JSON object, a name twice or with control characters, an unknown dtype, a shape that doesn't
            match its bytes, bytes outside of the file, shared by two tensors or by none.
    """
    if len(head) < 9 or len(head) != 8 + int.from_bytes(head[:8], "little") or head[8:9] != b"{":
        raise FormatError("not a safetensors file: there is no header; damaged, or another kind of file", path=path)
    said = parse_object(
        head[8:], lambda message, key: FormatError(f"safetensors header: {message}", path=path, key=key)
    )
    metadata = said.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("safetensors header: __metadata__ has to hold text only", path=path, key="__metadata__")
    if len(said) > MAX_TENSORS:
        raise FormatError(f"{len(said):,} tensors in one file; at most {MAX_TENSORS:,} are read", path=path)
    entries = {name: _entry(name, facts, path) for name, facts in said.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = 0
    for name, entry in ordered.items():
        if entry.start != end:
            what = (
                "bytes of another tensor"
                if entry.start < end
                else f"{entry.start - end:,} bytes that belong to nothing"
            )
            raise FormatError(
                f"its bytes start at {entry.start:,}, after {end:,}: {what}; the file is damaged",
                path=path,
                key=shortened(name),
            )
        end = entry.stop
    if end != size - len(head):
        raise FormatError(
            f"the header describes {end:,} bytes, the file has {size - len(head):,} after it: cut short or damaged; get it again",
            path=path,
        )
    return ordered, metadata


def _entry(name: str, facts: Any, path: Path) -> Entry:
    """One tensor of a header."""
    key = shortened(name)
    check_name(name, path)
    if not isinstance(facts, dict) or set(facts) != {"dtype", "shape", "data_offsets"}:
        raise FormatError("safetensors header: expected dtype, shape and data_offsets", path=path, key=key)
    dtype = _DTYPES.get(facts["dtype"]) if isinstance(facts["dtype"], str) else None
    if dtype is None:
        raise FormatError(
            f"dtype {shortened(repr(facts['dtype']))}; expected one of {', '.join(_DTYPES)}. Numbers of eight bits and less have to be widened where they came from",
            path=path, key=key,
        )  # fmt: skip
    shape, offsets = facts["shape"], facts["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(
            type(number) is int and 0 <= number < 1 << 63 for number in numbers
        ):
            raise FormatError(
                f"shape {str(shape)[:60]} and data_offsets {str(offsets)[:60]}; expected lists of whole numbers",
                path=path,
                key=key,
            )
    if len(shape) > MAX_DIMENSIONS or len(offsets) != 2:
        raise FormatError(
            f"{len(shape)} dimensions and {len(offsets)} offsets; expected at most {MAX_DIMENSIONS}, and 2",
            path=path,
            key=key,
        )
    needed = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != needed:
        raise FormatError(
            f"shape {shape} of {facts['dtype']} needs {needed:,} bytes, its data_offsets {offsets} hold {offsets[1] - offsets[0]:,}",
            path=path,
            key=key,
        )
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def read_tensors(
    path: Path,
    folder: Path | None = None,
    *,
    like: str = "",
    hashes: TensorHashes | None = None,
    trusted: bool = False,
) -> TensorFile:
    """All tensors of a file, copied into memory; the kind of file is told by its first bytes.

    Args:
        path: ``.safetensors``, or a zip as ``torch.save`` writes it (``.bin``, ``.pt``, ``.pth``, ``.ckpt``).
        folder: where the file has to be in, links followed.
        like: a hash; that of the file is computed, of the same kind, see `weft.hashes`.
        hashes: learns the tensors' hashes, where ``like`` needs them.
        trusted: the numbers were checked when the file was written, by whoever kept its hash; they are not checked again.

    Raises:
        FormatError: see `parse_header`; a pickle that needs more than tensors.
        NotFiniteFileError: NaN or infinity.
    """
    size = plain_file(path, folder)
    try:
        with path.open("rb") as file:
            if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
                found = _read_pickle(path, size)
            else:
                found = _read_safetensors(file, size, path, like, hashes)
    except OSError as problem:
        raise FormatError(f"can't be read: {problem.strerror or problem}", path=path) from None
    for name, tensor in found.tensors.items() if not trusted else ():
        check_finite(name, tensor, path)
    return found


def check_finite(name: str, tensor: Tensor, path: Path) -> None:
    """Refuse NaN and infinity.

    Raises:
        NotFiniteFileError: names the tensor.
    """
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum())):  # a sum costs a tenth of looking at each
        return
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise NotFiniteFileError(
            f"{bad:,} of {tensor.numel():,} values are NaN or infinite: the training that wrote it diverged, or the file is damaged; "
            "take an earlier checkpoint", path=path, key=shortened(name)
        )  # fmt: skip


def _read_safetensors(file: BinaryIO, size: int, path: Path, like: str, hashes: TensorHashes | None) -> TensorFile:
    """The tensors of a file, in the order of their bytes: it is read once, from start to end."""
    head = _head(file, size, path)
    entries, metadata = parse_header(head, size, path)
    tensors: dict[str, Tensor] = {}
    with _Running(head, like, hashes) as running:  # the next tensor is read while this one is hashed
        for name, entry in entries.items():
            raw = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
            view = memoryview(raw.numpy())  # type: ignore[arg-type]
            if len(view) and file.readinto(view) != len(view):  # type: ignore[attr-defined]
                raise FormatError("the file became shorter while it was read", path=path, key=shortened(name))
            running.add(raw)
            if entry.dtype == torch.bool and bool((raw > 1).any()):
                raise FormatError("truth values that are neither 0 nor 1", path=path, key=shortened(name))
            tensors[name] = raw.view(entry.dtype).reshape(entry.shape)
        return TensorFile(path, tensors, metadata, running.result())


class _Running:
    """The hash of a file whose tensors come one after the other."""

    def __init__(self, head: bytes, like: str, hashes: TensorHashes | None) -> None:
        self.head, self.parts = head, list[Future[str]]()
        self.by_tensors = like.startswith(TENSORS)
        self.hashes = (hashes or TensorHashes()) if self.by_tensors else None
        self.owned = self.hashes is not hashes
        self.whole = hashlib.sha256(head) if like and not self.by_tensors else None
        self.pool = ThreadPoolExecutor(1, "weft-hash")

    def __enter__(self) -> _Running:
        return self

    def __exit__(self, *problem: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        if self.owned and self.hashes is not None:
            self.hashes.__exit__(None, None, None)

    def add(self, raw: Tensor) -> None:
        if self.hashes is not None:
            self.parts.append(self.hashes.ask(raw))
        elif self.whole is not None:
            self.pool.submit(self.whole.update, memoryview(raw.numpy()))  # type: ignore[arg-type]

    def result(self) -> str:
        if self.hashes is not None:
            return of_tensors(self.head, [part.result() for part in self.parts])
        return self.pool.submit(self.whole.hexdigest).result() if self.whole is not None else ""


def _read_pickle(path: Path, size: int) -> TensorFile:
    """A state dict that ``torch.save`` wrote as a zip; nothing but tensors and plain containers is unpickled."""
    _check_zip(path, size)
    try:
        value = torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=True)
    except _BROKEN as problem:
        first = str(problem).strip().splitlines()[:1]
        raise FormatError(
            f"not a state dict of plain tensors ({type(problem).__name__}: {first[0][:200] if first else 'damaged'}). Nothing else is unpickled, "
            "because pickles can run code: save it as safetensors where it came from", path=path
        ) from None  # fmt: skip
    tensors = {name: _owned(name, tensor, path) for name, tensor in _state_dict(value, path).items()}
    return TensorFile(path, tensors, {})


def _check_zip(path: Path, size: int) -> None:
    """Members are stored as they are, and all of them together are no larger than the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, struct.error, EOFError):
        raise FormatError(
            "no zip as torch.save writes it since PyTorch 1.6: damaged, or older; an older one: torch.save(torch.load(path, weights_only=True), path) "
            "writes it anew", path=path
        ) from None  # fmt: skip
    packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if packed or sum(member.file_size for member in members) > size:
        raise FormatError("a compressed archive: torch.save never writes such a file; don't trust it", path=path)


def _state_dict(value: Any, path: Path) -> dict[str, Tensor]:
    """The state dict, also where a training wrapped it: ``{"model_state_dict": {...}}``."""
    for name in ("model_state_dict", "state_dict", "model", "module"):
        if isinstance(value, dict) and isinstance(value.get(name), dict):
            value = value[name]
    if not isinstance(value, dict) or not value:
        raise FormatError(f"expected a state dict (names and tensors), got {type(value).__name__}", path=path)
    for name, tensor in value.items():
        if not isinstance(name, str):
            raise FormatError(f"expected names, got {type(name).__name__} as a key", path=path)
        check_name(name, path)
        if not isinstance(tensor, Tensor):
            raise FormatError(f"expected a tensor, got {type(tensor).__name__}", path=path, key=shortened(name))
    return value


def _owned(name: str, tensor: Tensor, path: Path) -> Tensor:
    """A copy of a tensor that really has the bytes that its shape needs."""
    plain = (
        type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    )
    if not plain or tensor.is_quantized or tensor.dtype not in _DTYPES.values():
        raise FormatError(
            f"a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}; expected a plain one",
            path=path,
            key=shortened(name),
        )
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise FormatError(
            f"shape {tuple(tensor.shape)} needs more bytes than the file has for it", path=path, key=shortened(name)
        )
    return tensor.detach().clone(memory_format=torch.contiguous_format)


class TensorBytes:
    """A safetensors file that isn't written yet; dtypes are kept. The same bytes as those of ``safetensors.torch.save_file``.

    Args:
        tensors: by name; any device and layout of memory, also shared.
        metadata: text for the header.
        hashes: begins with the tensors' hashes at once.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, hashes: TensorHashes
    ) -> None:
        ordered = sorted(
            tensors, key=lambda name: (-tensors[name].itemsize, name)
        )  # wide numbers first: every tensor is aligned
        said: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        end = 0
        for name in ordered:
            start, end = end, end + tensors[name].numel() * tensors[name].itemsize
            said[name] = {
                "dtype": _NAMES[tensors[name].dtype],
                "shape": list(tensors[name].shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text
        self._tensors = [tensors[name].detach() for name in ordered]
        self._hashes = [hashes.ask(tensors[name]) for name in ordered]
        self.size = len(self._head) + end

    @property
    def hash(self) -> str:
        """Of the file, see `weft.hashes`; waits until it is known."""
        return of_tensors(self._head, [part.result() for part in self._hashes])

    def write(self, path: Path, flushed: bool = True) -> None:
        """Write it, onto the disk if it isn't to be flushed later, with others. It is hashed meanwhile.

        Raises:
            OSError: the disk is full, or the file can't be written.
        """
        with path.open("wb", buffering=0) as file:
            _write_all(file, memoryview(self._head))
            for tensor in self._tensors:
                _write_all(file, _bytes(tensor.cpu().contiguous()))
            if flushed:
                os.fsync(file.fileno())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file, see `TensorBytes`; gives its hash."""
    with TensorHashes() as hashes:
        made = TensorBytes(tensors, metadata, hashes=hashes)
        made.write(path)
        return made.hash


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _write_all(file: io.FileIO, part: memoryview) -> None:
    while part.nbytes:
        part = part[file.write(part[:_PIECE]) :]
