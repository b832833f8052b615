"""What can be asked of adaptive ranks: values, sections of a recipe, refusals; importance and budgets against plain loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import weft
from weft.errors import RecipeError
from weft.train.adaptive import adaptive_from, check_spec, to_section
from weft.train.importance import Importance, allocate, budget_at, direction_scores
from weft.train.recipe import Recipe
from weft.train.schedule import Facts, settle


@pytest.mark.parametrize(
    "value",
    [
        weft.GrowOnPlateau(max_rank=16, add=3),
        weft.BudgetRanks(target_rank=3.5, every=7),
        weft.ShrinkBySpectrum(error=0.1, every=5),
    ],
)
def test_a_recipe_keeps_it_in_yaml(value: Any, tmp_path: Path) -> None:
    recipe = Recipe(adaptive=value)
    assert Recipe.load(recipe.save(tmp_path / "recipe.yaml")) == recipe
    assert adaptive_from(to_section(value)) == value
    assert recipe.replace(seed=3).adaptive == value
    assert hash(recipe)


def test_assignments_reach_into_the_section() -> None:
    recipe = Recipe().set(["adaptive.kind=grow", "adaptive.max_rank=32", "adaptive.patience=1"])
    assert recipe.adaptive == weft.GrowOnPlateau(max_rank=32, patience=1)
    assert recipe.set(["adaptive.patience=4"]).adaptive == weft.GrowOnPlateau(max_rank=32, patience=4)
    assert Recipe().set(["adaptive=shrink", "adaptive.energy=0.9"]).adaptive == weft.ShrinkBySpectrum(energy=0.9)
    assert Recipe().adaptive is None
    assert recipe.set(["adaptive=null"]).adaptive is None


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"kind": "growth"}, "grow, budget, shrink.*Did you mean 'grow'"),
        ({"max_rank": 4}, "expected one of grow"),
        ({"kind": "grow", "max_ranks": 4}, "Did you mean 'max_rank'"),
        ({"kind": "grow", "factor": 1.0}, "above 1"),
        ({"kind": "grow", "factor": 2, "add": 2}, "give one of them"),
        ({"kind": "grow", "until": 0}, "at most 1"),
        ({"kind": "grow", "max_rank": True}, "whole number"),
        ({"kind": "budget", "warmup": 0.5, "final": 0.5}, "no steps in between"),
        ({"kind": "budget", "min_rank": 9}, "above target_rank"),
        ({"kind": "shrink", "energy": 1.0}, "between 0 and 1"),
        ({"kind": "shrink", "energy": 0.9, "error": 0.1}, "give one of them"),
        (3, "expected a section"),
    ],
)
def test_what_is_wrong_is_named(section: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe(adaptive=section)


def test_what_contradicts_the_spec_or_the_run() -> None:
    with pytest.raises(RecipeError, match="no room to grow from rank=8"):
        check_spec(weft.GrowOnPlateau(max_rank=8), weft.LoraSpec(rank=8))
    with pytest.raises(RecipeError, match="rank=8"):
        check_spec(weft.BudgetRanks(target_rank=4), weft.LoraSpec(rank=4))
    with pytest.raises(RecipeError, match="init='pissa'"):
        check_spec(weft.ShrinkBySpectrum(), weft.LoraSpec(init="pissa"))
    with pytest.raises(RecipeError, match="compile"):
        Recipe(adaptive="grow", compile=True)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="no evaluation data"):
        settle(Recipe(adaptive=weft.GrowOnPlateau()), Facts(32, False, "text"))
    settle(Recipe(adaptive=weft.ShrinkBySpectrum()), Facts(32, False, "text"))
    with pytest.raises(RecipeError, match="give one of them"):
        weft.train(
            data=[], adaptive=weft.GrowOnPlateau(), recipe=Recipe(adaptive=weft.GrowOnPlateau(max_rank=3)), out="unused"
        )


def test_ranks_of_a_growth() -> None:
    grow = weft.GrowOnPlateau(max_rank=12)
    assert [grow.next_rank(rank) for rank in (1, 2, 4, 8, 12, 20)] == [2, 4, 8, 12, 12, 20]
    assert weft.GrowOnPlateau(max_rank=12, factor=1.1).next_rank(2) == 3, "at least one more"
    assert weft.GrowOnPlateau(max_rank=12, add=3).next_rank(2) == 5


def test_importance_against_the_paper_in_numpy(seed: int) -> None:
    random = np.random.default_rng(seed)
    importance = Importance(0.85, 0.9)
    smooth, unsure = np.zeros((2, 3, 4)), np.zeros((2, 3, 4))
    for _ in range(5):
        weight, gradient = random.normal(size=(2, 3, 4)), random.normal(size=(2, 3, 4))
        importance.see("site:A", torch.tensor(weight), torch.tensor(gradient))
        sensitivity = np.abs(weight * gradient)
        smooth = 0.85 * smooth + 0.15 * sensitivity
        unsure = 0.9 * unsure + 0.1 * np.abs(sensitivity - smooth)
    np.testing.assert_allclose(importance.of("site:A").numpy(), smooth * unsure, rtol=1e-4, atol=1e-9)
    A, B = torch.rand(2, 3, 4), torch.rand(2, 5, 3)
    scores = direction_scores(A, B)
    for block in range(2):
        for direction in range(3):
            expected = sum(A[block, direction].tolist()) / 4 + sum(B[block, :, direction].tolist()) / 5
            assert float(scores[block, direction]) == pytest.approx(expected, rel=1e-5)


def test_a_budget_falls_as_a_cubic_and_goes_where_the_scores_are(seed: int) -> None:
    budgets = [budget_at(step, 10, 50, 100, 40) for step in range(60)]
    assert budgets[:11] == [100] * 11
    assert budgets[50:] == [40] * 10
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[30] == round(40 + 60 * 0.5**3)
    generator = torch.Generator().manual_seed(seed)
    scores = {path: torch.rand(1, 6, generator=generator) for path in "abc"}
    kept = allocate(scores, 9, least=1)
    assert sum(index.shape[1] for index in kept.values()) == 9
    inside = min(float(scores[path][0, index[0]].min()) for path, index in kept.items() if index.shape[1] > 1)
    for path, index in kept.items():
        out = sorted(set(range(6)) - set(index[0].tolist()))
        assert index[0].tolist() == sorted(index[0].tolist())
        assert all(float(scores[path][0, k]) <= inside for k in out)
    assert {index.shape[1] for index in allocate(scores, 3).values()} == {1}, "each site keeps one"
    grouped = allocate({"conv": torch.rand(4, 3, generator=generator), "b": scores["b"]}, 9, costs={"conv": 4, "b": 1})
    assert 4 * grouped["conv"].shape[1] + grouped["b"].shape[1] <= 9
