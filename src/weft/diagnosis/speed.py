"""Rules about throughput: padding, waiting for batches. Nothing of it changes what is learned, so the severities are low ones."""

from __future__ import annotations

from weft.diagnosis.record import Record, number
from weft.diagnosis.rules import Sign, rule
from weft.diagnosis.series import median

__all__ = ["padding", "waits"]


@rule("padding", "much of the batches is padding")
def padding(record: Record) -> Sign | None:
    """Positions that are computed for nothing."""
    shares = [value for _, value in record.column("padding")]
    share = sum(shares) / len(shares) if shares else 0.0
    if len(shares) < 4 or share < 0.3:
        return None
    batching = record.fact("batching")
    evidence = (
        f"{share:.0%} of the positions in the batches are padding{f' (batching={batching!r})' if batching else ''}."
    )
    advice = (
        "Set batching='length' (examples of like length together) or 'packed'."
        if batching == "random"
        else "Set batching='packed', where the base can take it, or a larger batch_size, out of which like lengths can be chosen."
    )
    return Sign("medium" if share > 0.5 else "low", evidence, advice, numbers={"share": share})


@rule("data-waits", "training waits for its batches")
def waits(record: Record) -> Sign | None:
    """Seconds between two lines in which nothing was trained."""
    shares = []
    before: float | None = None
    for row in record.rows:
        now = number(row, "seconds")
        if now is None:
            continue
        waited = number(row, "seconds_waiting")
        if waited is not None and before is not None and now > before:
            shares.append(min(1.0, waited / (now - before)))
        before = now
    share = median(shares)
    if len(shares) < 6 or share < 0.2:
        return None
    workers = record.fact("workers")
    more = f"Set workers={2 * int(workers) or 2}" if workers is not None else "Use more workers"
    evidence = f"Training waits for its batches in {share:.0%} of the time (median over {len(shares)} lines)."
    advice = f"{more} (processes that prepare batches), or make what is done to an example cheaper (smaller images, fewer augmentations)."
    return Sign("medium" if share > 0.5 else "low", evidence, advice, numbers={"share": share})
