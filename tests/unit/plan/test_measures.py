"""The choice of measures: against all combinations, and what is said where none fits."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from weft.errors import BudgetError
from weft.plan.measures import Measure, Trial, axes_of, choose, measures
from weft.plan.memory import Gauge, Memory
from weft.plan.sizes import bytes_of
from weft.plan.skeleton import find_config
from weft.plan.subject import Subject
from weft.spec import LoraSpec
from weft.train import Recipe

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
RECIPE = Recipe(batch_size=2)
FIELDS = ("gradient_checkpointing", "loss_chunk", "optimizer")


def some(gauge: Gauge, now: Memory) -> list[Measure]:
    return [measure for measure in measures(gauge, RECIPE, now) if set(measure.changes) & {*FIELDS}]


@pytest.fixture(scope="module")
def gauge() -> Gauge:
    return Gauge(Subject(find_config(LLAMA), LoraSpec(rank=4, targets="all-linear")), 64)


@pytest.mark.parametrize("share", [0.9, 0.5])
def test_no_combination_that_fits_is_cheaper(gauge: Gauge, share: float) -> None:
    """Against all combinations of some measures, each followed."""
    now = gauge.memory(RECIPE)
    known = some(gauge, now)
    budget = now.overhead + int(share * now.own)
    recipe, memory = choose(gauge, RECIPE, budget, known)
    assert memory.total <= budget
    assert gauge.memory(recipe).total == memory.total
    axes = axes_of(gauge, RECIPE, known)
    trial = Trial(gauge, RECIPE, axes, budget)
    every = list(itertools.product(*(range(len(axis)) for axis in axes)))
    prices = {places: trial.price(places) for places in every if trial.fits(places)}
    mine = [
        price
        for places, price in prices.items()
        if trial.tried[places][0].replace(eval_batch_size=recipe.eval_batch_size) == recipe
    ]
    assert min(mine) == min(prices.values())


def test_a_budget_that_is_too_small_by_how_much(gauge: Gauge) -> None:
    now = gauge.memory(RECIPE)
    with pytest.raises(BudgetError) as caught:
        choose(gauge, RECIPE, now.overhead, some(gauge, now))
    text = str(caught.value)
    found = re.search(r"it takes ([\d.]+ \w+), ([\d.]+ \w+) too much", text)
    assert found, text
    takes, over = (bytes_of(size) for size in found.groups())
    assert takes - over == pytest.approx(now.overhead, rel=0.01)
    assert "What would help most" in text


def test_every_measure_says_what_it_is(gauge: Gauge) -> None:
    now = gauge.memory(RECIPE)
    for measure in measures(gauge, RECIPE, now):
        if measure.applies:
            changed = gauge.memory(RECIPE.replace(**measure.changes))
            assert measure.saving == now.total - changed.total
        else:
            assert measure.why


def test_what_fits_only_with_both_moved_away_is_found() -> None:
    """A GPU that isn't there: weights and activations each alone are too much."""
    gauge = Gauge(
        Subject(find_config(LLAMA | {"hidden_size": 128, "num_hidden_layers": 12}), LoraSpec(rank=2), "cuda"), 64
    )
    recipe = Recipe(batch_size=1)
    now = gauge.memory(recipe)
    known = [measure for measure in measures(gauge, recipe, now) if "offload" in measure.changes]
    assert len(axes_of(gauge, recipe, known)[0]) == 4, "nothing, each, both"
    both = gauge.memory(recipe.replace(offload=["base", "activations"]))
    assert both.total < min(now.total - measure.saving for measure in known)
    found, memory = choose(gauge, recipe, both.total, known)
    assert set(found.offload) == {"base", "activations"}
    assert memory.total == both.total
