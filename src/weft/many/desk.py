"""What happens around the rounds: data are read when their user's turn comes, and every user's run folder is written.

Stands between `weft.many.rounds` and the file system.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from weft.adapter import Adapter
from weft.errors import DataError, RunError
from weft.many import state
from weft.many.engine import Engine
from weft.many.folder import ManyFolder
from weft.many.member import Member
from weft.many.processes import World
from weft.many.progress import ManyProgress
from weft.many.report import row_of
from weft.many.rounds import Rounds
from weft.many.shares import Share
from weft.models.targets import resolve_default
from weft.spec import LoraSpec
from weft.train.ends import unlearned_end
from weft.train.inputs import prepare, read
from weft.train.opening import with_head
from weft.train.progress import StopOnSignal
from weft.train.proof import make_proof
from weft.train.recipe import Recipe
from weft.train.recompute import above
from weft.train.run import Report, plain_json, write_beside
from weft.train.schedule import settle
from weft.train.training import digests_of, facts_of, name_of, not_for_peft, provenance_of

__all__ = ["Counter", "FolderDesk"]

SECONDS = 30.0
"""Between two checkpoints, where no number of rounds is given."""


@dataclass
class Counter:
    """When to write a checkpoint, and whether somebody asked to stop.

    Attributes:
        every: rounds between two checkpoints; None: as time says.
    """

    stop: StopOnSignal
    every: int | None = None
    last: float = field(default_factory=time.monotonic)

    def due(self, number: int) -> bool:
        """Whether a checkpoint follows this round."""
        if self.every is not None:
            return number % self.every == 0
        return time.monotonic() - self.last > SECONDS


@dataclass
class FolderDesk:
    """`weft.many.rounds.Desk` over a run folder.

    Attributes:
        shares, recipes, keys: by name: data, recipe, and folder.
        rows: of the report, of those who have left.
        compares: the report keeps losses by evaluation row.
        stopped: a signal ended the run.
    """

    model: nn.Module
    tokenizer: Any
    engine: Engine
    folder: ManyFolder
    shares: Mapping[str, Share]
    recipes: Mapping[str, Recipe]
    keys: Mapping[str, str]
    environment: Mapping[str, Any]
    world: World
    progress: ManyProgress
    counter: Counter
    labels: tuple[str, ...] | None = None
    steps_of: Callable[[Member], int] | None = None
    compares: bool = False
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    stopped: bool = False
    _for_peft: dict[LoraSpec, tuple[str, ...]] = field(default_factory=dict)
    _ends: dict[LoraSpec, str | None] = field(default_factory=dict)

    @property
    def checkpoints(self) -> Path:
        """Those of this process."""
        whole = self.world.count == 1 or self.world.mode == "rows"
        return self.folder.checkpoints if whole else self.folder.checkpoints / f"process-{self.world.rank}"

    # coming

    def open(self, name: str) -> Member:
        """Read the data and settle the recipe."""
        share, recipe = self.shares[name], self.recipes[name]
        texts = read(recipe, share.data, share.eval_data, self.labels, lenient=True)
        if texts.evaluated is None and isinstance(
            share.eval_data, float
        ):  # asked for of all, but here there is too little
            recipe = recipe.replace(**{name: getattr(Recipe(), name) for name in ("patience", "eval_every", "metric")})
        if texts.train.images is not None:
            raise DataError(
                f"{texts.train.source}: examples with images are trained one adapter at a time: weft train, not train-many"
            )
        inputs = prepare(recipe, texts, self.model, self.tokenizer)
        spec = above(self.model, resolve_default(self.model, recipe.spec or LoraSpec()), recipe.freeze_below)
        spec = with_head(spec, self.model) if inputs.train.kind == "classification" else spec
        facts = dataclasses.replace(facts_of(inputs, self.model, recipe, spec), processes=self.world.rows)
        schedule = settle(recipe, facts)
        recipe = recipe.replace(spec=spec, kind=texts.kind, max_length=inputs.max_length)
        member = Member(name, self.keys[name], recipe, spec, schedule, inputs, self.world.rows, self.world.row_rank)
        if self.steps_of is not None:
            member.due = self.steps_of(member)
        return member

    def entered(self, member: Member) -> None:
        """Its folder: recipe and environment, and nothing of an earlier try."""
        if not self.world.writes:
            return
        folder = self.folder.of(member.key)
        self.folder.clear(member.key)
        folder.root.mkdir(parents=True, exist_ok=True)
        folder.log.unlink(missing_ok=True)
        folder.save_recipe(member.recipe)
        share = self.shares[member.name]
        named = {"data": name_of(share.data), "eval_data": name_of(share.eval_data)}
        facts = {
            "name": member.name,
            "data": digests_of(member.inputs),
            "inputs": named | {"base": self.environment.get("base")},
        }
        folder.save_environment(plain_json({**self.environment, **facts}))

    def reopen(self, name: str) -> Member:
        """The same for a resumed run: the data must be the same, and the log goes back to the checkpoint.

        Raises:
            RunError: the data changed.
        """
        member = self.open(name)
        folder = self.folder.of(member.key)
        before = folder.read_environment().get("data", {})
        if before != digests_of(member.inputs):
            raise RunError(
                f"{folder.root}: the data of {name!r} changed since the run was started; bring them back, or start a new run"
            )
        return member

    # on the way

    def log(self, member: Member, line: dict[str, Any]) -> None:
        """A line of its log.jsonl."""
        if self.world.writes:
            self.folder.of(member.key).append_log({**line, "seconds": round(member.course.seconds, 3)})

    def round_done(self, rounds: Rounds) -> bool:
        """Show, and save now and then."""
        self.progress.update(rounds, len(self.rows), sum(row["status"] == "failed" for row in self.rows.values()))
        asked = self.world.any(self.counter.stop.asked)
        if asked or self.counter.due(rounds.number):
            self.counter.last = time.monotonic()
            if self.world.writes:
                state.save(rounds, self.checkpoints, self.rows)
        self.stopped = asked and bool(rounds.active or rounds.waiting or rounds.parked or rounds.back)
        return not self.stopped

    # leaving

    def finished(self, member: Member, adapter: Adapter) -> None:
        """Write the adapter and its report."""
        adapter.check_finite()
        begin = provenance_of(member.inputs, member.recipe, member.schedule, self.environment["versions"])
        metrics = member.result
        evaluation = {f"eval_{name}": value for name, value in metrics.items()}
        evaluation |= {f"base_{name}": value for name, value in member.course.base.items()}
        came = dataclasses.replace(begin, evaluation=evaluation, base=adapter.provenance.base)
        adapter = adapter.replace(provenance=came, proof=self._proof(member))
        folder = self.folder.of(member.key)
        log = folder.read_log() if self.world.writes else []
        self.rows[member.name] = row_of(member.name, member.key, member, log, digest=adapter.digest)
        if self.compares:
            self.rows[member.name]["eval_rows"] = member.best_rows
        if self.world.writes:
            problem = self._problem(member.spec, adapter)
            adapter.save(folder.adapter, overwrite=True, for_peft=not problem)
            folder.save_report(self._report(member, adapter, metrics, problem), member.name)

    def failed(self, name: str, reason: str, member: Member | None) -> None:
        """Write why."""
        key = self.keys[name]
        log = self.folder.of(key).read_log()
        self.rows[name] = row_of(name, key, member, log, reason)
        self.progress.tell(f"FAILED {name}: {reason}")
        if self.world.writes:
            (self.folder.root / key).mkdir(parents=True, exist_ok=True)
            write_beside(
                self.folder.failed(key), json.dumps({"name": name, "reason": reason}, ensure_ascii=False) + "\n"
            )

    def _proof(self, member: Member) -> Mapping[str, Any]:
        if member.key not in self.engine.bank.names:
            return {}
        with self.engine.using(member.key):
            return make_proof(self.model, member.inputs.evaluated or member.inputs.train)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was found of the base while adapters were written."""
        return tuple(dict.fromkeys(said for said in self._ends.values() if said))

    def _end(self, member: Member, adapter: Adapter) -> tuple[str, ...]:
        if member.inputs.train.kind != "completion":
            return ()
        if member.spec not in self._ends:
            self._ends[member.spec] = unlearned_end(self.model, self.tokenizer, adapter.sites, adapter.modules)
        said = self._ends[member.spec]
        return (said,) if said else ()

    def _problem(self, spec: LoraSpec, adapter: Adapter) -> tuple[str, ...]:
        if spec not in self._for_peft:
            self._for_peft[spec] = not_for_peft(adapter)
        return self._for_peft[spec]

    def _report(
        self, member: Member, adapter: Adapter, metrics: Mapping[str, float], problem: tuple[str, ...]
    ) -> Report:
        course, schedule = member.course, member.schedule
        kept = member.best.step if member.best is not None and schedule.best else None
        return Report(
            base=course.base, adapter=metrics, steps=course.step, epochs=member.epoch, tokens=course.tokens, seconds=course.seconds,
            tokens_per_second=course.tokens / max(course.seconds, 1e-9), train_loss=course.last_loss, best_step=kept, stopped=course.stopped,
            learning_rate=schedule.learning_rate, rate_reason=schedule.rate_reason, trainable=adapter.num_parameters, digest=adapter.digest,
            data=member.inputs.data, ranks=_ranks_of(member), notes=(*member.inputs.notes, *self._end(member, adapter), *problem),
        )  # fmt: skip


def _ranks_of(member: Member) -> dict[str, Any]:
    """The record of ranks that changed, as `weft.train.ranks.Ranks.record` has it."""
    return {} if member.ranks is None else {"changes": member.ranks.changes, "sites": member.held}
