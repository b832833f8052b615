"""Ranks that change while adapters are trained together: each as it would alone, also through a kill, and through rungs."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weft
from tests.tolerances import TOLERANCES
from tests.unit.many.support import furthest, steps_of, user_rows
from tests.unit.train.support import byte_base
from weft.core.pool import Pool
from weft.core.resizing import grown, kept_directions
from weft.data import load_examples
from weft.errors import RecipeError, RunStoppedError
from weft.many import sweep
from weft.many.desk import FolderDesk
from weft.many.rounds import Rounds
from weft.train.recipe import Recipe

Pair = tuple[nn.Module, Any]

COMMON = Recipe(max_steps=12, learning_rate=1e-2, batch_size=4, eval_every=2, patience=0, max_length=40)
KINDS: dict[str, dict[str, Any]] = {
    "grow": {"rank": 2, "alpha": 4, "dropout": 0.1, "patience": 1, "adaptive": weft.GrowOnPlateau(max_rank=7, patience=1, min_change=0.9, warmup=2)},
    "budget": {"rank": 4, "adaptive": weft.BudgetRanks(target_rank=2, every=2), "accumulation": 2},
    "shrink": {"rank": 4, "adaptive": weft.ShrinkBySpectrum(energy=0.8, every=4), "lora_plus_ratio": 4.0, "targets": ("q_proj", "down_proj")},
    "dora grows": {"rank": 1, "dora": True, "adaptive": weft.GrowOnPlateau(max_rank=4, add=1, patience=1, min_change=0.9), "weight_decay": 0.1},
    "pissa grows": {"rank": 2, "init": "pissa", "rslora": True, "adaptive": weft.GrowOnPlateau(max_rank=5, patience=1, min_change=0.9)},
    "plain": {"rank": 3},
}  # fmt: skip


def recipes() -> dict[str, Recipe]:
    return {name: COMMON.replace(seed=number, **kind) for number, (name, kind) in enumerate(KINDS.items())}


def data() -> dict[str, Any]:
    return {name: user_rows(number) for number, name in enumerate(KINDS)}


def test_ranks_change_together_as_alone(tmp_path: Path) -> None:
    """Beside each other, in float64: factors, metrics, the record of changes, and where each stopped."""
    common: dict[str, Any] = {"base": byte_base(layers=1, dtype=torch.float64), "eval_data": 0.2, "progress": False}
    together = weft.train_many(**common, data=data(), recipe=recipes(), out=tmp_path / "many", slots=5, tokens=200)
    assert not together.report.failed
    allowed = TOLERANCES[torch.float64]
    for name, rows in data().items():
        if name == "plain":
            continue
        alone = weft.train(**common, data=rows, recipe=recipes()[name], out=tmp_path / name)
        ours, theirs = together[name].report, alone.report
        for mine, its in zip(ours.ranks.get("changes", []), theirs.ranks.get("changes", []), strict=True):
            assert mine == its or name == "shrink", name
        assert ours.ranks.get("sites") == theirs.ranks.get("sites")
        assert ours.ranks["changes"], name
        error, size = furthest(together[name].adapter, alone.adapter)
        assert error <= allowed.atol + allowed.rtol * size, f"{name}: off by {error:.3g} of {size:.3g}"
        assert (ours.steps, ours.best_step, ours.stopped) == (theirs.steps, theirs.best_step, theirs.stopped), name
        assert ours.adapter == pytest.approx(theirs.adapter, rel=1e-6), name
        assert steps_of(together[name].log) == steps_of(alone.log), name
        assert together[name].adapter.spec.rank_pattern == alone.adapter.spec.rank_pattern


def test_a_stopped_run_goes_on_with_the_ranks_that_it_had(
    tmp_path: Path, small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped twice, with some in the batch and some waiting: the same as without a break, up to the last bit."""
    files = {}
    for name, rows in data().items():
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    given: dict[str, Any] = {"base": small_dir, "data": files, "recipe": recipes(), "eval_data": 0.2, "progress": False}
    whole = weft.train_many(**given, out=tmp_path / "whole", slots=3)
    done = FolderDesk.round_done
    at = [5, 17]

    def stops(self: FolderDesk, rounds: Rounds) -> bool:
        if at and rounds.number == at[0]:
            os.kill(os.getpid(), signal.SIGINT)
            del at[0]
        return done(self, rounds)

    monkeypatch.setattr(FolderDesk, "round_done", stops)
    with pytest.raises(RunStoppedError):
        weft.train_many(**given, out=tmp_path / "parts", slots=3)
    with pytest.raises(RunStoppedError):
        weft.train_many(out=tmp_path / "parts", resume=True, progress=False)
    parts = weft.train_many(out=tmp_path / "parts", resume=True, progress=False)
    for name in KINDS:
        error, size = furthest(parts[name].adapter, whole[name].adapter)
        assert error <= 1e-6 * size, f"{name}: off by {error:.3g}"
        assert parts[name].report.ranks == whole[name].report.ranks
        assert [row["step"] for row in parts[name].log] == [row["step"] for row in whole[name].log]


