"""train_many from data to run folders: the queue, failures, what is written."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weft
from tests.tolerances import TOLERANCES
from tests.unit.many.support import furthest, user_rows
from tests.unit.train.support import same
from weft.errors import DataError, RecipeError, RunError
from weft.many import ManyReport, Runs
from weft.many.engine import Engine
from weft.train.recipe import Recipe

Pair = tuple[nn.Module, Any]
QUICK = Recipe(weft.LoraSpec(rank=2), max_steps=4, learning_rate=1e-2, batch_size=4)


def test_what_a_many_run_leaves(small_dir: Path, users: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "runs"
    names = [*users, "../evil", "User 0"]
    data = {**users, "../evil": user_rows(7), "User 0": user_rows(8)}
    runs = weft.train_many(base=small_dir, data=data, eval_data=0.25, recipe=QUICK, out=out, slots=3, progress=False)
    assert (list(runs), len(runs), runs.path) == (names, 8, out)
    folders = {row["name"]: row["folder"] for row in runs.report.rows}
    assert folders["../evil"] == "evil"
    assert sorted(folders[name] for name in ("user 0", "User 0")) == sorted(
        {folders[name] for name in ("user 0", "User 0")}
    )
    assert not (tmp_path / "evil").exists()
    for name in names:
        folder = out / folders[name]
        assert {"adapter", "recipe.yaml", "log.jsonl", "report.json", "report.md", "curve.svg", "environment.json"} <= {
            path.name for path in folder.iterdir()
        }
        assert weft.load(folder).digest == runs[name].adapter.digest == runs[name].report.digest
        assert runs[name].adapter.provenance.evaluation.keys() == {
            "eval_loss",
            "eval_perplexity",
            "base_loss",
            "base_perplexity",
        }
        assert json.loads((folder / "environment.json").read_text())["name"] == name, "the true name is kept"
        assert Recipe.load(folder / "recipe.yaml").max_steps == 4
    assert weft.prove(out / folders["user 1"], weft.load_base(small_dir)[0]).ok
    opened = Runs.open(out)
    assert list(opened) == names
    assert opened.report == ManyReport.from_dict(json.loads((out / "report.json").read_text()))
    assert "8 of 8 adapters trained" in opened.report.text()
    page = (out / "report.html").read_text()
    assert "../evil" in page
    assert "http" not in page.replace("http://www.w3.org", ""), "the page needs no network"
    with pytest.raises(RunError, match="Did you mean 'user 1'"):
        runs["user1"]


def test_the_base_is_what_it_was(small: Pair, users: dict[str, Any], tmp_path: Path) -> None:
    model, _ = small
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    weft.train_many(base=small, data=users, recipe=QUICK, out=tmp_path / "runs", progress=False)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [type(module) for module in model.modules()] == kinds
    assert "_weft_bank" not in model.__dict__


def test_broken_data_stop_their_user_alone(small: Pair, users: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"prompt": \n')
    bad = {
        "broken": tmp_path / "broken.jsonl", "missing": tmp_path / "nowhere.jsonl", "unclear": [{"a": "x"}], "empty": [],
        "nothing": [{"prompt": "x", "completion": " "}],
    }  # fmt: skip
    good = {"user 1": users["user 1"], "user 2": users["user 2"]}
    mixed = dict(zip(["broken", "user 1", "missing", "unclear", "user 2", "empty", "nothing"], [None] * 7, strict=True))
    data = {name: {**bad, **good}[name] for name in mixed}
    runs = weft.train_many(base=small, data=data, recipe=QUICK, out=tmp_path / "runs", slots=2, progress=False)
    reasons = {row["name"]: row["reason"] for row in runs.report.failed}
    assert reasons.keys() == bad.keys()
    assert "invalid JSON" in reasons["broken"]
    assert "nowhere.jsonl" in reasons["missing"]
    assert [row["name"] for row in runs.report.rows] == [*(name for name in mixed if name in bad), *good], (
        "failed ones first"
    )
    assert json.loads((tmp_path / "runs" / "broken" / "failed.json").read_text())["reason"] == reasons["broken"]
    alone = weft.train_many(base=small, data=good, recipe=QUICK, out=tmp_path / "good", slots=2, progress=False)
    assert all(same(runs[name].adapter, alone[name].adapter) for name in good), "and the others don't notice"
    with pytest.raises(RunError, match="the run of 'empty' failed"):
        runs["empty"]


def test_a_user_with_one_example_is_trained_without_evaluation(
    small: Pair, users: dict[str, Any], tmp_path: Path
) -> None:
    """A share to hold out is asked of everybody; who has too little for it is not broken."""
    one = [{"prompt": "only?", "completion": "this"}]
    recipe = QUICK.replace(patience=1, eval_every=2)
    runs = weft.train_many(
        base=small, data={"one": one, "user 1": users["user 1"]}, eval_data=0.2, recipe=recipe, out=tmp_path / "runs", progress=False
    )  # fmt: skip
    assert not runs.report.failed
    rows = {row["name"]: row for row in runs.report.rows}
    assert (rows["one"]["steps"], rows["one"]["eval_examples"], rows["user 1"]["warnings"]) == (4, 0, [])
    assert "⚠  one: too few examples to hold some out" in runs.report.text()
    alone = weft.train(base=small, data=one, recipe=QUICK, out=tmp_path / "alone", progress=False)
    error, size = furthest(runs["one"].adapter, alone.adapter)
    assert error <= TOLERANCES["steps"].atol + TOLERANCES["steps"].rtol * size


def test_a_user_whose_loss_explodes_is_stopped_alone(small: Pair, users: dict[str, Any], tmp_path: Path) -> None:
    wild = QUICK.replace(max_steps=12, learning_rate=1e30, clip=0.0, schedule="constant", warmup_ratio=0.0)
    calm = QUICK.replace(max_steps=12)
    recipes = {name: wild if name == "user 2" else calm for name in users}
    runs = weft.train_many(
        base=small, data=users, eval_data=0.2, recipe=recipes, out=tmp_path / "runs", slots=4, progress=False
    )
    (failed,) = runs.report.failed
    assert failed["name"] == "user 2"
    assert "lower learning rate (now 1e+30)" in failed["reason"]
    assert not (tmp_path / "runs" / failed["folder"] / "adapter").exists()
    others = {name: rows for name, rows in users.items() if name != "user 2"}
    alone = weft.train_many(
        base=small, data=others, eval_data=0.2, recipe=calm, out=tmp_path / "alone", slots=4, progress=False
    )
    for name in others:
        error, size = furthest(runs[name].adapter, alone[name].adapter)
        assert error <= 1e-5 + 1e-4 * size, name


def test_nan_in_one_users_gradient_reaches_nobody_else(
    small: Pair, users: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that is finite with a gradient that isn't: only clipping and the optimizer could spread it."""
    train = Engine.train
    rounds = [0]

    def poisoned(self: Any, pieces: Any) -> dict[str, float]:
        losses = train(self, pieces)
        rounds[0] += 1
        if rounds[0] == 3:
            for leaf in self.pool.leaves[:3]:
                if "user_2" in leaf.lines:
                    leaf.parameter.grad[leaf.lines["user_2"]] = math.nan
        return losses

    expected = weft.train_many(base=small, data=users, recipe=QUICK, out=tmp_path / "clean", progress=False)
    monkeypatch.setattr(Engine, "train", poisoned)
    runs = weft.train_many(base=small, data=users, recipe=QUICK, out=tmp_path / "runs", progress=False)
    assert [row["name"] for row in runs.report.failed] == ["user 2"]
    assert "at step 3 of 4" in runs.report.failed[0]["reason"]
    for name in runs:
        error, size = furthest(runs[name].adapter, expected[name].adapter)
        assert error <= 1e-5 + 1e-4 * size


