"""What is known of a run before its first step, as plain data: for environment.json (``"facts"``), and for the rules of `weft.diagnosis`.

    {"steps", "steps_per_epoch", "warmup_steps", "learning_rate", "log_every", "eval_every", "schedule", "clip", "optimizer", "precision",
     "dtype", "batching", "batch_size", "accumulation", "workers", "best", "metric", "kind", "mask_prompt", "rank", "trained", "adaptive",
     "data": {"train": {"examples", "kept", "features", "tokens", "loss_tokens", "truncated", "prompt_cut", "completion_cut", "split",
                        "empty", "masked", "copies", "answers", "most_common": {"share", "what", "text"}},
              "eval": {…, "shared", "asked"}}}

``copies``: rows that another row repeats; ``answers``: different ones among them; ``most_common``: the answer (or label) that stands there
most often, with its share; ``shared`` and ``asked``: evaluation rows that are in the training data, whole or with their question.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from weft.data import Examples, overlap
from weft.train.recipe import Recipe
from weft.train.schedule import Schedule

__all__ = ["facts_for"]

TALLIES = ("truncated", "prompt_cut", "completion_cut", "split", "empty", "masked", "broken")
SHOWN = 60


def facts_for(recipe: Recipe, schedule: Schedule, texts: Any, inputs: Any, trained: int, dtype: str) -> dict[str, Any]:
    """Everything that the module's text lists.

    Args:
        texts: the examples as they were read, with ``train`` and ``evaluated``. inputs: what they became.
        trained: how many numbers are trained. dtype: of the base's weights.
    """
    spec = recipe.spec
    found: dict[str, Any] = {
        "steps": schedule.steps,
        "steps_per_epoch": schedule.steps_per_epoch,
        "warmup_steps": schedule.warmup_steps,
        "learning_rate": schedule.learning_rate,
        "log_every": schedule.log_every,
        "eval_every": schedule.eval_every,
        "schedule": recipe.schedule,
        "clip": recipe.clip,
        "optimizer": recipe.optimizer,
        "precision": schedule.precision,
        "dtype": dtype,
        "batching": recipe.batching,
        "batch_size": recipe.batch_size,
        "accumulation": recipe.accumulation,
        "workers": recipe.workers,
        "best": schedule.best,
        "metric": schedule.metric,
        "kind": inputs.train.kind,
        "mask_prompt": recipe.mask_prompt,
        "rank": None if spec is None else spec.rank,
        "trained": trained,
        "adaptive": recipe.adaptive is not None,
    }
    train, evaluated = getattr(texts, "train", None), getattr(texts, "evaluated", None)
    parts = {role: dict(part.get("account") or {}) for role, part in inputs.data.items()}
    data = {role: _counts(account) for role, account in parts.items()}
    for role, examples in (("train", train), ("eval", evaluated)):
        if isinstance(examples, Examples):
            data.setdefault(role, {}).update(_rows(examples))
    if isinstance(train, Examples) and isinstance(evaluated, Examples):
        shared = overlap(train, evaluated)
        data["eval"] |= {"shared": shared.rows, "asked": shared.prompts}
    return found | {"data": data}


def _counts(account: dict[str, Any]) -> dict[str, int]:
    plain = {
        name: int(account[name])
        for name in ("examples", "kept", "features", "tokens", "loss_tokens")
        if name in account
    }
    return plain | {name: int(account[name]["count"]) for name in TALLIES if name in account}


def _rows(examples: Examples) -> dict[str, Any]:
    """Copies among the rows, and the answer that is given most often."""
    keys = Counter(examples._keys)
    found: dict[str, Any] = {"examples": len(examples), "copies": len(examples) - len(keys)}
    answers = Counter(text for row in examples.rows if (text := _answer(examples.kind, row)) is not None)
    if answers:
        text, count = answers.most_common(1)[0]
        what = "label" if "label" in examples.rows[0] else "answer"
        found |= {
            "answers": len(answers),
            "most_common": {"share": count / sum(answers.values()), "what": what, "text": text[:SHOWN]},
        }
    return found


def _answer(kind: str, row: Any) -> str | None:
    """What a row teaches to answer; None where it teaches a text."""
    if "label" in row:
        return str(row["label"])
    if "completion" in row:
        return str(row["completion"])
    if "messages" in row:
        said = [message for message in row["messages"] if message.get("role") == "assistant"]
        return str(said[-1].get("content") or "") if said else None
    return None
