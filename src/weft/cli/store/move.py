"""``weft store promote`` and ``rollback``: where an alias points."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from weft.cli import show
from weft.cli.options import Json, Quiet
from weft.cli.store.opening import Name, Ref, opened

if TYPE_CHECKING:
    from weft.store import Move

__all__ = ["add_to"]

Alias = Annotated[str, typer.Argument(metavar="ALIAS", help="As in prod.")]


def add_to(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command()(promote)
    app.command()(rollback)


def promote(
    ctx: typer.Context,
    ref: Ref,
    alias: Alias,
    require: Annotated[
        str | None,
        typer.Option(
            "--require",
            metavar="CONDITION",
            help="Only if it holds: 'eval_loss<=prod' compares with the version that prod is.",
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Point an alias to a version, in one step."""
    store = opened(ctx)
    version = store.version(ref)
    _show(version.name, store.promote(version, alias, require=require), json)
    show.remark(f"back:  {show.command('weft', 'store', 'rollback', version.name, alias)}", quiet or json)


def rollback(ctx: typer.Context, name: Name, alias: Alias, json: Json = False) -> None:
    """Point an alias to where it was before."""
    _show(name, opened(ctx).rollback(name, alias), json)


def _show(name: str, move: Move, json: bool) -> None:
    if json:
        return show.as_json(
            {
                "name": name,
                "alias": move.alias,
                "kind": move.kind,
                "before": move.before,
                "after": move.after,
                "required": move.required,
            }
        )
    if move.before == move.after:
        return show.result(f"{name}@{move.alias} is {name}@{move.after} already")
    show.result(
        f"{name}@{move.alias} is {name}@{move.after}" + (f", it was {name}@{move.before}" if move.before else "")
    )
