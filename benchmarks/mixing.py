"""Rows of mixing: truncation beside PEFT's dense decomposition, and the exact sum beside a copy of its bytes."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import weft
from benchmarks import measures, subjects
from benchmarks.subjects import Setting

__all__ = ["ROWS", "rows"]

Row = dict[str, Any]
RANK = 16
EQUAL = 1e-6


def truncate(rounds: int, sites: str, bar: float) -> Row:
    """Rank-16 truncation of a mixture of two rank-16 adapters: weft's time over that of PEFT's dense SVD."""
    if sites == "one":
        base, label = nn.Sequential(nn.Linear(4096, 4096, bias=False)), "one site of 4096 × 4096"
        targets = ["0"]
    else:
        base = subjects.frozen_base(Setting(2, 1024, 1, 16, "float32"))
        targets, label = subjects.SUFFIXES, "14 sites of 1024 and 2816"
    pair = [_adapter(base, targets, seed) for seed in (1, 2)]
    mixed: list[Any] = [None]

    def ours() -> None:
        mixed[0] = weft.combine([(pair[0], 0.7), (pair[1], 0.3)], method="svd", rank=RANK)

    wrapped = _in_peft(base, targets, pair)
    found = {"weft": [], "peft": []}
    ours()
    for number in range(max(2, min(rounds, 3)) if sites == "one" else rounds):
        found["peft"].append(_seconds(lambda name=f"mixed{number}": _theirs(wrapped, name)))
        found["weft"].append(statistics.median(_seconds(ours) for _ in range(5)))
    ratios = [mine / other for mine, other in zip(found["weft"], found["peft"], strict=True)]
    off = max(_difference(mixed[0], wrapped, pair, path) for path in mixed[0].sites)
    if off > EQUAL:
        raise SystemExit(f"the truncations differ from the best ones of float64 by {off:.2g}")
    return {
        "row": f"rank-16 truncation of two mixed adapters, {label}, over peft's (the best truncation to {off:.0e})",
        "bar": bar,
        "weft": statistics.median(ratios),
        "peft": 1.0,
        "milliseconds": {name: round(1000 * statistics.median(values), 2) for name, values in found.items()},
    }


def exact(rounds: int, layers: int = 32, adapters: int = 8) -> Row:
    """The exact mixture over one copy of the bytes of its parents, in memory: the bar is two."""
    values = [_made(layers, seed) for seed in range(adapters)]
    for value in values:
        assert value.digest
    tensors = [tensor for value in values for tensor in value.tensors().values()]
    steps: dict[str, Callable[[], None]] = {
        "weft": lambda: _drop(weft.combine([(value, 0.1 + 0.1 * number) for number, value in enumerate(values)])),
        "base": lambda: _drop([tensor.clone() for tensor in tensors]),
    }
    times = measures.interleaved(steps, rounds)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return {
        "row": f"exact mixture of {adapters} adapters, {layers * 7} sites, {size / 1e6:.0f} MB, over reading and writing their bytes once",
        "bar": 2.0,
        "weft": measures.median_ratio(times, "weft"),
        "peft": float("nan"),
        "milliseconds": {name: round(1000 * statistics.median(values), 1) for name, values in times.items()},
    }


def files(rounds: int, layers: int = 32, adapters: int = 8) -> Row:
    """The same from files to files, flushed to the disk; the hashes that an adapter is checked by are in it."""
    folder = Path(tempfile.mkdtemp())
    try:
        paths = [_made(layers, seed).save(folder / f"a{seed}") for seed in range(adapters)]

        def ours() -> None:
            weft.combine([(path, 0.1 + 0.1 * number) for number, path in enumerate(paths)]).save(
                folder / "mixed", overwrite=True
            )

        def copied() -> None:
            import os

            with open(folder / "copy", "wb") as target:
                for path in paths:
                    target.write((path / "adapter_model.safetensors").read_bytes())
                target.flush()
                os.fsync(target.fileno())

        times: Mapping[str, list[float]] = {"weft": [], "base": []}
        for number in range(rounds + 1):
            for name, step in (("weft", ours), ("base", copied)):
                start = time.perf_counter()
                step()
                if number:
                    times[name].append(time.perf_counter() - start)
    finally:
        shutil.rmtree(folder)
    return {
        "row": f"the same from {adapters} directories to one, checked by their hashes, over reading and writing the files once",
        "bar": 2.0,
        "weft": measures.median_ratio(times, "weft"),
        "peft": float("nan"),
        "milliseconds": {name: round(1000 * statistics.median(values), 1) for name, values in times.items()},
    }


def _drop(value: object) -> None:
    del value


def _seconds(step: Callable[[], None]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def _adapter(base: nn.Module, targets: list[str], seed: int) -> weft.Adapter:
    torch.manual_seed(seed)
    with weft.attach(base, {"made": weft.LoraSpec(rank=RANK, targets=targets)}) as bank:
        for _, parameter in bank.named_parameters("made"):
            nn.init.normal_(parameter, std=0.02)
        return bank.adapter("made")


def _in_peft(base: nn.Module, targets: list[str], pair: list[weft.Adapter]) -> Any:
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(base, config, adapter_name="a0")
        wrapped.add_adapter("a1", config)
    for number, adapter in enumerate(pair):
        for path, item in adapter.factors.items():
            layer = wrapped.base_model.model.get_submodule(path)
            layer.lora_A[f"a{number}"].weight.data.copy_(item.A)
            layer.lora_B[f"a{number}"].weight.data.copy_(item.B)
    return wrapped


def _theirs(wrapped: Any, name: str) -> None:
    wrapped.base_model.add_weighted_adapter(["a0", "a1"], [0.7, 0.3], name, combination_type="svd", svd_rank=RANK)


def _difference(mixed: weft.Adapter, wrapped: Any, pair: list[weft.Adapter], path: str) -> float:
    """Relative distance of weft's truncation from the best one, which is computed from PEFT's in float64 by one more step each way."""
    items = [value.factors[path].map(Tensor.double) for value in pair]
    total = 0.7 * items[0].delta() + 0.3 * items[1].delta()
    layer = wrapped.base_model.model.get_submodule(path)
    theirs = layer.lora_B["mixed0"].weight.double()
    Q = torch.linalg.qr(theirs).Q
    for _ in range(8):  # PEFT's space, made exact by orthogonal iteration
        Q = torch.linalg.qr(total @ (total.mT @ Q)).Q
    best = Q @ (Q.mT @ total)
    return float((mixed.factors[path].map(Tensor.double).delta() - best).norm() / best.norm())


def _made(layers: int, seed: int) -> weft.Adapter:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"self_attn.q_proj": (2048, 2048), "self_attn.k_proj": (2048, 2048), "self_attn.v_proj": (2048, 2048),
             "self_attn.o_proj": (2048, 2048), "mlp.gate_proj": (5632, 2048), "mlp.up_proj": (5632, 2048),
             "mlp.down_proj": (2048, 5632)}  # fmt: skip
    factors = {
        f"model.layers.{layer}.{name}": weft.Factors(
            torch.randn(RANK, d_in, generator=generator), torch.randn(d_out, RANK, generator=generator), 1.0
        )
        for layer in range(layers)
        for name, (d_out, d_in) in sizes.items()
    }
    return weft.Adapter(weft.LoraSpec(rank=RANK, targets=tuple(factors)), factors)


ROWS: dict[str, Callable[..., Row]] = {"truncate": truncate, "exact": exact, "files": files}
"""By name, see `benchmarks.rows`."""


def rows() -> list[tuple[str, dict[str, Any]]]:
    """The name of the function and its arguments."""
    return [
        ("truncate", {"sites": "model", "bar": 1 / 200}),
        ("truncate", {"sites": "one", "bar": 1 / 1000}),
        ("exact", {}),
        ("files", {}),
    ]
