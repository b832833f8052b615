"""``weft report``: a run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weft.cli import show
from weft.cli.options import Dtype, Json, Quiet

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def report(
    path: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, also of a run that goes on.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Page to write; default: report.html in the run folder."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="BASE", help="Base to measure the adapter against; default: it is not."),
    ] = None,
    dtype: Dtype = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw a run: one HTML page, no network.

    Curves, learning rate, gradient norms, findings, the adapter site by site, answers before and after. With --base also how far the adapter
    turns the weights.
    """
    from weft.train.page import PAGE, gather, write_page

    facts = gather(path, base=base, dtype=dtype)
    if json:
        show.as_json(facts.to_dict())
        if out is None:
            return
    written = write_page(facts, out if out is not None else Path(path) / PAGE)
    if not json:
        show.result(str(written))
    for note in facts.notes:
        show.remark(f"note: {note}", quiet)
    if not facts.finished:
        show.remark(f"note: this run has not ended: {facts.record.step:,} of {facts.record.steps:,} steps", quiet)
