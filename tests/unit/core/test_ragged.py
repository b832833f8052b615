"""Products of segments of different lengths: every way against the loop, and which way is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import randomise
from tests.tolerances import assert_close
from tests.unit.core.support import made
from weft.core import ragged
from weft.core.bank import attach
from weft.core.ragged import Segments, loop_outer, loop_product, outer, product, way
from weft.spec import LoraSpec

CPU = torch.device("cpu")
LENGTHS = [(1, 1, 1), (3, 1, 4, 2), (7,), (1, 30, 2, 2, 9)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def only(monkeypatch: pytest.MonkeyPatch, chosen: str) -> list[str]:
    """Let this way be taken wherever it can be; what was taken."""
    taken: list[str] = []

    def choose(segments: Segments, columns: int, dtype: torch.dtype, device: torch.device, aligned: bool = True) -> str:
        can = chosen != "grouped" or (aligned and dtype in ragged.GROUPED)
        taken.append(chosen if can else "loop")
        return taken[-1]

    monkeypatch.setattr(ragged, "way", choose)
    return taken


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chosen", ["loop", "grouped", "padded"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_every_way_is_the_loop(
    lengths: tuple[int, ...], chosen: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = only(monkeypatch, chosen)
    segments = Segments(lengths, CPU)
    total = sum(lengths)
    for k, n in ((8, 16), (16, 3), (5, 8), (1, 1)):
        x, y = torch.randn(total, k, dtype=torch.float64), torch.randn(total, n, dtype=torch.float64)
        factors = torch.randn(len(lengths), k, n, dtype=torch.float64)
        x, y, factors = (tensor.to(dtype) for tensor in (x, y, factors))
        wide = torch.cat([y, x, y], 1)[:, n : n + k]
        exact = loop_product(x.double(), factors.double(), segments), loop_outer(x.double(), y.double(), segments)
        for left in (x, wide, x.t().contiguous().t()):
            for right in (factors, factors.mT.contiguous().mT):
                got = product(left, right, segments)
                assert got.dtype == dtype
                assert_close(got, exact[0].to(dtype))
            assert_close(outer(left, y, segments), exact[1].to(dtype))
        expanded = torch.ones((), dtype=dtype).expand(total, n)
        assert_close(outer(x, expanded, segments), loop_outer(x.double(), expanded.double(), segments).to(dtype))
    if dtype in ragged.GROUPED or chosen != "grouped":
        assert chosen in taken


def test_where_tokens_are() -> None:
    segments = Segments((2, 1, 3), CPU)
    assert segments.ends.tolist() == [2, 3, 6]
    assert segments.ends.dtype == torch.int32
    assert segments.places.tolist() == [0, 1, 3, 6, 7, 8]
    assert segments.owners.tolist() == [0, 0, 1, 2, 2, 2]


def test_the_way_depends_on_the_shape() -> None:
    short, long = Segments((1, 3, 4), CPU), Segments((20, 200), CPU)
    assert way(short, 80, torch.float32, CPU) == "padded"
    assert way(long, 528, torch.float32, CPU) == "grouped"
    assert way(long, 528, torch.float64, CPU) == way(long, 528, torch.float32, CPU, aligned=False) == "loop"
    assert way(long, 80, torch.bfloat16, CPU) == "padded"
    cuda = torch.device("cuda")
    for segments in (short, long):
        assert way(segments, 80, torch.bfloat16, cuda) == "grouped"
        assert (
            way(segments, 80, torch.float64, cuda) == way(segments, 80, torch.float32, cuda, aligned=False) == "padded"
        )


@pytest.mark.parametrize("chosen", ["loop", "grouped", "padded"])
@pytest.mark.parametrize("rank", [4, 3])
def test_a_packed_batch_by_every_way(chosen: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and gradients of a packed batch in training, against the segments by themselves."""
    taken = only(monkeypatch, chosen)
    lengths, names = [3, 1, 4, 2, 5, 1, 2, 6], ["a", "b", "c", None, "a", "d", "b", "d"]
    x, weights = torch.randn(sum(lengths), 8), torch.randn(sum(lengths), 4)
    model = randomise(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)), torch.float32)
    ranks = {"a": rank, "b": rank, "c": 8, "d": rank}
    adapters = {name: made(model, LoraSpec(rank=r, targets=["0", "2"])) for name, r in ranks.items()}
    bank = attach(model, {})
    for name, adapter in adapters.items():
        bank.load(name, adapter, trainable=True)
    found: list[dict[str, Tensor]] = []
    for packed in (True, False):
        leaf = x.clone().requires_grad_()
        if packed:
            with bank.route(names, lengths=lengths):
                out = model(leaf)
            with torch.no_grad(), bank.route(names, lengths=lengths):
                assert_close(model(leaf), out.detach())
        else:
            parts: list[Any] = []
            for entry, rows in zip(names, leaf.split(lengths), strict=True):
                bank.use(entry)
                parts.append(model(rows))
            out = torch.cat(parts)
        (out * weights).sum().backward()
        values = {"out": out.detach(), "x": leaf.grad}
        for name in adapters:
            for path, parameter in bank.named_parameters(name):
                values[path] = parameter.grad
                parameter.grad = None
        found.append(values)  # type: ignore[arg-type]
    for key, value in found[0].items():
        assert_close(value, found[1][key], what=key)
    assert chosen in taken
