"""Training of many users: weft's mixed batch over peft training them one after another, in one process, interleaved.

One step of everybody is forward, backward, clipping and AdamW for each user. Peft's users take turns on one wrapped model, which
costs it nothing: it never switches adapters.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import measures, subjects
from benchmarks.subjects import Setting

__all__ = ["ROWS", "cotrain", "curve", "frozen_step", "peft_steps", "rows", "weft_step"]

RATE = 1e-4
COUNTS = (1, 2, 4, 8, 16, 32, 64)
Row = dict[str, Any]


def cotrain(rounds: int, users: int, times: float, **values: Any) -> Row:
    """Time of a step of all users over peft's, one user after another; the bar is one over how many times faster."""
    setting = Setting(**values)
    torch.manual_seed(0)
    base = subjects.frozen_base(setting)
    moved: dict[str, list[float]] = {"weft": [], "peft": []}
    steps = {
        "weft": weft_step(base, setting, users, moved["weft"]), "peft": peft_steps(base, setting, users, moved["peft"]),
        "base": frozen_step(base, setting, users),
    }  # fmt: skip
    seconds = measures.interleaved(steps, rounds, setting.device)
    parts = {"base": statistics.median(seconds["base"])}
    for name, values in moved.items():
        parts[f"{name}'s optimizer"] = statistics.median(values[-len(seconds[name]) :])
        parts[f"{name}'s passes"] = statistics.median(seconds[name]) - parts[f"{name}'s optimizer"]
    found = measures.ratios(seconds, "weft", "peft")
    limit = statistics.median(measures.ratios(seconds, "base", "peft"))
    optimized = limit + parts["weft's optimizer"] / statistics.median(seconds["peft"])
    ratio = statistics.median(found)
    tokens = users * setting.rows * setting.length
    return {
        "row": (
            f"training {users} users × {setting}, over peft one after another: {1 / ratio:.2f} × its tokens/s, must {times:g} × "
            f"(the frozen base alone: {1 / limit:.2f} ×; with the optimizer: {1 / optimized:.2f} ×)"
        ),
        "bar": 1 / times, "weft": ratio, "peft": 1.0, "spread": {"weft": [min(found), max(found)]},
        "milliseconds": {name: round(1000 * value, 1) for name, value in parts.items()},
        "tokens_per_second": {name: round(tokens / statistics.median(item)) for name, item in seconds.items()},
        "setting": asdict(setting) | {"users": users},
    }  # fmt: skip


def curve(rounds: int, total: int = 512, counts: tuple[int, ...] = COUNTS, **values: Any) -> dict[int, dict[str, Any]]:
    """By number of users, with as many tokens a step for all: tokens a second, and MiB that a step holds at most."""
    found: dict[int, dict[str, Any]] = {}
    for users in counts:
        setting = Setting(rows=1, length=total // users, **values)
        torch.manual_seed(0)
        base = subjects.frozen_base(setting)
        steps = {"weft": weft_step(base, setting, users), "peft": peft_steps(base, setting, users)}
        seconds = measures.interleaved(steps, rounds, setting.device)
        found[users] = {
            "tokens_per_second": {name: total / statistics.median(item) for name, item in seconds.items()},
            "mebibytes": {name: measures.peak_bytes(step, setting.device) / 2**20 for name, step in steps.items()},
        }
    return found


def frozen_step(base: torch.nn.Module, setting: Setting, users: int) -> Callable[[], None]:
    """The limit: the frozen base's forward, and a backward to its embeddings, over everybody's rows at once (as many as weft puts in one forward)."""
    from weft.many.training import settings_for

    model = subjects.base_with_activation_gradients(base)
    rows = max(setting.rows, min(users * setting.rows, settings_for(model).budget // setting.length))
    batches = [
        torch.randint(0, 1024, (rows, setting.length), device=setting.device)
        for _ in range(-(-users * setting.rows // rows))
    ]

    def run() -> None:
        for ids in batches:
            model(input_ids=ids, labels=ids).loss.backward()

    return run


def weft_step(
    base: torch.nn.Module, setting: Setting, users: int, moved: list[float] | None = None
) -> Callable[[], None]:
    """One optimizer step of all users, as `weft.train_many` does it.

    Args:
        moved: takes the seconds that clipping and AdamW took of each step.
    """
    import weft
    from weft.core.bank import attach
    from weft.many.engine import Move
    from weft.many.pieces import Piece
    from weft.many.together import Together
    from weft.many.training import settings_for

    model = copy.deepcopy(base)
    bank = attach(model, {})
    engine = Together(model, bank, _NoTokenizer(), settings_for(model))
    spec = weft.LoraSpec(rank=setting.rank, targets=subjects.SUFFIXES, dropout=setting.dropout)
    names = [f"user{number}" for number in range(users)]
    for number, name in enumerate(names):
        engine.enter(name, spec, number)
    pieces = [_piece(Piece, name, setting) for name in names]
    done = [0]

    def run() -> None:
        engine.train(pieces)
        start = time.process_time()
        engine.step([Move(name, RATE, 1.0, 0.01, None, done[0]) for name in names])
        done[0] += 1
        if moved is not None:
            moved.append(time.process_time() - start)

    return run


def peft_steps(
    base: torch.nn.Module, setting: Setting, users: int, moved: list[float] | None = None
) -> Callable[[], None]:
    """As many steps of one adapter by peft; ``moved`` as in `weft_step`, of all users together."""
    model = subjects.with_peft(base, setting)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01)
    batches = [subjects.batch(setting) for _ in range(users)]

    def run() -> None:
        spent = 0.0
        for ids in batches:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
            start = time.process_time()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            spent += time.process_time() - start
        if moved is not None:
            moved.append(spent)

    return run


def _piece(kind: Any, name: str, setting: Setting) -> Any:
    rows = subjects.batch(setting).cpu().numpy()
    features = [{"input_ids": row, "labels": row} for row in rows]
    return kind(name, features, 1 / (setting.rows * (setting.length - 1)), tuple(range(setting.rows)))


class _NoTokenizer:
    """All rows have one length: nothing is padded."""

    pad_token_id = eos_token_id = unk_token_id = 0


ROWS: dict[str, Callable[..., Row]] = {"cotrain": cotrain}


def rows() -> list[tuple[str, dict[str, Any]]]:
    """The rows of `make bench`."""
    model = {"layers": 8, "width": 512, "dtype": "float32", "users": 8}
    shapes = ((1, 16, 2.5), (1, 64, 1.8), (4, 256, 1.1))
    return [("cotrain", {**model, "rows": count, "length": length, "times": times}) for count, length, times in shapes]
