"""Which rank: the three rules, and the advice on a tiny base."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch

from tests.unit.train.support import byte_base
from weft.data import encode, load_examples
from weft.errors import DataError, PlanError
from weft.plan.capacity import DataBits, bits_of, rank_for_bits
from weft.plan.ranks import by_capacity, by_spectrum, by_thumb, recommend_rank
from weft.plan.spectra import SiteSpectrum
from weft.spec import LoraSpec
from weft.train.recipe import Recipe

LETTERS = "abcdefgh"


def _rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": "say ", "completion": "".join(random.choices(LETTERS, k=12))} for _ in range(count)]


def test_bits_are_those_of_the_shorter_code() -> None:
    _, tokenizer = byte_base()
    same = encode(
        load_examples([{"prompt": str(index), "completion": "all alike"} for index in range(200)]),
        tokenizer,
        max_length=64,
    )
    drawn = encode(load_examples(_rows(200)), tokenizer, max_length=64)
    for part in (same, drawn):
        found = bits_of(part, 4.0, 0.5)
        assert found.by_base == pytest.approx(part.num_loss_tokens * 4.0 / 0.693147, rel=1e-5)
        assert found.bits == pytest.approx(0.5 * min(found.by_base, found.packed))
    assert bits_of(same, 4.0, 1).packed < 0.1 * bits_of(drawn, 4.0, 1).packed
    # eight letters are three bits each; a compressor takes more, never less
    assert bits_of(drawn, 4.0, 1).packed > 200 * 12 * 3


def test_labels_hold_no_more_than_their_entropy() -> None:
    _, tokenizer = byte_base()
    rows = [{"text": f"text {index}", "label": "yes" if index % 4 else "no"} for index in range(64)]
    found = bits_of(encode(load_examples(rows), tokenizer, labels=["no", "yes"], max_length=64), 3.0, 1.0)
    assert found.classifies
    assert found.bits == pytest.approx(64 * 0.811278, rel=1e-4)


def test_capacity_is_two_bits_a_number() -> None:
    assert rank_for_bits(8000, 500) == 8
    wanted, reason = by_capacity(DataBits(100, 2000, 2.0, 16000.0, 20000.0, 0.5), 500)
    assert wanted == 8
    assert "sees 50%" in reason
    assert "2,000 tokens" in reason


def test_the_rule_of_thumb() -> None:
    assert by_thumb("classification", 4096)[0] == 4
    assert by_thumb("completion", 4096)[0] == 16
    assert by_thumb("text", 1024)[0] == 32
    assert by_thumb("chat", 64)[0] == 64
    assert by_thumb("chat", 10**6)[0] == 8
    assert by_thumb("chat", 0)[0] == 16


def test_the_spectrum_counts_directions_over_all_sites() -> None:
    one = SiteSpectrum("a", 8, 8, 16, (97.0, 1.0, 1.0, 1.0), 100)
    other = SiteSpectrum("b", 8, 8, 16, (0.5, 0.3, 0.1, 0.1), 1)
    assert by_spectrum([one, other], 0.70)[0] == 1
    assert by_spectrum([one, other], 0.88)[0] == 2
    assert by_spectrum([one, other], 0.94)[0] == 3
    assert by_spectrum([one, other], 0.97)[0] == 4
    assert by_spectrum([SiteSpectrum("c", 8, 8, 16, (0.0, 0.0), 0.0)])[0] == 2  # nothing agrees: all that was looked at
    assert one.effective_rank == pytest.approx(100**2 / (97**2 + 3))


def test_the_advice_is_the_middle_rank_and_can_be_trained() -> None:
    model, tokenizer = byte_base()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = Recipe(epochs=2, batch_size=4, max_length=48)
    advice = recommend_rank(
        (model, tokenizer), _rows(24), spec=LoraSpec(rank=3, targets=["q_proj", "up_proj"]), recipe=recipe
    )
    assert [rule.name for rule in advice.rules] == ["thumb", "capacity", "spectrum"]
    assert advice.rank == sorted(rule.rank for rule in advice.rules)[1]
    assert all(rule.rank & (rule.rank - 1) == 0 and rule.rank <= 32 for rule in advice.rules)
    assert advice.recipe.spec == LoraSpec(rank=advice.rank, alpha=32, targets=["q_proj", "up_proj"])
    assert advice.recipe.replace(spec=None) == recipe
    assert (advice.steps, advice.epochs) == (12, 2)
    assert advice.numbers == 2 * (64 + 80)
    assert advice.at_speed(2.0).seconds == 24
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert json.loads(json.dumps(advice.to_dict()))["rank"] == advice.rank
    text = advice.at_speed(30.0).text()
    assert all(
        word in text for word in ("thumb", "capacity", "spectrum", "6 min", f"rank={advice.rank}", "learning rate")
    )


def test_ranks_by_site_go_into_the_recipe() -> None:
    advice = recommend_rank(byte_base(), _rows(16), recipe=Recipe(batch_size=4, max_length=48))
    least = 4 * advice.numbers
    recipe = advice.recipe_within(3 * least)
    assert recipe.spec is not None
    spent = advice.spend(3 * least)
    assert {path: recipe.spec.rank_at(path) for path in spent.ranks} == dict(spent.ranks)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(PlanError, match=f"{least:,} bytes"):
        advice.spend(least - 1)


def test_memory_limits_the_rank() -> None:
    base, rows, recipe = byte_base(), _rows(16), Recipe(batch_size=4, max_length=48)
    one = recommend_rank(base, rows, recipe=recipe).numbers * 16
    tight = recommend_rank(base, rows, recipe=recipe, memory=2 * one + 1)
    assert all(rule.rank <= 2 for rule in tight.rules)
    assert "at most 2 fits" in tight.text()
    with pytest.raises(PlanError, match="rank 1 at 14 sites"):
        recommend_rank(base, rows, recipe=recipe, memory=one - 1)


def test_data_that_are_too_few_are_refused() -> None:
    with pytest.raises(DataError, match="two halves"):
        recommend_rank(byte_base(), _rows(1), recipe=Recipe(max_length=48))
    with pytest.raises(DataError):
        recommend_rank(byte_base(), [], recipe=Recipe(max_length=48))
