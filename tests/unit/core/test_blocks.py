"""Grouped products of a mixed batch against the loop over its units, forward and backward; the short way of inference against both."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from tests.models import randomise
from tests.tolerances import assert_close
from tests.unit.core.support import made
from weft.core import blocks as blocking
from weft.core import dropout as dropping
from weft.core.bank import attach
from weft.core.blocks import LONG, WIDE, gated, reference_blocks, routed_linears
from weft.core.ragged import Segments
from weft.core.units import Block, Loaded
from weft.spec import LoraSpec

WIDTHS = (5, 4, 7)
STRUCTURES: dict[str, list[Block]] = {
    "all rows, a unit each": [Block(None, 6, 1, (2, 2, 2))],
    "all rows, units of three": [Block(None, 2, 3, (2, 1, 3))],
    "one unit": [Block(None, 1, 6, (3, 3, 3))],
    "neighbours": [Block((1, 5), 2, 2, (2, 2, 2))],
    "scattered": [Block(torch.tensor([4, 0, 3, 1]), 2, 2, (2, 2, 2))],
    "ragged": [Block(torch.tensor([5, 1]), 2, 1, (2, 2, 2)), Block((2, 4), 1, 2, (5, 1, 4))],
    "a site without factors": [Block((0, 3), 3, 1, (2, 0, 2)), Block((4, 6), 1, 2, (0, 3, 0))],
    "unequal units": [Block(None, 3, 0, (2, 1, 4), Segments((1, 3, 2), torch.device("cpu")))],
    "unequal units, some of the rows": [
        Block((0, 3), 2, 0, (2, 2, 0), Segments((2, 1), torch.device("cpu"))),
        Block(torch.tensor([5, 3, 4]), 2, 0, (4, 4, 4), Segments((1, 2), torch.device("cpu"))),
    ],
    "nobody": [],
}


def random_call(
    structure: list[Block], *, dtype: torch.dtype = torch.float64, bias: bool = True, base: bool = True, scaled: bool = True,
    length: int = 3, d_in: int = 6, widths: tuple[int, ...] = WIDTHS,
) -> tuple[Tensor, list[tuple[Tensor | None, Tensor | None]], list[Loaded], list[Tensor]]:  # fmt: skip
    """x, bases, blocks, and everything that can have a gradient."""

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, dtype=torch.float64) / shape[-1] ** 0.5).to(dtype).requires_grad_()

    if any(block.segments is not None for block in structure):
        length = 1  # rows are single tokens
    x = draw(6, length, d_in)
    bases: list[tuple[Tensor | None, Tensor | None]] = [
        (draw(width, d_in) if base else None, draw(width) if bias and base else None) for width in widths
    ]
    loaded, leaves = [], [x, *[tensor for pair in bases for tensor in pair if tensor is not None]]
    for block in structure:
        A = draw(block.units, sum(block.ranks), d_in)
        B = tuple(
            draw(block.units, rank, width) if rank else None for rank, width in zip(block.ranks, widths, strict=True)
        )
        scale = torch.rand(block.units, 1, sum(block.ranks), dtype=dtype) + 0.5 if scaled else None
        loaded.append(Loaded(block, A, B, scale))
        leaves += [A, *[tensor for tensor in B if tensor is not None]]
    return x, bases, loaded, leaves


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("name", list(STRUCTURES))
def test_products_and_gradients_are_those_of_the_loop(name: str, scaled: bool, p: float) -> None:
    x, bases, loaded, leaves = random_call(STRUCTURES[name], scaled=scaled)
    drawn = [dropping.draw(x.detach().reshape(-1, 6), p) for _ in WIDTHS] if p else []
    got = routed_linears(x, bases, loaded, (lambda flat: list(drawn)) if p else None, WIDTHS)
    expected = reference_blocks(x, bases, loaded, drawn)
    weights = [torch.randn_like(out) for out in expected]
    mine = torch.autograd.grad(sum((a * w).sum() for a, w in zip(got, weights, strict=True)), leaves, allow_unused=True)  # type: ignore[arg-type]
    theirs = torch.autograd.grad(
        sum((a * w).sum() for a, w in zip(expected, weights, strict=True)), leaves, allow_unused=True
    )  # type: ignore[arg-type]
    for one, two in zip(got, expected, strict=True):
        assert_close(one, two)
    for one_grad, two_grad in zip(mine, theirs, strict=True):
        if two_grad is not None and one_grad is not None:
            assert_close(one_grad, two_grad)
    with torch.no_grad():
        plain = routed_linears(x, bases, loaded, (lambda flat: list(drawn)) if p else None, WIDTHS)
    for one, two in zip(plain, expected, strict=True):
        assert_close(one, two)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("base", [True, False])
def test_long_and_wide(bias: bool, base: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the products changes with the shape, the result doesn't."""
    structure = [Block(None, 3, 2, (2, 3))]
    length, widths = LONG // 6 + 1, (WIDE + 1, 8)
    x, bases, loaded, leaves = random_call(structure, bias=bias, base=base, length=length, widths=widths)
    expected = reference_blocks(x, bases, loaded)
    grads = torch.autograd.grad([out.square().sum() for out in expected], leaves)
    for limit in (LONG, 10**9):
        monkeypatch.setattr(blocking, "LONG", limit)
        got = routed_linears(x, bases, loaded, None, widths)
        for one, two in zip(got, expected, strict=True):
            assert_close(one, two)
        for one, two in zip(torch.autograd.grad([out.square().sum() for out in got], leaves), grads, strict=True):
            assert_close(one, two)


