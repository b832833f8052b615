"""``weft train``: a base and a file of examples become a run folder with an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from weft.cli import show
from weft.cli.options import Base, Columns, Dtype, Images, Json, Kind, Quiet, Usage, columns_of, held_out
from weft.cli.quiet import show_remarks

if TYPE_CHECKING:
    from weft.train import Recipe, Run

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

EPILOG = (
    "Often set: rank alpha targets dropout init dora rslora epochs max_steps learning_rate batch_size accumulation max_length"
    " batching eval_every patience seed report_to. All names: the fields of weft.Recipe and weft.LoraSpec."
    " Several GPUs: accelerate launch -m weft train …"
)


@app.command(epilog=EPILOG)
def train(
    base: Base = None,
    text_base: Annotated[
        str | None, typer.Option("--text-base", metavar="DIR", help="Text encoder, for --task contrastive and fused.")
    ] = None,
    vision_base: Annotated[
        str | None, typer.Option("--vision-base", metavar="DIR", help="Vision model, for --task contrastive and fused.")
    ] = None,
    images: Images = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="DATA", help="JSON lines, CSV, Parquet, text, or a hub data set.")
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option("--eval", metavar="DATA", help="Evaluation data; or a share of --data to hold out, as in 0.1."),
    ] = None,
    out: Annotated[str | None, typer.Option("--out", metavar="DIR", help="The run folder, as in runs/NAME.")] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", metavar="FILE", help="A recipe in YAML; default: the stable one.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change the recipe, as in rank=16; may be repeated."),
    ] = None,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="DIR", help="Go on with a run that was stopped or killed.")
    ] = None,
    columns: Columns = None,
    kind: Kind = None,
    dtype: Dtype = None,
    fit: Annotated[
        str | None,
        typer.Option(
            "--fit", metavar="SIZE", help="Choose the cheapest measures that fit this much memory, as in 24GiB."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that stands in --out.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an adapter on a frozen base."""
    folder = resume if out is None else out
    if folder is None or None not in (out, resume):
        raise Usage("give --out runs/NAME for a new run, or --resume runs/NAME to go on with one")
    if resume is not None and overwrite:
        raise Usage("--resume goes on with a run and --overwrite removes it; give one of them")
    if resume is not None and fit is not None:
        raise Usage(
            "--resume goes on with the recipe of the run, so --fit has nothing to choose; leave one of them out"
        )
    if resume is None and data is None:
        raise Usage("give --data FILE, the examples to learn from")
    if (text_base is None) != (vision_base is None) or (text_base is not None and base is not None):
        raise Usage("give --text-base and --vision-base, two towers; or --base, one model")
    if text_base is not None and fit is not None:
        raise Usage(
            "--fit plans a training of one model, and these are two towers; name the measures: --set batch_size=4"
        )
    if not quiet:
        show_remarks()
    from weft import Recipe
    from weft import train as run_training

    named = {"columns": columns_of(columns), "kind": kind, "dtype": dtype}
    changes = {name: value for name, value in named.items() if value is not None}
    given = recipe is not None or bool(assignments) or bool(changes)
    chosen = Recipe.load(recipe) if recipe is not None else Recipe()
    settled = chosen.replace(**changes).set(assignments or ()) if given else None
    if fit is not None:
        settled = _fitted(base, settled or Recipe(), fit, quiet)
    run = run_training(
        base=base if text_base is None else {"text_model": text_base, "vision_model": vision_base},
        images=images,
        data=data,
        eval_data=held_out(evaluation),
        recipe=settled,
        out=folder,
        resume=resume is not None,
        overwrite=overwrite,
        progress=show.progress(quiet),
    )
    if json:
        return show.as_json({"path": run.path, **run.report.to_dict()})
    show.result(run.report.text())
    show.remark(f"\nwritten: {run.path}/ (adapter, report.html, report.md, log.jsonl, recipe.yaml, checkpoints)", quiet)
    show.remark(f"next:    {_next(run)}", quiet)


def _fitted(base: str | None, recipe: Recipe, size: str, quiet: bool) -> Recipe:
    """The recipe with the cheapest measures that fit, said."""
    from weft import plan
    from weft.plan.sizes import in_words

    found = plan(base, recipe=recipe, budget=size, full=False, table=False)
    changed = ", ".join(f"{name}={value}" for name, value in found.changes.items() if name != "spec")
    takes = f"planned: {in_words(found.bytes.total)} of {in_words(found.budget)}, rows of {found.seq_len} tokens"
    show.remark(f"{takes}; " + (f"chosen: {changed}" if changed else "it fits as it is"), quiet)
    return found.recipe


def _next(run: Run) -> str:
    """What to type with the new adapter."""
    from weft.models.source import EMBEDDED

    if run.report.data.get("train", {}).get("kind") in ("contrastive", "fused"):
        return f"{show.command('weft', 'eval', str(run.path))} --data FILE --images DIR"
    origin = run.adapter.provenance.base
    base = () if origin is None or origin.name in (None, EMBEDDED) else ("--base", origin.name)
    classifies = run.report.data.get("train", {}).get("kind") in ("classification", "classify-images")
    verb, rest = ("eval", "--data FILE") if classifies else ("generate", "PROMPT")
    return f"{show.command('weft', verb, *base, '--adapter', str(run.path))} {rest}"
