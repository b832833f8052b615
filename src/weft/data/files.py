"""Bytes of a local file to lines of text: compression, encodings, and files that are not what their name says.

Does not know JSON, tables or examples.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from weft.errors import DataError, did_you_mean

__all__ = ["ENDINGS", "beginning", "check_file", "ending", "missing", "opened", "text_lines"]

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
"""File endings that are read; each but .parquet also with ``.gz`` behind it."""

_LFS = b"version https://git-lfs.github.com/spec/"
_UTF8_BOM = b"\xef\xbb\xbf"
_MAGIC = {
    b"\x1f\x8b": ("compressed with gzip", "give it a name that ends in .gz"),
    b"PAR1": ("a Parquet file", "give it a name that ends in .parquet"),
    b"PK\x03\x04": ("a zip archive", "unpack it"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "unpack it"),
    b"BZh": ("compressed with bzip2", "unpack it"),
    b"\xff\xfe": ("UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW"),
    b"\xfe\xff": ("UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW"),
}


def ending(path: Path) -> str:
    """The ending that says how to read a file, without ``.gz`` and in small letters: ``".jsonl"``."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def missing(path: Path, also: str = "") -> DataError:
    """The error for a path that isn't there: which part of it is, and which neighbours have a like name."""
    parent = path.parent
    if not parent.is_dir():
        while parent != parent.parent and not parent.exists():
            parent = parent.parent
        return DataError(f"{path}: no such file; of its folders only {str(parent)!r} exists{also}")
    hint = did_you_mean(path.name, sorted(entry.name for entry in parent.iterdir()))
    return DataError(f"{path}: no such file.{hint}{also}")


def check_file(path: Path) -> None:
    """Refuse what can be refused by looking at the first bytes.

    Raises:
        DataError: the file is empty, a Git LFS pointer, can't be opened, or is of another kind than its name says.
    """
    with _readable(path), path.open("rb") as stream:
        head = stream.read(200)
    if not head:
        raise DataError(f"{path}: the file is empty (0 bytes)")
    if head.startswith(_LFS):
        raise DataError(
            f"{path}: this is a Git LFS pointer, not the data; fetch the file with `git lfs pull` in its repository"
        )
    expected = b"\x1f\x8b" if path.suffix.lower() == ".gz" else b"PAR1" if ending(path) == ".parquet" else None
    if expected is not None:
        if not head.startswith(expected):
            kind = "gzip" if expected == b"\x1f\x8b" else "Parquet"
            raise DataError(f"{path}: not a {kind} file, whatever its name says; it begins with {head[:40]!r}")
        return
    for magic, (what, way_out) in _MAGIC.items():
        if head.startswith(magic):
            raise DataError(f"{path}: this is {what}, not text in UTF-8; {way_out}")


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed where its name ends in .gz.

    Raises:
        DataError: the file can't be read, or its compressed stream is damaged or cut off.
    """
    with _readable(path), gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as stream:
        yield cast(IO[bytes], stream)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: the gzip stream is damaged or cut off ({error}); fetch or compress it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from error


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a UTF-8 file with their numbers from 1; a byte order mark is dropped, line ends are kept.

    Lines end at LF only, so that characters such as U+2028 inside of a JSON string are no line ends.

    Raises:
        DataError: bytes that are not UTF-8; names the line, the byte and the likely encoding.
    """
    with opened(path) as stream:
        for number, raw in enumerate(stream, 1):
            line = raw.removeprefix(_UTF8_BOM) if number == 1 else raw
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _encoding_error(path, number, line, error) from error
            yield number, text


def _encoding_error(path: Path, number: int, line: bytes, error: UnicodeDecodeError) -> DataError:
    start = error.start
    guess = _likely_encoding(line)
    before = line[max(0, start - 30) : start].decode("utf-8", errors="replace")
    return DataError(
        f"{path}, line {number}: byte {start + 1} (0x{line[start]:02x}, after {before!r}) is not UTF-8. If the file is in "
        f"{guess}, convert it: iconv -f {guess} -t UTF-8 OLD > NEW"
    )


def _likely_encoding(line: bytes) -> str:
    try:
        chinese = sum("\u4e00" <= character <= "\u9fff" for character in line.decode("gb18030"))
    except UnicodeDecodeError:
        chinese = 0
    high = sum(byte > 0x7F for byte in line)
    return "GB18030" if chinese * 2 > high * 0.6 and high > 3 else "WINDOWS-1252"


def beginning(text: str, limit: int = 60) -> str:
    """The beginning of a text for a message, quoted, with its size where it is longer."""
    shown = text.strip()
    return repr(shown) if len(shown) <= limit else f"{shown[:limit]!r} … ({len(shown):,} characters)"
