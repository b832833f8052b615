"""Rules about losses: explosion, NaN, stagnation, oscillation, overfitting, forgetting, an adapter that is worse than its base."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from weft.diagnosis.record import Record, number
from weft.diagnosis.rules import Sign, rule
from weft.diagnosis.series import falls, median, noise, spread

__all__ = ["explosion", "forgetting", "not_finite", "oscillation", "overfitting", "rolled_back", "stagnation", "worse"]

FEWEST = 5
"""Lines before a distribution is one."""
WINDOW = 12
FAR = 6.0
"""Standard deviations (of a line's loss around its own recent median) that no healthy line is above."""
IN_A_ROW = 3
LOST = 1.5
"""Times the loss at the start (the base's, where it was measured), above which nothing that was known is left. A run that was rough from the
beginning has too wide a distribution for the first limit."""

LOWER = "lower learning_rate (half of it), give it a longer warm-up (warmup_ratio=0.1), or lower clip; don't raise clip"


@rule("loss-explosion", "the loss leaves its own range upwards", acts=True)
def explosion(record: Record) -> Sign | None:
    """Three lines in a row far above the distribution of the lines before; or far above where the run began."""
    lines = record.column("loss")
    begun = _departure(lines, record.base_loss)
    if begun is None:
        return None
    at, limit, usual = begun
    after = [value for _, value in lines[at:]]
    back = median(after[-IN_A_ROW:]) <= usual + 0.25 * (limit - usual) and len(after) > IN_A_ROW
    step = lines[at][0]
    norms = [value for where, value in record.column("grad_norm_high") if where >= step] or [0.0]
    rate = next((value for where, value in record.column("learning_rate") if where >= step), 0.0)
    evidence = (
        f"The loss rose from {usual:.3g} to {max(after):.3g}, over {limit:.3g}, the end of its own range until then"
    )
    evidence += ", and came back." if back else f", and stands at {after[-1]:.3g}."
    numbers = {
        "usual": usual,
        "limit": limit,
        "highest": max(after),
        "last": after[-1],
        "grad_norm": max(norms),
        "learning_rate": rate,
    }
    advice = f"Train again: {LOWER}." if not back else f"For a smoother run: {LOWER}."
    return Sign("medium" if back else "high", evidence, advice, step, numbers=numbers)


def _departure(lines: Sequence[tuple[int, float]], base: float | None) -> tuple[int, float, float] | None:
    """(index of its first line, limit, usual loss) of the first departure upwards."""
    values = [value for _, value in lines]
    if not values:
        return None
    start = max(base or 0.0, *values[:2])
    known: list[float] = []
    far = above = 0
    for index, value in enumerate(values):
        recent = known[-WINDOW:]
        usual = median(recent) if len(known) >= FEWEST else start
        reach = max(spread(recent), noise(recent), 0.03 * usual, 0.01 * start)
        limit = usual + FAR * reach if len(known) >= FEWEST else LOST * start
        far = far + 1 if value > limit else 0
        above = above + 1 if value > LOST * start else 0
        if far >= IN_A_ROW:
            return index - far + 1, limit, usual
        if above >= (IN_A_ROW if base is not None else 2 * IN_A_ROW):
            return index - above + 1, LOST * start, start
        if value <= limit:
            known.append(value)
    return None


@rule("not-finite", "NaN or infinity, and where it was first", acts=True)
def not_finite(record: Record) -> Sign | None:
    """The first of them; a run stops there."""
    advice = f"Train again: {LOWER}; with fp16 take bf16."
    for row in record.rows:
        step = int(row.get("step", 0))
        if row.get("of") == "not-finite":
            site = row.get("site")
            evidence = (
                f"The {row.get('what', 'loss')} is not finite{': ' + str(row['where']) if row.get('where') else ''}."
            )
            return Sign("high", evidence, advice, step, None if site is None else str(site))
        bad = next(
            (
                name
                for name in ("loss", "grad_norm")
                if (n := number(row, name)) is not None and not abs(n) < float("inf")
            ),
            None,
        )
        skipped = number(row, "skipped")
        if bad is not None and "of" not in row and not skipped:
            word = "loss" if bad == "loss" else "gradient's norm"
            return Sign("high", f"The {word} is {row[bad]}.", advice, step)
    return None


@rule("rolled-back", "the run went back to a checkpoint and on with a lower learning rate")
def rolled_back(record: Record) -> Sign | None:
    """What ``on_trouble: act`` did."""
    rows = record.of("trouble")
    if not rows:
        return None
    last = rows[-1]
    peak = record.fact("learning_rate")
    rate = "" if peak is None else f" ({peak * float(last['factor']):.3g})"
    times = "once" if len(rows) == 1 else f"{len(rows)} times"
    evidence = (
        f"{times.capitalize()} the run went back to a checkpoint, last from step {last['seen']} to step {last['step']} because of "
        f"{last['rule']}; it went on with {float(last['factor']):g} of the learning rate{rate}."
    )
    advice = "The result stands; the next time begin with that learning rate, or a longer warm-up."
    return Sign(
        "medium", evidence, advice, int(last["step"]), numbers={"times": len(rows), "factor": float(last["factor"])}
    )


@rule("stagnation", "the loss does not fall")
def stagnation(record: Record) -> Sign | None:
    """Neither the training loss nor the evaluation's got better than at the start, beyond noise."""
    lines = record.column("loss")
    if len(lines) < 10 or not _far_enough(record, 0.3):
        return None
    values = [value for _, value in lines]
    part = max(3, len(values) // 5)
    first, last = median(values[:part]), median(values[-part:])
    wobble = max(noise(values), 1e-4 * first)
    gain = first - last
    evaluated = record.evaluations
    before = record.base_loss if record.base_loss is not None else (evaluated[0][1] if len(evaluated) > 2 else None)
    won = None if before is None or not evaluated else before - min(value for _, value in evaluated)
    if won is not None and before is not None:
        if won > 0.003 * before or won < -0.02 * before:
            return None  # it learns; or it gets worse, which other rules see
    elif gain > 2 * wobble / part**0.5 or gain > 0.02 * first:
        return None
    if median(values[-part:]) > first + 3 * wobble:
        return None  # it rises: other rules
    seen = (
        f"the evaluation loss from {before:.4g} to {before - won:.4g} at best"
        if won is not None and before is not None
        else ""
    )
    evidence = (
        f"After {lines[-1][0]} steps the training loss is {last:.4g}, and was {first:.4g} at the start (noise {wobble:.2g})"
        + (f"; {seen}." if seen else ".")
    )
    advice = (
        "See learning-rate-too-low and dead-sites where they are found beside this; else raise learning_rate 3 times, train longer, and see "
        "that the loss is on what is to be learned (columns, mask_prompt)."
    )
    return Sign("medium", evidence, advice, numbers={"first": first, "last": last, "noise": wobble})


@rule("oscillation", "the loss goes up and down instead of falling")
def oscillation(record: Record) -> Sign | None:
    """The evaluation loss, which has no noise of batches, turns up again and again; or the training loss swings far more than batches do."""
    found = record.evaluations
    values = [value for _, value in found]
    if len(values) >= 5:
        size = max(values) - min(values)
        turns = sum((b - a) * (c - b) < 0 for a, b, c in zip(values, values[1:], values[2:], strict=False))
        way = falls(values)
        middle = median(values)
        if turns >= len(values) // 2 and way < 0.8 and size > 0.05 * middle:
            swing = median([abs(b - a) for a, b in itertools.pairwise(values)])
            if swing > 0.03 * middle:
                evidence = (
                    f"The evaluation loss turned {turns} times in {len(values)} evaluations, between {min(values):.3g} and {max(values):.3g}; "
                    f"{1 - way:.0%} of its way went up."
                )
                return _swings(evidence, found[1][0], turns=turns, swing=swing, up=1 - way)
    return _swinging_lines(record)


def _swinging_lines(record: Record) -> Sign | None:
    lines = record.column("loss")
    warm = record.fact("warmup_steps")
    if len(lines) < 24:
        return None
    cut = int(warm) if isinstance(warm, int) else 0
    values = [value for step, value in lines if step > cut]
    third = len(values) // 3
    if third < 6:
        return None
    early, middle = values[:third], values[third : 2 * third]
    wobble, level = noise(middle), median(middle)
    calm = noise([value for step, value in lines if step <= cut] or early)
    if wobble > 0.15 * level and wobble > 3 * calm and median(middle) > 0.9 * median(early):
        return _swings(
            f"The training loss swings by {wobble:.3g} from line to line around {level:.3g}, {wobble / max(calm, 1e-9):.0f} times as much as at the start.",
            lines[len(lines) - len(values) + third][0], swing=wobble, calm=calm,
        )  # fmt: skip
    return None


def _swings(evidence: str, step: int, **numbers: float) -> Sign:
    advice = "Lower learning_rate (half of it), or average over more examples a step: raise batch_size or accumulation."
    return Sign("medium", evidence, advice, step, numbers=numbers)


@rule("overfitting", "the evaluation loss rises while the training loss falls")
def overfitting(record: Record) -> Sign | None:
    """It began at the best evaluation."""
    found = record.evaluations
    if len(found) < 3:
        return None
    best = min(range(len(found)), key=lambda index: found[index][1])
    after = [value for _, value in found[best + 1 :]]
    step, lowest = found[best]
    if len(after) < 2 or falls([lowest, *after]) > 0.3:
        return None
    base = record.base_loss
    rise = (after[-1] - lowest) / max(lowest, (base or 0.0) - lowest, 1e-9)
    lines = record.column("loss")
    then = [value for where, value in lines if where <= step][-8:]
    now = [value for _, value in lines][-8:]
    if rise < 0.02 or not then or not now or median(now) > median(then):
        return None
    kept = bool(record.fact("best"))
    lost = not kept and base is not None and after[-1] > base
    severity = "high" if lost else "medium" if rise > 0.1 and (not kept or rise > 0.3) else "low"
    evidence = (
        f"Since step {step} the evaluation loss rose from {lowest:.4g} to {after[-1]:.4g}, while the training loss fell from "
        f"{median(then):.3g} to {median(now):.3g}."
    )
    advice = (
        "The checkpoint of that step is the one that is kept. "
        if kept
        else "Set best=true: the checkpoint of the best evaluation is kept then. "
    ) + f"More examples help most; else stop near step {step} (epochs, patience), or use dropout=0.1, a lower rank."
    return Sign(severity, evidence, advice, step, numbers={"lowest": lowest, "last": after[-1], "rise": rise})  # type: ignore[arg-type]


@rule("worse-than-base", "with the adapter the evaluation loss is higher than without")
def worse(record: Record) -> Sign | None:
    """At the best evaluation where the best checkpoint is kept, at the last one else."""
    base, found = record.base_loss, record.evaluations
    if base is None or not found or not _far_enough(record, 0.5):
        return None
    step, value = min(found, key=lambda item: item[1]) if record.fact("best") else found[-1]
    if value <= 1.02 * base:
        return None
    evidence = (
        f"The base alone has {base:.4g} on the evaluation data, with the adapter it has {value:.4g} (step {step})."
    )
    advice = "Don't use this adapter. Lower learning_rate, and see that training and evaluation data are of one kind."
    return Sign("high", evidence, advice, step, numbers={"base": base, "adapter": value})


@rule("forgetting", "the loss on a general text grows")
def forgetting(record: Record) -> Sign | None:
    """Against the base, at the step whose factors are kept."""
    found = record.general
    if len(found) < 2 or found[0][0] != 0:
        return None
    base = found[0][1]
    step, value = found[-1]
    if record.fact("best") and record.evaluations:
        kept = min(record.evaluations, key=lambda item: item[1])[0]
        step, value = next((item for item in found if item[0] == kept), found[-1])
    rise = value - base
    began = next((where for where, seen in found[1:] if seen - base > 0.1), step)
    if rise <= 0.1:
        return None
    severity = "high" if rise > 2.0 else "medium" if rise > 0.5 else "low"
    evidence = f"On the general text the loss grew from {base:.3g} to {value:.3g} (perplexity × {2.718281828 ** min(rise, 50):.2g}) by step {step}."
    advice = (
        "If what the base knew is needed: lower learning_rate, a lower rank, fewer sites or steps; mix general texts into the training data; "
        "or use the adapter at a lower weight."
    )
    return Sign(severity, evidence, advice, began, numbers={"base": base, "adapter": value})  # type: ignore[arg-type]


def _far_enough(record: Record, share: float) -> bool:
    """The run has gone so far that its outcome can be judged."""
    return record.ended or record.step >= share * max(1, record.steps)
