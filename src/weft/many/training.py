"""`train_many`: one base, many users' data, one pass; a run folder with an adapter each.

Settings that contradict each other are found before anything starts; a user's data are read when its turn comes, and what is wrong
with them stops that user alone. The base is afterwards what it was before, whatever happens in between.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from weft.data import load_examples
from weft.errors import RecipeError, RunError, RunStoppedError, WeftError
from weft.identity import Fingerprint
from weft.many import state
from weft.many.desk import Counter, FolderDesk
from weft.many.engine import Apart, Engine, Settings
from weft.many.folder import RESERVED, ManyFolder
from weft.many.names import folder_names
from weft.many.pieces import OVERHEAD
from weft.many.processes import World
from weft.many.progress import ManyProgress
from weft.many.report import ManyReport, Runs
from weft.many.rounds import Parked, Rounds
from weft.many.settings import check_evaluated, recipes_for
from weft.many.shares import Share, shares
from weft.models.attach import attach
from weft.spec import LoraSpec
from weft.train.opening import BaseLike, as_before, open_base
from weft.train.progress import StopOnSignal
from weft.train.recipe import Recipe
from weft.train.recompute import checkpointing
from weft.train.run import describe_environment, plain_json, write_beside
from weft.train.training import OBJECT, dtype_of, name_of, process_count, width_of

__all__ = ["BUDGET", "Options", "Plan", "run_plan", "settings_for", "train_many"]

BUDGET = {"cpu": 2**19, "cuda": 2**23}
"""Tokens in one forward times the width of the base, by device: where a longer forward is no faster and holds more memory."""

NARROW = 512
"""The width at which another forward costs as much as `weft.many.pieces.OVERHEAD` tokens; in narrower bases a token costs less."""


@dataclass(frozen=True)
class Options:
    """How a many-run is run; none of it changes what an adapter learns.

    Attributes:
        slots: adapters in the batch at once. tokens: most tokens in one forward; None: by the base's width.
        save_every: rounds between checkpoints; None: twice a minute.
        apart: run adapters one after another (slow; for comparison).
        processes: see `weft.many.processes`.
    """

    slots: int = 32
    tokens: int | None = None
    save_every: int | None = None
    apart: bool = False
    processes: str = "auto"

    def __post_init__(self) -> None:
        for name in ("slots", "tokens", "save_every"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise RecipeError(f"{name}={value!r}: expected a whole number of at least 1")


@dataclass(frozen=True)
class Plan:
    """Everything that a many-run needs to know.

    Attributes:
        shares, recipes: by name. inputs: what can be written down of base and data, to resume.
        judge_rung, steps_of: of a sweep, see `weft.many.sweeping`.
        extra: written into environment.json.
    """

    base: BaseLike
    shares: Mapping[str, Share]
    recipes: Mapping[str, Recipe]
    inputs: Mapping[str, Any]
    judge_rung: Callable[[Sequence[Parked]], Sequence[Parked]] | None = None
    steps_of: Any = None
    extra: Mapping[str, Any] | None = None


def train_many(
    *,
    base: BaseLike = None,
    data: Any = None,
    by: str | None = None,
    eval_data: Any = None,
    spec: LoraSpec | Mapping[str, LoraSpec] | None = None,
    recipe: Recipe | Mapping[str, Recipe] | None = None,
    out: str | os.PathLike[str],
    slots: int = 32,
    tokens: int | None = None,
    save_every: int | None = None,
    processes: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Runs:
    """Train one LoRA adapter a user, all in one pass over a frozen base. Each is the adapter that `weft.train` gives alone.

    Args:
        base: as in `weft.train`.
        data: a mapping from names to data; or paths (or a pattern as ``"users/*.jsonl"``), one user a file; or, with ``by``,
            one source whose rows are parted by that column.
        eval_data: a share to hold out of every user's rows, as 0.1; or of the form of ``data``.
        spec, recipe: one for all, or one by name. Learning rate, schedule, batch size, clipping, evaluation, patience,
            rank (also one that changes, see `weft.GrowOnPlateau`), sites and dropout are each adapter's own; what is about the base (dtype, precision, checkpointing) is shared.
        out: the run folder, with one run folder a user in it; must not exist, or be empty, unless `resume` or `overwrite`.
        slots: adapters in the batch at once; when one has finished, the next user takes its place.
        tokens: most tokens in one forward, padding included; None: as the device likes it. Only speed and memory
            depend on it.
        save_every: rounds between checkpoints; None: twice a minute.
        processes: with several processes: each has its own ``"users"``, or all share the ``"rows"`` of each user.
        resume: go on from the newest checkpoint in `out`, to the same factors as without the break.

    Returns:
        The runs by name, ``runs["alice"].adapter``; ``runs.report`` has all rows, also of those that failed.

    Raises:
        RecipeError, SpecError: a contradiction; before anything starts.
        DataError: data that can't be parted. Broken data of one user only stop that user, see the report.
        RunError: the folder can't be used; RunStoppedError: a signal ended the run (says how to go on).

    Example:
        >>> runs = weft.train_many(data={"alice": "alice.jsonl", "bob": rows}, out="runs/users")  # doctest: +SKIP
        >>> runs["alice"].adapter, runs.report.failed  # doctest: +SKIP
    """
    options = Options(slots, tokens, save_every, processes=processes)
    folder = ManyFolder(out)
    if resume:
        return _resumed(folder, base, data, eval_data, (spec, recipe), options, progress)
    if int(os.environ.get("RANK", "0")) == 0:
        folder.check(overwrite)
    parts = {share.name: share for share in shares(data, eval_data, by)}
    recipes = recipes_for(list(parts), spec, recipe)
    check_evaluated(recipes, {name: share.eval_data is not None for name, share in parts.items()})
    inputs = {"base": name_of(base), "data": _names(data), "eval_data": _names(eval_data), "by": by}
    return run_plan(Plan(base, parts, recipes, inputs), folder, options, overwrite=overwrite, progress=progress)


def run_plan(
    plan: Plan,
    folder: ManyFolder,
    options: Options,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Runs:
    """Run what was planned, or go on with it."""
    recipe = next(iter(plan.recipes.values()))
    labels = _labels(plan)
    cpu = recipe.device == "cpu" or not torch.cuda.is_available()
    world = World.join(options.processes, len(plan.recipes), cpu)
    model, tokenizer = open_base(plan.base, labels=labels, dtype=dtype_of(recipe))
    with as_before(model):
        model.to(world.device)
        with attach(model, {}) as bank, checkpointing(model, recipe), contextlib.ExitStack() as stack:
            known = {"fingerprint": bank.fingerprint.to_dict(), "processes": world.count, "mode": world.mode}
            keys = folder_names(list(plan.recipes), RESERVED)
            if world.main:
                stack.enter_context(_start(plan, folder, keys, known, resume, overwrite, options))
            world.wait()
            kind = Apart if options.apart else _fast()
            settings = settings_for(model, options.tokens)
            bf16 = recipe.mixed_precision == "bf16" or (
                recipe.mixed_precision == "auto" and not cpu and torch.cuda.is_bf16_supported()
            )
            engine: Engine = kind(model, bank, tokenizer, replace(settings, bf16=bf16, reduce=world.reducer()))
            done, rounds, notes = _go(
                plan, folder, options, engine, world, keys, labels, known, resume, progress, tokenizer
            )
            return _close(folder, world, done, rounds, options, notes)


def settings_for(model: nn.Module, tokens: int | None = None) -> Settings:
    """How much goes into one forward of this base, on the device where it is.

    Args:
        tokens: most tokens in one forward; None: by the base's width.
    """
    width = width_of(model) or NARROW
    device = next(model.parameters()).device.type
    budget = tokens or max(256, min(BUDGET.get(device, BUDGET["cuda"]) // width, 2**15))
    return Settings(budget, overhead=min(2**12, max(16, OVERHEAD * NARROW**2 // width**2)))


def _go(
    plan: Plan, folder: ManyFolder, options: Options, engine: Engine, world: World, keys: Mapping[str, str],
    labels: tuple[str, ...] | None, known: Mapping[str, Any], resume: bool, progress: bool | None, tokenizer: Any,
) -> tuple[dict[str, dict[str, Any]], Rounds, tuple[str, ...]]:  # fmt: skip
    """The rounds, from the start or from a checkpoint, until all are done."""
    own = world.own(list(plan.recipes))
    stop = StopOnSignal()
    shown = ManyProgress(len(own), progress, world.main)
    environment = {**describe_environment(), **known, "base": plan.inputs.get("base")}
    desk = FolderDesk(
        engine.model, tokenizer, engine, folder, plan.shares, plan.recipes, keys, environment, world, shown,
        Counter(stop, options.save_every), labels, plan.steps_of, plan.steps_of is not None,
    )  # fmt: skip
    desk.checkpoints.mkdir(parents=True, exist_ok=True)
    others = f" in each of {world.count} processes" if world.count > 1 and world.mode == "users" else ""
    shown.tell(
        f"{len(plan.recipes):,} adapters, {options.slots} at once{others}, up to {engine.settings.budget:,} tokens in one forward"
    )
    rounds = Rounds(
        engine, desk, options.slots, list(own), plan.judge_rung, world.share(), world.measurer(engine.measure)
    )
    try:
        if resume:
            found = state.resume(rounds, desk.checkpoints, desk.reopen)
            desk.rows = found or {}
            for member in rounds.active:
                folder.of(member.key).rewind_log(member.course.step)
            shown.tell(
                f"going on from round {rounds.number}" if found is not None else "no checkpoint yet: from the start"
            )
        with stop.listening():
            rounds.run()
    finally:
        shown.close()
    if desk.stopped:
        raise RunStoppedError(
            f"stopped after round {rounds.number}, {len(desk.rows)} of {len(own)} adapters done; "
            f"go on: weft train-many --resume {shlex.quote(str(folder.root))}"
        )
    return desk.rows, rounds, (*_notes(plan, engine), *desk.notes)


def _close(
    folder: ManyFolder,
    world: World,
    rows: Mapping[str, Mapping[str, Any]],
    rounds: Rounds,
    options: Options,
    notes: tuple[str, ...],
) -> Runs:
    """The report over all processes."""
    part = {"rows": list(rows.values()), "tokens": rounds.tokens, "seconds": rounds.seconds, "rounds": rounds.number}
    if world.count > 1 and world.mode == "users":
        parts: list[Any] = [None] * world.count
        torch.distributed.all_gather_object(parts, part)
    else:
        parts = [part]
    everybody = [row for one in parts for row in one["rows"]]
    order = {"failed": 0}
    everybody.sort(key=lambda row: order.get(row["status"], 1))
    report = ManyReport(
        tuple(everybody), sum(one["tokens"] for one in parts), max(one["seconds"] for one in parts),
        max(one["rounds"] for one in parts), options.slots, notes,
    )  # fmt: skip
    if world.main:
        from weft.many.page import page

        write_beside(folder.page, page(report, folder.root.name))
        write_beside(folder.report, json.dumps(plain_json(report.to_dict()), indent=1, ensure_ascii=False) + "\n")
    world.wait()
    return Runs(folder.root, report)


def _start(
    plan: Plan,
    folder: ManyFolder,
    keys: Mapping[str, str],
    known: Mapping[str, Any],
    resume: bool,
    overwrite: bool,
    options: Options,
) -> Any:
    """Make the folder, or see that it is the same run. Returns the lock."""
    if resume:
        _check_same(folder, known)
        return folder.lock()
    folder.create(overwrite)
    lock = folder.lock()
    folder.save_users(keys, plan.recipes)
    kept = {
        "inputs": plan.inputs,
        "slots": options.slots,
        "tokens": options.tokens,
        "apart": options.apart,
        "extra": plan.extra or {},
    }
    folder.save_environment({**describe_environment(), **known, **kept})
    return lock


def _check_same(folder: ManyFolder, known: Mapping[str, Any]) -> None:
    before = folder.read_environment()
    here, there = (Fingerprint.from_dict(part["fingerprint"]) for part in (known, before))
    if here.differences(there):
        raise RunError(
            f"{folder.root}: this run was started on another base ({there.name}): {'; '.join(here.differences(there))}; give the same, or "
            "start a new run"
        )
    if (before.get("processes"), before.get("mode")) != (known["processes"], known["mode"]):
        raise RunError(
            f"{folder.root}: this run was started on {before.get('processes')} processes (by {before.get('mode')}), and here are "
            f"{known['processes']} (by {known['mode']}): take as many, or start a new run"
        )


def _resumed(
    folder: ManyFolder,
    base: BaseLike,
    data: Any,
    eval_data: Any,
    settings: tuple[Any, Any],
    options: Options,
    progress: bool | None,
) -> Runs:
    """Go on with the run in a folder; what can't be read from it has to be given again."""
    folder.require()
    environment = folder.read_environment()
    extra = environment.get("extra", {})
    if folder.finished:
        return _judged(Runs.open(folder.root), extra)
    stored = environment.get("inputs", {})
    given = {"base": base, "data": data, "eval_data": eval_data}
    for name, value in given.items():
        if value is None and _is_object(stored.get(name)):
            raise RunError(
                f"{folder.root}: this run's {name} was an object, which can't be read from the folder; give {name} again"
            )
        given[name] = stored.get(name) if value is None else value
    _, recipes = folder.read_users()
    if any(value is not None for value in settings):
        raise RecipeError(
            f"{folder.root}: a resumed run keeps its recipes; leave spec and recipe out, or start a new run"
        )
    chosen = replace(options, slots=environment["slots"], tokens=environment["tokens"], apart=environment["apart"])
    if extra.get("sweep"):
        from weft.many.sweeping import resumed_plan

        plan = resumed_plan(given, recipes, stored, extra)
    else:
        parts = {share.name: share for share in shares(given["data"], given["eval_data"], stored.get("by"))}
        if set(parts) != set(recipes):
            odd = sorted(set(parts) ^ set(recipes))
            raise RunError(
                f"{folder.root}: the data now have other users than the run: {', '.join(odd[:6])}; bring the files back, or start a new run"
            )
        plan = Plan(given["base"], parts, recipes, stored)
    if process_count() > 1:
        chosen = replace(chosen, processes=environment["mode"])
    return _judged(run_plan(plan, folder, chosen, resume=True, progress=progress), extra)


