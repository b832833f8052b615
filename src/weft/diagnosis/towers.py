"""Rules about trainings with two towers: one that gets no gradient, embeddings that fall together.

Such trainings also have in each line ``grad_norm_text_model``, ``grad_norm_vision_model``, ``grad_norm_heads``, and where texts and images
are compared ``spread_text`` and ``spread_image``: 1 - ‖mean embedding‖² of a batch, 0 where all are one vector.
"""

from __future__ import annotations

from weft.diagnosis.record import Record
from weft.diagnosis.rules import Sign, rule
from weft.diagnosis.series import median

__all__ = ["collapse", "vanishing"]

TOWERS = {"text_model": "text", "vision_model": "vision"}
FEWEST = 5
"""Lines before anything is said."""
FAINT = 1e-3
"""Of the largest norm among towers and heads: two towers of one loss differ by factors of ten, not of a thousand."""
ONE_POINT = 0.02
"""Spread of embeddings whose mean cosine is 0.98."""


@rule("tower-vanishing", "a tower gets no gradient")
def vanishing(record: Record) -> Sign | None:
    """In the later half of the lines, one tower's gradient is less than a thousandth of the largest one."""
    names = [f"grad_norm_{name}" for name in (*TOWERS, "heads")]
    columns = {name: dict(record.column(name)) for name in names}
    steps = sorted(set[int]().union(*columns.values()))
    later = steps[len(steps) // 2 :]
    if len(steps) < FEWEST:
        return None
    usual = {
        name: median([column[step] for step in later if step in column] or [0.0]) for name, column in columns.items()
    }
    largest = max(usual.values())
    present = [tower for tower in TOWERS if columns[f"grad_norm_{tower}"]]
    faint = [tower for tower in present if usual[f"grad_norm_{tower}"] < FAINT * largest]
    if not faint:
        return None
    tower = min(faint, key=lambda name: usual[f"grad_norm_{name}"])
    own = columns[f"grad_norm_{tower}"]
    begun = next(
        (
            step
            for step in steps
            if own.get(step, 0.0) < FAINT * max(column.get(step, 0.0) for column in columns.values())
        ),
        later[0],
    )
    evidence = (
        f"The gradient of {tower} has a norm of {usual[f'grad_norm_{tower}']:.2g}, the largest of towers and heads {largest:.2g}: "
        "this tower learns nothing."
    )
    advice = (
        f"See that its features react to its input (saturated or dead units, a wrong mean and deviation of the images, a pooling that reads padding), "
        f"adapt other sites of it (targets), or freeze it: two_tower.{tower}.frozen=true."
    )
    return Sign("high", evidence, advice, begun, numbers={"norm": usual[f"grad_norm_{tower}"], "largest": largest})


@rule("collapse", "embeddings fall together in one point")
def collapse(record: Record) -> Sign | None:
    """In the last lines all embeddings of texts, or of images, are nearly one vector."""
    worst: tuple[float, str, list[tuple[int, float]]] | None = None
    for side in ("text", "image"):
        lines = record.column(f"spread_{side}")
        if len(lines) < FEWEST or lines[-1][0] < 0.2 * record.steps:
            continue
        now = median([value for _, value in lines[-3:]])
        if now < ONE_POINT and (worst is None or now < worst[0]):
            worst = now, side, lines
    if worst is None:
        return None
    now, side, lines = worst
    begun = next(
        (lines[at][0] for at in range(len(lines)) if all(value < ONE_POINT for _, value in lines[at:])), lines[-1][0]
    )
    evidence = f"The embeddings of {'texts' if side == 'text' else 'images'} have fallen together: spread {now:.2g}, and it began with {lines[0][1]:.2g}."
    advice = (
        "See that rows differ (not one text or one image for all), lower learning_rate (half of it) and two_tower.heads_learning_rate, and take larger batches "
        "(batch_size): pairs of one batch are what pushes embeddings apart."
    )
    return Sign("high", evidence, advice, begun, numbers={"spread": now, "first": lines[0][1]})
