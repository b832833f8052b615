"""Writers are killed, and what they leave is looked at: ``python -m tests.unit.store.crash FOLDER KILLS [SEED]``.

Each writer is a process of its own that kills itself, by SIGKILL, before a line of the store's code that was drawn by chance;
every third is killed from outside, after a time drawn by chance. It says what it is about to do and what was acknowledged.
After each death another process opens the store: all files are hashed, what was acknowledged has to be there, what was not
may be there whole or not at all.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tests.unit.store.support import as_of_first_migration, make_adapter
from weft.errors import WeftError
from weft.store import Store

SCENARIOS = ("put", "promote", "gc", "migrate", "create", "all")
_TRACED = (
    "/weft/store/",
    "/weft/formats/folders.py",
    "/weft/formats/peft.py",
    "/alembic/operations/",
    "/alembic/runtime/",
    "/sqlalchemy/engine/base.py",
)


@dataclass
class Known:
    """What has to be true of the store, by what its writers said."""

    versions: dict[str, str] = field(default_factory=dict)  # digest by reference, acknowledged
    aliases: dict[str, str] = field(default_factory=dict)  # reference by alias, acknowledged
    open: list[Any] | None = None  # what the last writer was about to do
    lines: dict[str, int] = field(default_factory=dict)  # that a scenario runs through when nobody dies
    deaths: dict[str, int] = field(default_factory=dict)
    survived: int = 0


def work(scenario: str, folder: Path, seed: int, say: Callable[..., None]) -> None:
    """What a writer does."""
    if scenario == "create":
        shutil.rmtree(folder.parent / "fresh", ignore_errors=True)
        Store(folder.parent / "fresh").find()
        return
    store = Store(folder)
    if scenario == "migrate":
        return
    draw = random.Random(seed)
    for step in range({"put": 1, "promote": 2, "gc": 3, "all": 8}[scenario]):
        kind = scenario if scenario != "all" else draw.choice(("put", "put", "promote", "rollback", "gc", "remove"))
        name = draw.choice(("a", "b"))
        if kind == "gc" and step < 2:  # something to collect
            kind = ("put", "remove")[step]
        if kind == "put":
            adapter = make_adapter(draw.randrange(40), evaluation={"eval_loss": draw.random()})
            say("try", "put", name, adapter.digest)
            version = store.put(adapter, name)
            say("ack", "put", str(version), adapter.digest)
        elif kind == "promote":
            version = draw.choice(store.versions(name))
            say("try", "promote", name, str(version))
            store.promote(version, "prod", require="eval_loss<=1")
            say("ack", "promote", name, str(version))
        elif kind == "rollback":
            moves = [move for move in store.moves(name) if move.kind == "promote" and not move.undone]
            if (
                moves
                and moves[0].before
                and f"{name}@{moves[0].before}" in {str(version) for version in store.versions(name)}
            ):
                say("try", "promote", name, f"{name}@{moves[0].before}")
                store.rollback(name, "prod")
                say("ack", "promote", name, f"{name}@{moves[0].before}")
        elif kind == "remove":
            free = [version for version in store.versions(name) if not version.aliases]
            if len(free) > 1:
                victim = draw.choice(free)
                say("try", "remove", str(victim))
                store.remove(victim)
                say("ack", "remove", str(victim))
        else:
            say("try", "gc")
            store.gc(grace=0)
            say("ack", "gc")


def die_at_line(count: int, at: int | None) -> Callable[[], int]:
    """Count lines of the store's code, and die before one of them; gives the counter."""
    seen = count

    def local(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        if event == "line":
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)
        return local

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        return local if any(part in frame.f_code.co_filename for part in _TRACED) else None

    sys.settrace(enter)
    return lambda: seen


def writer(scenario: str, folder: Path, seed: int, at: int | None) -> tuple[int, list[list[Any]], int]:
    """Fork a writer; gives its status, what it said, and the lines that it ran through."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)

        def say(*words: Any) -> None:
            os.write(writing, (json.dumps(words) + "\n").encode())

        status = 1
        try:
            lines = die_at_line(0, at) if at is None or at >= 0 else lambda: 0
            work(scenario, folder, seed, say)
            sys.settrace(None)
            say("end", lines())
            status = 0
        except BaseException as problem:  # noqa: BLE001 - whatever it is, the parent has to hear of it
            say("problem", f"{type(problem).__name__}: {problem}")
        finally:
            os._exit(status)
    os.close(writing)
    if at is not None and at < 0:  # from outside
        time.sleep(-at / 1e6)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reading) as pipe:
        said = [json.loads(line) for line in pipe.read().splitlines()]
    _, status = os.waitpid(child, 0)
    end = next((words[1] for words in said if words[0] == "end"), 0)
    return status, said, end


def learn(known: Known, said: list[list[Any]]) -> None:
    """What a writer's words mean for the store."""
    known.open = None
    for words in said:
        if words[0] == "problem":
            raise AssertionError(words[1])
        if words[0] == "try":
            known.open = words[1:]
        elif words[0] == "ack":
            known.open = None
            if words[1] == "put":
                assert known.versions.setdefault(words[2], words[3]) == words[3], f"{words[2]} was given twice"
            elif words[1] == "promote":
                known.aliases[words[2]] = words[3]
            elif words[1] == "remove":
                del known.versions[words[2]]


