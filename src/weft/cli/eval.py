"""``weft eval``: how well a base and an adapter do on examples, side by side."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from weft.cli import show
from weft.cli.options import (
    AdapterOption,
    Base,
    Columns,
    Dtype,
    Images,
    Json,
    Kind,
    OtherBase,
    Quiet,
    Usage,
    columns_of,
)

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def evaluate(
    run: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="A run folder; needed for one that was trained on texts and images."),
    ] = None,
    base: Base = None,
    adapter: AdapterOption = None,
    data: Annotated[
        str, typer.Option("--data", metavar="DATA", help="JSON lines, CSV, Parquet, text, or a hub data set.")
    ] = ...,  # type: ignore[assignment]
    images: Images = None,
    limit: Annotated[
        int,
        typer.Option("--limit", metavar="N", min=0, help="Prompts to answer; 0: all. Losses are over all examples."),
    ] = 200,
    tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Longest answer in tokens.")
    ] = 128,
    classes: Annotated[
        str | None,
        typer.Option(
            "--classes", metavar="A,B,…", help="Names for zero-shot classification; default: the data's labels."
        ),
    ] = None,
    template: Annotated[
        str, typer.Option("--template", metavar="TEXT", help="What is said of a class, {} is its name.")
    ] = "a photo of a {}",
    columns: Columns = None,
    kind: Kind = None,
    dtype: Dtype = None,
    other: OtherBase = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare base and adapter on examples.

    Of texts and images: recall at 1, 5 and 10 both ways, and zero-shot accuracy with class prompts. Else
    loss and perplexity; exact match, BLEU and ROUGE of generated answers; accuracy and F1 of classifications.
    """
    if run is not None:
        from weft.train.pair_evaluation import evaluate_pairs, is_pair_run

        if is_pair_run(run):
            names = None if classes is None else [name.strip() for name in classes.split(",") if name.strip()]
            pairs = evaluate_pairs(
                run, data, images=images, adapter=adapter, classes=names, template=template, columns=columns_of(columns), dtype=dtype,
                allow_other_base=other, progress=show.progress(quiet),
            )  # fmt: skip
            return show.as_json(pairs.to_dict()) if json else show.result(pairs.text())
        if adapter is not None:
            raise Usage(
                "give the run, or --adapter; one of them (both for runs on texts and images alone: the run says what the towers are)"
            )
        adapter = run
    from weft import evaluate as run_evaluation

    found = run_evaluation(
        base=base,
        adapter=adapter,
        data=data,
        images=images,
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
