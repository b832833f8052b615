"""What is wrong with a run or an adapter, and what to change: rules that look at numbers. Below training, which is watched by them.

    record = Record(rows, facts)         # the lines of a log, and what was known before the first step
    findings = examine(record)           # every rule of `weft.diagnosis.rules.RULES`, worst first

One function a rule, registered by its name; `weft.diagnosis.record` says which numbers there are. No torch, no files.
"""

from weft.diagnosis import data, losses, sites, speed, steps, towers
from weft.diagnosis.finding import SEVERITIES, Finding, worst, worst_first
from weft.diagnosis.record import Record
from weft.diagnosis.rules import RULES, examine

__all__ = [
    "RULES",
    "SEVERITIES",
    "Finding",
    "Record",
    "data",
    "examine",
    "losses",
    "sites",
    "speed",
    "steps",
    "towers",
    "worst",
    "worst_first",
]
