"""The rows of `make bench`. Each function measures one and returns plain data; each runs in a process of its own."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import cotraining, measures, mixing, seeing, serving, storing, subjects
from benchmarks.subjects import Setting

__all__ = ["ROWS", "rows_for"]

Row = dict[str, Any]


def step(rounds: int, **values: Any) -> Row:
    """Time of a training step over the frozen base's with activation gradients."""
    setting = Setting(**values)
    models, ids = subjects.subjects(setting), subjects.batch(setting)
    steps = {name: subjects.training_step(model, ids) for name, model in models.items()}
    times = measures.interleaved(steps, rounds, setting.device)
    found = {name: measures.ratios(times, name) for name in ("weft", "peft")}
    return {
        "row": f"training step: {setting}",
        "bar": 1.15 if setting.dropout else 1.08,
        **{name: statistics.median(values) for name, values in found.items()},
        "spread": {name: [min(values), max(values)] for name, values in found.items()},
        "floor": _flops(steps["weft"]) / _flops(steps["base"]),
        "setting": asdict(setting),
    }


def memory(rounds: int, **values: Any) -> Row:
    """Peak bytes of a training step over the frozen base's own."""
    setting = Setting(**values)
    models, ids = subjects.subjects(setting), subjects.batch(setting)
    peaks = {
        name: measures.peak_bytes(subjects.training_step(model, ids), setting.device) for name, model in models.items()
    }
    return {
        "row": f"peak memory: {setting}",
        "bar": 1.05 if setting.dropout else 0.97,
        "weft": peaks["weft"] / peaks["base"],
        "peft": peaks["peft"] / peaks["base"],
        "mebibytes": {name: round(value / 2**20, 1) for name, value in peaks.items()},
        "setting": asdict(setting),
    }


def attach(rounds: int, layers: int = 32, width: int = 64) -> Row:
    """Seconds to attach to 7 sites of each layer, weft's over peft's."""
    import peft

    import weft

    model = subjects.frozen_base(Setting(layers, width, 1, 16, "float32"))
    config = peft.LoraConfig(r=16, target_modules=subjects.SUFFIXES)
    seconds: dict[str, list[float]] = {"weft": [], "peft": []}
    for number in range(rounds + 1):
        start = time.perf_counter()
        bank = weft.attach(model, {"bench": weft.LoraSpec(rank=16, targets=subjects.SUFFIXES)})
        middle = time.perf_counter()
        bank.detach()
        again = time.perf_counter()
        wrapped = peft.get_peft_model(model, config)
        end = time.perf_counter()
        model = wrapped.unload()
        if number:
            seconds["weft"].append(middle - start)
            seconds["peft"].append(end - again)
    ratio = statistics.median(a / b for a, b in zip(seconds["weft"], seconds["peft"], strict=True))
    return {
        "row": f"attach, {layers} layers × 7 sites, over peft's",
        "bar": 0.1,
        "weft": ratio,
        "peft": 1.0,
        "milliseconds": {name: round(1000 * statistics.median(values), 1) for name, values in seconds.items()},
    }


def start(rounds: int, what: str) -> Row:
    """Seconds over the interpreter's own start."""
    commands = {
        "none": [sys.executable, "-c", "pass"],
        "weft": [sys.executable, "-c", "import weft"] if what == "import" else [sys.executable, "-m", "weft", "--help"],
        "peft": [sys.executable, "-c", "import peft"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, command in commands.items():
            begin = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if number:
                seconds[name].append(time.perf_counter() - begin)
    own = {
        name: statistics.median(mine - none for mine, none in zip(values, seconds["none"], strict=True))
        for name, values in seconds.items()
    }
    label = "import weft" if what == "import" else "weft --help"
    return {
        "row": f"{label}, seconds over the interpreter's start (peft: import)",
        "bar": 0.15 if what == "import" else 0.4,
        "weft": own["weft"],
        "peft": own["peft"],
    }


def _flops(run: Callable[[], None]) -> int:
    """Floating point operations of the products in a step."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


ROWS: dict[str, Callable[..., Row]] = {
    "step": step,
    "memory": memory,
    "attach": attach,
    "start": start,
    **mixing.ROWS,
    **cotraining.ROWS,
    **serving.ROWS,
    **storing.ROWS,
    **seeing.ROWS,
}
"""By name, as `python -m benchmarks --row NAME '{…}'` calls them."""


def rows_for(cuda: bool) -> list[tuple[str, dict[str, Any]]]:
    """All rows: the name of the function and its arguments."""
    small, large = {"layers": 8, "width": 512, "rows": 4}, {"layers": 12, "width": 1024, "rows": 2}
    found: list[tuple[str, dict[str, Any]]] = []
    for device in ("cpu", "cuda") if cuda else ("cpu",):
        for size in (small, large):
            shape = {**size, "length": 256, "device": device} if device == "cpu" else {
                **size, "rows": 16, "length": 512, "device": device}  # fmt: skip
            for dtype in ("float32", "bfloat16"):
                found += [("step", {**shape, "dtype": dtype, "dropout": p}) for p in (0.0, 0.05)]
            found += [("memory", {**shape, "dtype": "bfloat16", "dropout": p}) for p in (0.0, 0.05)]
    return [
        *found,
        ("attach", {}),
        ("start", {"what": "import"}),
        ("start", {"what": "help"}),
        *mixing.rows(),
        *cotraining.rows(),
        *serving.rows(),
        *storing.rows(),
        *seeing.rows(cuda),
    ]


def versions() -> dict[str, str]:
    """What was measured with."""
    import importlib.metadata
    import platform

    names = ("weft", "peft", "torch", "transformers")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names},
            "threads": str(torch.get_num_threads())}  # fmt: skip
