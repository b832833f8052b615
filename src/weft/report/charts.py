"""Curves of a run over its steps: loss, learning rate, gradient norms, speed, ranks. SVG for a page, coloured by its style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from weft.drawing import clean, element, line, smooth, text, thinned, ticks
from weft.drawing.svg import Point
from weft.report.facts import RunFacts, as_map, as_number

__all__ = ["Mark", "Series", "chart", "curves"]

WIDTH, HEIGHT = 520, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 30, 56
_LOG_FROM = 15.0
"""Largest over smallest value from which an axis is logarithmic: a spike hides nothing then."""


@dataclass(frozen=True)
class Series:
    """One line. ``look`` is a class of the page's style; ``dots`` marks each point."""

    name: str
    points: Sequence[tuple[float, float]]
    look: str
    dots: bool = False
    legend: bool = True


@dataclass(frozen=True)
class Mark:
    """A vertical line at a step: what happened there."""

    step: float
    said: str
    look: str
    name: str


def curves(facts: RunFacts) -> list[str]:
    """All curves that there is something to draw of."""
    record, marks = facts.record, _marks(facts)
    losses = record.column("loss")
    high = record.column("loss_high")
    found = [
        chart(
            "Loss", "nats a token" if not _classifies(facts) else "nats an example",
            [
                Series("training, highest of a step", high, "pale", legend=bool(high)),
                Series("training", losses, "thin"),
                Series("training, smoothed", smooth([(float(x), y) for x, y in losses]), "ink"),
                Series("evaluation", _with_base(facts), "one", dots=True),
                Series("general text", record.general, "two", dots=True),
            ],
            marks,
        ),
        chart("Learning rate", "", [Series("learning rate", record.column("learning_rate"), "one", legend=False)], _of(marks, "trouble"), from_zero=True),
        _gradients(facts, marks),
        chart("Speed", "tokens a second", [Series("tokens a second", record.column("tokens_per_second"), "one", legend=False)], [], from_zero=True),
        chart("Share of positions that hold padding", "", [Series("padding", record.column("padding"), "one", legend=False)], [], from_zero=True),
        _ranks(facts),
    ]  # fmt: skip
    return [picture for picture in found if picture]


def _classifies(facts: RunFacts) -> bool:
    return str(facts.record.fact("kind") or facts.recipe.get("kind")) in ("classification", "classify-images")


def _with_base(facts: RunFacts) -> list[tuple[float, float]]:
    base = facts.record.base_loss
    points = [(float(step), value) for step, value in facts.record.evaluations if step > 0]
    return points if base is None or not math.isfinite(base) else [(0.0, base), *points]


def _gradients(facts: RunFacts, marks: Sequence[Mark]) -> str:
    norms, high = facts.record.column("grad_norm"), facts.record.column("grad_norm_high")
    clip = facts.recipe.get("clip")
    lines = [Series("highest", high, "pale"), Series("gradient norm", norms, "one")]
    if norms and isinstance(clip, int | float) and clip > 0:
        ends = [float(norms[0][0]), float(norms[-1][0])]
        lines.append(Series(f"clipped above {clip:g}", [(x, float(clip)) for x in ends], "limit"))
    return chart("Gradient norm", "", lines, _of(marks, "trouble")) if norms else ""


def _ranks(facts: RunFacts) -> str:
    """Mean, lowest and highest rank over the steps, where ranks changed; from the ranks at the end, backwards."""
    ranks = as_map(facts.report.get("ranks"))
    changes = [row for row in facts.record.rows if "change" in row and isinstance(row.get("ranks"), dict)]
    now = {path: int(rank) for path, rank in as_map(ranks.get("sites")).items() if as_number(rank) is not None}
    if not changes or not now:
        return ""
    points = [(float(facts.record.steps), dict(now))]
    for row in sorted(changes, key=lambda row: int(row["step"]), reverse=True):
        points.append((float(row["step"]), dict(now)))
        now |= {path: int(pair[0]) for path, pair in row["ranks"].items()}
        points.append((float(row["step"]), dict(now)))
    points.append((0.0, dict(now)))
    points.reverse()
    held = [(step, list(by_site.values())) for step, by_site in points]
    shown = [
        Series("highest", [(step, float(max(values))) for step, values in held], "thin"),
        Series("mean", [(step, sum(values) / len(values)) for step, values in held], "one"),
        Series("lowest", [(step, float(min(values))) for step, values in held], "thin"),
    ]
    return chart("Rank of the sites", "", shown, [], from_zero=True)


def _marks(facts: RunFacts) -> list[Mark]:
    found = []
    for row in facts.record.rows:
        if "change" in row:
            found.append(Mark(float(row["step"]), f"step {row['step']}: {row['change']}", "change", "ranks changed"))
        if row.get("of") == "trouble":
            said = f"step {row.get('seen')}: {row.get('rule')}: back to step {row['step']}, learning rate × {row.get('factor')}"
            found.append(Mark(as_number(row.get("seen")) or float(row["step"]), said, "trouble", "trouble began"))
    for finding in facts.findings:
        if finding.step is not None and finding.severity != "low":
            found.append(Mark(float(finding.step), f"step {finding.step}: {finding.rule}", "trouble", "trouble began"))
    best = as_number(facts.report.get("best_step"))
    if best is not None and math.isfinite(best):
        found.append(Mark(best, f"kept: the checkpoint of step {best:g}", "best", f"kept: step {best:g}"))
    return found


def _of(marks: Sequence[Mark], look: str) -> list[Mark]:
    return [mark for mark in marks if mark.look == look]


