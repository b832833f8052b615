"""The rounds of a many-run: who is in the batch, one optimizer step of everybody, who leaves it and who comes next.

A round is one step of every adapter in the bank: each has the micro-batches of its own recipe, all go through the base
together, and each is clipped and moved by itself. An adapter that has finished, or that failed, leaves; its place goes to the next
in the queue. This module knows engines and members; what becomes of them is the business of the `Desk`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from weft.adapter import Adapter
from weft.errors import WeftError
from weft.many.engine import Engine, Measured, Move
from weft.many.member import Member
from weft.many.ranking import changing
from weft.train.scoring import Score

__all__ = ["Desk", "Parked", "Rounds"]

_NONE: Mapping[str, Sequence[float]] = {}


class Desk(Protocol):
    """What happens around the rounds."""

    def open(self, name: str) -> Member:
        """Read a user's data and settle its recipe; raises WeftError where that can't be done."""

    def entered(self, member: Member) -> None:
        """It has a place in the bank, with its starting factors."""

    def log(self, member: Member, line: dict[str, Any]) -> None:
        """A line of its log."""

    def finished(self, member: Member, adapter: Adapter) -> None:
        """It is done; its slot still holds the adapter."""

    def failed(self, name: str, reason: str, member: Member | None) -> None:
        """It was stopped."""

    def round_done(self, rounds: Rounds) -> bool:
        """After every round; False ends the run here."""


@dataclass
class Parked:
    """An adapter that waits outside of the bank: what it needs to go on (with its ranks, where these change), and what it is now."""

    member: Member
    state: dict[str, Tensor]
    adapter: Adapter
    sizes: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Rounds:
    """Train everybody in the queue.

    Attributes:
        engine, desk: see there.
        slots: places in the bank.
        waiting: names in their order. active: those in the bank, in the order in which they came.
        parked: those that wait at a rung; back: those that wait to come back into the bank.
        judge_rung: given all that wait at a rung when nobody is left in the batch, says who goes on (with a new ``due``).
        number: rounds that are done. tokens, seconds: of all rounds.
    """

    engine: Engine
    desk: Desk
    slots: int
    waiting: list[str]
    judge_rung: Callable[[Sequence[Parked]], Sequence[Parked]] | None = None
    share: Callable[[dict[str, float]], dict[str, float]] | None = None
    measure: Callable[[list[Any]], list[Measured]] | None = None
    active: list[Member] = field(default_factory=list)
    parked: list[Parked] = field(default_factory=list)
    back: list[Parked] = field(default_factory=list)
    number: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def run(self) -> bool:
        """All rounds. False: the desk ended it before."""
        while True:
            self.admit()
            if not self.active:
                if not self.parked or self.judge_rung is None:
                    return True
                self._rung(self.judge_rung)
                continue
            start = time.perf_counter()
            self.round()
            spent = time.perf_counter() - start
            self.number += 1
            self.seconds += spent
            if not self.desk.round_done(self):
                return False

    def admit(self) -> None:
        """Fill free places: first with those that come back, then from the queue."""
        new: list[Member] = []
        while len(self.active) < self.slots and (self.back or self.waiting):
            if self.back:
                parked = self.back.pop(0)
                self.come_in(parked.member, parked.state, parked.sizes)
                continue
            name = self.waiting.pop(0)
            member: Member | None = None
            try:
                member = self.desk.open(name)
                self._enter(member)
                self.desk.entered(member)
            except WeftError as error:
                self.desk.failed(name, str(error), member)
                continue
            self.active.append(member)
            new.append(member)
        self._measure_base(new)

    def round(self) -> None:
        """One optimizer step of everybody in the bank."""
        start = time.perf_counter()
        members = list(self.active)
        for member in members:
            if member.ranks is not None:
                member.ranks.step_begins()
        losses = self.engine.train([piece for member in members for piece in member.pieces()])
        losses = self.share(losses) if self.share is not None else losses
        finite = [member for member in members if math.isfinite(losses[member.key])]
        rates = {member.key: member.rate * (member.ranks.rate_factor() if member.ranks else 1.0) for member in finite}
        norms = self.engine.step([_move(member, rates[member.key]) for member in finite])
        for member in members:
            if member not in finite:
                self._fail(member, f"the loss is {losses[member.key]}")
            elif not math.isfinite(norms[member.key]):
                self._fail(member, f"the gradient's norm is {norms[member.key]}")
        moved = [member for member in finite if not member.course.stopped]
        before = sum(member.course.tokens for member in moved)
        for member in moved:
            member.advance(losses[member.key])
            if member.ranks is not None:
                member.ranks.step_ended()
            if member.is_logged():
                self.desk.log(member, member.log_line(rates[member.key], norms[member.key]))
        self.tokens += sum(member.course.tokens for member in moved) - before
        self._evaluate([member for member in moved if member.is_evaluated()])
        spent = (time.perf_counter() - start) / max(1, len(members))
        for member in moved:
            member.course.seconds += spent
            if member.ended:
                self._finish(member)
            elif member.course.step >= member.due:
                self._park(member)

    # coming and going

    def _enter(self, member: Member) -> None:
        needs = any(own.init in ("eva", "lora_ga") for own in member.spec.everywhere())
        batches = member.inputs.first_batches(member.recipe) if needs else None
        self.engine.enter(member.key, member.spec, member.recipe.seed, batches)
        if member.ranks is None:  # else it comes back, and goes on deciding
            member.ranks = changing(self.engine, member, lambda line: self.desk.log(member, line))

    def come_in(self, member: Member, state: dict[str, Tensor], sizes: Mapping[str, Sequence[float]] = _NONE) -> None:
        """A member that was in the bank before, with what it had: tensors, and rank and scale by site where these change."""
        self._enter(member)
        self.engine.fit(member.key, sizes)
        self.engine.restore(member.key, state)
        self.active.append(member)

    def _leave(self, member: Member) -> None:
        self.engine.leave(member.key)
        self.active.remove(member)

    def _fail(self, member: Member, what: str) -> None:
        schedule = member.schedule
        member.course.stopped = "failed"
        member.course.reason = (
            f"{what} at step {member.course.step + 1} of {schedule.steps}. Train again with a lower learning rate (now "
            f"{schedule.learning_rate:g}), a longer warm-up (now {schedule.warmup_steps} steps) or a lower clip (now {member.recipe.clip:g})"
        )
        self._leave(member)
        self.desk.failed(member.name, member.course.reason, member)

    def _finish(self, member: Member) -> None:
        """Its best factors, as a value, and out."""
        if member.best is not None and member.best.factors and member.best.step != member.course.step:
            self._put_best(member)
        if member.ranks is not None and member.ranks.finish() and member.inputs.evaluated is not None:
            ((_, member.final, _),) = self._metrics([member], of_base=False)
        self._note_ranks(member)
        try:
            self.desk.finished(member, self.engine.adapter(member.key))
        except WeftError as error:  # factors that are not finite, a disk that is full
            member.course.stopped, member.course.reason = "failed", str(error)
            self.desk.failed(member.name, str(error), member)
        self._leave(member)

    def _park(self, member: Member) -> None:
        self.parked.append(self.take_out(member, self.engine.state(member.key)))

    def take_out(self, member: Member, state: dict[str, Tensor]) -> Parked:
        """Out of the bank, to wait there.

        Args:
            state: what it goes on with.
        """
        sizes = self.sizes(member)
        if member.best is not None and member.best.factors:
            self._put_best(member)
        self._note_ranks(member)
        adapter = self.engine.adapter(member.key)
        self._leave(member)
        return Parked(member, state, adapter, sizes)

    def _put_best(self, member: Member) -> None:
        assert member.best is not None
        self.engine.fit(member.key, member.best.sizes)
        self.engine.put(member.key, member.best.factors)

    def _note_ranks(self, member: Member) -> None:
        if member.ranks is not None:
            member.held = member.ranks.ranks()

    def sizes(self, member: Member) -> dict[str, list[float]]:
        """Rank and scale by site of a member in the bank; empty where they don't change."""
        return {} if member.ranks is None else self.engine.sizes(member.key)

    def _rung(self, judge: Callable[[Sequence[Parked]], Sequence[Parked]]) -> None:
        """Everybody waits at a rung: some go on, the others are done."""
        waiting, self.parked = self.parked, []
        go_on = list(judge(waiting))
        for item in waiting:
            if item not in go_on:
                item.member.course.stopped = "halved"
                self.desk.finished(item.member, item.adapter)
        self.back = go_on

    # evaluation

    def _measure_base(self, members: Sequence[Member]) -> None:
        members = [member for member in members if member.inputs.evaluated is not None]
        for member, metrics, _ in self._metrics(members, of_base=True):
            member.course.base = metrics
            self.desk.log(
                member, {"step": 0, "of": "base", **{f"eval_{name}": value for name, value in metrics.items()}}
            )

    def _evaluate(self, members: Sequence[Member]) -> None:
        for member, metrics, rows in self._metrics(members, of_base=False):
            before = member.best
            member.judge(
                metrics,
                lambda member=member: self.engine.copy(member.key),  # type: ignore[misc]
                lambda member=member: self.sizes(member),  # type: ignore[misc]
            )
            if member.best is not before:
                member.best_rows = [
                    [float(total), int(count)]
                    for item in rows
                    for total, count in zip(item.sums, item.counts, strict=True)
                ]
            self.desk.log(
                member, {"step": member.course.step, **{f"eval_{name}": value for name, value in metrics.items()}}
            )
            if member.ranks is not None:
                member.ranks.evaluated({f"eval_{name}": value for name, value in metrics.items()})

    def _metrics(
        self, members: Sequence[Member], of_base: bool
    ) -> list[tuple[Member, dict[str, float], list[Measured]]]:
        """Everybody's evaluation, in mixed batches; each one's metrics are over its own rows."""
        pieces = [(member, piece) for member in members for piece in member.eval_pieces(of_base)]
        if not pieces:
            return []
        measured = (self.measure or self.engine.measure)([piece for _, piece in pieces])
        found = []
        for member in members:
            score, own = Score(member.inputs.train.kind == "classification"), []
            for (owner, _), result in zip(pieces, measured, strict=True):
                if owner is member:
                    score.take(result.sums, result.counts, result.predicted, result.labels)
                    own.append(result)
            found.append((member, score.metrics(), own))
        return found


def _move(member: Member, rate: float) -> Move:
    recipe, ranks = member.recipe, member.ranks
    watch = ranks.saw if ranks is not None and ranks.watches() else None
    return Move(member.key, rate, recipe.clip, recipe.weight_decay, recipe.lora_plus_ratio, member.course.step, watch)