def _judged(runs: Runs, extra: Mapping[str, Any]) -> Runs:
    """The runs of a sweep with its table; others as they are."""
    if not extra.get("sweep"):
        return runs
    from weft.many.sweeping import finish

    return finish(runs, extra)


def _labels(plan: Plan) -> tuple[str, ...] | None:
    """Names of the classes over all users, where they classify; None: they don't."""
    found: list[str] = []
    for name, share in plan.shares.items():
        recipe = plan.recipes[name]
        if recipe.kind not in ("auto", "classification"):
            return None
        try:
            examples = load_examples(
                share.data,
                columns=dict(recipe.columns) if recipe.columns else None,
                kind=None if recipe.kind == "auto" else recipe.kind,
            )
        except WeftError:
            continue  # said when the user's turn comes
        if examples.kind != "classification":
            return None
        found += examples.labels or ()
    return tuple(sorted(set(found))) or None


def _notes(plan: Plan, engine: Engine) -> tuple[str, ...]:
    found = []
    if engine.draws:
        found.append(
            "this base has dropout of its own, which would depend on neighbours: adapters went through it one after another"
        )
    if any(share.eval_data is None for share in plan.shares.values()):
        found.append("users without evaluation data keep their last factors, and nothing says whether these are good")
    return tuple(found)


def _fast() -> type[Engine]:
    from weft.many.together import Together

    return Together


def _names(value: Any) -> Any:
    """Data as they can be written down, to be found again."""
    if isinstance(value, Mapping):
        return {name: name_of(item) for name, item in value.items()}
    if isinstance(value, list | tuple) and all(isinstance(item, str | os.PathLike) for item in value):
        return [_names(item) for item in value]
    if isinstance(value, str) and glob.has_magic(value) and not os.path.exists(value):
        return os.path.abspath(os.path.expanduser(value))
    return name_of(value)


def _is_object(value: Any) -> bool:
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
    return OBJECT in list(parts)
