"""A watch that belongs to a run folder: its lines and findings go into the log, and with ``on_trouble: act`` the run answers by itself.

The answer to a loss that exploded or is not finite: back to the newest checkpoint from before it began, half of the learning rate, and on.
The log is the record: the line of a trouble is written in the one renaming that takes back the lines after the checkpoint, and the number
of such lines says by how much the learning rate is lower, so a run that is killed at any point goes on as it would have. At most `MOST`
times. This module does not know how a trainer is made.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from weft.diagnosis import RULES, Finding
from weft.errors import RecipeError
from weft.train import checkpoints
from weft.train.recipe import ON_TROUBLE
from weft.train.run import Folder, plain_json, write_beside
from weft.train.watching import Watch, said

__all__ = ["MOST", "GoBack", "RunWatch", "check_answer", "factor_of", "go_back"]

MOST = 3
"""How often a run goes back. A rate that is an eighth of what was asked for, and still fails, is not what is wrong."""
HALF = 0.5


class GoBack(Exception):
    """Ends a training inside of a session, which goes on from a checkpoint.

    Attributes:
        finding: what made it necessary. checkpoint: where to go on from.
    """

    def __init__(self, finding: Finding, checkpoint: Path) -> None:
        super().__init__(str(finding))
        self.finding, self.checkpoint = finding, checkpoint


def check_answer(on_trouble: str, processes: int) -> None:
    """A run that goes back makes its trainer anew, which several processes can't do together.

    Raises:
        RecipeError: it is asked for, and there are several.
    """
    if on_trouble == "act" and processes > 1:
        raise RecipeError(
            f"on_trouble='act' is for one process, and here are {processes}; set on_trouble=say, and where a run goes wrong, train again "
            "from its last checkpoint with a lower learning_rate"
        )


def factor_of(folder: Folder) -> float:
    """What is left of the recipe's learning rate, after the times that a run went back."""
    return HALF ** sum(row.get("of") == "trouble" for row in folder.read_log())


def go_back(folder: Folder, why: GoBack, seen: int) -> dict[str, Any]:
    """Take back what came after the checkpoint; returns the line of the log that says so.

    Args:
        seen: the step at which it was seen.
    """
    step = int(why.checkpoint.name.rpartition("-")[2])
    for later in checkpoints.steps(folder.checkpoints):
        if later > step:
            shutil.rmtree(checkpoints.path_of(folder.checkpoints, later))
    row = {
        "step": step,
        "of": "trouble",
        "rule": why.finding.rule,
        "seen": seen,
        "evidence": why.finding.evidence,
        "site": why.finding.site,
        "factor": factor_of(folder) * HALF,
    }
    kept = [line for line in folder.read_log() if line.get("step", 0) <= step or line.get("of") == "trouble"]
    write_beside(folder.log, "".join(json.dumps(plain_json(line)) + "\n" for line in [*kept, row]))
    return row


class RunWatch(Watch):
    """The watch of `weft.train`.

    Args:
        on_trouble: one of `weft.train.recipe.ON_TROUBLE`.
        folder: of the run; its log is read first, for a run that is resumed.
        facts: see `weft.train.facts`.
        tell: takes a line for the user.
        writes: this process writes.
    """

    answers = ON_TROUBLE

    def __init__(
        self,
        on_trouble: str,
        folder: Folder,
        facts: Mapping[str, Any],
        tell: Callable[[str], None],
        writes: bool = True,
    ) -> None:
        super().__init__(on_trouble, tell=tell if writes else lambda line: None)
        self.folder, self.writes = folder, writes
        self.facts = dict(facts)
        self.fed = True
        self.begin()

    def begin(self) -> None:
        """Be where the log is."""
        self.rows = [row for row in self.folder.read_log() if isinstance(row, dict)]
        self.said = {str(row["rule"]): str(row["severity"]) for row in self.rows if row.get("of") == "finding"}

    def put(self, row: dict[str, Any]) -> None:
        """Write the line, and look."""
        if self.writes:
            self.folder.append_log(row)
        self.take(row)

    def new(self, finding: Finding) -> None:
        """Write it, say it; and go back, where that is asked for and can be done."""
        row = said(finding, self.record.step)
        self.rows.append(row)
        if self.writes:
            self.folder.append_log(row)
        if finding.rule != "not-finite":  # there an error says it
            self.tell(str(finding))
        if self.on_trouble == "act" and RULES[finding.rule].acts and finding.severity == "high":
            checkpoint = self.good_checkpoint(finding)
            if checkpoint is not None:
                raise GoBack(finding, checkpoint)

    def good_checkpoint(self, finding: Finding) -> Path | None:
        """The newest one from before it began; None: there is none, or the run went back often enough."""
        if sum(row.get("of") == "trouble" for row in self.rows) >= MOST or self.ended:
            return None
        began = self.record.step if finding.step is None else finding.step
        there = [step for step in checkpoints.steps(self.folder.checkpoints) if step < began]
        return checkpoints.path_of(self.folder.checkpoints, there[-1]) if there else None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """As its parent; a run that is to go back has a checkpoint to go back to from its first step on."""
        super().on_train_begin(args, state, control, model=model, **kwargs)
        if self.on_trouble == "act" and state.global_step == 0 and not checkpoints.steps(self.folder.checkpoints):
            self.trainer._save_checkpoint(model, None)
