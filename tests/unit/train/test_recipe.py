"""Recipe: YAML, `--set`, wrong types and contradictions."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from weft.errors import RecipeError, WeftError
from weft.spec import LoraSpec
from weft.train.recipe import METRICS, Recipe
from weft.train.yaml12 import dump, parse


def test_recipe_and_spec_share_no_field_name() -> None:
    """Or a flat recipe file would be ambiguous."""
    assert not {item.name for item in fields(Recipe)} & {item.name for item in fields(LoraSpec)}


def test_a_recipe_reads_what_it_writes(tmp_path: Path) -> None:
    recipe = Recipe(
        LoraSpec(rank=4, rank_pattern={"down_proj": 2}, targets=("q_proj",)),
        max_steps=7, learning_rate=3e-4, mixed_precision="no", report_to=("tensorboard",), columns={"prompt": "q"},
    )  # fmt: skip
    path = recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.load(path) == recipe
    assert hash(Recipe.load(path)) == hash(recipe)
    assert yaml.safe_load(path.read_text())["mixed_precision"] == "no", "a reader of YAML 1.1 sees text, not false"


def test_fields_of_the_spec_may_stand_beside_the_others(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("rank: 16\nlearning_rate: 3e-4\nspec:\n  alpha: 32\n")
    recipe = Recipe.load(path)
    assert recipe.spec == LoraSpec(rank=16, alpha=32)
    assert recipe.learning_rate == 3e-4


def test_one_field_given_twice_and_differently_is_an_error() -> None:
    with pytest.raises(RecipeError, match="'rank' stands twice"):
        Recipe.from_dict({"rank": 4, "spec": {"rank": 8}})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4), ("1e5", 1e5), (".5", 0.5), ("-1", -1), ("012", 12), ("0x10", 16), ("true", True), ("False", False),
        ("no", "no"), ("off", "off"), ("1:30", "1:30"), ("1_000", "1_000"), ("null", None), ("~", None), ("", None),
        ("[q_proj, 3e-4]", ["q_proj", 3e-4]), ("{q_proj: 4}", {"q_proj": 4}), ("'3e-4'", "3e-4"),
    ],
)  # fmt: skip
def test_values_follow_yaml_1_2(text: str, value: Any) -> None:
    found = parse(text, "it")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["a: [", "!!python/object/apply:os.system ['true']", "a: 1\na: 2", "1: 2", "\x00"])
def test_what_is_no_plain_yaml_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="no YAML that can be read"):
        parse(text, "it")


@given(st.text())
def test_any_text_is_yaml_or_a_recipe_error(text: str) -> None:
    try:
        value = parse(text, "it")
        Recipe.from_dict(value if isinstance(value, dict) else {"rank": value})
    except WeftError:
        pass


def test_dump_is_read_alike_by_both_versions() -> None:
    values = {"a": "no", "b": "3e-4", "c": 3e-4, "d": None, "e": ["off"], "f": "1:30", "g": 1e-12}
    text = dump(values, "x")
    assert parse(text, "it") == values
    assert yaml.safe_load(text) == values


def test_set_reaches_recipe_and_spec() -> None:
    recipe = Recipe().set(
        ["rank=16", "learning_rate=3e-4", "rank_pattern.layers.0.q_proj=4", "spec.dropout=0.1", "columns.prompt=question",
         "targets=[q_proj, v_proj]", "report_to=tensorboard"]
    )  # fmt: skip
    assert recipe.learning_rate == 3e-4
    assert recipe.spec == LoraSpec(
        rank=16, rank_pattern={"layers.0.q_proj": 4}, dropout=0.1, targets=("q_proj", "v_proj")
    )
    assert recipe.columns == {"prompt": "question"}
    assert recipe.report_to == ("tensorboard",)


def test_set_keeps_the_patterns_that_there_are() -> None:
    recipe = Recipe(LoraSpec(rank_pattern={"a": 1})).set(["rank_pattern.b=2", "rank_pattern.c=3"])
    assert recipe.spec is not None
    assert recipe.spec.rank_pattern == {"a": 1, "b": 2, "c": 3}


def test_alpha_follows_the_rank_unless_it_was_said() -> None:
    assert Recipe(LoraSpec(rank=8)).set(["rank=16"]).spec == LoraSpec(rank=16, alpha=16)
    assert Recipe(LoraSpec(rank=8, alpha=32)).set(["rank=16"]).spec == LoraSpec(rank=16, alpha=32)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("lerning_rate=1", "Did you mean 'learning_rate'"),
        ("rnk=1", "rank"),
        ("learning_rate", "expected name=value"),
        ("learning_rate='3e-4'", "write it without quotes"),
        ("learning_rate=fast", "expected a number above 0"),
        ("learning_rate.x=1", "has no inner keys"),
        ("epochs=0", "expected a number above 0"),
        ("max_steps=1.5", "whole number"),
        ("batch_size=true", "whole number"),
        ("schedule=cosin", "Did you mean 'cosine'"),
        ("mixed_precision=bf61", "bf16"),
        ("best=1", "true or false"),
        ("rank=0", "LoraSpec.rank"),
        ("spec=4", "expected a section"),
        ("batching=packing", "packed"),
    ],
)
def test_a_wrong_value_names_field_and_way_out(assignment: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("(", "\\(")):
        Recipe().set([assignment])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 1.0, "max_steps": 5}, "both say how long to train"),
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, "both say how long to warm up"),
        ({"max_steps": 10, "warmup_steps": 10}, "not shorter than the run"),
        ({"eval_every": 30, "save_every": 20}, "no multiple"),
        ({"metric": "eval_accuracy", "kind": "text"}, "never reported"),
        ({"metric": "eval_perplexity", "kind": "classification"}, "never reported"),
        ({"batching": "packed", "kind": "classification"}, "one label a row"),
        ({"reentrant": True}, "gradient_checkpointing"),
        ({"metric": "eval_loss", "best": False}, "decides nothing"),
    ],
)
def test_contradictions_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(**values)


def test_trap_a_metric_named_loss_that_is_never_reported() -> None:
    """Found out before anything starts, with the name that was meant."""
    with pytest.raises(RecipeError, match=r"a metric that a training reports: .*Did you mean 'eval_loss'"):
        Recipe(metric="loss")
    assert "loss" not in METRICS


def test_a_file_that_is_not_there_or_no_mapping(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="can't be read"):
        Recipe.load(tmp_path / "none.yaml")
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n")
    with pytest.raises(RecipeError, match="expected a mapping"):
        Recipe.load(path)
    path.write_text("rank: 0\n")
    with pytest.raises(RecipeError, match=r"list\.yaml: LoraSpec\.rank"):
        Recipe.load(path)
    path.write_text("")
    assert Recipe.load(path) == Recipe()
