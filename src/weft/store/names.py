"""What a name may be, and what a reference means: ``medical``, ``medical@3``, ``medical@prod``, ``9f2c41d0``.

Names are ASCII: what two people read as the same name is the same name. Text from outside is measured before anything
else is done with it. This module knows no database and no files.
"""

from __future__ import annotations

import os
import re
import unicodedata
from dataclasses import dataclass

from weft.errors import StoreError

__all__ = ["LATEST", "Reference", "check_label", "check_name", "check_text", "parse", "parse_name"]

LATEST = "latest"
"""The alias that every name has by itself: its newest version."""

MAX_NAME = 128
MAX_TEXT = 1024
MIN_PREFIX = 6
"""Hexadecimal digits that a digest has to start with."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PREFIX = re.compile(rf"[0-9a-f]{{{MIN_PREFIX},64}}")
_DEVICES = frozenset({"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))})


@dataclass(frozen=True)
class Reference:
    """What somebody wrote for an adapter.

    Attributes:
        name: of an adapter; empty for a digest.
        number: a version.
        alias: or an alias; `LATEST` where neither was given.
        prefix: first digits of a digest that the text can mean as well, or only.
    """

    text: str
    name: str = ""
    number: int | None = None
    alias: str = ""
    prefix: str = ""


def check_name(name: object, what: str = "name") -> str:
    """A name of an adapter, an owner or an alias, if it can be one.

    Raises:
        StoreError: says what is wrong with it: no text, too long, a letter that is not ASCII, a path, a device of Windows.
    """
    if not isinstance(name, str):
        raise StoreError(f"a {what} is text; got {type(name).__name__}")
    if not name:
        raise StoreError(f"an empty {what}; expected {_expected()}")
    if len(name) > MAX_NAME:
        raise StoreError(f"a {what} of {len(name):,} characters ({_shown(name)}); expected {_expected()}")
    wrong = re.search(r"[^A-Za-z0-9._-]", name)
    if wrong:
        raise StoreError(f"{what} {_shown(name)}: {_letter(wrong[0])} can't be in it; expected {_expected()}")
    if not _NAME.fullmatch(name) or name.endswith(".") or ".." in name:
        raise StoreError(
            f"{what} {_shown(name)}: it starts with a letter or a digit, ends with no dot, and has no two dots in a row"
        )
    if name.partition(".")[0].lower() in _DEVICES:
        raise StoreError(
            f"{what} {_shown(name)} is a device on Windows, where no file can be called so; choose another"
        )
    if re.fullmatch(r"[0-9a-f]{64}", name):
        raise StoreError(f"{what} {_shown(name)} looks like a digest; choose another")
    return name


def check_label(alias: object) -> str:
    """An alias, if it can be one: a name that is no number and not ``latest``.

    Raises:
        StoreError: see `check_name`.
    """
    label = check_name(alias, "alias")
    if label.isdigit():
        raise StoreError(f"alias {label!r}: a number means a version; choose a word, as in prod")
    if label.lower() == LATEST:
        raise StoreError(f"alias {label!r} is always the newest version, and can't be moved")
    return label


def check_text(text: object, what: str) -> str:
    """Free text (a tag's value, a note) as it is kept: one form of each letter, nothing invisible.

    Raises:
        StoreError: no text, too long, control or format characters.
    """
    if not isinstance(text, str):
        raise StoreError(f"{what}: expected text, got {type(text).__name__}")
    if len(text) > MAX_TEXT:
        raise StoreError(f"{what} has {len(text):,} characters; at most {MAX_TEXT:,} are kept")
    plain = unicodedata.normalize("NFC", text)
    wrong = next((letter for letter in plain if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Co", "Cn")), None)
    if wrong is not None:
        raise StoreError(f"{what} {_shown(text)}: {_letter(wrong)} is invisible, and can't be in it")
    return plain


def parse(text: object) -> Reference:
    """Read a reference.

    Raises:
        StoreError: it can't be one.
    """
    given = os.fspath(text) if isinstance(text, os.PathLike) else text
    if not isinstance(given, str):
        raise StoreError(f"a reference is text, as in medical@prod; got {type(text).__name__}")
    if len(given) > 2 * MAX_NAME + 1:
        raise StoreError(
            f"a reference of {len(given):,} characters ({_shown(given)}); expected NAME, NAME@3, NAME@prod or a digest"
        )
    name, at, version = given.partition("@")
    prefix = given.lower().removeprefix("sha256:") if not at else ""
    prefix = prefix if _PREFIX.fullmatch(prefix) else ""
    if prefix and (len(prefix) == 64 or given.lower().startswith("sha256:")):
        return Reference(given, prefix=prefix)
    check_name(name)
    if not at:
        return Reference(given, name, alias=LATEST, prefix=prefix)
    if version.isascii() and version.isdigit():
        if len(version) > 9 or not int(version):
            raise StoreError(f"{_shown(given)}: versions are counted from 1")
        return Reference(given, name, number=int(version))
    if not version:
        raise StoreError(f"{_shown(given)}: after @ stands a version or an alias, as in {name}@3 or {name}@prod")
    return Reference(given, name, alias=LATEST if version == LATEST else check_label(version))


def parse_name(text: object) -> str:
    """A name alone.

    Raises:
        StoreError: it can't be one; or a version stands behind it.
    """
    if isinstance(text, str) and "@" in text[: MAX_NAME + 1]:
        raise StoreError(f"{_shown(text)}: expected a name alone, without a version: {_shown(text.partition('@')[0])}")
    return check_name(text)


def _expected() -> str:
    return f"1 to {MAX_NAME} of A-Z a-z 0-9 . _ -"


def _shown(name: str) -> str:
    return ascii(name if len(name) <= 60 else f"{name[:40]}...")


def _letter(letter: str) -> str:
    """A character, by its name where it is no plain one."""
    if letter in "/\\":
        return f"{letter!r} (a name is no path)"
    if letter.isascii() and letter.isprintable():
        return repr(letter)
    known = unicodedata.name(letter, "a control character")
    plain = unicodedata.normalize("NFKC", letter)
    like = f", which looks like {plain!r}" if plain != letter and plain.isascii() and plain.isprintable() else ""
    return f"{letter!a} ({known}{like})"
