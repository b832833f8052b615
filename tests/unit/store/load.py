"""Many processes write at once: ``python -m tests.unit.store.load FOLDER PROCESSES OPERATIONS [INDEX]``.

They put, promote, tag, remove, collect and read under the same few names, adapters of one process being those of another. At the
end every version that was acknowledged and not removed is there, numbers were given once, every move of an alias is in the
history, every tag has the value that its one writer gave it last, and all files are what they were.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.unit.store.support import make_adapter
from weft.errors import NotInStoreError, RequirementError, StoreError
from weft.store import Store

NAMES = ("alpha", "beta", "gamma")


def work(number: int, folder: Path, index: str | None, operations: int) -> dict[str, Any]:
    """One process; gives what was acknowledged."""
    store, draw = Store(folder, index=index), random.Random(number)
    done: dict[str, Any] = {"put": {}, "removed": [], "moves": 0, "tag": None, "refused": Counter(), "slowest": 0.0}
    for step in range(operations):
        name = draw.choice(NAMES)
        kind = draw.choices(
            ("put", "promote", "rollback", "tag", "remove", "gc", "get", "find"), (30, 15, 5, 15, 8, 2, 15, 10)
        )[0]
        begin = time.perf_counter()
        try:
            if kind == "put":
                version = store.put(make_adapter(draw.randrange(60), evaluation={"eval_loss": draw.random()}), name)
                if version.is_new:
                    assert done["put"].setdefault(str(version), version.digest) == version.digest
            elif kind == "promote":
                move = store.promote(draw.choice(store.versions(name)), "prod", require="eval_loss<=1")
                done["moves"] += move.before != move.after
            elif kind == "rollback":
                store.rollback(name, "prod")
                done["moves"] += 1
            elif kind == "tag":
                store.tag("counter@1", {f"p{number}": str(step)})
                done["tag"] = str(step)
            elif kind == "remove":
                done["removed"] += [str(item) for item in store.remove(draw.choice(store.versions(name)))]
            elif kind == "gc":
                store.gc(grace=draw.choice((0.0, 0.5)))
            elif kind == "get":
                wanted = draw.choice(store.versions(name))
                assert store.get(wanted).digest == wanted.digest
            else:
                store.find(where="eval_loss<0.5", all_versions=True)
        except (
            NotInStoreError,
            RequirementError,
        ) as problem:  # removed by another process meanwhile, or nothing to roll back to
            done["refused"][type(problem).__name__] += 1
        except StoreError as problem:
            if "points to it" not in str(problem):
                raise
            done["refused"]["in use"] += 1
        done["slowest"] = max(done["slowest"], time.perf_counter() - begin)
    store.close()
    return done


def run(folder: Path, processes: int, operations: int, index: str | None) -> dict[str, Any]:
    """All processes, and what has to be true afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    store = Store(folder / "store", index=index)
    store.put(make_adapter(1), "counter")
    for name in NAMES:
        store.put(make_adapter(2, evaluation={"eval_loss": 0.5}), name)
    first = {f"{name}@1": store.version(name).digest for name in NAMES}
    store.close()
    started = time.monotonic()
    children = []
    for number in range(processes):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                outcome = work(number, folder / "store", index, operations)
                (folder / f"{number}.json").write_text(json.dumps(outcome))
                status = 0
            finally:
                if status:
                    import traceback

                    traceback.print_exc()
                os._exit(status)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    seconds = time.monotonic() - started
    assert statuses == [0] * processes, statuses
    said = [json.loads((folder / f"{number}.json").read_text()) for number in range(processes)]
    store = Store(folder / "store", index=index)
    versions = dict(first)
    for item in said:
        assert not set(versions) & set(item["put"]), "a number was given twice"
        versions |= item["put"]
    removed = [ref for item in said for ref in item["removed"]]
    assert len(removed) == len(set(removed)), "a version was removed twice"
    there = {
        str(version): version.digest
        for version in store.find(all_versions=True, limit=1 << 20)
        if version.name != "counter"
    }
    assert there == {ref: digest for ref, digest in versions.items() if ref not in removed}
    for name in NAMES:
        numbers = sorted(int(ref.partition("@")[2]) for ref in versions if ref.startswith(f"{name}@"))
        assert numbers == list(range(1, len(numbers) + 1)), "numbers have a gap"
    assert sum(len(store.moves(name)) for name in NAMES) == sum(item["moves"] for item in said), "a move was lost"
    tags = {f"p{number}": item["tag"] for number, item in enumerate(said) if item["tag"] is not None}
    assert dict(store.version("counter").tags) == tags
    found = store.verify()
    assert found.ok, found.problems
    store.gc(grace=0)
    for ref, digest in there.items():
        assert store.get(ref).digest == digest
    assert not store.verify().leftovers
    store.close()
    refused = sum((Counter(item["refused"]) for item in said), Counter())
    return {"processes": processes, "operations": processes * operations, "seconds": round(seconds, 1), "versions": len(there), "refused": dict(refused),
            "slowest": round(max(item["slowest"] for item in said), 2)}  # fmt: skip


if __name__ == "__main__":
    print(
        json.dumps(
            run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else None)
        )
    )
