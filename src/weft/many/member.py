"""One adapter of a many-run: what it trains on, its own schedule, and how far it is.

Everything about the order of the data, the learning rate, the best checkpoint and early stopping is that of `weft.train`,
and so a function of the adapter's own recipe. This module does not know models or neighbours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.data import BatchSampler

from weft.many.pieces import Piece
from weft.spec import LoraSpec
from weft.train.inputs import Inputs
from weft.train.ranks import Ranks
from weft.train.recipe import Recipe
from weft.train.schedule import Schedule, rate_at
from weft.train.scoring import IGNORED
from weft.train.streams import stream_seed

__all__ = ["Best", "Course", "Member", "Micro"]


@dataclass(frozen=True)
class Micro:
    """One micro-batch: indices of features, and how many tokens (or labels) are learned in it."""

    indices: tuple[int, ...]
    learned: int


@dataclass
class Best:
    """The best evaluation so far, and the factors that it had; their rank and scale by site, where these change."""

    metric: float
    step: int
    metrics: dict[str, float]
    factors: dict[str, Tensor]
    sizes: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Course:
    """How far an adapter is; plain numbers, saved with every checkpoint.

    Attributes:
        step: optimizer steps that are done. tokens: tokens that were read.
        waited: evaluations in a row without a better metric.
        loss_sum, loss_steps: since the last line of the log. first_loss, last_loss: lines of the log.
        base, metrics: of the base, and of the last evaluation.
        stopped: ``""``, ``"end"``, ``"early"``, ``"halved"`` or ``"failed"``; reason: why it failed.
        seconds: of the passes that it was part of.
    """

    step: int = 0
    tokens: int = 0
    waited: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    base: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    stopped: str = ""
    reason: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


class Member:
    """One adapter on its way.

    Attributes:
        name: the user's own; key: in the bank, and its folder's name.
        recipe, spec, schedule: settled.
        course: how far it is; best: the best evaluation so far; best_rows: its losses, row by row: [sum, count].
        ranks: changes its ranks while it is in the bank; None: they stay. held: rank by site of the result, where they change. final: its metrics,
            where it was changed at the very end.
        due: the step after which it leaves the batch for now (a rung of successive halving); else that of its schedule.
    """

    def __init__(
        self,
        name: str,
        key: str,
        recipe: Recipe,
        spec: LoraSpec,
        schedule: Schedule,
        inputs: Inputs,
        processes: int = 1,
        process: int = 0,
    ) -> None:
        self.name, self.key = name, key
        self.recipe, self.spec, self.schedule, self.inputs = recipe, spec, schedule, inputs
        self.processes, self.process = processes, process
        self.course = Course()
        self.best: Best | None = None
        self.best_rows: list[list[float]] = []
        self.ranks: Ranks | None = None
        self.held: dict[str, int] = {}
        self.final: dict[str, float] = {}
        self.due = schedule.steps
        self.rate_at = rate_at(recipe.schedule, schedule)
        self._epoch: tuple[int, list[list[tuple[int, ...]]]] = (-1, [])

    # the data

    def micros(self, step: int) -> list[list[Micro]]:
        """The micro-batches of an optimizer step, by process."""
        epoch, position = divmod(step, self.schedule.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, [list(self._batches(epoch, process)) for process in range(self.processes)])
        size = self.recipe.accumulation
        parts = (batches[position * size : (position + 1) * size] for batches in self._epoch[1])
        return [[Micro(indices, self._learned(indices)) for indices in part] for part in parts]

    def pieces(self) -> list[Piece]:
        """What this process computes in the next step."""
        micros = self.micros(self.course.step)
        learned = sum(micro.learned for part in micros for micro in part)
        train = self.inputs.train
        found = []
        for number, micro in enumerate(micros[self.process]):
            seeds = tuple(
                stream_seed(self.recipe.seed, self.course.step, number, self.process, row)
                for row in range(len(micro.indices))
            )
            found.append(
                Piece(
                    self.key,
                    [train[index] for index in micro.indices],
                    1 / max(1, learned),
                    seeds,
                    train.packed,
                    train.kind == "classification",
                    number,
                    self.name,
                    stream_seed(self.recipe.seed, self.course.step, number, self.process),
                )
            )
        return found

    def eval_pieces(self, of_base: bool = False) -> list[Piece]:
        """The evaluation data as batches, longest rows first."""
        evaluated = self.inputs.evaluated
        assert evaluated is not None
        order, size = self.inputs.eval_order(), self.recipe.eval_batch_size or 2 * self.recipe.batch_size
        parts = (order[start : start + size] for start in range(0, len(order), size))
        classifies = evaluated.kind == "classification"
        key = None if of_base else self.key
        return [
            Piece(key, [evaluated[index] for index in part], classifies=classifies, owner=self.name) for part in parts
        ]

    def tokens_of(self, step: int) -> int:
        """Tokens that all processes read in a step, without padding."""
        lengths = self.inputs.train.lengths
        return sum(int(lengths[index]) for part in self.micros(step) for micro in part for index in micro.indices)

    def _batches(self, epoch: int, process: int) -> Iterator[tuple[int, ...]]:
        order = self.inputs.sampler(self.recipe, self.processes).indices(epoch)
        batches: Any = BatchSampler(order, self.recipe.batch_size, drop_last=False)
        if self.processes > 1:
            from accelerate.data_loader import BatchSamplerShard  # type: ignore[import-untyped]

            batches = BatchSamplerShard(batches, self.processes, process)
        return (tuple(batch) for batch in batches)

    def _learned(self, indices: tuple[int, ...]) -> int:
        train = self.inputs.train
        if train.kind == "classification":
            return len(indices)
        return sum(int((train[index]["labels"][1:] != IGNORED).sum()) for index in indices)

    # the schedule

    @property
    def rate(self) -> float:
        """Learning rate of the next step."""
        return self.rate_at(self.course.step)

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.course.step / self.schedule.steps_per_epoch

    @property
    def ended(self) -> bool:
        """Nothing is left to train."""
        return bool(self.course.stopped)

    def is_logged(self) -> bool:
        """Whether the step just done has a line in the log."""
        return self.course.step == 1 or self.course.step % self.schedule.log_every == 0

    def is_evaluated(self) -> bool:
        """Whether an evaluation follows the step just done; the last one has one in any case."""
        every, step = self.schedule.eval_every, self.course.step
        return bool(every) and (step % every == 0 or step >= self.schedule.steps or step == self.due)

    def advance(self, loss: float) -> None:
        """One optimizer step is done."""
        self.course.tokens += self.tokens_of(self.course.step)
        self.course.step += 1
        self.course.loss_sum += loss
        self.course.loss_steps += 1
        if self.course.step >= self.schedule.steps:
            self.course.stopped = "end"

    def log_line(self, rate: float, norm: float) -> dict[str, Any]:
        """The line of the log for the steps since the last one."""
        course = self.course
        loss = course.loss_sum / max(1, course.loss_steps)
        course.loss_sum, course.loss_steps = 0.0, 0
        course.first_loss = loss if course.first_loss is None else course.first_loss
        course.last_loss = loss
        return {
            "step": course.step, "loss": loss, "grad_norm": norm, "learning_rate": rate, "epoch": self.epoch, "tokens": course.tokens,
        }  # fmt: skip

    @property
    def result(self) -> dict[str, float]:
        """Metrics of the adapter that comes of it."""
        best = self.best is not None and self.schedule.best
        return self.final or (self.best.metrics if best and self.best is not None else self.course.metrics)

    def judge(
        self,
        metrics: dict[str, float],
        factors: Callable[[], dict[str, Tensor]],
        sizes: Callable[[], dict[str, list[float]]] = dict,
    ) -> None:
        """Take an evaluation in: is it the best, and is it time to stop.

        Args:
            metrics: by plain names.
            factors: gives a copy of the factors as they are; called where they are to be kept. sizes: their ranks and scales.
        """
        course, schedule = self.course, self.schedule
        course.metrics = metrics
        value = metrics[schedule.metric.removeprefix("eval_")]
        sign = 1 if schedule.higher_is_better else -1
        better = not math.isnan(value) and (self.best is None or sign * (value - self.best.metric) > 0)
        course.waited = 0 if better or self.best is None else course.waited + 1
        if better:
            self.best = Best(value, course.step, metrics, factors() if schedule.best else {}, sizes())
        if schedule.patience and course.waited >= schedule.patience and course.step < schedule.steps:
            course.stopped = "early"