def look(known: Known, folder: Path) -> None:
    """Open the store as the next one would, and compare."""
    store = Store(folder)
    try:
        found = store.verify()
        assert found.ok, found.problems
        there = {str(version): version for version in store.find(all_versions=True, limit=1 << 20)}
        pending = known.open or [""]
        for ref, digest in list(known.versions.items()):
            if ref not in there and pending[:2] == ["remove", ref]:
                del known.versions[ref]
                continue
            assert ref in there, f"{ref} was acknowledged and is lost"
            assert there[ref].digest == digest
        for ref, version in there.items():
            if ref not in known.versions:
                assert pending == ["put", version.name, version.digest], f"{ref} is there, and nobody put it"
                known.versions[ref] = version.digest
        for ref in random.sample(sorted(there), min(3, len(there))):
            assert store.get(ref).digest == there[ref].digest
        for name in {version.name for version in there.values()}:
            pointing = [
                str(version) for version in there.values() if version.name == name and "prod" in version.aliases
            ]
            wanted = [known.aliases[name]] if name in known.aliases else []
            if pointing != wanted:
                assert pending == ["promote", name, *pointing], f"{name}@prod is {pointing}, acknowledged was {wanted}"
                known.aliases[name] = pointing[0]
    finally:
        store.close()


def run(folder: Path, kills: int, seed: int) -> Known:
    """Kill writers until so many died."""
    draw, known = random.Random(seed), Known()
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / "store"
    for number in range(4):
        _, said, _ = writer("put", place, number, None)
        learn(known, said)
    for scenario in SCENARIOS:
        if scenario == "migrate":
            as_of_first_migration(place / "index.sqlite")
        status, said, lines = writer(scenario, place, draw.randrange(1 << 30), None)
        assert status == 0, said
        learn(known, said)
        look(known, place)
        known.lines[scenario] = lines
    round_ = 0
    while sum(known.deaths.values()) < kills:
        scenario = SCENARIOS[round_ % len(SCENARIOS)]
        round_ += 1
        if scenario == "migrate":
            as_of_first_migration(place / "index.sqlite")
        at = draw.randint(1, known.lines[scenario]) if round_ % 3 else -draw.randint(1, 60_000)
        status, said, _ = writer(scenario, place, draw.randrange(1 << 30), at)
        learn(known, said)
        if os.WIFSIGNALED(status):
            known.deaths[scenario] = known.deaths.get(scenario, 0) + 1
        else:
            known.survived += 1
        if scenario == "create":
            Store(folder / "fresh").close()
        look(known, place)
    store = Store(place)
    for path in (place / "tmp").iterdir():
        os.utime(path, (0, 0))
    store.gc(grace=0)
    left = [path.name for path in (place / "tmp").iterdir()]
    found = store.verify()
    assert (found.problems, found.leftovers, left) == ((), 0, [])
    assert {str(version) for version in store.find(all_versions=True, limit=1 << 20)} == set(known.versions)
    for ref, digest in known.versions.items():
        assert store.get(ref).digest == digest
    store.close()
    return known


if __name__ == "__main__":
    started = time.monotonic()
    seed_ = int(sys.argv[3]) if len(sys.argv) > 3 else random.SystemRandom().randrange(1 << 30)
    try:
        outcome = run(Path(sys.argv[1]), int(sys.argv[2]), seed_)
    except (AssertionError, WeftError) as problem:
        print(f"seed {seed_}: {type(problem).__name__}: {problem}")
        raise
    print(json.dumps({"seed": seed_, "deaths": outcome.deaths, "survived": outcome.survived, "lines": outcome.lines, "versions": len(outcome.versions),
                      "seconds": round(time.monotonic() - started, 1)}))  # fmt: skip
