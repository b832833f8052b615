"""Adapters on the Hugging Face hub: only the files of the adapter are fetched.

This module does not read them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from weft.errors import FormatError
from weft.formats.other import FILES
from weft.formats.peft import OWNED

__all__ = ["fetch", "is_hub_id"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WAIT_SECONDS = 10


def is_hub_id(name: str | os.PathLike[str]) -> bool:
    """Whether a text can be the id of a repository, ``org/name``, and is no path that exists."""
    return isinstance(name, str) and bool(_HUB_ID.fullmatch(name)) and ".." not in name and not os.path.lexists(name)


def fetch(name: str, revision: str | None = None) -> tuple[Path, str]:
    """The folder with an adapter's files, and the commit they are from.

    Raises:
        FormatError: the hub can't be reached, or doesn't have it; says what to do.
    """
    import huggingface_hub
    from huggingface_hub import errors

    failures = (OSError, ValueError, getattr(errors, "HTTPError", OSError))
    try:
        folder = Path(huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=[*OWNED, *FILES], etag_timeout=_WAIT_SECONDS
        ))  # fmt: skip
    except errors.GatedRepoError:
        way_out = f"it is gated: ask for access on https://huggingface.co/{name}, then log in with 'hf auth login'"
    except errors.RevisionNotFoundError:
        way_out = f"it has no revision {revision!r}"
    except errors.RepositoryNotFoundError:
        way_out = "the hub has no such repository, or it is private: check the spelling, or log in with 'hf auth login'"
    except errors.LocalEntryNotFoundError:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        reason = "HF_HUB_OFFLINE is set" if offline else "the hub can't be reached"
        way_out = (
            f"it is not in the local cache, and {reason}: download it where there is a network, or give a directory"
        )
    except failures as problem:
        way_out = f"{type(problem).__name__}: {(str(problem).strip().splitlines() or [''])[0][:200]}"
    else:
        if any(os.path.lexists(folder / file) for file in (*OWNED, *FILES)):
            return folder, folder.name
        way_out = f"that repository has none of the files of an adapter ({', '.join((*OWNED[:3], FILES[0]))})"
    raise FormatError(f"no file or directory is called so, and as a hub id it can't be had: {way_out}", path=name)
