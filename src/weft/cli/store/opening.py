"""The store that a command line means, and options that several verbs of it share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from weft.cli.options import Usage

if TYPE_CHECKING:
    from weft.store import Store

__all__ = ["Name", "Ref", "Where", "metrics_of", "opened", "pairs_of"]

Ref = Annotated[str, typer.Argument(metavar="REF", help="NAME, NAME@3, NAME@prod, or the first digits of a digest.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A name in the store.")]


@dataclass(frozen=True)
class Where:
    """What stands between ``store`` and its verb."""

    at: str | None = None
    index: str | None = None
    owner: str | None = None


def opened(ctx: typer.Context, *, create: bool = False) -> Store:
    """The store; only who puts something into it makes it."""
    from weft.store import Store

    where = ctx.obj if isinstance(ctx.obj, Where) else Where()
    return Store(where.at, index=where.index, owner=where.owner, create=create)


def pairs_of(option: str, values: list[str] | None) -> dict[str, str]:
    """``["a=b"]`` as a mapping.

    Raises:
        Usage: a part without ``=``, or a key that stands twice.
    """
    found: dict[str, str] = {}
    for value in values or ():
        key, equals, text = value.partition("=")
        if not (equals and key):
            raise Usage(f"{option}: {value!r} is no KEY=VALUE")
        if key in found:
            raise Usage(f"{option}: {key!r} stands twice")
        found[key] = text
    return found


def metrics_of(values: list[str] | None) -> dict[str, float]:
    """``["eval_loss=1.8"]`` as numbers.

    Raises:
        Usage: a value that is no number.
    """
    found = {}
    for key, text in pairs_of("--metric", values).items():
        try:
            found[key] = float(text)
        except ValueError:
            raise Usage(f"--metric: {key} is to be a number, got {text!r}") from None
    return found
