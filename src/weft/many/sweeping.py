"""`sweep`: which settings are best. Every combination is an adapter, all learn from the same data in one pass.

Those without hope are given up early (`weft.many.halving`); what is left is compared on the same evaluation rows
(`weft.many.confidence`). The winner's recipe is OUT/winner.yaml, for ``weft train --recipe``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.data import Examples, load_examples
from weft.errors import DataError, RecipeError
from weft.many.combinations import Grid, combinations, label, read_grid, recipe_of
from weft.many.confidence import Comparison, compare
from weft.many.folder import ManyFolder
from weft.many.halving import Halving
from weft.many.page import page
from weft.many.report import ManyReport, Runs
from weft.many.settings import recipes_for
from weft.many.shares import Share
from weft.many.sweep_plot import plot
from weft.many.training import Options, Plan, run_plan
from weft.spec import LoraSpec
from weft.train.opening import BaseLike
from weft.train.recipe import METRICS, Recipe
from weft.train.run import plain_json, write_beside
from weft.train.training import name_of

__all__ = ["SweepReport", "SweepRuns", "resumed_plan", "sweep"]


@dataclass(frozen=True)
class SweepReport(ManyReport):
    """The report of a sweep.

    Attributes:
        winner: name of the best combination (of its first seed).
        table: one row a combination, best first: ``settings``, ``loss``, ``low``, ``high``, ``wins`` (share of resamples in
            which it is best), ``steps``, ``status``.
        by_field: for each swept field, its values with the share of resamples in which one with this value is best.
    """

    winner: str | None = None
    table: tuple[Mapping[str, Any], ...] = ()
    by_field: Mapping[str, Mapping[str, float]] | None = None

    def text(self, limit: int = 20) -> str:
        """The table, and what wins."""
        failed = [f"FAILED  {row['name']}: {row['reason']}" for row in self.failed]
        return "\n".join([self.headline(), *failed, "", self.ranking(limit), *(f"note: {note}" for note in self.notes)])

    def ranking(self, limit: int = 20) -> str:
        """The combinations, best first, and which value of each field wins."""
        lines: list[str] = []
        if self.table:
            width = max(len(label(row["settings"])) for row in self.table[:limit])
            lines += [f"{'':{width}}  {'loss':>8}  {'9 of 10 resamples':>19}  {'best in':>7}  {'steps':>6}"]
        for row in self.table[:limit]:
            state = (
                ""
                if row["status"] in ("end", "early")
                else "  given up"
                if row["status"] == "halved"
                else f"  {row['status']}"
            )
            lines.append(
                f"{label(row['settings']):{width}}  {row['loss']:>8.4f}  {row['low']:>8.4f} … {row['high']:<8.4f}  {row['wins']:>7.0%}  {row['steps']:>6,}{state}"
            )
        lines.append("")
        for name, shares in (self.by_field or {}).items():
            best = max(shares, key=lambda value: shares[value])
            lines.append(f"{name}: {best} is best in {shares[best]:.0%} of resamples of the evaluation rows")
        return "\n".join(lines)


class SweepRuns(Runs):
    """Runs by combination, and which one won.

    Attributes:
        report: a `SweepReport`.
    """

    report: SweepReport

    @property
    def winner(self) -> str:
        """Name of the best run.

        Raises:
            RecipeError: all of them failed.
        """
        if self.report.winner is None:
            raise RecipeError(f"{self.path}: every combination failed, see the report")
        return self.report.winner


def sweep(
    *,
    base: BaseLike = None,
    data: Any = None,
    eval_data: Any = None,
    grid: Grid | Sequence[str],
    sample: int | None = None,
    halving: int = 3,
    spec: LoraSpec | None = None,
    recipe: Recipe | None = None,
    out: str | os.PathLike[str],
    slots: int = 32,
    tokens: int | None = None,
    save_every: int | None = None,
    processes: str = "auto",
    overwrite: bool = False,
    progress: bool | None = None,
) -> SweepRuns:
    """Train one adapter a combination of settings, all on the same data in one pass, and say which is best.

    Args:
        grid: values by field of `Recipe` or `LoraSpec`: ``{"rank": [4, 8], "learning_rate": [1e-4, 1e-3]}``, or texts as on
            the command line. ``seed`` may be among them: combinations are then compared by their mean over seeds.
        sample: try so many random combinations; then ``"1e-5..1e-3"`` may stand for a range.
        halving: at each rung one in so many goes on; 1: all go on to the end.
        eval_data: the same rows judge all; a share to hold out, as 0.1, or data of their own.
        recipe, spec: what all combinations have in common.

    Returns:
        The runs; ``runs.winner``, ``runs.report.text()``. OUT has winner.yaml, sweep.svg and report.html too.

    Raises:
        RecipeError: an unknown field, a wrong value. DataError: no evaluation data, or data that can't be read.
        RunError: see `weft.train_many`.

    Example:
        >>> runs = sweep(data="train.jsonl", eval_data=0.1, grid={"rank": [4, 16]}, out="runs/sweep")  # doctest: +SKIP
        >>> weft.train(recipe=weft.Recipe.load("runs/sweep/winner.yaml"), …)  # doctest: +SKIP
    """
    common = recipes_for(["all"], spec, recipe)["all"]
    values = combinations(read_grid(grid), sample, common.seed)
    named = {label(item): item for item in values}
    recipes = {name: recipe_of(common, item) for name, item in named.items()}
    recipes_for(list(recipes), None, recipes)
    inputs = {"base": name_of(base), "data": name_of(data), "eval_data": name_of(eval_data), "by": None}
    extra = {"sweep": {"settings": named, "halving": halving, "seed": common.seed}}
    folder = ManyFolder(out)
    if int(os.environ.get("RANK", "0")) == 0:
        folder.check(overwrite)
    plan = _plan(base, data, eval_data, recipes, inputs, extra)
    options = Options(slots, tokens, save_every, processes=processes)
    return finish(run_plan(plan, folder, options, overwrite=overwrite, progress=progress), extra)


def resumed_plan(
    given: Mapping[str, Any], recipes: Mapping[str, Recipe], stored: Mapping[str, Any], extra: Mapping[str, Any]
) -> Plan:
    """The plan of a sweep that goes on."""
    return _plan(given["base"], given["data"], given["eval_data"], recipes, stored, extra)


def _plan(
    base: BaseLike,
    data: Any,
    eval_data: Any,
    recipes: Mapping[str, Recipe],
    inputs: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> Plan:
    """Everybody learns from one part of the data, and is judged on the other."""
    if data is None:
        raise DataError("no training data: give data (--data FILE)")
    if eval_data is None:
        raise DataError(
            "a sweep is judged on evaluation data, and there are none: hold some out (eval_data=0.1, --eval 0.1), or give a file"
        )
    train, held = _examples(next(iter(recipes.values())), data, eval_data, int(extra["sweep"]["seed"]))
    halving = Halving(len(recipes), int(extra["sweep"]["halving"]))
    shares = {name: Share(name, train, held) for name in recipes}
    return Plan(base, shares, recipes, inputs, halving.judge, halving.first, extra)


def _examples(recipe: Recipe, data: Any, eval_data: Any, seed: int) -> tuple[Examples, Examples]:
    settings: dict[str, Any] = {
        "columns": dict(recipe.columns) if recipe.columns else None, "kind": None if recipe.kind == "auto" else recipe.kind,
    }  # fmt: skip
    train = load_examples(data, **settings)
    if isinstance(eval_data, float):
        return train.split(eval_data, seed=seed)
    return train, load_examples(eval_data, **{**settings, "kind": train.kind}, labels=train.labels or None)


def finish(runs: Runs, extra: Mapping[str, Any]) -> SweepRuns:
    """Compare what was trained, and write the winner; may be called again."""
    settings: Mapping[str, Mapping[str, Any]] = extra["sweep"]["settings"]
    rows = {str(row["name"]): row for row in runs.report.rows}
    table, comparison, groups = _table(settings, rows)
    fields = _by_field(settings, comparison, groups)
    winner = str(table[0]["names"][0]) if table else None
    plain = ManyReport.to_dict(runs.report)
    if any(row["status"] == "halved" for row in table):
        plain["notes"].append(
            "what was given up is compared as it was then, with fewer steps than the others; --halving 1 trains all to the end"
        )
    plain["rows"] = tuple({key: value for key, value in row.items() if key != "eval_rows"} for row in plain["rows"])
    report = SweepReport(
        **{**plain, "notes": tuple(plain["notes"])}, winner=winner, table=tuple(table), by_field=fields
    )
    if int(os.environ.get("RANK", "0")) == 0:
        _write(runs.path, report, rows)
    return SweepRuns(runs.path, report)


def _write(path: Path, report: SweepReport, rows: Mapping[str, Mapping[str, Any]]) -> None:
    picture = plot(report.table)
    write_beside(path / "sweep.svg", picture)
    write_beside(
        path / "sweep.json",
        json.dumps(plain_json({"winner": report.winner, "table": report.table, "by_field": report.by_field}), indent=1)
        + "\n",
    )
    if report.winner is not None:
        shutil.copyfile(path / str(rows[report.winner]["folder"]) / "recipe.yaml", path / "winner.yaml")
    write_beside(path / "report.html", page(report, path.name, picture, report.ranking()))


def _table(
    settings: Mapping[str, Mapping[str, Any]], rows: Mapping[str, Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], Comparison | None, list[list[str]]]:
    """Combinations, seeds put together, best first."""
    groups: dict[str, list[str]] = {}
    for name, values in settings.items():
        if name in rows and rows[name]["status"] != "failed" and rows[name].get("eval_rows"):
            groups.setdefault(label({key: value for key, value in values.items() if key != "seed"}) or name, []).append(
                name
            )
    members = list(groups.values())
    sizes = [len(rows[names[0]]["eval_rows"]) for names in members]
    members = [names for names, size in zip(members, sizes, strict=True) if size == max(sizes)]
    if not members:
        return [], None, []
    comparison = compare([[rows[name]["eval_rows"] for name in names] for names in members])
    # a combination that was given up has had fewer steps: it does not win against one that was trained to its end
    order = sorted(
        range(len(members)),
        key=lambda index: (
            all(rows[name]["status"] == "halved" for name in members[index]),
            _judged(rows, members[index], float(comparison.losses[index])),
        ),
    )
    table = []
    for index in order:
        names = members[index]
        shown = {key: value for key, value in settings[names[0]].items() if key != "seed" or len(names) == 1}
        table.append({
            "settings": shown, "names": names, "loss": float(comparison.losses[index]), "low": float(comparison.low[index]),
            "high": float(comparison.high[index]), "wins": float(comparison.wins[index]), "steps": rows[names[0]]["steps"],
            "status": rows[names[0]]["status"],
        })  # fmt: skip
    return table, comparison, members


def _judged(rows: Mapping[str, Mapping[str, Any]], names: Sequence[str], loss: float) -> float:
    """What decides, turned so that less is better: the recipe's metric, which mostly is the loss."""
    metric = str(rows[names[0]].get("metric", "eval_loss"))
    if metric in ("eval_loss", "eval_perplexity"):
        return loss
    mean: float = sum(rows[name]["adapter"][metric.removeprefix("eval_")] for name in names) / len(names)
    return -mean if METRICS[metric] == "higher" else mean


def _by_field(
    settings: Mapping[str, Mapping[str, Any]], comparison: Comparison | None, groups: Sequence[Sequence[str]]
) -> dict[str, dict[str, float]]:
    if comparison is None:
        return {}
    found: dict[str, dict[str, float]] = {}
    for field in (name for name in next(iter(settings.values())) if name != "seed"):
        values = list(dict.fromkeys(str(settings[names[0]][field]) for names in groups))
        members = {
            value: [index for index, names in enumerate(groups) if str(settings[names[0]][field]) == value]
            for value in values
        }
        found[field] = {value: comparison.wins_of(indices) for value, indices in members.items()}
    return found
