"""``weft plan``: what a training takes, before anything is allocated."""

from __future__ import annotations

from typing import Annotated

import typer

from weft.cli import show
from weft.cli.options import Dtype, Json, Quiet
from weft.cli.plan_data import Advised

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

EPILOG = "Memory is that of the largest step: rows of full length, every token learned. Sizes: 24GiB is 24 x 1024^3 bytes, 24GB 24 x 1000^3."


@app.command(epilog=EPILOG)
def plan(
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="BASE",
            help="Directory, config.json or hub id (no weights needed); default: the embedded base.",
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", metavar="R", help="Of the factors.")] = None,
    targets: Annotated[
        str | None,
        typer.Option("--targets", metavar="NAMES", help="default, all-linear, or names with commas between them."),
    ] = None,
    seq: Annotated[int | None, typer.Option("--seq", metavar="TOKENS", help="Tokens of a row.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", metavar="ROWS", help="Rows of a forward.")] = None,
    fit: Annotated[
        str | None, typer.Option("--fit", metavar="SIZE", help="Choose the cheapest measures that fit, as in 24GiB.")
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            "--device", metavar="DEVICE", help="cpu, cuda (need not be there), auto: a GPU where there is one."
        ),
    ] = "auto",
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine's speed, for the time of a step.")
    ] = False,
    brief: Annotated[
        bool, typer.Option("--brief", help="Without the table of measures and without full training beside it.")
    ] = False,
    recipe: Annotated[
        str | None, typer.Option("--recipe", metavar="FILE", help="A recipe in YAML; default: the stable one.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change the recipe, as in accumulation=4; may be repeated."),
    ] = None,
    save: Annotated[
        str | None,
        typer.Option(
            "--save", metavar="FILE", help="Write the recipe with the chosen measures, for weft train --recipe."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="DATA", help="Recommend rank and learning rate for these examples; loads the base."
        ),
    ] = None,
    sites: Annotated[
        str | None,
        typer.Option("--sites", metavar="SIZE", help="With --data: spend so many bytes, as in 8MiB, on ranks by site."),
    ] = None,
    dtype: Dtype = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what a training takes, and which measures make it fit."""
    from weft import Recipe
    from weft import plan as make_plan

    named = {"rank": rank, "targets": _targets(targets), "batch_size": batch, "dtype": dtype}
    changes = {name: value for name, value in named.items() if value is not None}
    chosen = (Recipe.load(recipe) if recipe is not None else Recipe()).replace(**changes).set(assignments or ())
    advised: Advised | None = None
    if data is not None or sites is not None:
        show.remark("looking at the data, and at the base's gradients on the first batches …", quiet)
        advised = Advised(base, data, sites, chosen, own_rank=rank is not None)
        chosen = advised.recipe
    show.remark("following a step of this model on tensors without data …", quiet)
    found = make_plan(
        base, recipe=chosen, seq_len=seq, budget=fit, device=device, measure=measure, full=not brief, table=not brief
    )
    if save is not None:
        found.recipe.save(save)
    if advised is not None:
        rows = found.recipe.batch_size * found.recipe.accumulation
        advised.timed(found.seconds, rows * found.seq_len)
    if json:
        return show.as_json(found.to_dict() | (advised.to_dict() if advised is not None else {}))
    show.result(found.text())
    if advised is not None:
        show.result(f"\n{advised.text()}")
    if save is not None:
        show.remark(f"\nwritten: {save}; next: weft train --recipe {save} …", quiet)


def _targets(text: str | None) -> str | list[str] | None:
    if text is None or text in ("default", "all-linear"):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]