def test_many_users_pass_through_a_bank_of_thirty_two_slots(
    small: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``WEFT_TEST_USERS=1000`` for a thousand of them, half a minute."""
    from weft.many.rounds import Rounds

    count = int(os.environ.get("WEFT_TEST_USERS", "150"))
    most, entered = [0], set()
    done = Rounds.round

    def watched(self: Rounds) -> None:
        most[0] = max(most[0], len(self.active))
        assert len(self.engine.bank.names) == len(self.active) <= 32
        entered.update(member.name for member in self.active)
        done(self)

    monkeypatch.setattr(Rounds, "round", watched)
    data = {f"u{number}": user_rows(number % 7, 2 + number % 3) for number in range(count)}
    recipes = {name: QUICK.replace(max_steps=1 + number % 3, rank=1 + number % 4) for number, name in enumerate(data)}
    runs = weft.train_many(base=small, data=data, recipe=recipes, out=tmp_path / "runs", progress=False)
    assert (len(runs), most[0], len(entered)) == (count, 32, count)


def test_more_rounds_for_those_who_have_more(small: Pair, users: dict[str, Any], tmp_path: Path) -> None:
    """Epochs, batch share and stop are each one's own."""
    recipes = {
        name: QUICK.replace(max_steps=None, epochs=1 + number, batch_size=1 + number)
        for number, name in enumerate(users)
    }
    runs = weft.train_many(base=small, data=users, recipe=recipes, out=tmp_path / "runs", progress=False)
    for number, name in enumerate(users):
        assert runs[name].report.epochs == 1 + number
        assert runs[name].report.steps == (1 + number) * math.ceil(len(users[name]) / (1 + number))


@pytest.fixture
def finished(small_dir: Path, users: dict[str, Any], tmp_path: Path) -> Path:
    weft.train_many(base=small_dir, data={"a": users["user 1"]}, recipe=QUICK, out=tmp_path / "runs", progress=False)
    return tmp_path / "runs"


def test_a_folder_that_exists_is_left_alone(
    finished: Path, small_dir: Path, users: dict[str, Any], tmp_path: Path
) -> None:
    before = weft.load(finished / "a")
    with pytest.raises(RunError, match="resume it"):
        weft.train_many(base=small_dir, data=users, out=finished)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(RunError, match="files of others are left alone"):
        weft.train_many(base=small_dir, data=users, out=tmp_path / "mine", overwrite=True)
    with pytest.raises(RunError, match="run of one adapter"):
        weft.train_many(out=finished / "a", resume=True)
    assert weft.load(finished / "a") == before
    (finished / "notes.txt").write_text("mine")
    weft.train_many(
        base=small_dir, data={"b": users["user 2"]}, recipe=QUICK, out=finished, overwrite=True, progress=False
    )
    assert not (finished / "a").exists()
    assert (finished / "notes.txt").read_text() == "mine", "what weft did not write stays"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"data": None}, DataError, "no training data"), ({"slots": 0}, RecipeError, "slots=0"), ({"tokens": 1.5}, RecipeError, "tokens=1.5"),
        ({"processes": "all"}, RunError, "expected one of auto"), ({"recipe": {"x": QUICK}}, RecipeError, "no data"),
    ],
)  # fmt: skip
def test_what_can_not_be_run(
    given: dict[str, Any], error: type[Exception], message: str, small: Pair, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        weft.train_many(**{"base": small, "data": {"a": user_rows(0)}, "out": tmp_path / "runs", **given})
    assert not (tmp_path / "runs").exists()
