"""The verbs, found when they are asked for, and what becomes of an error.

Knows nothing of what a verb does.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, cast

import typer
from typer.core import TyperGroup

from weft import __version__
from weft.cli.options import Usage
from weft.cli.quiet import debugging, quiet_libraries, show_remarks
from weft.errors import (
    BudgetError,
    DamagedError,
    MergeError,
    NotFiniteError,
    RequirementError,
    RunStoppedError,
    WeftError,
)

__all__ = ["VERBS", "app", "run"]

VERBS = (
    "demo",
    "plan",
    "train",
    "train-many",
    "eval",
    "generate",
    "inspect",
    "doctor",
    "report",
    "merge",
    "convert",
    "combine",
    "compare",
    "shrink",
    "store",
)

FAILURES = (BudgetError, DamagedError, MergeError, NotFiniteError, RequirementError, RunStoppedError)
"""What can happen although all that was asked for was right: exit status 1. Every other WeftError: 2."""

_INTERRUPTED = 130
_ClickError: Any = Usage.__base__


class _Verbs(TyperGroup):
    """Imports the module of a verb when the verb is used, and not before."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All verbs, in the order in which they are met."""
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a verb; None for an unknown one."""
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"weft.cli.{cmd_name.replace('-', '_')}")
        command = typer.main.get_command(module.app)
        command.name = cmd_name
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that ``args`` start with; for an unknown verb the near ones are named."""
        self.commands = cast(Any, dict.fromkeys(VERBS))  # where typer searches for near names
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Verbs, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True
)


def _version(asked: bool) -> None:
    if asked:
        print(f"weft {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Say the version and end."),
) -> None:
    """The whole life of a LoRA adapter: train one or hundreds, check, mix, keep and use them. The base is never changed."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and turn whatever happens into an exit status and a message on stderr."""
    quiet_libraries()
    show_remarks(warnings_only=True)
    command = typer.main.get_command(app)
    try:
        status = command.main(
            args=None if arguments is None else list(arguments), prog_name="weft", standalone_mode=False
        )
        sys.stdout.flush()
        return _interrupted() if status == _INTERRUPTED else status if isinstance(status, int) else 0
    except _ClickError as error:
        return _say_usage(error)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except BrokenPipeError:  # who read the output has enough of it, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as end:  # typer's own answer to the same
        return end.code if isinstance(end.code, int) else 1
    except Exception as error:  # the outermost door: nothing passes it as a traceback
        if debugging():
            raise
        return _say(error)


def _interrupted() -> int:
    print("\nweft: stopped", file=sys.stderr)
    return _INTERRUPTED


def _say_usage(error: Any) -> int:
    """A command line that can't be read: what is wrong with it, and how to see what is right."""
    name = error.ctx.command_path if getattr(error, "ctx", None) else "weft"
    text = error.format_message().strip()
    if type(error).__name__ == "NoArgsIsHelpError":
        print(text, file=sys.stderr)
    else:
        print(f"{name}: {text}\nTry '{name} --help'.", file=sys.stderr)
    return int(error.exit_code)


def _say(error: Exception) -> int:
    """One message for an error that ended a command; gives the exit status."""
    if isinstance(error, WeftError):
        print(f"weft: {error}", file=sys.stderr)
        return 1 if isinstance(error, FAILURES) else 2
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        print("weft: out of memory. Smaller steps need less of it: --set batch_size=1 --set accumulation=8, --set max_length=256, "
              f"--set gradient_checkpointing=true, --dtype bfloat16. ({_first_line(error)})", file=sys.stderr)  # fmt: skip
        return 1
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        print(f"weft: {where}{error.strerror or _first_line(error)}", file=sys.stderr)
        return 1
    print(f"weft: this is a bug in weft, or in a library below it: {type(error).__name__}: {_first_line(error)}\n"
          "WEFT_DEBUG=1 before the command shows the traceback; please report it with that", file=sys.stderr)  # fmt: skip
    return 1


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
