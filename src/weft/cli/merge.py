"""``weft merge``: a base and an adapter become a plain model directory, with a report of what survived."""

from __future__ import annotations

from typing import Annotated

import typer

from weft.cli import show
from weft.cli.options import Base, Dtype, Json, OtherBase, Out, Quiet

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def merge(
    adapter: Annotated[str, typer.Option("--adapter", metavar="PATH", help="Directory of an adapter, or of a run.")],
    out: Out,
    base: Base = None,
    dtype: Dtype = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            metavar="TASK",
            help="What the base is for: causal-lm, classification, seq2seq …; default: as the adapter was trained.",
        ),
    ] = None,
    other: OtherBase = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write base and adapter as one plain model.

    The directory is read again and compared before it gets its name; merge_report.json says what rounding took at each site.
    """
    from weft.merging import merge_to_directory

    written, report = merge_to_directory(
        base=base, adapter=adapter, out=out, dtype=dtype, task=task, allow_other_base=other
    )
    if json:
        return show.as_json({"path": written, **report.to_dict()})
    show.result(report.summary())
    show.remark(
        f"\nwritten: {written}/ (read again: the same weights, the same logits; merge_report.json has every site)",
        quiet,
    )
    show.remark(f"next:    {show.command('weft', 'eval', '--base', str(written))} --data FILE", quiet)
