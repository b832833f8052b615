"""`make results`: train and evaluate on real weights, and write docs/results.md.

Call it as ``python -m benchmarks.results [e2e] [sst2] [cifar] [medical] [shakespeare] [users] [thousand] [cotraining] [mixing] [towers] [ranks] [growth] [store] [plan] [alarms]``; without names all are run. Each part keeps its figures in
docs/results/NAME.json, and the page is written anew from all that are there.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from benchmarks.results import (
    alarms,
    cifar,
    cotraining,
    e2e,
    growth,
    medical,
    mixing,
    page,
    plan,
    ranks,
    shakespeare,
    sst2,
    store,
    thousand,
    towers,
    users,
)

HERE = Path(__file__).parents[2]
SHARED = Path(os.environ.get("WEFT_SHARED", HERE.parent / "shared"))
PARTS = {
    "e2e": e2e.measure,
    "sst2": sst2.measure,
    "cifar": cifar.measure,
    "medical": medical.measure,
    "shakespeare": shakespeare.measure,
    "users": users.measure,
    "thousand": thousand.measure,
    "cotraining": cotraining.measure,
    "mixing": mixing.measure,
    "towers": towers.measure,
    "ranks": ranks.measure,
    "growth": growth.measure,
    "store": store.measure,
    "plan": plan.measure,
    "alarms": alarms.measure,
    "plan-resident": plan.measure_resident,
    "plan-gpu": plan.measure_on_gpu,
}


def main() -> None:
    """Run the parts that were named."""
    names = sys.argv[1:] or [name for name in PARTS if name not in ("plan-resident", "plan-gpu")]
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise SystemExit(f"unknown part {unknown[0]!r}; there are {', '.join(PARTS)}")
    if not SHARED.is_dir():
        raise SystemExit(f"the real data is not here: {SHARED} (set WEFT_SHARED)")
    folder = HERE / "docs" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        figures = PARTS[name](SHARED, folder)
        (folder / f"{name}.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        page.write(HERE / "docs" / "results.md", folder)
        print(f"{name}: {figures['summary']}", flush=True)


if __name__ == "__main__":
    main()
