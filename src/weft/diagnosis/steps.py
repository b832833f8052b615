"""Rules about optimizer steps: learning rate, clipping, warm-up, underflow.

Measured for the limits: trainings of stories260k (width 64) on e2e at the learning rate of the rule, and at 1/1000 to 15 times of it;
docs/log.md has the numbers.
"""

from __future__ import annotations

import math

from weft.diagnosis.record import Record, number
from weft.diagnosis.rules import Sign, rule
from weft.diagnosis.series import median

__all__ = ["clipping", "rate_too_high", "rate_too_low", "underflow", "warm_up"]

TOO_LARGE = 0.15
"""Median over the sites of ‖change of ΔW in one step‖ / ‖W‖ from which a step undoes others. Measured at the largest step: 0.067 at the
rate of the rule, 0.58 at 3 times that, which ended above the base's loss, 7 at 10 times."""
TOO_SMALL = 3e-5
"""And up to which it does next to nothing. Measured: 1.2e-5 at 1/4000 of the rule's rate, which gained 0.8 % of the loss."""
NEARLY_ALWAYS = 0.9


@rule("learning-rate-too-high", "steps that are large against the weights")
def rate_too_high(record: Record) -> Sign | None:
    """By the change of ΔW in one step against ‖W‖, site by site."""
    sizes = _step_sizes(record)
    if not sizes:
        return None
    step, own = max(sizes, key=lambda item: median(list(item[1].values())))
    middle = median(list(own.values()))
    if middle < TOO_LARGE:
        return None
    site = max(own, key=lambda path: own[path])
    rate = _rate(record, step)
    evidence = (
        f"One step changed ΔW by {middle:.0%} of ‖W‖ (median of {len(own)} sites; most, {own[site]:.0%}, at {site}); trainings that go well stay "
        f"under {TOO_LARGE:.0%}."
    )
    advice = (
        f"Lower learning_rate{_at(rate)}: to about {_round(rate * 0.03 / middle)}."
        if rate
        else "Lower learning_rate, to a third or less."
    )
    return Sign("medium", evidence, advice, step, site, {"median": middle, "most": own[site], "learning_rate": rate})


