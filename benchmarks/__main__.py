"""`make bench`: measure every row, each in a process of its own, and write docs/benchmarks.md.

python -m benchmarks                     all rows
python -m benchmarks --only step         rows of one kind (or of any word in their arguments); the page keeps the others as they were
python -m benchmarks --rounds 9          more rounds

Each row is kept in docs/benchmarks.json as soon as it is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent.parent
STEADY = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "HF_HUB_OFFLINE": "1",
}
"""One thread, and an allocator that keeps its pages: otherwise page faults are measured, not products."""


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name or arguments contain this")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=HERE / "docs" / "benchmarks.md")
    parser.add_argument("--row", nargs=2, metavar=("NAME", "ARGUMENTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        _measure(options.row[0], json.loads(options.row[1]), options.rounds)
        return
    import torch

    from benchmarks.report import keep, write
    from benchmarks.rows import rows_for

    known = rows_for(torch.cuda.is_available())
    wanted = [row for row in known if options.only in json.dumps(row)]
    if not wanted:
        raise SystemExit(f"no row contains {options.only!r}; kinds: {', '.join(sorted({name for name, _ in known}))}")
    for number, (name, arguments) in enumerate(wanted, 1):
        result = _in_own_process(name, arguments, options.rounds)
        keep(options.out.with_suffix(".json"), name, arguments, result)
        write(options.out, known)
        met = "met" if result["weft"] <= result["bar"] else "NOT met"
        print(f"[{number}/{len(wanted)}] {result['row']}: weft {result['weft']:.4g}, peft {result['peft']:.4g}, "
              f"bar {result['bar']} {met}", flush=True)  # fmt: skip
    print(f"written: {options.out}")


def _in_own_process(name: str, arguments: dict[str, Any], rounds: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks", "--rounds", str(rounds), "--row", name, json.dumps(arguments)]
    done = subprocess.run(command, cwd=HERE, env={**os.environ, **STEADY}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} {arguments} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _measure(name: str, arguments: dict[str, Any], rounds: int) -> None:
    import torch

    from benchmarks.rows import ROWS, versions

    torch.set_num_threads(1)
    result = ROWS[name](rounds, **arguments)
    print(json.dumps({**result, "versions": versions()}))


if __name__ == "__main__":
    main()
