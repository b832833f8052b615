"""Training of many users: weft's mixed batch over peft training them one after another, in one process, interleaved.

One step of everybody is forward, backward, clipping and AdamW for each user. Peft's users take turns on one wrapped model, which
costs it nothing: it never switches adapters.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import measures, subjects
from benchmarks.subjects import Setting

__all__ = ["cotrain", "peft_steps", "step_memory", "users_curve", "weft_step"]

RATE = 1e-4
Row = dict[str, Any]


def cotrain(rounds: int, users: int, bar: float, **values: Any) -> Row:
    """Tokens a second of all users over peft's: the median of ratios."""
    setting = Setting(**values)
    torch.manual_seed(0)
    base = subjects.frozen_base(setting)
    steps = {"weft": weft_step(base, setting, users), "peft": peft_steps(base, setting, users)}
    times = measures.interleaved(steps, rounds, setting.device)
    found = measures.ratios(times, "peft", "weft")
    tokens = users * setting.rows * setting.length
    return {
        "row": f"{users} users × {setting}: tokens/s over peft, one user after another",
        "bar": bar, "weft": statistics.median(found), "peft": 1.0, "more_is_better": True,
        "spread": {"weft": [min(found), max(found)]},
        "tokens_per_second": {name: round(tokens / statistics.median(seconds)) for name, seconds in times.items()},
        "setting": asdict(setting) | {"users": users},
    }  # fmt: skip


def users_curve(rounds: int, total: int = 512, **values: Any) -> Row:
    """Tokens a second against the number of users, with as many tokens a step for all numbers."""
    found = {}
    for users in (1, 2, 4, 8, 16, 32, 64):
        setting = Setting(rows=1, length=total // users, **values)
        base = subjects.frozen_base(setting)
        steps = {"weft": weft_step(base, setting, users), "peft": peft_steps(base, setting, users)}
        times = measures.interleaved(steps, rounds, setting.device)
        found[users] = {name: round(total / statistics.median(seconds)) for name, seconds in times.items()}
    return {"row": f"tokens/s against users, {total} tokens a step", "tokens_per_second": found}


def step_memory(rounds: int, users: int = 8, **values: Any) -> Row:
    """Most bytes that one step of everybody holds, beyond factors and moments, by number of users."""
    found = {}
    for count in (1, users, 4 * users):
        setting = Setting(**values)
        base = subjects.frozen_base(setting)
        steps = {"weft": weft_step(base, setting, count), "peft": peft_steps(base, setting, count)}
        found[count] = {
            name: round(measures.peak_bytes(step, setting.device) / 2**20, 1) for name, step in steps.items()
        }
    return {"row": "MiB of a step by users", "mebibytes": found}


def weft_step(base: torch.nn.Module, setting: Setting, users: int) -> Callable[[], None]:
    """One optimizer step of all users, as `weft.train_many` does it."""
    import weft
    from weft.core.bank import attach
    from weft.many.engine import Move, Settings
    from weft.many.pieces import Piece
    from weft.many.together import Together
    from weft.many.training import BUDGET

    model = copy.deepcopy(base)
    bank = attach(model, {})
    budget = BUDGET["cuda" if setting.device.startswith("cuda") else "cpu"]
    engine = Together(model, bank, _NoTokenizer(), Settings(budget))
    spec = weft.LoraSpec(rank=setting.rank, targets=subjects.SUFFIXES, dropout=setting.dropout)
    names = [f"user{number}" for number in range(users)]
    for number, name in enumerate(names):
        engine.enter(name, spec, number)
    pieces = [_piece(Piece, name, setting) for name in names]
    done = [0]

    def run() -> None:
        engine.train(pieces)
        engine.step([Move(name, RATE, 1.0, 0.01, None, done[0]) for name in names])
        done[0] += 1

    return run


def peft_steps(base: torch.nn.Module, setting: Setting, users: int) -> Callable[[], None]:
    """As many steps of one adapter by peft."""
    model = subjects.with_peft(base, setting)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01)
    batches = [subjects.batch(setting) for _ in range(users)]

    def run() -> None:
        for ids in batches:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return run


def _piece(kind: Any, name: str, setting: Setting) -> Any:
    rows = subjects.batch(setting).cpu().numpy()
    features = [{"input_ids": row, "labels": row} for row in rows]
    return kind(name, features, 1 / (setting.rows * (setting.length - 1)), tuple(range(setting.rows)))


class _NoTokenizer:
    """All rows have one length: nothing is padded."""

    pad_token_id = eos_token_id = unk_token_id = 0