@rule("learning-rate-too-low", "steps that do next to nothing")
def rate_too_low(record: Record) -> Sign | None:
    """Small against ‖W‖, and the loss has hardly moved."""
    sizes = _step_sizes(record)
    if not sizes or not (record.ended or record.step >= 0.5 * record.steps):
        return None
    step, own = max(sizes, key=lambda item: median(list(item[1].values())))
    middle = median(list(own.values()))
    values = [value for _, value in record.column("loss")]
    if not 0 < middle < TOO_SMALL or len(values) < 6:
        return None
    part = max(2, len(values) // 5)
    gain = 1 - median(values[-part:]) / max(median(values[:part]), 1e-9)
    base, found = record.base_loss, [value for _, value in record.evaluations]
    if base and found:
        gain = 1 - min(found) / base
    if gain > 0.1:
        return None
    site = min(own, key=lambda path: own[path])
    rate = _rate(record, step)
    evidence = (
        f"The largest step changed ΔW by {middle:.1g} of ‖W‖ (median of {len(own)} sites; least {own[site]:.1g} at {site}), and the loss fell by "
        f"{max(gain, 0):.1%}."
    )
    advice = f"Raise learning_rate{_at(rate)}: 10 times, or leave it out, for the rule by width, rank and alpha."
    return Sign("medium", evidence, advice, None, site, {"median": middle, "gain": gain, "learning_rate": rate})


@rule("always-clipped", "nearly every gradient is clipped")
def clipping(record: Record) -> Sign | None:
    """After the warm-up. With AdamW this does little by itself; gradients many times the clip, or growing, do."""
    warm = int(record.fact("warmup_steps") or 0)
    clip = float(record.fact("clip") or 0.0)
    shares = [value for step, value in record.column("clipped") if step > warm]
    norms = [value for step, value in record.column("grad_norm") if step > warm]
    if not shares and clip:
        shares = [float(norm > clip) for norm in norms]
    if not clip or len(shares) < 8 or not norms:
        return None
    share, middle = sum(shares) / len(shares), median(norms)
    if share < NEARLY_ALWAYS:
        return None
    third = max(1, len(norms) // 3)
    growth = median(norms[-third:]) / max(median(norms[:third]), 1e-9)
    severity = "medium" if middle > 10 * clip and growth > 2 else "low"
    grown = f", and grew {growth:.1f} times" if growth > 1.5 else ""
    evidence = f"{share:.0%} of the steps after the warm-up were clipped at {clip:g}; the norm is {middle:.3g} (median){grown}."
    advice = (
        "Only the direction of such gradients counts, and outliers are no longer held back more than others. Where the loss is rough, lower "
        "learning_rate or raise warmup_ratio; where it is smooth, this is harmless with AdamW. Don't raise clip against a loss that explodes."
    )
    return Sign(severity, evidence, advice, numbers={"share": share, "norm": middle, "growth": growth})  # type: ignore[arg-type]


@rule("no-warm-up", "the learning rate is full from the first step")
def warm_up(record: Record) -> Sign | None:
    """Low where nothing came of it; medium where the loss jumped at the start."""
    warm, steps = record.fact("warmup_steps"), record.steps
    lines = record.column("loss")
    if warm is None or steps < 20 or len(lines) < 6 or int(warm) > 0:
        return None
    early = [(step, value) for step, value in lines if step <= max(10, steps // 10)]
    first = max(lines[0][1], record.base_loss or 0.0)
    high = max(early[1:], key=lambda item: item[1], default=lines[0])
    jump = high[1] / max(first, 1e-9) - 1
    severity = "medium" if jump > 0.2 else "low"
    what = f"; the loss jumped from {first:.3g} to {high[1]:.3g} at step {high[0]}" if jump > 0.2 else ""
    evidence = f"There is no warm-up: AdamW's first steps, which know nothing of the gradient's size, have the full learning rate{what}."
    advice = "Set warmup_ratio=0.1 (the default), or warmup_steps to 10 at least."
    return Sign(severity, evidence, advice, lines[0][0], numbers={"jump": jump})  # type: ignore[arg-type]


@rule("underflow", "gradients vanish in float16")
def underflow(record: Record) -> Sign | None:
    """Gradients that are exactly zero where they should not be; or a loss scale that falls again and again."""
    if record.fact("precision") != "fp16" and record.fact("dtype") != "float16":
        return None
    lines = record.lines
    skipped = sum(number(row, "skipped") or 0 for row in lines)
    zero: dict[str, float] = {}
    for step, own in record.sites:
        if step >= 1:
            for path, row in own.items():
                zero[path] = max(zero.get(path, 0.0), number(row, "gradient_zero") or 0.0)
    site = max(zero, key=lambda path: zero[path], default=None)
    share = median(list(zero.values()))
    done = max(1, record.step)
    if share > 0.2:
        evidence = f"{share:.0%} of the gradient's numbers are exactly zero (median of {len(zero)} sites), and the base is in float16, whose smallest number is 6e-8."
        advice = "Train in bfloat16 (--dtype bfloat16, mixed_precision=bf16), or with mixed_precision=fp16, which scales the loss."
        severity = "high" if share > 0.9 else "medium"
        return Sign(severity, evidence, advice, site=site, numbers={"zero": share, "skipped": skipped})  # type: ignore[arg-type]
    if skipped > max(5.0, 0.1 * done):
        evidence = f"{skipped:.0f} of {done} steps were left out because gradients overflowed in float16."
        advice = "Train in bfloat16 (mixed_precision=bf16); or lower learning_rate."
        return Sign("medium", evidence, advice, numbers={"skipped": skipped})
    return None


def _step_sizes(record: Record) -> list[tuple[int, dict[str, float]]]:
    """(step, ‖change of ΔW‖ / ‖W‖ by site), where something changed."""
    weights = record.weights
    found = []
    for step, own in record.sites:
        sizes = {
            path: value / weights[path]
            for path, row in own.items()
            if weights.get(path) and (value := number(row, "update")) and math.isfinite(value)
        }
        if sizes:
            found.append((step, sizes))
    return found


def _rate(record: Record, step: int) -> float:
    """The learning rate of a step, from the nearest line; 0: unknown."""
    found = record.column("learning_rate")
    return min(found, key=lambda item: abs(item[0] - step))[1] if found else 0.0


def _at(rate: float) -> str:
    return f" (then {rate:.2g})" if rate else ""


def _round(value: float) -> str:
    return f"{value:.1g}"
