"""``weft combine``: adapters become one adapter, exactly or by a method that says what it lost."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli import show
from weft.cli.options import Base, Json, Out, Quiet, Usage

if TYPE_CHECKING:
    from weft.compose import MixReport, Mixture

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

EPILOG = (
    "Methods: exact, svd, linear, task_arithmetic, layerwise, knots, ties, dare, dare_ties, magnitude. "
    "svd wants --rank, --energy or --error; ties, dare, dare_ties, magnitude and knots want --density, "
    "which counts the elements of each site by itself. In ties, dare_ties and knots weights are proportions (a=1 b=1 is a=0.5 b=0.5); "
    "--scaling gives the size. With --base the mixture carries golden prompts, for weft inspect --prove."
)


@app.command(epilog=EPILOG)
def combine(
    adapters: Annotated[
        list[str], typer.Argument(metavar="PATH[=WEIGHT]", help="Adapters or runs; a weight left out is 1.")
    ],
    out: Out,
    method: Annotated[str, typer.Option("--method", metavar="NAME", help="How; default: the exact sum.")] = "exact",
    rank: Annotated[int | None, typer.Option("--rank", metavar="N", help="Largest rank of a site.")] = None,
    energy: Annotated[
        float | None, typer.Option("--energy", metavar="SHARE", help="Share of ‖ΔW‖² that each site holds, as in 0.99.")
    ] = None,
    error: Annotated[
        float | None, typer.Option("--error", metavar="SHARE", help="Largest relative error of a site, as in 0.05.")
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", metavar="SHARE", help="Share of the elements of ΔW that stays.")
    ] = None,
    scaling: Annotated[
        float | None, typer.Option("--scaling", metavar="X", help="What the result is multiplied with.")
    ] = None,
    inner: Annotated[
        str | None, typer.Option("--inner", metavar="RULE", help="Of knots: ties, dare_ties or sum.")
    ] = None,
    at: Annotated[
        list[str] | None,
        typer.Option(
            "--at",
            metavar="PATTERN:PATH=WEIGHT",
            help="Another weight at sites whose end a pattern matches, as in 'layers.[0-3].*:a=0.2'.",
        ),
    ] = None,
    whole: Annotated[
        str,
        typer.Option(
            "--whole",
            metavar="RULE",
            help="Of modules trained whole: same (or an error), average, drop, or the PATH that gives its own.",
        ),
    ] = "same",
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of all that is random.")] = 0,
    search: Annotated[
        str | None, typer.Option("--search", metavar="DATA", help="Find the weights with the least loss on these data.")
    ] = None,
    evaluations: Annotated[
        int, typer.Option("--evaluations", metavar="N", min=1, help="How often a search evaluates.")
    ] = 40,
    data: Annotated[
        str | None, typer.Option("--data", metavar="DATA", help="Say what the mixture does to the loss on these.")
    ] = None,
    base: Base = None,
    other: Annotated[
        bool, typer.Option("--allow-other-base", help="Mix although the bases differ, or are named differently.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Mix adapters of one base.

    The exact sum of their updates, or a method that approximates and says its error site by site. --out is a directory that PEFT loads.
    """
    pairs = [operand(text) for text in adapters]
    weights = with_patterns(pairs, at or [])
    if search is not None and data is not None:
        raise Usage("--data with --search: the search measures its own data")
    check_out(out)
    from weft.compose import combine as run_mixing

    mixed = run_mixing(
        [(path, weights[path]) for path, _ in pairs] if len(weights) == len(pairs) else pairs,
        method=method, rank=rank, energy=energy, error=error, density=density, scaling=scaling, inner=inner, seed=seed, whole=whole,
        base=base, data=data, search=search, evaluations=evaluations, allow_other_base=other, progress=show.progress(quiet),
    )  # fmt: skip
    written(mixed, out, json, quiet)


def operand(text: str) -> tuple[str, float]:
    """``PATH=WEIGHT`` or ``PATH``, as path and weight.

    Raises:
        Usage: nothing before the last ``=``; or something behind it that is no number, where no such path exists.
    """
    path, equals, weight = text.rpartition("=")
    if not equals:
        return text, 1.0
    if not path:
        raise Usage(f"{text!r}: there is no path before the '=', as in medical=0.7")
    try:
        return path, float(weight)
    except ValueError:
        if os.path.lexists(text):
            return text, 1.0
        raise Usage(f"{text!r}: {weight!r} is no weight, as in medical=0.7") from None


