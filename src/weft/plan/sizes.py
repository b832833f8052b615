"""Numbers of bytes as people write them: ``8MiB``, ``24GB``, ``1.5 GiB``."""

from __future__ import annotations

import math
import re

from weft.errors import PlanError, did_you_mean

__all__ = ["bytes_of", "in_words"]

UNITS = {"B": 1} | {f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)}
UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}
_BY_NAME = {name.lower(): value for name, value in UNITS.items()}


def bytes_of(size: str | int, name: str = "budget") -> int:
    """A size in bytes. ``MiB`` is 1024², ``MB`` is 1000²; a bare number is bytes.

    Args:
        size: as ``"8MiB"``; a whole number of bytes is given back.
        name: of what it is, for messages.

    Raises:
        PlanError: no number, no such unit, or nothing above 0.

    Example:
        >>> bytes_of("1.5KiB"), bytes_of("2kB")
        (1536, 2000)
    """
    if isinstance(size, int) and not isinstance(size, bool):
        return _positive(size, size, name)
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([a-z]*)\s*", str(size), re.IGNORECASE)
    if match is None:
        raise PlanError(f"{name}: {size!r} is no size; expected a number and a unit, as in 8MiB or 24GB")
    unit = match[2] or "B"
    if unit.lower() not in _BY_NAME:
        raise PlanError(
            f"{name}: {size!r} has an unknown unit {unit!r}.{did_you_mean(unit, UNITS)} Units: {', '.join(UNITS)}"
        )
    found = float(match[1]) * _BY_NAME[unit.lower()]
    return _positive(int(found) if math.isfinite(found) else 0, size, name)


def _positive(number: int, given: object, name: str) -> int:
    if number < 1:
        raise PlanError(f"{name}: {given!r}; expected at least one byte and a finite number, as in 8MiB")
    return number


def in_words(size: float) -> str:
    """A size for people, in binary units: ``8.00 MiB``; below 1 KiB exactly."""
    for power, letter in reversed(list(enumerate("KMGT", 1))):
        if size >= 1024**power:
            return f"{size / 1024**power:.2f} {letter}iB"
    return f"{size:.0f} B"
