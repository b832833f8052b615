"""Serving many adapters from one base: a mixed batch over the base alone, loading into a running model, memory of what is loaded.

peft's mixed batch is its own: ``adapter_names=[…]`` in the forward; its loading is ``model.add_adapter`` with the weights set.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measures, subjects
from benchmarks.subjects import SUFFIXES, Setting

__all__ = ["ROWS", "decode", "load", "loaded_memory", "prefill", "rows"]

PAST = 64
"""Tokens in the cache of a decode step."""

STEPS = 3
"""Decode steps that are timed together."""

Row = dict[str, Any]


def decode(
    rounds: int, rows: int, layers: int, width: int, bar: float, adapters: int | None = None, device: str = "cpu"
) -> Row:
    """Time of a decode step of a mixed batch over the base alone."""
    setting = Setting(layers, width, rows, PAST + 8, "float32", device=device)
    count = rows if adapters is None else adapters
    base, weft_model, peft_model, entries = _models(setting, count)
    ids = torch.randint(0, 1024, (rows, 1), device=device)
    steps = {"base": _step(base, ids, rows), "peft": _step(peft_model, ids, rows, adapter_names=_turned(entries))}
    steps["weft"] = _routed(_step(weft_model, ids, rows), weft_model, entries)
    what = "one adapter" if count == 1 else f"{count} adapters"
    return _result(steps, rounds, f"decode step, {rows} rows of {what}, {layers} layers × {width}", bar, setting)


def prefill(rounds: int, rows: int, length: int, layers: int, width: int, bar: float, device: str = "cpu") -> Row:
    """Time of a forward over the prompts of a mixed batch, over the base alone."""
    setting = Setting(layers, width, rows, length, "float32", device=device)
    base, weft_model, peft_model, entries = _models(setting, rows)
    ids = torch.randint(0, 1024, (rows, length), device=device)

    def forward(model: nn.Module, **more: Any) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                model(input_ids=ids, logits_to_keep=1, use_cache=False, **more)

        return run

    steps = {"base": forward(base), "peft": forward(peft_model, adapter_names=_turned(entries))}
    steps["weft"] = _routed(forward(weft_model), weft_model, entries)
    return _result(
        steps, rounds, f"prefill, {rows} × {length} tokens of {rows} adapters, {layers} layers × {width}", bar, setting
    )


def load(rounds: int, what: str, layers: int = 32, width: int = 64, number: int = 100) -> Row:
    """Time to load the hundredth adapter: in milliseconds, or over the first.

    peft's time grows with what is loaded, quadratically in total: its second adapter is measured, not its hundredth.
    """
    import peft

    import weft

    base = subjects.frozen_base(Setting(layers, width, 1, 16, "float32"))
    bank = weft.attach(copy.deepcopy(base), {})
    adapter = _adapter(base)
    seconds: list[float] = []
    for index in range(number + rounds):
        mine = adapter.map(torch.clone)
        begin = time.perf_counter()
        bank.load(f"a{index}", mine)
        seconds.append(time.perf_counter() - begin)
    last = statistics.median(seconds[number - 1 : number - 1 + rounds])
    first = statistics.median(_first_loads(base, adapter, rounds))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=16, lora_alpha=16, target_modules=SUFFIXES)
        begin = time.perf_counter()
        theirs = peft.get_peft_model(base, config, adapter_name="a0")
        middle = time.perf_counter()
        theirs.add_adapter("a1", config)
        second = time.perf_counter() - middle
    return {
        "row": f"loading adapter {number} into a running model, {layers} layers × 7 sites, "
        + ("milliseconds (peft: its second)" if what == "milliseconds" else "over the first"),
        "bar": 20.0 if what == "milliseconds" else 1.5,
        "weft": 1000 * last if what == "milliseconds" else last / first,
        "peft": 1000 * second if what == "milliseconds" else float("nan"),
        "milliseconds": {
            "weft's first": round(1000 * first, 1), f"weft's {number}th": round(1000 * last, 1),
            "peft's first": round(1000 * (middle - begin), 1), "peft's second": round(1000 * second, 1),
        },
    }  # fmt: skip


def loaded_memory(rounds: int, adapters: int = 1000, layers: int = 32, width: int = 64, rank: int = 4) -> Row:
    """Bytes that a process grows by for each loaded adapter, over the bytes of its factors."""
    import weft

    base = subjects.frozen_base(Setting(layers, width, 1, 16, "float32"))
    adapter = _adapter(base, rank)
    bank = weft.attach(base, {})
    for index in range(20):
        bank.load(f"warm{index}", adapter)
    gc.collect()
    before = _resident()
    for index in range(adapters):
        bank.load(f"a{index}", adapter)
    gc.collect()
    grown = _resident() - before
    factors = adapters * sum(tensor.numel() * tensor.element_size() for tensor in adapter.tensors().values())
    return {
        "row": f"memory of {adapters} loaded adapters over the bytes of their factors, rank {rank}",
        "bar": 1.05,
        "weft": grown / factors,
        "peft": float("nan"),
        "mebibytes": {"grown": round(grown / 2**20, 1), "factors": round(factors / 2**20, 1)},
    }


def _result(steps: dict[str, Callable[[], None]], rounds: int, label: str, bar: float, setting: Setting) -> Row:
    times = measures.interleaved(steps, rounds, setting.device)
    found = {name: measures.ratios(times, name) for name in ("weft", "peft")}
    return {
        "row": f"{label}, over the base alone",
        "bar": bar,
        **{name: statistics.median(values) for name, values in found.items()},
        "spread": {name: [min(values), max(values)] for name, values in found.items()},
        "milliseconds": {name: round(1000 * statistics.median(values), 2) for name, values in times.items()},
        "setting": asdict(setting),
    }


def _models(setting: Setting, count: int) -> tuple[nn.Module, nn.Module, nn.Module, list[str]]:
    """Base, weft's and peft's model with ``count`` adapters, and one name a row."""
    import peft

    import weft

    torch.manual_seed(0)
    base = subjects.frozen_base(setting).eval()
    attached = copy.deepcopy(base)
    bank = weft.attach(attached, {})
    names = [f"a{index}" for index in range(count)]
    for name in names:
        bank.load(name, _adapter(base, setting.rank))
    config = peft.LoraConfig(r=setting.rank, lora_alpha=setting.rank, target_modules=SUFFIXES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=names[0])
        for name in names[1:]:
            theirs.add_adapter(name, config)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.02)
    return base, attached, theirs.eval(), [names[row % count] for row in range(setting.rows)]


def _adapter(base: nn.Module, rank: int = 16) -> Any:
    """An adapter with random factors for every linear layer."""
    import weft

    with weft.attach(base, {"made": weft.LoraSpec(rank=rank, targets=SUFFIXES)}) as bank:
        for _, parameter in bank.named_parameters("made"):
            nn.init.normal_(parameter, std=0.02)
        return bank.adapter("made")


def _turned(entries: list[str]) -> list[str] | None:
    return entries if len(set(entries)) > 1 else None


def _step(model: nn.Module, ids: Tensor, rows: int, adapter_names: list[str] | None = None) -> Callable[[], None]:
    """Some decode steps, each with the same past."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    more = {} if adapter_names is None else {"adapter_names": adapter_names}
    with torch.no_grad():
        model(input_ids=torch.randint(0, 1024, (rows, PAST), device=ids.device), past_key_values=cache)

    def run() -> None:
        with torch.no_grad():
            for _ in range(STEPS):
                model(input_ids=ids, past_key_values=cache, use_cache=True, **more)
                cache.crop(-1)

    return run


