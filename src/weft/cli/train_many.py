"""``weft train-many``: many users' data become an adapter each, in one pass; or one data set an adapter for each setting."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from weft.cli import show
from weft.cli.options import Base, Columns, Dtype, Json, Kind, Quiet, Usage, columns_of, held_out
from weft.cli.quiet import show_remarks

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

EPILOG = (
    "One adapter a file: weft train-many --data users/*.jsonl --out runs/users. One a value of a column: --data all.jsonl --by user_id."
    " One a combination of settings, all on the same data: --sweep rank=4,8,16 --sweep learning_rate=1e-4,1e-3; the best one's recipe"
    " is then in OUT/winner.yaml, for weft train --recipe. Several processes: accelerate launch -m weft train-many …"
)


@app.command(epilog=EPILOG)
def train_many(
    more: Annotated[list[str] | None, typer.Argument(metavar="[FILE]...", show_default=False, help="More files, as a shell's pattern after --data gives them.")] = None,
    base: Base = None,
    data: Annotated[list[str] | None, typer.Option("--data", metavar="DATA", help="A file a user; or, with --by or --sweep, one file or data set.")] = None,
    by: Annotated[str | None, typer.Option("--by", metavar="COLUMN", help="Part the rows by this column: one adapter a value.")] = None,
    evaluation: Annotated[list[str] | None, typer.Option("--eval", metavar="DATA", help="A share of each user's rows to hold out, as in 0.1; or files with the same names.")] = None,
    out: Annotated[str | None, typer.Option("--out", metavar="DIR", help="The run folder, as in runs/users.")] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", metavar="FILE", help="A recipe in YAML, for everybody.")] = None,
    assignments: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Change the recipe, as in rank=16; may be repeated.")] = None,
    sweep: Annotated[list[str] | None, typer.Option("--sweep", metavar="NAME=A,B,C", help="Try these values; several --sweep are combined.")] = None,
    sample: Annotated[int | None, typer.Option("--random", metavar="N", help="Of a sweep: N random combinations, not all; LOW..HIGH is a range.")] = None,
    halving: Annotated[int, typer.Option("--halving", metavar="N", help="Of a sweep: at each rung one in N goes on; 1: all to the end.")] = 3,
    slots: Annotated[int, typer.Option("--slots", metavar="N", min=1, help="Adapters in the batch at once.")] = 32,
    tokens: Annotated[int | None, typer.Option("--tokens", metavar="N", min=1, help="Most tokens in one forward; speed and memory alone depend on it.")] = None,
    save_every: Annotated[int | None, typer.Option("--save-every", metavar="N", min=1, help="Rounds between checkpoints; default: twice a minute.")] = None,
    processes: Annotated[str, typer.Option("--processes", metavar="KIND", help="With several processes, each has its own users, or all share the rows: users, rows, auto.")] = "auto",
    resume: Annotated[str | None, typer.Option("--resume", metavar="DIR", help="Go on with a run that was stopped or killed.")] = None,
    columns: Columns = None,
    kind: Kind = None,
    dtype: Dtype = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that stands in --out.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Train many adapters in one pass over a frozen base.

    Each is the adapter that it would be alone.

    Whoever has broken data, or a loss that explodes, is stopped alone: the others are trained, the report says why, and the exit
    status is 1.
    """
    files = [*(data or []), *(more or [])]
    _check(out, resume, overwrite, files, by, sweep, sample)
    if not quiet:
        show_remarks()
    from weft import Recipe
    from weft import train_many as run_many

    if resume is not None:
        runs: Any = run_many(
            base=base,
            data=files or None,
            eval_data=_held(evaluation),
            out=resume,
            resume=True,
            progress=show.progress(quiet),
        )
    else:
        named = {"columns": columns_of(columns), "kind": kind, "dtype": dtype}
        changes = {name: value for name, value in named.items() if value is not None}
        chosen = (Recipe.load(recipe) if recipe is not None else Recipe()).replace(**changes).set(assignments or ())
        common: dict[str, Any] = {
            "base": base, "eval_data": _held(evaluation), "recipe": chosen, "out": out, "slots": slots, "tokens": tokens,
            "save_every": save_every, "processes": processes, "overwrite": overwrite, "progress": show.progress(quiet),
        }  # fmt: skip
        if sweep:
            from weft.many import sweep as run_sweep

            runs = run_sweep(data=files[0], grid=sweep, sample=sample, halving=halving, **common)
        else:
            runs = run_many(data=files if by is None or len(files) > 1 else files[0], by=by, **common)
    if json:
        show.as_json({"path": runs.path, **runs.report.to_dict()})
        raise typer.Exit(1 if runs.report.failed else 0)
    show.result(runs.report.text())
    show.remark(f"\nwritten: {runs.path}/ (report.html, and a run folder for each adapter)", quiet)
    _say_next(runs, quiet)
    raise typer.Exit(1 if runs.report.failed else 0)


def _check(
    out: str | None,
    resume: str | None,
    overwrite: bool,
    files: list[str],
    by: str | None,
    sweep: list[str] | None,
    sample: int | None,
) -> None:
    """Whether these options go together."""
    if (out is None) == (resume is None):
        raise Usage("give --out runs/NAME for a new run, or --resume runs/NAME to go on with one")
    if resume is not None and overwrite:
        raise Usage("--resume goes on with a run and --overwrite removes it; give one of them")
    if resume is None and not files:
        raise Usage("give --data, one file a user, or one file and --by COLUMN")
    if sweep and by:
        raise Usage("--sweep tries settings on one data set, --by trains users; give one of them")
    if sweep and len(files) > 1:
        raise Usage(f"--sweep tries settings on one data set, and there are {len(files)} files; give one")
    if sample is not None and not sweep:
        raise Usage("--random chooses combinations of a --sweep; give --sweep NAME=VALUES too")


def _held(given: list[str] | None) -> Any:
    """A share, one source, or a list of files."""
    if not given:
        return None
    return held_out(given[0]) if len(given) == 1 else given


def _say_next(runs: Any, quiet: bool) -> None:
    """What to type now."""
    if not runs:
        return
    first = runs.path / next(row["folder"] for row in runs.report.rows if row["status"] != "failed")
    origin = runs[next(iter(runs))].adapter.provenance.base
    from weft.models.source import EMBEDDED

    base = () if origin is None or origin.name in (None, EMBEDDED) else ("--base", origin.name)
    winner = runs.path / "winner.yaml"
    if winner.is_file():
        begin = show.command("weft", "train", *base, "--recipe", str(winner))
        show.remark(f"next:    {begin} --data FILE --eval FILE --out runs/NAME", quiet)
        return
    show.remark(f"next:    {show.command('weft', 'generate', *base, '--adapter', str(first))} PROMPT", quiet)
