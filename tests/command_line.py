"""Run a command line inside of the test's process: fast, and without a trace afterwards."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from weft.cli import main

__all__ = ["Done", "weft"]


@dataclass(frozen=True)
class Done:
    """What came of a command."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def weft(line: str = "", *more: object, stdin: str | None = None, ok: bool = True) -> Done:
    """Run ``weft LINE MORE…`` inside of the test's process.

    Args:
        line: split as a shell does; more: words that are taken as they are.
        stdin: None: a terminal at which nobody types.
        ok: the exit status has to be 0.
    """
    words = [*shlex.split(line), *map(str, more)]
    out, err = io.StringIO(), io.StringIO()
    with _as_before(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.stdin = _Terminal() if stdin is None else io.StringIO(stdin)
        status = main(words)
    done = Done(status, out.getvalue(), err.getvalue())
    assert not ok or status == 0, f"weft {shlex.join(words)}: exit status {status}\n{done.out}\n{done.err}"
    return done


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """The command line may change its process as it likes: here it is put back."""
    environment, stdin = dict(os.environ), sys.stdin
    logger = logging.getLogger("weft")
    state = list(logger.handlers), logger.propagate, logger.level
    try:
        with warnings.catch_warnings():
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        sys.stdin = stdin
        logger.handlers[:], logger.propagate, logger.level = state
