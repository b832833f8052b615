"""What the libraries say by themselves stays off the terminal; what weft has to say is shown.

Only the command line does this: who imports weft decides for themselves.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

__all__ = ["debugging", "quiet_libraries", "show_remarks"]

_ENVIRONMENT = {
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def debugging() -> bool:
    """Whether ``WEFT_DEBUG`` asks for tracebacks and for everything that libraries say."""
    return os.environ.get("WEFT_DEBUG", "0") not in ("", "0")


def quiet_libraries() -> None:
    """Before any library is imported; a variable that the user has set stays as it is."""
    if debugging():
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # what it could not accelerate is nobody's question here
    warnings.simplefilter("ignore")


class _Remarks(logging.Handler):
    """Writes to whatever stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        print(self.format(record), file=sys.stderr, flush=True)


def show_remarks(warnings_only: bool = False) -> None:
    """Show what weft's own modules log: all of it, or only warnings."""
    logger = logging.getLogger("weft")
    if not any(isinstance(handler, _Remarks) for handler in logger.handlers):
        logger.addHandler(_Remarks())
        logger.propagate = False
    logger.setLevel(logging.WARNING if warnings_only else logging.INFO)
