"""Rows of the store: putting and getting over copying a file, and a filtered listing of many adapters."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from weft.adapter import Adapter, Provenance
from weft.core.factors import Factors
from weft.identity import Fingerprint
from weft.spec import LoraSpec
from weft.store import Store

__all__ = ["ROWS", "rows"]

Row = dict[str, Any]
BASE = Fingerprint("Model", "c" * 64, "a" * 64, "b" * 64, "float32", name="models/base")


def _adapter() -> Adapter:
    """10 MB: rank 64 at 14 sites of 1024 and 2816."""
    shapes = [(1024, 1024)] * 8 + [(2816, 1024)] * 4 + [(1024, 2816)] * 2
    rank = 64
    factors = {
        f"layers.{site}.proj": Factors(torch.randn(rank, d_in), torch.randn(d_out, rank), 1.0)
        for site, (d_out, d_in) in enumerate(shapes)
    }
    return Adapter(LoraSpec(rank=rank, targets=("proj",)), factors, provenance=Provenance(base=BASE))


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def put_and_get(rounds: int, what: str) -> Row:
    """Time of a put (or get) over copying the adapter's file with fsync, in the same folder; 2 is half the speed."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("WEFT_BENCH_DIR")) as folder:
        store = Store(Path(folder) / "store")
        times: dict[str, list[float]] = {"copy": [], "weft": []}
        for number in range(rounds + 1):
            adapter = _adapter()
            plain = adapter.save(Path(folder) / f"plain{number}") / "adapter_model.safetensors"
            size = plain.stat().st_size / 1e6

            def copy(plain: Path = plain, to: Path = Path(folder) / f"copy{number}") -> None:
                with plain.open("rb") as file, to.open("wb") as copied:
                    shutil.copyfileobj(file, copied, 1 << 20)
                    copied.flush()
                    os.fsync(copied.fileno())

            fresh = adapter.replace()  # its digest isn't known yet
            steps: list[tuple[str, Callable[[], object]]] = [("copy", copy)]
            if what == "put":
                steps.append(("weft", lambda fresh=fresh: store.put(fresh, "m")))
            else:
                store.put(fresh, "m")
                steps.append(("weft", lambda: store.get("m")))
            random.shuffle(steps)
            for name, step in steps:
                seconds = _seconds(step)
                if number:
                    times[name].append(seconds)
        ratios = [mine / other for mine, other in zip(times["weft"], times["copy"], strict=True)]
    milliseconds = {name: round(1000 * statistics.median(values), 1) for name, values in times.items()}
    return {"row": f"store: {what} of an adapter of {size:.0f} MB, over copying its file with fsync", "bar": 2.0, "weft": statistics.median(ratios),
            "peft": float("nan"), "milliseconds": milliseconds}  # fmt: skip


def listing(rounds: int, adapters: int) -> Row:
    """Milliseconds of the slowest of some filtered listings, fifty rows each, of many adapters."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("WEFT_BENCH_DIR")) as folder:
        store = Store(Path(folder))
        fill(store, adapters)
        asked: list[dict[str, Any]] = [
            {}, {"tags": {"domain": "d7"}}, {"tags": {"domain": "d7", "user": "u123"}}, {"where": "eval_loss<1.001"}, {"where": "eval_loss<2 and rank>=16"},
            {"base": "base3"}, {"where": "eval_loss<1.1 and tag.domain=d3 and rank=8"}, {"where": "not eval_loss<2.9"}, {"name": "n1234*"},
            {"where": "eval_loss>9"}, {"base": "base3", "where": "eval_loss<1.01"}, {"data": "ab12"},
            {"base": "nothing"}, {"where": "rank=64"}, {"where": "name>'n99998'"}, {"where": "bytes>5000"}, {"where": "created>'2030-01-01'"},
        ]  # fmt: skip
        found = {}
        for values in asked:
            seconds = [_seconds(lambda values=values: store.find(limit=50, **values)) for _ in range(rounds + 1)][1:]
            found[str(values)] = 1000 * statistics.median(seconds)
        slowest = max(found, key=lambda name: found[name])
    return {"row": f"store: the slowest of {len(asked)} filtered listings of {adapters:,} adapters, milliseconds: {slowest}", "bar": 50.0, "weft": found[slowest],
            "peft": float("nan"), "milliseconds": {"median of all": round(statistics.median(found.values()), 1)}}  # fmt: skip


def fill(store: Store, count: int) -> None:
    """Rows of so many adapters, without their files."""
    import sqlalchemy as sa

    from weft.store import tables as t

    draw = random.Random(3)

    def work(c: sa.Connection) -> None:
        for start in range(1, count + 1, 10_000):
            numbers = range(start, min(start + 10_000, count + 1))
            addresses = {number: secrets.token_hex(32) for number in numbers}
            c.execute(
                sa.insert(t.blobs),
                [{"address": addresses[n], "bytes": 1000, "files": "{}", "touched": 0.0} for n in numbers],
            )
            c.execute(
                sa.insert(t.names),
                [
                    {"id": n, "owner": "local", "name": f"n{n}", "folded": f"n{n}", "last": 1, "created": 0.0}
                    for n in numbers
                ],
            )
            c.execute(sa.insert(t.versions), [
                {"id": n, "name_id": n, "owner": "local", "number": 1, "newest": 1, "address": addresses[n], "digest": addresses[n], "provenance": addresses[n],
                 "created": float(n), "note": "", "base": f"{n % 10}" * 64, "base_layout": "", "base_name": f"models/base{n % 10}", "base_leaf": f"base{n % 10}", "bytes": 1000, "architecture": "Model",
                 "rank": draw.choice((4, 8, 16, 32)), "sites": 14, "parameters": 1000} for n in numbers
            ])  # fmt: skip
            c.execute(
                sa.insert(t.tags),
                [
                    {"version_id": n, "key": key, "value": value}
                    for n in numbers
                    for key, value in (("domain", f"d{n % 20}"), ("user", f"u{n % 5000}"))
                ],
            )
            c.execute(
                sa.insert(t.metrics),
                [{"version_id": n, "key": "eval_loss", "value": 1 + 2 * draw.random()} for n in numbers],
            )
            c.execute(
                sa.insert(t.datasets),
                [
                    {
                        "version_id": n,
                        "position": 0,
                        "digest": secrets.token_hex(32),
                        "source": "train.jsonl",
                        "role": "train",
                    }
                    for n in numbers
                ],
            )

    store.index.database.write(work)


ROWS: dict[str, Callable[..., Row]] = {"store": put_and_get, "store-list": listing}


def rows() -> list[tuple[str, dict[str, Any]]]:
    """The rows of the store."""
    return [("store", {"what": "put"}), ("store", {"what": "get"}), ("store-list", {"adapters": 100_000})]