@pytest.mark.parametrize("name", list(STRUCTURES)[:-1])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_a_gated_product(name: str, p: float) -> None:
    structure = [dataclasses.replace(block, ranks=block.ranks[:1]) for block in STRUCTURES[name] if block.ranks[0]]
    gate, bases, loaded, leaves = random_call(structure, widths=(5,))
    up = torch.randn_like(gate).requires_grad_()
    drawn = [dropping.draw(gate.detach().reshape(-1, 6), p)] if p else []
    (expected,) = reference_blocks(nn.functional.silu(gate) * up, bases, loaded, drawn)
    got = gated(gate, up, bases[0], loaded, (lambda flat: list(drawn)) if p else None, 5)
    assert_close(got, expected)
    weights = torch.randn_like(expected)
    mine = torch.autograd.grad((got * weights).sum(), [*leaves, up])
    theirs = torch.autograd.grad((expected * weights).sum(), [*leaves, up])
    for one, two in zip(mine, theirs, strict=True):
        assert_close(one, two)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("length", [1, 3, 100])
@pytest.mark.parametrize(
    "entries", [list("abcd"), list("aabb"), ["c", "a", "c", "a"], ["a", None, "d", "b"], ["a"] * 4, list("ddaa")]
)
def test_the_short_way_is_the_long_way(entries: list[str | None], length: int, bias: bool) -> None:
    """Without gradients and with them, the same numbers; siblings that share their input and one that doesn't."""

    class Block_(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, width, bias=bias) for width in (4, 4, WIDE + 2))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(y)], dim=-1)

    model = randomise(nn.ModuleDict({"attn": Block_()}), torch.float64)
    specs = {"a": {"rank": 2}, "b": {"rank": 2, "alpha": 5}, "c": {"rank": 3, "targets": ["q_proj"]}, "d": {"rank": 4}}
    adapters = {
        name: made(model, LoraSpec(**({"targets": ["q_proj", "k_proj", "v_proj"]} | spec)))
        for name, spec in specs.items()
    }  # type: ignore[arg-type]
    bank = attach(model, {})
    for name, adapter in adapters.items():
        bank.load(name, adapter)
    x, other = (torch.randn(4, length, 6, dtype=torch.float64) for _ in range(2))
    for y in (x, other):
        with bank.route(entries):
            expected = model["attn"](x, y)
            with torch.no_grad():
                for _ in range(20):  # often enough that siblings with inputs of their own part
                    got = model["attn"](x, y)
                assert_close(got, expected)
                assert_close(model["attn"](x.repeat_interleave(2, 0), y.repeat_interleave(2, 0))[::2], expected)
                assert_close(model["attn"](x.transpose(1, 2).contiguous().transpose(1, 2), y), expected)
            with torch.inference_mode():
                assert_close(model["attn"](x, y), expected)
    if entries[0] is not None:
        bank.use(entries[0])
        expected = model["attn"](x, other)
        with torch.no_grad():
            for _ in range(40):
                assert_close(model["attn"](x, other), expected)