def with_patterns(pairs: list[tuple[str, float]], rules: list[str]) -> dict[str, Any]:
    """Weights by path; a mapping of patterns for those that ``--at`` names.

    Raises:
        Usage: a rule without a pattern, a path or a number, or a pattern that stands twice.
    """
    weights: dict[str, Any] = dict(pairs)
    for rule in rules:
        rest, _, number = rule.rpartition("=")
        path = next((name for name in sorted(weights, key=len, reverse=True) if rest.endswith(f":{name}")), None)
        if path is None or not rest[: -len(path) - 1]:
            raise Usage(f"--at {rule!r}: expected PATTERN:PATH=WEIGHT, with one of the paths {', '.join(weights)}")
        try:
            value = float(number)
        except ValueError:
            raise Usage(f"--at {rule!r}: {number!r} is no number") from None
        pattern, known = rest[: -len(path) - 1], weights[path]
        if not isinstance(known, dict):
            known = {"default": known}
        if pattern == "default" or pattern in known:
            why = (
                "the weight behind the path is meant for all other sites" if pattern == "default" else "it stands twice"
            )
            raise Usage(f"--at {rule!r}: {pattern!r}: {why}")
        weights[path] = {**known, pattern: value}  # the first pattern that matches wins; the default is looked at last
    return weights


def check_out(out: str) -> None:
    """Before anything is computed.

    Raises:
        Usage: something stands at ``--out``.
    """
    if os.path.lexists(out):
        raise Usage(f"--out {out!r} exists already: give the name of a new directory")


def written(mixed: Mixture, out: str, json: bool, quiet: bool) -> None:
    """Save a mixture and say what it is."""
    from weft.formats.peft import problem_for_peft

    problem = problem_for_peft(mixed)
    place = mixed.save(out, for_peft=problem is None)
    if json:
        return show.as_json({"path": place, "digest": mixed.digest, "ranks": mixed.ranks(), **mixed.report.to_dict()})
    report = mixed.report
    if report.trials:
        _show_trials(report)
    _show_parents(mixed)
    _show_sites(report)
    show.result(report.summary())
    if problem is not None:
        show.result(f"note: weft alone reads this directory, for PEFT's files can't express it: {problem}")
    show.remark(
        f"\nwritten: {place}/ ({mixed.num_parameters:,} numbers, rank {mixed.ranks()}, {mixed.digest[:12]})", quiet
    )
    show.remark(f"next:    {show.command('weft', 'eval', '--adapter', out)} --data FILE", quiet)
    return None


def _show_parents(mixed: Mixture) -> None:
    rows = [
        (f"{_weight(parent['weight'])} ×", f"{parent['name']} ({parent['digest'][:12]})")
        for parent in mixed.provenance.parents
    ]
    if len(rows) > 1:
        show.pairs(rows)
        show.result()


def _weight(weight: Any) -> str:
    return (
        f"{weight:g}"
        if isinstance(weight, float)
        else "; ".join(f"{name}: {value:g}" for name, value in weight.items())
    )


def _show_trials(report: MixReport) -> None:
    """The table of a search, best first."""
    names = list(report.trials[0]["weights"])
    best = sorted(enumerate(report.trials, 1), key=lambda one: one[1]["loss"])[:10]
    show.result(f"{len(report.trials)} evaluations; the ten best:\n")
    show.table(
        [("no.", "right"), *((name, "right") for name in names), ("loss", "right")],
        [
            [str(number), *(f"{trial['weights'][name]:g}" for name in names), f"{trial['loss']:.4f}"]
            for number, trial in best
        ],
    )
    show.result()


def _show_sites(report: MixReport) -> None:
    """What was lost, site by site; nothing where nothing was."""
    if not any(site.relative_error or site.from_sum for site in report.sites):
        return
    sums = any(site.from_sum != site.relative_error for site in report.sites)
    common = show.common([site.path for site in report.sites])
    heads = [
        (f"site in {common[:-1]}" if common else "site", "left"),
        ("rank", "right"),
        ("‖wanted‖", "right"),
        ("error", "right"),
    ]
    rows = [
        [
            site.path.removeprefix(common),
            str(site.rank),
            "" if site.norm is None else f"{site.norm:.3g}",
            f"{site.relative_error:.2%}",
        ]
        for site in report.sites
    ]
    if sums:
        heads.append(("from sum", "right"))
        rows = [[*row, f"{site.from_sum:.2%}"] for row, site in zip(rows, report.sites, strict=True)]
    show.table(heads, rows)
    show.result()
