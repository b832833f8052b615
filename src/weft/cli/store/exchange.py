"""``weft store push``, ``pull``, ``export``, ``serve-index``: to other places, and from there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weft.cli import show
from weft.cli.options import Json, Out, Quiet, Usage
from weft.cli.store.opening import Ref, opened

if TYPE_CHECKING:
    from weft.store.exchange import Transfer

__all__ = ["add_to"]

Place = Annotated[str, typer.Argument(metavar="PLACE", help="A directory, s3://bucket/prefix, hf://org/name …")]
Refs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="REF", show_default=False, help="NAME: all its versions; NAME@3, NAME@prod: one; default: all."
    ),
]


def add_to(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command()(push)
    app.command()(pull)
    app.command()(export)
    app.command(name="serve-index")(serve_index)


def push(ctx: typer.Context, place: Place, refs: Refs = None, json: Json = False, quiet: Quiet = False) -> None:
    """Copy versions to another place, with all that is known of them."""
    _show("pushed", opened(ctx).push(place, *(refs or ()), progress=show.progress(quiet)), json, quiet)


def pull(
    ctx: typer.Context,
    place: Annotated[
        str, typer.Argument(metavar="PLACE", help="A directory, s3://…, hf://…, or http://… of weft store serve-index.")
    ],
    refs: Refs = None,
    name: Annotated[str | None, typer.Option("--as", metavar="NAME", help="What it is to be called here.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Copy versions from another place; every byte is verified."""
    _show(
        "pulled",
        opened(ctx, create=True).pull(place, *(refs or ()), name=name, progress=show.progress(quiet)),
        json,
        quiet,
    )


def _show(verb: str, done: Transfer, json: bool, quiet: bool) -> None:
    if json:
        return show.as_json(
            {
                verb: list(done.moved),
                "there": list(done.there),
                "bytes": done.bytes,
                "place": done.place,
                "notes": list(done.notes),
            }
        )
    for ref in done.moved:
        show.result(f"{verb} {ref}")
    show.remark(
        f"{show.number(len(done.moved), 'version')}, {show.size(done.bytes)}"
        + (f"; {len(done.there)} were there already" if done.there else ""),
        quiet,
    )
    for note in done.notes:
        show.remark(note, quiet)


def export(
    ctx: typer.Context,
    ref: Ref,
    out: Out,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that stands in --out.")] = False,
) -> None:
    """Write a version as a plain adapter directory."""
    show.result(str(opened(ctx).export(ref, out, overwrite=overwrite)))


def serve_index(
    ctx: typer.Context,
    host: Annotated[
        str, typer.Option("--host", metavar="HOST", help="Where to listen; who can reach it can read everything.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="0: a free one.")] = 8765,
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="Write the pages as files in place of serving them.")
    ] = None,
    blobs: Annotated[bool, typer.Option("--with-adapters", help="With --out: the adapters too, to pull from.")] = False,
    quiet: Quiet = False,
) -> None:
    """Serve the index as pages and JSON, read only; or write it as files.

    Others pull from the address: weft store pull http://HOST:PORT
    """
    if blobs and out is None:
        raise Usage("--with-adapters belongs to --out DIR; a server has them anyway")
    store = opened(ctx)
    from weft.store.pages import make_server, write_pages

    if out is not None:
        count = write_pages(store, Path(out), with_blobs=blobs)
        return show.result(f"written: {Path(out) / 'index.html'} ({show.number(count, 'name')})")
    with make_server(store, host, port) as server:
        address = f"http://{host}:{server.server_address[1]}"
        show.result(address)
        show.remark(
            "read only; Ctrl-C ends it"
            + (
                ""
                if host in ("127.0.0.1", "localhost")
                else f"; whoever reaches {host} can read all adapters of {store.owner}"
            ),
            quiet,
        )
        server.serve_forever()
