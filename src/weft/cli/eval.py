"""``weft eval``: how well a base and an adapter do on examples, side by side."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from weft.cli import show
from weft.cli.options import AdapterOption, Base, Columns, Dtype, Json, Kind, OtherBase, Quiet, columns_of

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def evaluate(
    base: Base = None,
    adapter: AdapterOption = None,
    data: Annotated[
        str, typer.Option("--data", metavar="DATA", help="JSON lines, CSV, Parquet, text, or a hub data set.")
    ] = ...,  # type: ignore[assignment]
    limit: Annotated[
        int,
        typer.Option("--limit", metavar="N", min=0, help="Prompts to answer; 0: all. Losses are over all examples."),
    ] = 200,
    tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Longest answer in tokens.")
    ] = 128,
    columns: Columns = None,
    kind: Kind = None,
    dtype: Dtype = None,
    other: OtherBase = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare base and adapter on examples.

    Loss and perplexity; exact match, BLEU and ROUGE of generated answers; accuracy and F1 of classifications.
    """
    from weft import evaluate as run_evaluation

    found = run_evaluation(
        base=base,
        adapter=adapter,
        data=data,
        kind=kind,
        columns=columns_of(columns),
        limit=limit or None,
        max_new_tokens=tokens,
        dtype=dtype,
        allow_other_base=other,
        progress=show.progress(quiet),
    )
    if json:
        return show.as_json(found.to_dict())
    show.result(found.text())
    for example in () if quiet else found.examples[:2]:
        _show_example(example)


def _show_example(example: Any) -> None:
    """One prompt and what base and adapter say to it."""
    prompt = example["prompt"] if isinstance(example["prompt"], str) else example["prompt"][-1]["content"]
    rows = [("prompt", prompt), ("wanted", " | ".join(example["references"]))]
    rows += [(side, example[side]) for side in ("base", "adapter") if side in example]
    show.result()
    show.pairs(rows, lines=3)
