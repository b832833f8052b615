"""``weft shrink``: an adapter of lower rank, and what that loses."""

from __future__ import annotations

from typing import Annotated

import typer

from weft.cli import show
from weft.cli.combine import check_out, written
from weft.cli.options import Base, Json, Out, Quiet

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def shrink(
    adapter: Annotated[str, typer.Argument(metavar="PATH", help="Adapter: a directory, a file, or a run folder.")],
    out: Out,
    rank: Annotated[int | None, typer.Option("--rank", metavar="N", help="Largest rank of a site.")] = None,
    energy: Annotated[
        float | None, typer.Option("--energy", metavar="SHARE", help="Share of ‖ΔW‖² that each site holds, as in 0.99.")
    ] = None,
    error: Annotated[
        float | None, typer.Option("--error", metavar="SHARE", help="Largest relative error of a site, as in 0.05.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="DATA", help="Say what it does to the loss on these.")
    ] = None,
    base: Base = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Truncate an adapter's spectrum.

    To a rank, or to the fewest directions that hold an energy or an error at each site. --out is a directory that PEFT loads.
    """
    check_out(out)
    from weft.compose import shrink as run_shrinking

    small = run_shrinking(
        adapter, rank=rank, energy=energy, error=error, base=base, data=data, progress=show.progress(quiet)
    )
    written(small, out, json, quiet)
