"""Where the store is if nobody says: environment variables, and the user's data directory. Costs nothing to ask."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["INDEX_FILE", "default_index", "default_owner", "default_place", "is_there"]

INDEX_FILE = "index.sqlite"
OWNER = "local"


def default_place() -> str:
    """``WEFT_STORE``, or ``weft/store`` in the user's data directory (Linux: ``~/.local/share``)."""
    given = os.environ.get("WEFT_STORE", "")
    if given:
        return given
    from platformdirs import user_data_path

    return str(user_data_path("weft", appauthor=False) / "store")


def default_index() -> str | None:
    """``WEFT_STORE_INDEX``; None: the file beside the blobs."""
    return os.environ.get("WEFT_STORE_INDEX") or None


def default_owner() -> str:
    """``WEFT_OWNER``, or ``local``."""
    return os.environ.get("WEFT_OWNER") or OWNER


def is_there() -> bool:
    """Whether the store that nobody named exists, as far as can be told without opening it."""
    if default_index() is not None:
        return True
    place = default_place()
    return "://" not in place and (Path(place).expanduser() / INDEX_FILE).is_file()
