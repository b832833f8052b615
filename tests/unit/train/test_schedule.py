"""A recipe, settled for one run."""

from __future__ import annotations

import pytest

from weft.errors import RecipeError
from weft.spec import LoraSpec
from weft.train.recipe import Recipe
from weft.train.schedule import Facts, learning_rate_for, settle

FACTS = Facts(features=1000, evaluated=True, kind="completion", width=2048, family="llama")


def test_steps_follow_epochs_batches_and_processes() -> None:
    assert settle(Recipe(epochs=2, batch_size=8), FACTS).steps == 250
    assert settle(Recipe(epochs=2, batch_size=8, accumulation=4), FACTS).steps == 64
    two = Facts(features=1000, evaluated=True, kind="text", processes=2)
    assert settle(Recipe(epochs=2, batch_size=8), two).steps == 126
    assert settle(Recipe(max_steps=7), FACTS).steps == 7
    assert settle(Recipe(), FACTS).epochs == 3


def test_the_learning_rate_follows_the_rule_and_says_so() -> None:
    rate, reason = learning_rate_for(2000, "llama", 1000)
    assert rate == pytest.approx(5e-4)
    assert "10 x" in reason
    assert learning_rate_for(2000, "llama", 99)[0] == pytest.approx(7.5e-4)
    assert learning_rate_for(8000, "llama", 1000)[0] < 2e-4
    assert learning_rate_for(8000, "qwen3", 1000)[0] == pytest.approx(5e-4 * 4**-0.0775, rel=0.02)
    assert learning_rate_for(0, "", 1000)[0] == pytest.approx(5e-4)
    assert learning_rate_for(64, "llama", 1000)[0] == pytest.approx(7.3e-3, rel=0.02)
    assert learning_rate_for(2000, "llama", 1000, alpha=8)[0] == pytest.approx(1e-3)
    assert learning_rate_for(2000, "llama", 1000, alpha=64)[0] == pytest.approx(2.5e-4)
    assert learning_rate_for(2000, "llama", 1000, alpha=0.01)[0] == pytest.approx(2e-3)
    assert settle(Recipe(learning_rate=1e-3), FACTS).rate_reason == "0.001: as the recipe says"


@pytest.mark.parametrize("rank", [8, 16, 64, 128])
def test_a_larger_scale_keeps_the_first_steps_and_a_smaller_one_half_of_the_way(rank: int) -> None:
    def step(spec: LoraSpec) -> float:
        reach = spec.scale_at("") * spec.rank_at("")
        return reach * learning_rate_for(2000, "llama", 1000, reach)[0]

    usual = step(LoraSpec(rank=rank, alpha=32))
    assert usual == pytest.approx(32 * 5e-4)
    for spec in (LoraSpec(rank=rank), LoraSpec(rank=rank, alpha=16, rslora=True)):
        reach = spec.scale_at("") * spec.rank_at("")
        expected = usual * min(1.0, reach / 32) ** 0.5
        assert step(spec) == pytest.approx(expected, rel=0.05)  # two digits are kept


def test_intervals_fit_the_run() -> None:
    short = settle(Recipe(max_steps=5), FACTS)
    assert (short.log_every, short.eval_every, short.save_every) == (1, 1, 1)
    long = settle(Recipe(max_steps=100_000), FACTS)
    assert (long.log_every, long.eval_every, long.save_every) == (50, 500, 500)
    assert settle(Recipe(max_steps=100, save_every=7), FACTS).eval_every == 14
    assert settle(Recipe(max_steps=100, eval_every=30), FACTS).save_every == 30


def test_warm_up_is_a_tenth_and_shorter_than_the_run() -> None:
    assert settle(Recipe(max_steps=100), FACTS).warmup_steps == 10
    assert settle(Recipe(max_steps=1), FACTS).warmup_steps == 0
    with pytest.raises(RecipeError, match="not shorter than the run"):
        settle(Recipe(epochs=1, batch_size=1000, warmup_steps=5), FACTS)


def test_without_evaluation_data_nothing_may_depend_on_it() -> None:
    alone = Facts(features=100, evaluated=False, kind="text")
    settled = settle(Recipe(), alone)
    assert not settled.best
    assert settled.patience == settled.eval_every == 0
    for recipe in (Recipe(patience=2), Recipe(eval_every=5), Recipe(metric="eval_loss")):
        with pytest.raises(RecipeError, match="needs evaluation data"):
            settle(recipe, alone)


def test_the_metric_must_be_one_that_this_kind_reports() -> None:
    with pytest.raises(RecipeError, match="never reported for completion data"):
        settle(Recipe(metric="eval_accuracy"), FACTS)
    labels = Facts(features=10, evaluated=True, kind="classification")
    assert settle(Recipe(metric="eval_accuracy"), labels).higher_is_better
    with pytest.raises(RecipeError, match="one label a row"):
        settle(Recipe(batching="packed"), labels)


def test_half_precision_needs_a_gpu() -> None:
    with pytest.raises(RecipeError, match="needs a GPU"):
        settle(Recipe(mixed_precision="fp16"), FACTS)
    assert settle(Recipe(), FACTS).precision == "no"


def test_no_feature_is_an_error() -> None:
    with pytest.raises(RecipeError, match="no training example"):
        settle(Recipe(), Facts(features=0, evaluated=False, kind="text"))
