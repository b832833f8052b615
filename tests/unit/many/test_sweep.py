"""Sweeps: which settings are tried, who is given up, who wins and how sure that is."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

import weft
from tests.unit.train.support import same
from weft.data import load_examples
from weft.errors import DataError, RecipeError
from weft.many import Runs, sweep
from weft.many.combinations import combinations, label, read_grid, recipe_of
from weft.many.confidence import compare
from weft.many.halving import Halving
from weft.many.sweep_plot import plot
from weft.train.recipe import Recipe

Pair = tuple[nn.Module, Any]
ROWS = [
    {"prompt": f"{letter * (1 + turn)}?", "completion": letter * (1 + turn)}
    for turn in range(3)
    for letter in "abcdefghijkl"
]
RECIPE = Recipe(max_steps=16, batch_size=8, eval_every=2)


def test_a_grid_is_all_combinations() -> None:
    grid = read_grid(["rank=4, 8", "learning_rate=1e-4,3e-4", "targets=[q_proj, v_proj],all-linear"])
    found = combinations(grid)
    assert len(found) == 8
    assert found[0] == {"rank": 4, "learning_rate": 1e-4, "targets": ["q_proj", "v_proj"]}
    assert len({label(item) for item in found}) == 8
    recipe = recipe_of(Recipe(weft.LoraSpec(rank=2)), {"rank": 16, "learning_rate": 3e-4, "rank_pattern.q_proj": 2})
    assert (recipe.spec.rank, recipe.spec.alpha, recipe.learning_rate) == (16, 16, 3e-4)  # type: ignore[union-attr]
    assert recipe.spec.rank_pattern == {"q_proj": 2}  # type: ignore[union-attr]


def test_random_combinations() -> None:
    grid = read_grid(["rank=4..64", "learning_rate=1e-5..1e-2", "dropout=0,0.1"])
    found = combinations(grid, 200, seed=3)
    assert found == combinations(grid, 200, seed=3) != combinations(grid, 200, seed=4)
    assert all(
        4 <= item["rank"] <= 64 and isinstance(item["rank"], int) and 1e-5 <= item["learning_rate"] <= 1e-2
        for item in found
    )
    below = sum(item["learning_rate"] < 3.2e-4 for item in found)
    assert 70 < below < 130, "even in the logarithm"
    assert len(combinations({"rank": [1, 2]}, 50)) == 2, "no more than there are"


@pytest.mark.parametrize(
    ("grid", "sample", "message"),
    [
        (["rank"], None, "expected NAME=A,B,C"), (["rank=1", "rank=2"], None, "swept twice"), ([], None, "a sweep of nothing"),
        (["learning_rate=1e-5..1e-3"], None, "say how many"), (["rank=8..4"], 3, "to a larger one"), (["rank=4,8"], 0, "sample=0"),
        ([f"seed={','.join(map(str, range(200)))}", f"rank={','.join(map(str, range(1, 200)))}"], None, "39,800 combinations"),
    ],
)  # fmt: skip
def test_what_can_not_be_swept(grid: list[str], sample: int | None, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        combinations(read_grid(grid), sample)


def parked(loss: float, step: int, steps: int = 27, every: int = 1) -> Any:
    schedule = SimpleNamespace(eval_every=every, steps=steps, metric="eval_loss", higher_is_better=False)
    member = SimpleNamespace(schedule=schedule, course=SimpleNamespace(metrics={"loss": loss}, step=step), due=0)
    return SimpleNamespace(member=member)


def test_one_in_three_goes_on_at_each_rung() -> None:
    halving = Halving(9, 3)
    waiting = [parked(loss, 3) for loss in (5.0, 1.0, float("nan"), 3.0, 2.0, 9.0, 8.0, 7.0, 6.0)]
    assert halving.first(waiting[0].member) == 3
    going = halving.judge(waiting)
    assert [item.member.course.metrics["loss"] for item in going] == [1.0, 3.0, 2.0]
    assert {item.member.due for item in going} == {9}
    for item in going:
        item.member.course.step = 9
    (last,) = halving.judge(going)
    assert (last.member.course.metrics["loss"], last.member.due) == (1.0, 27)
    assert Halving(9, 1).first(waiting[0].member) == 27
    assert Halving(27, 3).rungs(parked(1.0, 0, steps=100, every=10).member) == [10, 20, 40], (
        "where an evaluation is anyway"
    )
    with pytest.raises(RecipeError, match="halving=0"):
        Halving(9, 0)


def test_a_bootstrap_is_sure_where_it_can_be() -> None:
    generator = np.random.default_rng(random.randrange(2**31))
    hard = generator.uniform(1, 3, 200)
    rows = [
        [[[float(loss + offset + generator.normal(0, 0.05)), 1] for loss in hard]] for offset in (0.0, 0.1, 0.0, 1.0)
    ]
    found = compare(rows)
    assert found.wins.sum() == pytest.approx(1)
    assert found.wins[1] < 0.01 > found.wins[3], "paired: the rows' own spread is ten times the difference"
    assert 0.01 < found.wins[0] < 0.999, "and two that are alike share"
    assert (found.low < found.losses).all()
    assert (found.losses < found.high).all()
    one = np.array(rows[0])[0]
    assert found.losses[0] == pytest.approx(one[:, 0].sum() / one[:, 1].sum())


def test_seeds_widen_what_is_said() -> None:
    generator = np.random.default_rng(0)
    rows = generator.uniform(1, 1.01, 300)
    noisy = [[[float(loss + shift), 1] for loss in rows] for shift in (-0.2, 0.2, 0.1, -0.1)]
    sure = [[[float(loss + 0.02), 1] for loss in rows]] * 4
    found = compare([noisy, sure])
    assert found.losses[0] < found.losses[1]
    assert 0.05 < found.wins[1] < 0.95


def test_a_sweep_from_data_to_a_winner(small: Pair, tmp_path: Path) -> None:
    grid = {"rank": [1, 4], "learning_rate": [1e-5, 3e-2]}
    runs = sweep(
        base=small,
        data=ROWS,
        eval_data=0.25,
        grid=grid,
        recipe=RECIPE,
        halving=2,
        out=tmp_path / "sweep",
        slots=3,
        progress=False,
    )
    assert runs.winner == "rank=4,learning_rate=0.03"
    assert list(runs.report.by_field or ()) == ["rank", "learning_rate"]
    assert runs.report.by_field["learning_rate"]["0.03"] > 0.9  # type: ignore[index]
    states = {row["name"]: (row["status"], row["steps"]) for row in runs.report.rows}
    assert states[runs.winner] == ("end", 16)
    assert states["rank=1,learning_rate=1e-05"] == ("halved", 4)
    text = runs.report.text()
    for part in ("rank=4,learning_rate=0.03", "given up", "learning_rate: 0.03 is best in", "compared as it was then"):
        assert part in text
    picture = (tmp_path / "sweep" / "sweep.svg").read_text()
    assert picture.count("<polyline") == 2
    assert picture in (tmp_path / "sweep" / "report.html").read_text()
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["winner"] == runs.winner
    recipe = Recipe.load(tmp_path / "sweep" / "winner.yaml")
    assert (recipe.spec.rank, recipe.learning_rate) == (4, 3e-2)  # type: ignore[union-attr]
    train, held = load_examples(ROWS).split(0.25, seed=0)
    alone = weft.train(base=small, data=train, eval_data=held, recipe=recipe, out=tmp_path / "alone", progress=False)
    for name, tensor in alone.adapter.tensors().items():
        assert float((tensor - runs[runs.winner].adapter.tensors()[name]).abs().max()) < 1e-3, (
            "halving changes nothing that it learns"
        )
    assert isinstance(weft.train_many(out=tmp_path / "sweep", resume=True), type(runs))
    assert set(Runs.open(tmp_path / "sweep")) == set(runs)


def test_a_sweep_over_seeds_compares_their_means(small: Pair, tmp_path: Path) -> None:
    runs = sweep(
        base=small, data=ROWS, eval_data=0.25, grid=["rank=1,2", "seed=0,1"], recipe=RECIPE.replace(max_steps=4, learning_rate=1e-2), halving=1,
        out=tmp_path / "sweep", progress=False,
    )  # fmt: skip
    assert [len(row["names"]) for row in runs.report.table] == [2, 2]
    assert list(runs.report.by_field or ()) == ["rank"]
    assert not same(runs["rank=1,seed=0"].adapter, runs["rank=1,seed=1"].adapter)


def test_errors_of_sweeps(small: Pair, tmp_path: Path) -> None:
    common: dict[str, Any] = {"base": small, "data": ROWS, "out": tmp_path / "sweep"}
    with pytest.raises(DataError, match="judged on evaluation data"):
        sweep(**common, grid=["rank=1,2"])
    with pytest.raises(RecipeError, match="Did you mean 'rank'"):
        sweep(**common, eval_data=0.2, grid=["rnk=1,2"])
    with pytest.raises(RecipeError, match="dtype differs"):
        sweep(**common, eval_data=0.2, grid=["dtype=float32,bfloat16"])
    assert not (tmp_path / "sweep").exists()


def test_the_plot_of_anything() -> None:
    assert "nothing was trained" in plot([])
    row = {"loss": 1.0, "low": 0.9, "high": 1.1, "status": "end"}
    for settings in (
        [{"rank": 1}],
        [{"targets": ["a<b"]}, {"targets": "x&y"}],
        [{"lr": 10.0**-n, "rank": r} for n in range(12) for r in (1, 2)],
    ):
        picture = plot([{**row, "settings": item, "loss": 1.0 + 0.1 * number} for number, item in enumerate(settings)])
        assert picture.startswith("<svg")
        assert "a<b" not in picture
    assert "nan" not in plot(
        [{**row, "loss": float("inf"), "low": float("inf"), "high": float("inf"), "settings": {"rank": 1}}]
    )
