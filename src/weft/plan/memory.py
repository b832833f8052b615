"""Bytes of a training by part, at its highest moment; floating point operations of a step. Traced once for each kind of step.

This module does not choose anything.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass, field
from typing import Any

from weft.errors import PlanError, WeftError
from weft.plan.course import PARTS, Course, Segment
from weft.plan.layers import Stacks
from weft.plan.optimizers import optimizer_bytes
from weft.plan.skeleton import head_sizes
from weft.plan.step import Batch, StepSettings, trace
from weft.plan.subject import SLOT, Counts, Subject
from weft.train.recipe import Recipe

__all__ = ["CUDA_CONTEXT", "Gauge", "Memory", "quantized"]

CUDA_CONTEXT = 500 << 20
"""What CUDA and its libraries take on a device before the first tensor: about 300 to 700 MiB, by device and version."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a training at its highest moment.

    Attributes:
        weights, factors: of the base; of the adapter.
        gradients, optimizer, activations, logits, temporary: what there is of them at that moment.
        overhead: of the process or the device, before the model.
        when: ``"start"``, ``"forward"``, ``"loss"``, ``"backward"`` or ``"optimizer"``.
        kept: activations and logits that the forward leaves for the backward.
        flops, forward_flops: floating point operations of an optimizer step, with all its parts.
    """

    weights: int
    factors: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    temporary: int
    overhead: int
    when: str
    kept: int
    flops: float
    forward_flops: float

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part; they add up to `total`."""
        return {name: int(getattr(self, name)) for name in ("weights", "factors", *PARTS, "overhead")}

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values())

    @property
    def own(self) -> int:
        """Without the overhead: what the peak of an allocator is compared with."""
        return self.total - self.overhead

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self) | {"total": self.total}


@dataclass
class Gauge:
    """What a step of a subject takes, under any recipe.

    Attributes:
        subject: base and spec. seq_len: tokens of a row. padded: rows differ in length, so that a mask has to be made.
        whole: trace every layer; the slow, obvious reference.
        overhead: bytes before the model; None: as it is now, before anything is traced.
    """

    subject: Subject
    seq_len: int
    padded: bool = True
    whole: bool = False
    overhead: int | None = None
    _courses: dict[Any, Course] = field(default_factory=dict, repr=False)

    @property
    def before(self) -> int:
        """Bytes before the model."""
        if self.overhead is None:
            self.overhead = _overhead(self.subject.device)
        return self.overhead

    def memory(self, recipe: Recipe) -> Memory:
        """Bytes at the highest moment of a training with this recipe.

        Raises:
            PlanError: the step of this model can't be followed without data.
        """
        before, built, course = self.before, self.subject.built(recipe), self.course(recipe)
        trained, device = built.trained, self.subject.device
        state, buffers = optimizer_bytes(trained, recipe.optimizer, device)
        gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
        step = Segment(None, (0.0,) * len(PARTS), (0.0, 0.0, 0.0, 0.0, float(buffers)), 0.0, "optimizer")
        away = ("activations",) if "activations" in recipe.offload and device != "cpu" else ()
        start = (float(gradients) if recipe.accumulation > 1 else 0.0, float(state), 0.0, 0.0, 0.0)
        peak = Course((*course.segments, step)).peak(start, without=away)
        parts = dict(zip(PARTS, map(int, peak.parts), strict=True))
        weights, unpacked = self.weights(recipe)
        parts["temporary"] += unpacked
        return Memory(
            weights=weights, factors=built.counts.factors, overhead=before, when=peak.phase, kept=int(sum(course.kept)),
            flops=course.flops() * recipe.accumulation, forward_flops=course.flops("forward", "loss") * recipe.accumulation, **parts,
        )  # fmt: skip

    def least(self, recipe: Recipe) -> int:
        """Bytes that are there before any step: weights, factors, optimizer state, overhead."""
        built, device = self.subject.built(recipe), self.subject.device
        state, _ = optimizer_bytes(built.trained, recipe.optimizer, device)
        return self.weights(recipe)[0] + built.counts.factors + state + self.before

    def counts(self, recipe: Recipe) -> Counts:
        """Numbers of the base and of the adapter."""
        return self.subject.built(recipe).counts

    def course(self, recipe: Recipe) -> Course:
        """The course of a step's memory."""
        return self._course(recipe, self._settings(recipe))

    def precision(self, recipe: Recipe) -> str:
        """What ``mixed_precision="auto"`` is on this device."""
        auto = "no" if self.subject.device == "cpu" else "bf16"
        return auto if recipe.mixed_precision == "auto" else recipe.mixed_precision

    def weights(self, recipe: Recipe) -> tuple[int, int]:
        """(bytes of the base where it is computed, bytes of what is unpacked for a product)."""
        counts = self.counts(recipe)
        if recipe.quantize:
            return counts.weights - counts.linear[2] + quantized(counts, recipe.quantize), 2 * counts.largest
        if "base" in recipe.offload and self.subject.device != "cpu":
            return counts.weights - counts.in_layers, 2 * counts.one_layer
        return counts.weights, 0

    def _settings(self, recipe: Recipe) -> StepSettings:
        return StepSettings(
            batch=Batch(recipe.batch_size, self.seq_len, self.padded),
            precision=self.precision(recipe),
            accumulates=recipe.accumulation > 1,
            vocabulary=head_sizes(self.subject.config),
            loss_chunk=recipe.loss_chunk,
            whole=self.whole,
        )

    def _course(self, recipe: Recipe, settings: StepSettings) -> Course:
        key = (settings, recipe.dtype, recipe.gradient_checkpointing, recipe.freeze_below)
        if key not in self._courses:
            self._courses[key] = self._traced(recipe, settings)
        return self._courses[key]

    def _traced(self, recipe: Recipe, settings: StepSettings) -> Course:
        from weft.train.opening import as_before
        from weft.train.recompute import checkpointing

        built = self.subject.built(recipe)
        try:
            with as_before(built.model), checkpointing(built.model, recipe), self.subject.mode:
                stacks = Stacks.of(built.model, whole=self.whole)
                return trace(built.model, stacks, settings, built.bank, SLOT)
        except (
            RuntimeError,
            IndexError,
            ValueError,
            TypeError,
            NotImplementedError,
            AssertionError,
            AttributeError,
        ) as problem:
            if isinstance(problem, WeftError):
                raise
            raise PlanError(
                f"the step of a {type(built.model).__name__} can't be followed without data: {type(problem).__name__}: "
                f"{next(iter(str(problem).splitlines()), '')}; measure a short run instead (weft train … --set max_steps=3)"
            ) from problem


def quantized(counts: Counts, kind: str) -> int:
    """Bytes of the linear weights: int8 takes one a number and a float32 a row; nf4 half a byte, a byte a block of 64, a float32 for 256 of those."""
    numbers, rows, _ = counts.linear
    return numbers + 4 * rows if kind == "int8" else numbers // 2 + numbers // 64 + numbers // 4096


def _overhead(device: str) -> int:
    """Bytes before the model: of this process as it is now, with its libraries; or of CUDA."""
    if device != "cpu":
        return CUDA_CONTEXT
    if str(sys.platform) == "linux":  # mypy looks at one platform alone
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    scale = 1 if str(sys.platform) == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
