"""The course of a step, stretched from a short model to a deep one: small numbers, added by hand."""

from __future__ import annotations

from weft.plan.course import ZERO, Course, Segment, stretch


def segment(layer: tuple[int, int, str] | None, change: float, peak: float, phase: str, flops: float = 0.0) -> Segment:
    return Segment(layer, (0.0, 0.0, change, 0.0, 0.0), (0.0, 0.0, peak, 0.0, 0.0), flops, phase)


def short() -> list[Segment]:
    """Two kinds of layers: 10 and 30 bytes kept, with 5 and 50 more in between."""
    return [
        segment(None, 7, 7, "forward"),
        segment((0, 0, "forward"), 10, 15, "forward", 1),
        segment((0, 1, "forward"), 30, 80, "forward", 2),
        segment(None, 100, 120, "loss"),
        segment(None, -100, 3, "backward"),
        segment((0, 1, "backward"), -30, 60, "backward", 4),
        segment((0, 0, "backward"), -10, 6, "backward", 2),
    ]


def test_a_stretched_course_is_the_sum_of_its_layers() -> None:
    order = [0, 0, 1, 0, 1]
    found = stretch(short(), [order])
    assert [s.layer[1] for s in found.segments if s.layer and s.layer[2] == "forward"] == order
    assert [s.layer[1] for s in found.segments if s.layer and s.layer[2] == "backward"] == order[::-1]
    assert sum(found.kept) == 7 + 3 * 10 + 2 * 30 + 100
    assert found.peak().total == 7 + 90 + 120
    assert found.peak().phase == "loss"
    assert found.flops() == 3 * (1 + 2) + 2 * (2 + 4)
    assert found.flops("backward") == 3 * 2 + 2 * 4


def test_what_is_there_before_the_step_counts_and_what_is_elsewhere_does_not() -> None:
    found = stretch(short(), [[0, 1]])
    start = (1000.0, 0.0, 0.0, 0.0, 0.0)
    assert found.peak(start).total == found.peak().total + 1000
    assert found.peak(without=("activations",)).total == 0
    assert Course(()).peak().parts == ZERO
