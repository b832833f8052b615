"""Mixing adapters: exact by default; whatever is approximate says what it lost.

    mixed = combine([(a, 0.7), (b, 0.3)])                          # exact: ranks add up
    mixed = combine([a, b], method="ties", density=0.3, rank=16)   # mixed.report.relative_error, by site in mixed.report.sites
    mixed = combine([a, b], search="valid.jsonl", base=base)       # finds the weights
    found = compare([a, b, c])                                     # overlap, cosine and conflict by site
    small = shrink(a, energy=0.99)

A method is one registered function in `weft.compose.methods`. Everything is judged on ΔW: adding A's and B's apart is no mixture.
"""

from __future__ import annotations

from weft.compose.comparing import Comparison, compare
from weft.compose.methods import METHODS
from weft.compose.mixing import combine
from weft.compose.report import MixReport, Mixture
from weft.compose.shrinking import shrink

__all__ = ["METHODS", "Comparison", "MixReport", "Mixture", "combine", "compare", "shrink"]
