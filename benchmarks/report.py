"""docs/benchmarks.md from measured rows: written by the command, never by hand."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

__all__ = ["keep", "write"]

_HEAD = """# Benchmarks

Written by `make bench`; do not edit. Ratios, medians over rounds: absolute times of shared machines mean little. Below 1 is better than
what it is compared with; "bar" is what weft sets itself.

- **training step**: time of forward and backward over the frozen base with activation gradients, which is the limit for any adapter.
  All-linear, rank 16. *FLOPs* is the same ratio counted in multiplications: no implementation that computes LoRA's gradients without
  touching the base gets below it, except by saving elsewhere what the frozen base spends.
- **peak memory**: most bytes that a step holds beyond weights and factors, over the frozen base's own.
- **load**: how many processes wanted the machine's cores when the row was done; above their number the figures are rough.
"""


def keep(path: Path, name: str, arguments: dict[str, Any], result: dict[str, Any]) -> None:
    """Keep what was measured of a row, with the day and how busy the machine was."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept[_key(name, arguments)] = {
        **result, "date": datetime.date.today().isoformat(), "load": round(os.getloadavg()[0], 1), "machine": _machine(),
    }  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(sorted(kept.items())), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write(path: Path, rows: list[tuple[str, dict[str, Any]]]) -> None:
    """Write the page from the rows that are kept beside it; rows that the machine at hand doesn't have come last."""
    kept = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    here = [_key(*row) for row in rows]
    results = [kept[key] for key in (*(key for key in here if key in kept), *(key for key in kept if key not in here))]
    settings: dict[str, int] = {}
    lines = [
        _HEAD,
        "| measured | weft | peft | bar | met | FLOPs | range of weft, of peft | load | on |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        said = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
        number = settings.setdefault(f"{result['date']} on {result['machine']}; {said}", len(settings) + 1)
        lines.append(f"{_line(result)} {result['load']} | {number} |")
    lines += ["", *(f"{number}. {said}" for said, number in settings.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _key(name: str, arguments: dict[str, Any]) -> str:
    return f"{name} {json.dumps(arguments, sort_keys=True)}"


def _machine() -> str:
    return f"{_processor()}, {platform.system()} {platform.machine()}"


def _line(result: dict[str, Any]) -> str:
    met = "yes" if result["weft"] <= result["bar"] else "**no**"
    floor = f"{result['floor']:.3f}" if "floor" in result else ""
    spread = result.get("spread")
    said = "; ".join(f"{low:.2f}–{high:.2f}" for low, high in spread.values()) if spread else ""
    absolute = result.get("mebibytes") or result.get("milliseconds")
    if absolute:
        unit = "MiB" if "mebibytes" in result else "ms"
        said = ", ".join(f"{name} {value} {unit}" for name, value in absolute.items())
    shown = [_number(result[name]) for name in ("weft", "peft", "bar")]
    return f"| {result['row']} | {shown[0]} | {shown[1]} | ≤ {shown[2]} | {met} | {floor} | {said} |"


def _number(value: float) -> str:
    """Three decimals; small ratios by two digits; nothing where nothing was measured."""
    return "" if value != value else f"{value:.3f}" if value >= 0.01 else f"{value:.2g}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"