def test_a_growing_adapter_waits_at_a_rung_and_comes_back(small: Pair, tmp_path: Path) -> None:
    """Successive halving takes adapters out of the bank and back, whatever ranks they have by then."""
    recipe = COMMON.replace(**KINDS["grow"])
    given: dict[str, Any] = {"base": small, "recipe": recipe, "progress": False}
    swept = sweep(
        **given, data=user_rows(2), eval_data=0.2, grid={"learning_rate": [1e-2, 1e-5, 2e-5]}, out=tmp_path / "sweep"
    )
    assert swept.winner == "learning_rate=0.01"
    halved = swept["learning_rate=1e-05"]
    assert halved.report.ranks["sites"] == {path: item.rank for path, item in halved.adapter.factors.items()}
    train, held = load_examples(user_rows(2)).split(0.2, seed=0)
    won = weft.train(
        **given | {"recipe": recipe.replace(learning_rate=1e-2)}, data=train, eval_data=held, out=tmp_path / "alone"
    )
    error, size = furthest(swept[swept.winner].adapter, won.adapter)
    assert error <= TOLERANCES["steps"].atol + TOLERANCES["steps"].rtol * size
    assert swept[swept.winner].report.ranks["sites"] == won.report.ranks["sites"]
    assert swept[swept.winner].report.ranks["changes"]


def test_moments_go_along_and_neighbours_stay() -> None:
    """In the stacks: the function is unchanged by a growth, and what others have keeps its bytes."""
    model, _ = byte_base(layers=1)
    with weft.attach(model, {}) as bank:
        pool = Pool(bank)
        bank._pools.append(pool)
        for name, rank in (("one", 2), ("two", 3)):
            pool.add(name, weft.LoraSpec(rank=rank, alpha=8), seed=rank)
        with torch.no_grad():
            for leaf in pool.leaves:
                leaf.parameter.normal_()
                leaf.companion("first").normal_()
                leaf.companion("second").uniform_()
        before = {name: {path: (slot.scale, slot.lora_A.detach().clone(), slot.lora_B.detach().clone()) for path, (_, slot) in pool.slots(name).items()} for name in ("one", "two")}  # fmt: skip
        moments = {leaf.path + leaf.part: [leaf.companion(key)[leaf.lines["two"]].clone() for key in ("first", "second")] for leaf in pool.leaves}  # fmt: skip
        slots = pool.slots("one")
        changes = {path: grown(*pair, 5, seed=1) for path, pair in slots.items()}
        pool.resize(
            "one", {path: change for path, change in changes.items() if change is not None}, squares=("second",)
        )
        for path, (_, slot) in pool.slots("one").items():
            scale, A, B = before["one"][path]
            assert slot.lora_A.shape[0] == slot.rank == 5
            torch.testing.assert_close(slot.scale * slot.lora_B @ slot.lora_A, scale * B @ A)
            first = slot.leaves["B"].companion("first")[slot.leaves["B"].lines["one"]]
            assert (first[2:] == 0).all()
            assert (first[:2] != 0).all()
        for path, (_, slot) in pool.slots("two").items():
            assert torch.equal(slot.lora_A, before["two"][path][1])
            assert torch.equal(slot.lora_B, before["two"][path][2])
            for part in "AB":
                leaf = slot.leaves[part]
                found = [leaf.companion(key)[leaf.lines["two"]] for key in ("first", "second")]
                assert all(map(torch.equal, found, moments[path + part]))
        pool.resize("one", {path: kept_directions(torch.tensor([[1]])) for path in slots}, squares=("second",))
        for path, (_, slot) in pool.slots("one").items():
            assert torch.equal(slot.lora_A, before["one"][path][1][1:2])


def test_what_leaves_no_room_is_refused_before_anything_starts(small: Pair, tmp_path: Path) -> None:
    given: dict[str, Any] = {"base": small, "data": {"a": user_rows(0), "b": user_rows(1)}, "out": tmp_path / "many"}
    grow = weft.GrowOnPlateau(max_rank=4)
    with pytest.raises(RecipeError, match="'b': adaptive.max_rank=4 leaves no room"):
        weft.train_many(**given, eval_data=0.2, recipe={"a": COMMON, "b": COMMON.replace(rank=8, adaptive=grow)})
    with pytest.raises(RecipeError, match=r"'a'.*no evaluation data"):
        weft.train_many(**given, recipe={"a": COMMON.replace(rank=2, adaptive=grow), "b": COMMON})
    assert not (tmp_path / "many").exists()
