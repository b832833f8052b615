"""The store under kills and crowds, at the size that tests have no time for: the same modules as in ``tests/unit/store``, more of it.

KILLS=400 PROCESSES=8 OPERATIONS=500 scripts/with_postgres.sh python -m benchmarks.results store
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["measure"]

HERE = Path(__file__).parents[2]
KILLS = int(os.environ.get("KILLS", "300"))
PROCESSES = int(os.environ.get("PROCESSES", "8"))
OPERATIONS = int(os.environ.get("OPERATIONS", "500"))


def measure(shared: Path, folder: Path) -> dict[str, Any]:
    """Kill writers, and let many write at once on each database that is here; raises if anything is lost."""
    with tempfile.TemporaryDirectory() as work:
        crash = _run("crash", work + "/crash", str(KILLS))
        crowd = {"SQLite": _run("load", work + "/sqlite", str(PROCESSES), str(OPERATIONS))}
        postgres = os.environ.get("WEFT_TEST_POSTGRES")
        if postgres:
            crowd["PostgreSQL"] = _run("load", work + "/postgres", str(PROCESSES), str(OPERATIONS), postgres)
    deaths = crash["deaths"]
    rows: list[list[Any]] = [
        [f"killed in {name}", count, crash["lines"][name], "nothing lost, nothing half-written"]
        for name, count in deaths.items()
    ]
    rows += [
        [f"{PROCESSES} processes on {name}", found["operations"], "", f"no lost update, no error; {found['seconds']:.0f} s, slowest operation {found['slowest']:.1f} s"]
        for name, found in crowd.items()
    ]  # fmt: skip
    return {
        "title": "The store: killed writers, and many at once",
        "settings": f"{sum(deaths.values())} writers were killed by SIGKILL, two of three before a line of the store's code drawn by chance, the others after a time drawn by "
        f"chance (seed {crash['seed']}); after each one all files were hashed, and what was acknowledged compared. Then processes that put, promote, roll back, tag, remove, "
        "collect and read under the same names at once, "
        + ("on both databases" if postgres else "on SQLite; there was no PostgreSQL server"),
        "columns": ["what", "kills or operations", "lines of code that it runs through", "found"],
        "rows": rows,
        "summary": f"{deaths}, {crowd}",
    }


def _run(module: str, *words: str) -> dict[str, Any]:
    """The last line of a module's output."""
    command = [sys.executable, "-m", f"tests.unit.store.{module}", *words]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{module} found a problem:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
