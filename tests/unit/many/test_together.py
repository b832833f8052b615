"""Together equals alone: an adapter that is trained beside others is the one that `weft.train` gives."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weft
from tests.models import tiny_gpt2
from tests.tolerances import TOLERANCES
from tests.unit.many.support import furthest, user_rows
from tests.unit.train.support import byte_base, same
from weft.errors import RecipeError
from weft.many import training
from weft.many.engine import Apart
from weft.train.recipe import Recipe

Pair = tuple[nn.Module, Any]


def recipe_for(number: int, steps: int) -> Recipe:
    """No two users have the same: rank, sites, scale, dropout, DoRA, schedule, rate, batch, clipping, stop."""
    spec = weft.LoraSpec(
        rank=(2, 4, 3, 8, 1, 16, 5, 6)[number % 8], alpha=(8, 4, 16)[number % 3], dropout=(0.0, 0.05, 0.3)[number % 3],
        targets=("all-linear", ("q_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj"), "default")[number % 4],
        dora=number % 5 == 4, rslora=number % 7 == 3, init=("kaiming", "gaussian", "pissa")[number % 3] if number % 5 != 4 else "kaiming",
    )  # fmt: skip
    return Recipe(
        spec, max_steps=steps - steps * (number % 4) // 20, learning_rate=(1e-3, 5e-3, 2e-3)[number % 3], batch_size=1 + number % 5,
        accumulation=1 + number % 2, schedule=("cosine", "linear", "constant", "inverse_sqrt", "polynomial")[number % 5],
        warmup_ratio=(0.1, 0.0, 0.3)[number % 3], weight_decay=(0.01, 0.1)[number % 2], clip=(1.0, 0.05, 0.0)[number % 3],
        lora_plus_ratio=None if number % 4 else 4.0, seed=number, batching=("length", "random", "packed")[number % 3],
        max_length=40, eval_every=(max(1, steps // 5), max(1, steps // 4))[number % 2], patience=(0, 1)[number % 2],
    )  # fmt: skip


def check(base: Pair, count: int, steps: int, folder: Path, tolerance: torch.dtype | str, alone: range) -> None:
    data = {f"user {number}": user_rows(number, 5 + number) for number in range(count)}
    recipes = {name: recipe_for(number, steps) for number, name in enumerate(data)}
    common: dict[str, Any] = {"base": base, "eval_data": 0.2, "progress": False}
    runs = weft.train_many(
        **common, data=data, recipe=recipes, out=folder / "many", slots=max(2, count * 3 // 4), tokens=200
    )
    assert not runs.report.failed
    allowed = TOLERANCES[tolerance]
    for number in alone:
        name = f"user {number}"
        run = weft.train(**common, data=data[name], recipe=recipes[name], out=folder / f"alone-{number}")
        error, size = furthest(runs[name].adapter, run.adapter)
        assert error <= allowed.atol + allowed.rtol * size, (
            f"{name}: off by {error:.3g} of {size:.3g} ({recipes[name]})"
        )
        ours, theirs = runs[name].report, run.report
        assert (ours.steps, ours.best_step, ours.stopped) == (theirs.steps, theirs.best_step, theirs.stopped)
        if recipes[name].batching != "packed":  # where weft.train counts padding too
            assert ours.tokens == theirs.tokens
        assert ours.adapter == pytest.approx(theirs.adapter, rel=1e-4)
        assert ours.base == pytest.approx(theirs.base, rel=1e-4)
        steps = [[row["step"] for row in log if row.get("of", "base") == "base"] for log in (runs[name].log, run.log)]
        assert steps[0] == steps[1], "losses and evaluations; what a single run watches beside them is its own"


def test_some_adapters_together_and_alone(tmp_path: Path) -> None:
    check(byte_base(layers=1, dtype=torch.float64), 6, 12, tmp_path, torch.float64, range(0, 6, 2))


@pytest.mark.slow
def test_sixteen_adapters_together_and_alone_for_a_hundred_steps(tmp_path: Path) -> None:
    check(byte_base(layers=1), 16, 100, tmp_path, "steps", range(16))


@pytest.mark.slow
def test_sixteen_adapters_together_and_alone_to_ten_digits(tmp_path: Path) -> None:
    """float64 shows in few steps what is wrong; ``WEFT_TEST_STEPS=100`` for more."""
    steps = int(os.environ.get("WEFT_TEST_STEPS", "20"))
    check(byte_base(layers=2, dtype=torch.float64), 16, steps, tmp_path, torch.float64, range(16))


def test_one_after_another_is_the_single_trainer_bit_by_bit(
    small: Pair, users: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow engine, with dropout and accumulation: the same bytes as weft.train."""
    monkeypatch.setattr(training, "_fast", lambda: Apart)
    recipe = Recipe(
        weft.LoraSpec(rank=3, dropout=0.1), max_steps=7, learning_rate=1e-2, batch_size=3, accumulation=2, eval_every=3
    )
    names = ["user 1", "user 4"]
    runs = weft.train_many(
        base=small,
        data={name: users[name] for name in names},
        eval_data=0.2,
        recipe=recipe,
        out=tmp_path / "many",
        progress=False,
    )
    for name in names:
        alone = weft.train(
            base=small, data=users[name], eval_data=0.2, recipe=recipe, out=tmp_path / name, progress=False
        )
        assert same(runs[name].adapter, alone.adapter)


