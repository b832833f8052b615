"""The command line: ``weft VERB …``. One file a verb: parse, call the API, print.

    app.py      the verbs, and what is done with an error
    options.py  options that several verbs share
    show.py     what is printed, and how
    quiet.py    the libraries' own messages, kept off the terminal

Exit status: 0; 1 for a failure on the way; 2 for a command line, a file or a setting that can't be used; 130 after
Ctrl-C. Results go to stdout, all else to stderr. ``WEFT_DEBUG=1`` shows the traceback of every error.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the entry point ``weft`` and ``python -m weft``.

    Args:
        arguments: without the program's name; None: those of the process.

    Returns:
        The exit status.
    """
    from weft.cli.app import run

    return run(arguments)