def chart(title: str, unit: str, lines: Sequence[Series], marks: Sequence[Mark], *, from_zero: bool = False) -> str:
    """Lines over optimizer steps; ``""`` where no line has a point.

    Args:
        title: headline. unit: what is counted, beside it.
        lines: drawn in this order.
        marks: vertical lines; from_zero: the axis begins at 0.
    """
    there = [
        Series(s.name, [p for p in s.points if math.isfinite(p[1])], s.look, s.dots, s.legend)
        for s in lines
        if s.points
    ]
    points = [point for series in there for point in series.points]
    if not points:
        return ""
    across = ticks(min(x for x, _ in points), max(x for x, _ in points), 7, whole=True)
    low, high = min(y for _, y in points), max(y for _, y in points)
    logs = low > 0 and high / low >= _LOG_FROM and not from_zero
    up = _powers(low, high) if logs else ticks(0.0 if from_zero else low, high, 5)
    ends = (
        (across[0], across[-1], *(math.log(v) for v in (up[0], up[-1])))
        if logs
        else (across[0], across[-1], up[0], up[-1])
    )

    def place(point: Point) -> Point:
        y = math.log(point[1]) if logs else point[1]
        return (
            LEFT + (point[0] - ends[0]) / (ends[1] - ends[0]) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - ends[2]) / (ends[3] - ends[2]) * (HEIGHT - TOP - BOTTOM),
        )

    body = [text(LEFT, 17, title, size=14, class_="head")]
    beside = ", ".join([unit] * bool(unit) + ["logarithmic"] * logs)
    body += [text(WIDTH - RIGHT, 17, beside, size=11, anchor="end", class_="soft")] if beside else []
    body += _axes(across, up, place)
    body += _mark_lines(marks, place, (across[0], across[-1]), up[0])
    for series in there:
        drawn = thinned([place((float(x), y)) for x, y in series.points])
        body.append(line(drawn, class_=f"line {series.look}"))
        if series.dots or len(drawn) == 1:
            body += [
                element("circle", title=f"step {x:g}: {y:.4g}", cx=place((x, y))[0], cy=place((x, y))[1], r=3, class_=f"dot {series.look}")
                for x, y in _some(series.points)
            ]  # fmt: skip
    legend = [(s.look, s.name, "line") for s in there if s.legend]
    legend += list(
        dict.fromkeys((mark.look, mark.name, "mark") for mark in marks if across[0] <= mark.step <= across[-1])
    )
    below, height = _legend(legend)
    body += below
    said = _described(title, there, marks)
    return element(
        "svg", f"<title>{clean(title)}</title><desc>{clean(said)}</desc>" + "".join(body),
        viewBox=f"0 0 {WIDTH} {height:.0f}", role="img", aria_label=f"{title}. {said}", class_="chart",
    )  # fmt: skip


def _some(points: Sequence[tuple[float, float]], most: int = 120) -> Sequence[tuple[float, float]]:
    return points if len(points) <= most else points[:: math.ceil(len(points) / most)]


def _powers(low: float, high: float) -> list[float]:
    """1, 2, 5, 10 … around the range; powers of ten alone where that would be too many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / 6))
    if last - first <= 2:
        fine = [10.0**e * f for e in range(first, last + 1) for f in (1, 2, 5)]
        below, above = [v for v in fine if v <= low], [v for v in fine if v >= high]
        return [v for v in fine if below[-1] <= v <= above[0]]
    return [10.0**e for e in range(first, last + every, every)]


def _axes(across: Sequence[float], up: Sequence[float], place: object) -> list[str]:
    parts = []
    for value in up:
        y = place((across[0], value))[1]  # type: ignore[operator]
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(
            text(LEFT - 7, y + 4, f"{value:,.0f}" if value >= 10_000 else f"{value:.4g}", anchor="end", class_="soft")
        )
    for step in across:
        x = place((step, up[0]))[0]  # type: ignore[operator]
        parts.append(text(x, HEIGHT - BOTTOM + 17, f"{step:g}", anchor="middle", class_="soft"))
    return parts


def _mark_lines(marks: Sequence[Mark], place: object, ends: tuple[float, float], low: float) -> list[str]:
    parts = []
    for mark in marks:
        if ends[0] <= mark.step <= ends[1]:
            x = place((mark.step, low))[0]  # type: ignore[operator]
            parts.append(
                element("line", title=mark.said, x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM, class_=f"mark {mark.look}")
            )
    return parts


def _legend(entries: Sequence[tuple[str, str, str]]) -> tuple[list[str], float]:
    """Below the axis, in as many lines as it takes; and where the picture ends."""
    parts, x, y = [], float(LEFT), HEIGHT - 24.0
    for look, name, kind in entries:
        wide = 26 + 6.1 * len(name)
        if x + wide > WIDTH and x > LEFT:
            x, y = float(LEFT), y + 15
        parts.append(element("line", x1=x, x2=x + 16, y1=y, y2=y, class_=f"{kind} {look}"))
        parts.append(text(x + 21, y + 4, name, size=11, class_="soft"))
        x += wide + 8
    return parts, max(float(HEIGHT), y + 10)


def _described(title: str, lines: Sequence[Series], marks: Sequence[Mark]) -> str:
    """The picture in words."""
    said = [
        f"{s.name} from {s.points[0][1]:.4g} at step {s.points[0][0]:g} to {s.points[-1][1]:.4g} at step {s.points[-1][0]:g}"
        for s in lines
        if s.points
    ]
    return "; ".join([*said, *(mark.said for mark in marks[:8])])
