"""Rules about sites: rank, sites that don't move, one that dominates.

They look at what the log has of the sites; of a finished run the adapter itself is looked at too (`weft.diagnosis.adapters`), by the
same names and limits, and more closely.
"""

from __future__ import annotations

from weft.diagnosis.record import Record, number
from weft.diagnosis.rules import Sign, rule
from weft.diagnosis.series import median

__all__ = ["dead", "dominated", "rank_too_large", "rank_too_small"]

FLAT = 0.95
IDLE = 0.5
NEARLY_DEAD = 0.01
DOMINATES = 10.0
HALF = 0.5


@rule("dead-sites", "sites whose B stays near zero")
def dead(record: Record) -> Sign | None:
    """Against the median of the others."""
    sizes = _sizes(record)
    if not sizes:
        return None
    middle = median([size for size in sizes.values() if size > 0])
    idle = [path for path, size in sizes.items() if size <= NEARLY_DEAD * middle]
    if not idle:
        return None
    if middle == 0.0:
        evidence = f"No update of {len(sizes)} sites is above zero: B never moved, and the base answers as without this adapter."
        return Sign(
            "high",
            evidence,
            "See that the loss depends on these sites, and the learning rate.",
            numbers={"sites": len(sizes)},
        )
    names = ", ".join(idle[:3]) + (" …" if len(idle) > 3 else "")
    evidence = f"{len(idle)} of {len(sizes)} sites have an update under {NEARLY_DEAD:.0%} of the median size: {names}."
    advice = "No gradient reaches them, or they are of no use: leave them out with exclude=[…], or look why the base doesn't use them."
    return Sign("medium", evidence, advice, site=idle[0], numbers={"sites": len(idle), "of": len(sizes)})


@rule("one-site-dominates", "one site holds most of the change")
def dominated(record: Record) -> Sign | None:
    """Size against the median of the others, and share of the whole."""
    sizes = _sizes(record)
    if len(sizes) < 4:
        return None
    largest = max(sizes, key=lambda path: sizes[path])
    middle = median([size for path, size in sizes.items() if path != largest])
    _, own = record.sites[-1]
    deltas = {path: number(row, "delta") or 0.0 for path, row in own.items()}
    share = deltas[largest] ** 2 / max(sum(value**2 for value in deltas.values()), 1e-30)
    if not middle or sizes[largest] < DOMINATES * middle or share < HALF:
        return None
    evidence = f"{largest} has {share:.0%} of ‖ΔW‖², {sizes[largest] / middle:.0f} times the size of the median of the other {len(sizes) - 1} sites."
    advice = "Lower its alpha (alpha_pattern) or its learning rate, or leave the site out."
    return Sign("medium", evidence, advice, site=largest, numbers={"share": share, "times": sizes[largest] / middle})


@rule("rank-too-small", "a flat spectrum: all directions are in use")
def rank_too_small(record: Record) -> Sign | None:
    """Of rank 1 nothing can be told."""
    shares = _in_use(record, 2)
    middle = median(list(shares.values()))
    if not shares or middle < FLAT:
        return None
    rank = max(int(row["rank"]) for row in record.sites[-1][1].values())
    evidence = f"The spectrum is flat: {middle:.0%} of the rank is in use (median of {len(shares)} sites of rank up to {rank}), and none is left over."
    advice = f"Try rank {2 * rank}, or adaptive=GrowOnPlateau, and compare the evaluation loss; a training of few steps looks the same."
    return Sign("low", evidence, advice, numbers={"effective_share": middle, "rank": rank})


@rule("rank-too-large", "the effective rank is far under the rank")
def rank_too_large(record: Record) -> Sign | None:
    """Memory and time for directions that do nothing."""
    shares = _in_use(record, 4)
    middle = median(list(shares.values()))
    if not shares or middle > IDLE:
        return None
    rows = record.sites[-1][1]
    used = median([float(rows[path]["effective_rank"]) for path in shares])
    rank = max(int(rows[path]["rank"]) for path in shares)
    evidence = f"The effective rank is {used:.1f} of up to {rank} (median of {len(shares)} sites)."
    advice = (
        "Drop the rest: weft shrink ADAPTER --energy 0.99 says what it costs; another time train with a lower rank."
    )
    return Sign("low", evidence, advice, numbers={"effective_rank": used, "rank": rank})


def _settled(record: Record) -> bool:
    """Enough was trained for sites to have moved."""
    return bool(record.sites) and (record.ended or record.sites[-1][0] >= 0.5 * record.steps) and record.step >= 5


def _sizes(record: Record) -> dict[str, float]:
    """‖ΔW‖/‖W‖ by site at the last look; ‖ΔW‖ where weights are not known."""
    if not _settled(record):
        return {}
    _, own = record.sites[-1]
    weights = record.weights
    known = all(weights.get(path) for path in own)
    return {path: (number(row, "delta") or 0.0) / (weights[path] if known else 1.0) for path, row in own.items()}


def _in_use(record: Record, least: int) -> dict[str, float]:
    """Effective rank over rank by site that moved."""
    if not _settled(record):
        return {}
    return {
        path: used / rank
        for path, row in record.sites[-1][1].items()
        if (rank := number(row, "rank") or 0) >= least and (used := number(row, "effective_rank") or 0) > 0
    }
