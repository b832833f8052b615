"""docs/benchmarks.md from measured rows: written by the command, never by hand."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path
from typing import Any

__all__ = ["write"]

_HEAD = """# Benchmarks

Written by `make bench`; do not edit. Ratios, medians over rounds: absolute times of shared machines mean little. Below 1 is better than
what it is compared with; "bar" is what weft sets itself.

- **training step**: time of forward and backward over the frozen base with activation gradients, which is the limit for any adapter.
  All-linear, rank 16. *FLOPs* is the same ratio counted in multiplications: no implementation that computes LoRA's gradients without
  touching the base gets below it, except by saving elsewhere what the frozen base spends.
- **peak memory**: most bytes that a step holds beyond weights and factors, over the frozen base's own.
"""


def write(path: Path, results: list[dict[str, Any]]) -> None:
    """Write the page."""
    versions = results[0]["versions"]
    machine = f"{_processor()}, {platform.system()} {platform.machine()}"
    said = ", ".join(f"{name} {value}" for name, value in versions.items())
    lines = [
        _HEAD,
        f"Measured {datetime.date.today().isoformat()} on {machine}; {said}.\n",
        "| measured | weft | peft | bar | met | FLOPs | range of weft, of peft |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_line(result) for result in results]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


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
