"""The page of a run: one HTML file without network, out of numbers and texts that were gathered before.

    run_page(RunFacts(…)) -> str

Knows what a run recorded (`weft.diagnosis.record`), not where files are or how a training goes.
"""

from weft.report.facts import RunFacts
from weft.report.page import run_page

__all__ = ["RunFacts", "run_page"]
