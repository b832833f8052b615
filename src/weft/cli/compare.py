"""``weft compare``: where the updates of adapters overlap, agree or cancel; a table, and a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weft.cli import show
from weft.cli.options import Json, Quiet, Usage
from weft.errors import some_names

if TYPE_CHECKING:
    from weft.compose import Comparison

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def compare(
    adapters: Annotated[list[str], typer.Argument(metavar="PATH", help="Two or more adapters or runs.")],
    picture: Annotated[
        str | None, typer.Option("--picture", metavar="FILE.svg", help="Write a heat map of all sites.")
    ] = None,
    sites: Annotated[bool, typer.Option("--sites", help="A row for every site; default: one for each kind.")] = False,
    other: Annotated[
        bool, typer.Option("--allow-other-base", help="Compare although the bases differ, or are named differently.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare adapters of one base, site by site.

    Cosine of the updates, overlap of the spaces that they read from and write to, and how much cancels when they are added.
    """
    if picture is not None:
        if not picture.lower().endswith(".svg"):
            raise Usage(f"--picture {picture!r}: the picture is an SVG; end the name in .svg")
        if Path(picture).exists():
            raise Usage(f"--picture {picture!r} exists already: give another name")
        if not Path(picture).parent.is_dir():
            raise Usage(
                f"--picture {picture!r}: there is no directory {os.fspath(Path(picture).parent)!r}: make it first"
            )
    from weft.compose import compare as run_comparison

    found = run_comparison(adapters, allow_other_base=other)
    if picture is not None:
        Path(picture).write_text(found.picture(), encoding="utf-8")
    if json:
        return show.as_json({**found.to_dict(), "picture": picture})
    _show(found, sites)
    if picture is not None:
        show.remark(f"\nwritten: {picture}", quiet)
    return None


def _show(found: Comparison, each: bool) -> None:
    heads = [("site", "left"), ("n", "right"), ("cosine", "right"), ("overlap in", "right"), ("out", "right"),
             ("by chance", "right"), ("conflict", "right")]  # fmt: skip
    common = show.common([path for pair in found.pairs for path in found.groups(pair)])
    for pair in found.pairs:
        show.result(f"{pair[0]}  and  {pair[1]}\n")
        groups = {site.path: (site,) for site in found.of(pair)} if each else found.groups(pair)
        if not groups:
            show.result("no site is in both\n")
            continue
        rows = [[path.removeprefix(common), *_means(group)] for path, group in groups.items()]
        overall = found.overall(pair)
        rows.append(["all", str(len(found.of(pair))), *_cells(overall)])
        show.table(heads, rows)
        show.result()
    if common:
        show.result(f"sites in {common[:-1]}\n")
    for name, paths in found.alone.items():
        if paths:
            show.result(f"only in {name}: {len(paths)} sites, {some_names(paths, 3)}")
    for note in found.notes:
        show.result(f"note: {note}")
    show.result("cosine: 1 the same, 0 unrelated, -1 opposed. overlap: share of the smaller space that lies in the other, input and output\n"
                "side, and what random spaces have. conflict: share that cancels when both are added (unrelated of one size: 0.29)")  # fmt: skip


def _means(group: tuple[object, ...]) -> list[str]:
    names = ("cosine", "overlap_in", "overlap_out", "chance_in", "chance_out", "conflict")
    means = {name: sum(getattr(site, name) for site in group) / len(group) for name in names}
    return [str(len(group)), *_cells(means)]


def _cells(means: dict[str, float]) -> list[str]:
    return [
        f"{means['cosine']:+.3f}", f"{means['overlap_in']:.3f}", f"{means['overlap_out']:.3f}",
        f"{means['chance_in']:.3f}, {means['chance_out']:.3f}", f"{means['conflict']:.3f}",
    ]  # fmt: skip
