"""The course of memory through a step, cut where layers begin, and stretched to the model's full depth.

A `Segment` says what a part of the step leaves behind, and how high it went in between. The segments of a short model are those
of the deep one: each layer's are repeated as often as there are layers of its kind. This module does not know tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["PARTS", "Course", "Peak", "Segment", "stretch"]

PARTS = ("gradients", "optimizer", "activations", "logits", "temporary")
"""What the memory of a step is for; weights and factors are there before it."""

Vector = tuple[float, ...]
"""Bytes by part, in the order of `PARTS`."""

ZERO: Vector = (0.0,) * len(PARTS)


@dataclass(frozen=True)
class Segment:
    """A part of a step.

    Attributes:
        layer: (stack, place in it, ``"forward"`` or ``"backward"``); None: outside of the layers.
        change: bytes by part that it leaves behind (or has freed, below zero).
        peak: bytes by part at its highest moment, above those at its start.
        flops: floating point operations.
        phase: ``"forward"``, ``"loss"``, ``"backward"`` or ``"optimizer"``.
    """

    layer: tuple[int, int, str] | None
    change: Vector
    peak: Vector
    flops: float
    phase: str


@dataclass(frozen=True)
class Peak:
    """The highest moment of a course: bytes by part, and when it is."""

    parts: Vector
    phase: str

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.parts)


@dataclass(frozen=True)
class Course:
    """A step of the whole model."""

    segments: tuple[Segment, ...] = field(repr=False)

    def peak(self, start: Vector = ZERO, without: Iterable[str] = ()) -> Peak:
        """The highest moment.

        Args:
            start: bytes by part that are there before the step.
            without: parts that are held elsewhere.
        """
        weights = tuple(0.0 if part in without else 1.0 for part in PARTS)
        live, best = start, Peak(start, "start")
        for segment in self.segments:
            high = add(live, segment.peak)
            if dot(high, weights) > dot(best.parts, weights):
                best = Peak(high, segment.phase)
            live = add(live, segment.change)
        return Peak(tuple(a * b for a, b in zip(best.parts, weights, strict=True)), best.phase)

    @property
    def kept(self) -> Vector:
        """Bytes by part at the end of the forward: what is kept for the backward."""
        live = ZERO
        for segment in self.segments:
            if segment.phase in ("forward", "loss"):
                live = add(live, segment.change)
        return live

    def flops(self, *phases: str) -> float:
        """Floating point operations of some phases; of all without names."""
        return sum(segment.flops for segment in self.segments if not phases or segment.phase in phases)


def stretch(segments: Sequence[Segment], depths: Sequence[Sequence[int]]) -> Course:
    """The course of the whole model from that of the short one.

    Args:
        segments: of the short model, in order.
        depths: by stack and layer of the whole model, the place of the layer in the short stack that is like it.
    """
    done: list[Segment] = []
    at = 0
    while at < len(segments):
        here = segments[at].layer
        if here is None:
            done.append(segments[at])
            at += 1
            continue
        end = at
        own: dict[int, list[Segment]] = {}
        while end < len(segments) and (found := segments[end].layer) is not None and found[::2] == here[::2]:
            own.setdefault(found[1], []).append(segments[end])
            end += 1
        order = depths[here[0]] if here[2] == "forward" else tuple(reversed(depths[here[0]]))
        done += [segment for place in order for segment in own.get(place, ())]
        at = end
    return Course(tuple(done))


def add(left: Vector, right: Vector) -> Vector:
    """The sum, part by part."""
    return tuple(a + b for a, b in zip(left, right, strict=True))


def dot(left: Vector, right: Vector) -> float:
    """The weighted sum."""
    return sum(a * b for a, b in zip(left, right, strict=True))