def test_neighbours_change_nothing(small: Pair, users: dict[str, Any], tmp_path: Path) -> None:
    """The same user with other neighbours, other slots, other budgets of tokens."""
    recipe = Recipe(weft.LoraSpec(rank=4, dropout=0.2), max_steps=8, learning_rate=5e-3, batch_size=4)
    found = []
    for number, (names, slots, tokens) in enumerate(
        [(["user 3"], 32, 1024), (list(users), 32, 1024), (list(users)[::-1], 2, 30)]
    ):
        runs = weft.train_many(
            base=small, data={name: users[name] for name in names}, recipe=recipe, out=tmp_path / str(number), slots=slots, tokens=tokens, progress=False
        )  # fmt: skip
        found.append(runs["user 3"].adapter)
    for other in found[1:]:
        error, size = furthest(other, found[0])
        assert error <= TOLERANCES["steps"].atol + TOLERANCES["steps"].rtol * size


def test_a_base_that_drops_by_itself_draws_for_each_adapter_what_it_draws_alone(tmp_path: Path) -> None:
    """GPT-2 has dropout of its own: users go through it one after another, with their own streams."""
    model, tokenizer = tiny_gpt2(vocab_size=259, resid_pdrop=0.2, embd_pdrop=0.1), byte_base(layers=1)[1]
    recipe = Recipe(weft.LoraSpec(rank=2, dropout=0.1), max_steps=4, learning_rate=1e-2, batch_size=3)
    data = {f"user {number}": user_rows(number) for number in range(3)}
    common: dict[str, Any] = {"base": (model, tokenizer), "recipe": recipe, "progress": False}
    runs = weft.train_many(**common, data=data, out=tmp_path / "many")
    for name, rows in data.items():
        error, size = furthest(runs[name].adapter, weft.train(**common, data=rows, out=tmp_path / name).adapter)
        assert error <= TOLERANCES["steps"].atol + TOLERANCES["steps"].rtol * size


def test_classifiers_are_trained_in_the_same_way(small_dir: Path, tmp_path: Path) -> None:
    """A head is trained whole, which can't be stacked: those adapters are trained apart, in the same rounds."""
    words = ["apple", "pear", "orange", "plum", "egg", "bread", "ice", "milk"]
    data = {
        "vowels": [{"text": word, "label": "yes" if word[0] in "aeiou" else "no"} for word in words],
        "short": [{"text": word, "label": "yes" if len(word) < 5 else "no"} for word in words],
    }
    recipe = Recipe(weft.LoraSpec(rank=2), max_steps=5, learning_rate=1e-2, batch_size=4)
    from weft.models.load import load_base

    base = load_base(small_dir, task="classification", labels=["no", "yes"])
    runs = weft.train_many(base=base, data=data, eval_data=0.25, recipe=recipe, out=tmp_path / "many", progress=False)
    assert not runs.report.failed
    for name, rows in data.items():
        alone = weft.train(base=base, data=rows, eval_data=0.25, recipe=recipe, out=tmp_path / name, progress=False)
        error, size = furthest(runs[name].adapter, alone.adapter)
        assert error <= TOLERANCES["steps"].atol + TOLERANCES["steps"].rtol * size
        assert runs[name].report.adapter.keys() == {"loss", "accuracy", "macro_f1"}


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ({"a": Recipe(dtype="float32"), "b": Recipe()}, "dtype differs between recipes"),
        ({"a": Recipe(), "b": Recipe(optimizer="sgd")}, "'b': optimizer='sgd'"),
        (Recipe(report_to=("tensorboard",)), "trackers know one run"),
        (Recipe(mixed_precision="fp16"), "one user's overflow"),
        (Recipe(on_trouble="act"), "on_trouble='act' is for one adapter"),
        (Recipe(general="english"), "general='english' is for one adapter"),
        (Recipe(samples=9), "samples=9 is for one adapter"),
        (Recipe(compile=True), "compile=true"),
        ({"a": Recipe()}, "not for 'b'"),
        ({"a": Recipe(), "b": Recipe(), "c": Recipe()}, "of whom there are no data"),
    ],
)
def test_settings_that_can_not_share_a_base_are_refused_before_anything_starts(
    recipes: Any, message: str, small: Pair, tmp_path: Path
) -> None:
    data = {"a": user_rows(0), "b": user_rows(1)}
    with pytest.raises(RecipeError, match=message):
        weft.train_many(base=small, data=data, recipe=recipes, out=tmp_path / "many")
    assert not (tmp_path / "many").exists()
