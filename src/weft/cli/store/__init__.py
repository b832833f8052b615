"""``weft store VERB``: adapters by name, version, alias and digest.

keep.py   put, tag, rm, gc, verify        look.py      ls, show, log, diff
move.py   promote, rollback               exchange.py  push, pull, export, serve-index
"""

from __future__ import annotations

from typing import Annotated

import typer

from weft.cli.store import exchange, keep, look, move
from weft.cli.store.opening import Where

__all__ = ["app"]

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback()
def store(
    ctx: typer.Context,
    at: Annotated[
        str | None,
        typer.Option(
            "--at",
            metavar="PLACE",
            help="A directory, s3://bucket/prefix …; default: WEFT_STORE, or the user's data directory.",
        ),
    ] = None,
    index: Annotated[
        str | None,
        typer.Option(
            "--index",
            metavar="URL",
            help="Of a database, as in postgresql://…; default: WEFT_STORE_INDEX, or a file in the store.",
        ),
    ] = None,
    owner: Annotated[
        str | None, typer.Option("--owner", metavar="NAME", help="Whose adapters; default: WEFT_OWNER, or local.")
    ] = None,
) -> None:
    """Keep adapters by name, version, alias and digest.

    NAME, NAME@3, NAME@prod and the first digits of a digest work wherever weft takes an adapter.
    """
    ctx.obj = Where(at, index, owner)


keep.add_to(app)
look.add_to(app)
move.add_to(app)
exchange.add_to(app)