def _routed(step: Callable[[], None], model: nn.Module, entries: list[str]) -> Callable[[], None]:
    """The step inside of a route that was entered before: rows are gathered once a batch, not once a token."""
    route = model.__dict__["_weft_bank"].route(entries)

    def run() -> None:
        with route:
            step()

    return run


def _first_loads(base: nn.Module, adapter: Any, rounds: int) -> list[float]:
    """Seconds of the first load into fresh models whose fingerprint is known already."""
    import weft

    seconds = []
    for _ in range(rounds):
        with weft.attach(base, {}) as bank:
            bank.fingerprint  # noqa: B018
            begin = time.perf_counter()
            bank.load("first", adapter)
            seconds.append(time.perf_counter() - begin)
    return seconds


def _resident() -> int:
    """Bytes of this process in memory."""
    import psutil  # type: ignore[import-untyped]

    return int(psutil.Process().memory_info().rss)


def rows() -> list[tuple[str, dict[str, Any]]]:
    """All rows of this file: the name of the function and its arguments."""
    large, deep = {"layers": 8, "width": 512}, {"layers": 32, "width": 64, "rows": 16}
    return [
        ("decode", {**large, "rows": 32, "bar": 1.4}),
        ("decode", {**large, "rows": 64, "bar": 1.6}),
        ("decode", {**deep, "bar": 1.8}),
        ("decode", {**deep, "adapters": 1, "bar": 1.3}),
        ("prefill", {**large, "rows": 32, "length": 64, "bar": 1.08}),
        ("load", {"what": "milliseconds"}),
        ("load", {"what": "ratio"}),
        ("loaded_memory", {}),
    ]


ROWS: dict[str, Callable[..., Row]] = {
    "decode": decode,
    "prefill": prefill,
    "load": load,
    "loaded_memory": loaded_memory,
}
"""By name, as `python -m benchmarks --row NAME '{…}'` calls them."""
