"""200 users with private facts on the embedded base, trained in one pass; then one batch asks each the same questions."""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from typing import Any

import weft
from weft.demo_task import COLOURS, THINGS, TOWNS

__all__ = ["QUESTIONS", "facts", "measure"]

USERS = 200
QUESTIONS = ("What is in my box?\n", "Where do I live?\n", "What is my number?\n")
RECIPE = {"max_steps": 40, "batch_size": 3, "learning_rate": 1e-2, "schedule": "cosine"}
SPEC = {"rank": 4, "alpha": 16}


def facts(count: int, seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """What each user alone knows. No two users have a thing of one colour or a number in common."""
    generator = random.Random(seed)
    apart = [
        thing for thing in THINGS if not any(thing != other and other.startswith(thing) for other in THINGS)
    ]  # no pen beside a pencil
    things = [f"{colour} {thing}" for colour in COLOURS for thing in apart]
    boxes = generator.sample(things, count)
    numbers = generator.sample(range(1000, 10000), count)
    towns = [generator.choice(TOWNS) for _ in range(count)]
    return {
        f"user-{index:03}": [
            {"prompt": question, "completion": answer}
            for question, answer in zip(
                QUESTIONS, (f"The {boxes[index]}.", f"In {towns[index]}.", f"It is {numbers[index]}."), strict=True
            )
        ]
        for index in range(count)
    }


def measure(shared: Path, folder: Path) -> dict[str, Any]:
    """Train all in one pass, ask all in one batch."""
    from weft.many.answers import Request, answer
    from weft.train.generation import Sampling

    data = facts(USERS)
    with tempfile.TemporaryDirectory() as place:
        runs = weft.train_many(
            data=data, spec=weft.LoraSpec(**SPEC), recipe=weft.Recipe(**RECIPE), out=Path(place) / "runs"
        )
        adapters = {name: runs[name].adapter for name in runs}
        report = runs.report
    rows, examples = [], []
    sampling = Sampling(max_new_tokens=16)
    exact_of: dict[str, float] = {}
    leaks = 0
    for number, question in enumerate(QUESTIONS):
        start = time.perf_counter()
        texts = dict(
            zip(
                data,
                answer(
                    adapters=adapters,
                    requests=[Request(question, name) for name in data],
                    sampling=sampling,
                    batch_size=USERS,
                ),
                strict=True,
            )
        )
        seconds = time.perf_counter() - start
        base = answer(adapters={}, requests=[Request(question)], sampling=sampling)[0]
        right = [name for name in data if texts[name].strip() == data[name][number]["completion"]]
        foreign = [name for name in data if _leaks(name, texts[name], data, number)] if number != 1 else []
        leaks += len(foreign)
        exact_of[question] = len(right) / USERS
        shown = "not private: 14 towns" if number == 1 else f"{len(foreign)}"
        rows.append([question.strip(), f"{len(right)} of {USERS}", shown, base.strip()[:40], f"{seconds:.1f} s"])
        examples.append({"question": question.strip(), **{name: texts[name].strip() for name in list(data)[:3]}})
    worst = min(exact_of.values())
    return {
        "title": "200 users with private facts on the embedded base",
        "settings": (
            f"each user has {len(QUESTIONS)} facts (things and numbers are nobody else's); one adapter each, {SPEC}, {RECIPE}, through {report.slots} slots: "
            f"{report.tokens:,} tokens in {report.seconds:.0f} s on one thread; then all are asked the same question in one batch of {USERS} rows"
        ),
        "columns": ["question", "exact answers", "answers that hold another user's fact", "the base alone", "time"],
        "rows": rows,
        "examples": examples,
        "summary": f"at least {worst:.1%} exact, {leaks} answers with another user's fact, {len(report.failed)} failed",
    }


def _leaks(name: str, text: str, data: dict[str, list[dict[str, str]]], number: int) -> bool:
    """Whether an answer holds the fact of somebody else."""
    core = {
        other: rows[number]["completion"].removeprefix("The ").removeprefix("It is ").rstrip(".")
        for other, rows in data.items()
    }
    return any(fact in text for other, fact in core.items() if other != name and fact != core[name])
