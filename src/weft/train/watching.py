"""`Watch`: a callback that looks after a training while it runs. Works in any `transformers.Trainer`.

    trainer = transformers.Trainer(model, …, callbacks=[watch := weft.Watch()])
    trainer.train()
    watch.findings

What is recorded costs next to nothing and changes nothing; the rules are those of `weft.diagnosis`, as `weft doctor` has them
afterwards. On a model with a bank, the sites of the adapter that is in use are looked at too; on another only losses, gradients and
learning rate. This module does not know run folders; `weft.train.answering` makes a run answer by itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from weft.diagnosis import RULES, Finding, Record, examine
from weft.errors import RecipeError, did_you_mean
from weft.train.bars import say
from weft.train.site_numbers import Before, bank_of, site_numbers, trained_slots, weight_norms
from weft.train.tally import Tally

__all__ = ["WATCH", "Watch", "logged", "said"]

WATCH = "watch.json"
SITE_ROWS, CLOSEST = 10, 3
"""How often a run looks at its sites, and the least steps between two looks: one costs 4 % of a step of the smallest base."""
RENAMED = {
    "num_input_tokens_seen": "tokens",
    "grad_norm": "grad_norm",
    "loss": "loss",
    "learning_rate": "learning_rate",
    "epoch": "epoch",
}


def logged(logs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The line for what a trainer logs: of a training step or of an evaluation; None: neither."""
    if "loss" in logs:
        row = {new: logs[old] for old, new in RENAMED.items() if old in logs}
        more = {
            name: value for name, value in logs.items() if name.startswith(("grad_norm_", "spread_")) or name == "scale"
        }
        return row | more
    if any(name.startswith("eval_") for name in logs):
        return {
            name: value for name, value in logs.items() if name.startswith("eval_") and not name.endswith("_second")
        }
    return None


def said(finding: Finding, step: int) -> dict[str, Any]:
    """The line for a finding that is said at a step."""
    return {
        "step": step,
        "of": "finding",
        **{name: value for name, value in finding.to_dict().items() if name != "step"},
        "began": finding.step,
    }


