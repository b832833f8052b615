"""Directions that come, go and turn: the update stays what it was, and an optimizer's moments follow exactly where they can."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import batch_for, tiny_cnn, tiny_llama, tiny_mixtral
from weft.core.bank import Bank, attach
from weft.core.resizing import Resize, blocks_of, fitted, fresh, grown, kept_directions, rank_of, truncated
from weft.spec import LoraSpec

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (tiny_llama, {}),
    "rslora": (tiny_llama, {"rslora": True, "alpha": 3.0}),
    "dora": (tiny_llama, {"dora": True, "targets": ["q_proj", "down_proj"]}),
    "bias": (tiny_llama, {"lora_bias": True, "dropout": 0.0}),
    "embedding": (tiny_llama, {"targets": ["embed_tokens", "v_proj"]}),
    "starting product": (tiny_llama, {"init": "pissa"}),
    "experts": (tiny_mixtral, {"targets": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}),
    "convolutions": (tiny_cnn, {"targets": ["conv1", "conv2"]}),
}


def output(model: nn.Module) -> Tensor:
    """What the model says to a fixed batch."""
    torch.manual_seed(3)
    batch = batch_for(model)
    found = model(**batch) if isinstance(batch, dict) else model(batch)
    return (found.logits if hasattr(found, "logits") else found).detach()


def lean(slot: Any) -> float:
    """‖A‖ / ‖B‖."""
    return float(slot.lora_A.detach().norm() / slot.lora_B.detach().norm())


def opened(case: str, rank: int = 4) -> tuple[nn.Module, Bank]:
    """A float64 model with an adapter whose factors, biases and magnitudes are nowhere at their start."""
    build, settings = CASES[case]
    model = build(dtype=torch.float64)
    if case == "convolutions":
        settings = {"targets": [name for name, item in model.named_modules() if isinstance(item, nn.Conv2d)]}
    bank = attach(model, {"a": LoraSpec(rank=rank, **settings)}, seed=1)
    with torch.no_grad():
        for _, parameter in bank.named_parameters("a"):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, bank


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rank", [6, 8])
def test_growth_changes_nothing_and_its_new_directions_can_learn(case: str, rank: int) -> None:
    model, bank = opened(case)
    before, adapter = output(model), bank.adapter("a")
    slots = bank.slots("a")
    alphas = {path: slot.scale * rank_of(site, slot) for path, (site, slot) in slots.items()}
    changes = {path: grown(*pair, rank, rslora=bank.spec("a").rslora, seed=5) for path, pair in slots.items()}
    bank.resize("a", {path: change for path, change in changes.items() if change is not None})
    assert {rank_of(*pair) for pair in slots.values()} >= {rank}
    torch.testing.assert_close(output(model), before, rtol=1e-12, atol=1e-12)
    for path, factors in bank.adapter("a").factors.items():
        old = adapter.factors[path]
        torch.testing.assert_close(factors.delta(), old.delta(), rtol=1e-12, atol=1e-12)
    if not bank.spec("a").rslora:
        for path, (site, slot) in slots.items():
            assert slot.scale * rank_of(site, slot) == pytest.approx(alphas[path])
    loss = model(**batch_for(model)) if isinstance(batch_for(model), dict) else model(batch_for(model))
    (loss.logits if hasattr(loss, "logits") else loss).square().sum().backward()
    for path, (site, slot) in slots.items():
        flipped = site.kind == "embedding"
        gradient = (slot.lora_A if flipped else slot.lora_B).grad
        assert gradient is not None, path
        new = gradient[4:] if flipped else gradient.flatten(1)[:, -1] if gradient.dim() < 3 else gradient[..., -1]
        assert float(new.abs().max()) > 0, f"{path}: the new directions get gradients"


def test_doubling_is_exact_in_every_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_llama(dtype=torch.float32)
        bank = attach(model, {"a": LoraSpec(rank=2, alpha=3.0)}, seed=0)
        for site, slot in bank.slots("a").values():
            with torch.no_grad():
                slot.lora_B.copy_(torch.randn_like(slot.lora_B))
            A, B = (tensor.to(dtype) for tensor in (slot.lora_A.detach(), slot.lora_B.detach()))
            change = grown(site, slot, 4, seed=1)
            assert change is not None
            assert change.ratio == 2.0
            assert torch.equal(change.A(A[None])[0][:2], A)
            assert torch.equal(change.B(B[None])[0][:, :2] * 0.5, B)


def test_new_directions_are_orthogonal_to_all_others_while_there_is_room() -> None:
    known = torch.randn(3, 4, 10)
    rows = fresh(known, 5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(rows @ rows.mT, torch.eye(5, dtype=torch.float64).expand(3, 5, 5))
    assert float((rows @ known.double().mT).abs().max()) < 1e-12
    again = fresh(known, 5, torch.Generator().manual_seed(0))
    assert torch.equal(rows, again), "the same on every process"
    many = fresh(known, 9, torch.Generator().manual_seed(0))
    assert many.shape == (3, 9, 10)
    assert bool(torch.isfinite(many).all())


def test_no_site_grows_beyond_its_matrix() -> None:
    model = tiny_llama()
    bank = attach(model, {"a": LoraSpec(rank=4, targets=["k_proj"])}, seed=0)
    (site, slot), *_ = bank.slots("a").values()
    change = grown(site, slot, 999)
    assert change is not None
    bank.resize("a", {site.path: change})
    assert rank_of(site, slot) == min(site.d_in, site.d_out)
    assert grown(site, slot, 999) is None


@pytest.mark.parametrize("case", CASES)
def test_directions_that_are_kept_are_untouched(case: str) -> None:
    if case == "starting product":
        pytest.skip("such inits keep all directions")
    _, bank = opened(case)
    slots = bank.slots("a")
    for path, (site, slot) in slots.items():
        A, B = blocks_of(site, slot)
        keep = torch.stack([torch.randperm(A.shape[1])[: max(1, A.shape[1] - 1)].sort().values for _ in range(len(A))])
        expected_A = torch.stack([block[index] for block, index in zip(A, keep, strict=True)]).clone()
        expected_B = torch.stack([block[:, index] for block, index in zip(B, keep, strict=True)]).clone()
        scale = slot.scale
        bank.resize("a", {path: kept_directions(keep)})
        A, B = blocks_of(site, slot)
        assert torch.equal(A, expected_A)
        assert torch.equal(B, expected_B)
        assert slot.scale == scale
    assert bank.adapter("a").num_parameters > 0


@pytest.mark.parametrize("case", ["linear", "experts", "convolutions", "embedding"])
def test_truncation_is_the_best_of_its_rank(case: str) -> None:
    from weft.core.factors import truncate

    _, bank = opened(case)
    before = bank.adapter("a")
    slots = bank.slots("a")
    for path, (site, slot) in slots.items():
        expected, lost = truncate(before.factors[path], 2)
        ratio = lean(slot) if slot.lora_A.dim() == 2 else None
        found = truncated(site, slot, rank=2)
        if found is None:
            continue
        change, error = found
        bank.resize("a", {path: change})
        assert error == pytest.approx(lost, rel=1e-9)
        torch.testing.assert_close(bank.adapter("a").factors[path].delta(), expected.delta(), rtol=1e-9, atol=1e-12)
        if ratio is not None:
            assert lean(slot) == pytest.approx(ratio)


def test_truncation_by_energy_error_and_of_nothing() -> None:
    model = tiny_llama(dtype=torch.float64)
    bank = attach(model, {"a": LoraSpec(rank=4, targets=["q_proj"])}, seed=0)
    (site, slot), *_ = bank.slots("a").values()
    found = truncated(site, slot, energy=0.9)
    assert found is not None
    assert found[1] == 0.0, "an update of zero keeps its first directions"
    assert found[0].index is not None
    assert found[0].index.shape == (1, 1)
    values = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    with torch.no_grad():
        slot.lora_A.copy_(torch.linalg.qr(torch.randn(32, 4, dtype=torch.float64)).Q.mT)
        slot.lora_B.copy_(torch.linalg.qr(torch.randn(32, 4, dtype=torch.float64)).Q * values)
    for limit, expected in (({"energy": 0.85}, 2), ({"energy": 0.95}, 3), ({"error": 0.55}, 1), ({"error": 0.25}, 3)):
        found = truncated(site, slot, **limit)  # type: ignore[arg-type]
        assert found is not None
        assert found[0].left is not None
        assert found[0].left.shape[1] == expected, limit
    assert truncated(site, slot, energy=0.9999) is None
    least = truncated(site, slot, energy=0.5, least=3)
    assert least is not None
    assert least[0].left is not None
    assert least[0].left.shape[1] == 3


def test_gradients_of_turned_factors_are_turned_gradients() -> None:
    """The map of first moments, against autograd on the new factors; where nothing is cut off."""
    A, B = torch.randn(1, 3, 7, dtype=torch.float64), torch.randn(1, 5, 3, dtype=torch.float64)
    turn = torch.randn(1, 3, 3, dtype=torch.float64)
    change = Resize(left=turn, right=torch.linalg.inv(turn), ratio=4.0)
    target = torch.randn(5, 7, dtype=torch.float64)
    old = [A.clone().requires_grad_(), B.clone().requires_grad_()]
    (0.8 * (old[1] @ old[0]) - target).pow(3).sum().backward()
    new = [change.A(A).requires_grad_(), change.B(B).requires_grad_()]
    (0.2 * (new[1] @ new[0]) - target).pow(3).sum().backward()
    torch.testing.assert_close(change.moment_A(old[0].grad), new[0].grad)  # type: ignore[arg-type]
    torch.testing.assert_close(change.moment_B(old[1].grad), new[1].grad)  # type: ignore[arg-type]


def test_moments_of_new_and_of_kept_directions_against_loops() -> None:
    """The slow, obvious reference: entry by entry."""
    n, r, o, i, more, ratio = 2, 3, 5, 4, 2, 2.5
    A, B = torch.rand(n, r, i, dtype=torch.float64), torch.rand(n, o, r, dtype=torch.float64)
    grow = Resize(new_A=torch.ones(n, more, i), new_B=torch.zeros(n, o, more), ratio=ratio)
    keep = torch.tensor([[0, 2], [1, 2]])
    for squared in (False, True):
        divisor = ratio**2 if squared else ratio
        got_A, got_B = grow.moment_A(A, squared), grow.moment_B(B, squared)
        for block in range(n):
            for direction in range(r + more):
                for column in range(i):
                    start = float(sum(A[block, k, column] for k in range(r)) / r) if squared else 0.0
                    expected = float(A[block, direction, column]) if direction < r else start
                    assert float(got_A[block, direction, column]) == pytest.approx(expected)
                for row in range(o):
                    start = float(sum(B[block, row, k] for k in range(r)) / r / divisor) if squared else 0.0
                    expected = float(B[block, row, direction]) / divisor if direction < r else start
                    assert float(got_B[block, row, direction]) == pytest.approx(expected)
        chosen = kept_directions(keep)
        for block in range(n):
            for place, direction in enumerate(keep[block].tolist()):
                assert torch.equal(chosen.moment_A(A, squared)[block, place], A[block, direction])
                assert torch.equal(chosen.moment_B(B, squared)[block, :, place], B[block, :, direction])


def test_room_for_a_checkpoint() -> None:
    _, bank = opened("convolutions")
    for path, (site, slot) in bank.slots("a").items():
        assert fitted(site, slot, rank_of(site, slot), slot.scale) is None
        change = fitted(site, slot, 2 * rank_of(site, slot), slot.scale / 3)
        assert change is not None
        rank, scale = rank_of(site, slot), slot.scale
        bank.resize("a", {path: change})
        assert rank_of(site, slot) == 2 * rank
        assert slot.scale == pytest.approx(scale / 3)