class Watch(TrainerCallback):
    """Records, looks, and says what is wrong while a training runs.

    Args:
        on_trouble: ``"say"``: a line for the user; ``"stop"``: also end the training when a finding of high severity says that it is lost
            (the loss exploded or is not finite); ``"ignore"``: nothing is said.
        tell: takes a line for the user; None: stderr.

    Attributes:
        rows: what was recorded, see `weft.diagnosis.record`.
        findings: what the rules find in it, worst first.

    Raises:
        RecipeError: an unknown ``on_trouble``.
    """

    answers: tuple[str, ...] = ("say", "stop", "ignore")

    def __init__(self, on_trouble: str = "say", *, tell: Callable[[str], None] | None = None) -> None:
        if on_trouble not in self.answers:
            raise RecipeError(
                f"on_trouble={on_trouble!r}: expected one of {', '.join(self.answers)}.{did_you_mean(str(on_trouble), self.answers)}"
            )
        self.on_trouble = on_trouble
        self.tell = say if tell is None else tell
        self.rows: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}
        self.tally = Tally()
        self.ended = False
        self.fed = False
        self.trainer: Any = None
        self.said: dict[str, str] = {}
        self.every = 0
        self._slots: Any = None
        self._before: Before | None = None
        self._zeros = False

    # what comes in

    @property
    def record(self) -> Record:
        """The numbers so far."""
        return Record(tuple(self.rows), self.facts, self.ended)

    @property
    def findings(self) -> list[Finding]:
        """What is wrong, worst first."""
        return examine(self.record)

    def take(self, row: dict[str, Any]) -> None:
        """A line of the log: keep it, and look."""
        self.rows.append(row)
        if row.get("of") in ("weights", "finding"):
            return
        self.look(every=row.get("of") == "sites" or any(name.startswith("eval_") for name in row))

    def put(self, row: dict[str, Any]) -> None:
        """A line that the watch made itself."""
        self.take(row)

    def numbers(self, tokens: int) -> dict[str, float]:
        """What was added up since the last line."""
        return self.tally.take(tokens)

    def look(self, every: bool = False) -> list[Finding]:
        """Look at the rules that may end a run, or at every one, and say what is new."""
        if self.on_trouble == "ignore":
            return []
        rules = RULES.values() if every else [rule for rule in RULES.values() if rule.acts]
        found = examine(self.record, rules)
        for item in found:
            if item.severity != "low" and self.said.get(item.rule) not in (item.severity, "high"):
                self.said[item.rule] = item.severity
                self.new(item)
        return found

    def new(self, finding: Finding) -> None:
        """Something was found that was not said yet."""
        self.rows.append(said(finding, self.record.step))
        self.tell(str(finding))

    # events of the trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """See what is there to be watched."""
        if not self.facts:
            self.facts = _facts(args, state)
        self.ended = False
        self.tally.clip = float(args.max_grad_norm or 0.0)
        self._zeros = bool(args.fp16) or self.facts.get("dtype") == "float16"
        self.every = max(1, math.ceil(state.max_steps / SITE_ROWS), CLOSEST, _interval(args, state))
        bank = None if not state.is_world_process_zero or _is_sharded(args) else bank_of(model)
        self._slots = lambda: trained_slots(bank)
        if not any(row.get("of") == "weights" for row in self.rows) and (norms := weight_norms(self._slots())):
            self.put({"step": 0, "of": "weights", "weights": norms})
        self.look(every=True)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the factors, at the steps whose sites are looked at."""
        step = state.global_step + 1
        if self._slots is not None and (step == 1 or step % self.every == 0 or step == state.max_steps):
            slots = self._slots()
            self._before = Before(slots, self._zeros) if slots else None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """What became of them."""
        skipped = bool(getattr(optimizer, "step_was_skipped", False))
        self.tally.skipped += skipped
        if self._before is None:
            return
        before, self._before = self._before, None
        found = {} if skipped else site_numbers(self._slots(), before)
        if found:
            self.put({"step": state.global_step + 1, "of": "sites", "sites": found})

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """A line, where nobody else gives them."""
        row = None if self.fed else logged(logs or {})
        if row is not None:
            more = self.numbers(int(state.num_input_tokens_seen)) if "loss" in row else {}
            self.take({"step": state.global_step, **row, **more})
            if self.on_trouble == "stop" and any(
                RULES[name].acts and worst == "high" for name, worst in self.said.items()
            ):
                control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last look."""
        self.ended = True
        self.look(every=True)

    # the checkpoint

    def save(self, folder: Path) -> None:
        """Write what was added up since the last line into the folder of a checkpoint."""
        (folder / WATCH).write_text(json.dumps(self.tally.state()) + "\n", encoding="utf-8")

    def restore(self, folder: Path) -> None:
        """The inverse; a checkpoint of an older version has nothing to give back."""
        path = folder / WATCH
        if path.is_file():
            self.tally.load(json.loads(path.read_text(encoding="utf-8")))


def _facts(args: Any, state: Any) -> dict[str, Any]:
    """What a stranger's trainer says of itself."""
    steps = int(state.max_steps)
    return {
        "steps": steps,
        "warmup_steps": int(args.get_warmup_steps(steps)),
        "learning_rate": float(args.learning_rate),
        "clip": float(args.max_grad_norm or 0.0),
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "precision": "fp16" if args.fp16 else "bf16" if args.bf16 else "no",
        "best": bool(args.load_best_model_at_end),
    }


def _interval(args: Any, state: Any) -> int:
    """Steps between two lines of the log."""
    every = args.logging_steps if args.logging_strategy == "steps" else 1
    return int(every if every >= 1 else math.ceil(every * state.max_steps))


def _is_sharded(args: Any) -> bool:
    return bool(getattr(args, "fsdp", None) or getattr(args, "deepspeed", None))
