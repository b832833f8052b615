"""The demo's task: the same every time, and nothing of the held-out split is in the training split."""

from __future__ import annotations

import itertools
import json
import runpy
import sys
from pathlib import Path

import pytest

from weft import demo_task
from weft.demo_task import examples
from weft.errors import DataError

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_embedded_base"


def items(example: dict[str, str]) -> list[str]:
    """The things of an order without their numbers, in the singular."""
    return [phrase.split(" ", 1)[1].removesuffix("s") for phrase in json.loads(example["completion"])["items"]]


def test_the_record_says_what_the_message_says() -> None:
    for example in examples("train", 200) + examples("heldout", 200):
        record = json.loads(example["completion"])
        assert list(record) == ["name", "town", "day", "items"]
        words = example["prompt"].replace(",", " ").replace(".", " ").replace("?", " ").split()
        assert {record["name"], record["town"], record["day"]} <= set(words)
        assert 1 <= len(record["items"]) <= 3
        assert all(f" {phrase}" in example["prompt"] for phrase in record["items"])
        assert all(phrase.startswith("1 ") != phrase.endswith("s") for phrase in record["items"])
        assert example["prompt"].endswith("\n")
        assert "\n" not in example["completion"]


def test_the_same_seed_gives_the_same_examples_and_another_gives_others() -> None:
    assert examples("train", 50, seed=3) == examples("train", 50, seed=3)
    assert examples("train", 50, seed=3) == examples("train", 80, seed=3)[:50]
    assert examples("train", 50, seed=3) != examples("train", 50, seed=4)


def test_prompts_are_different() -> None:
    assert len({example["prompt"] for example in examples("train", 3000)}) == 3000


@pytest.mark.parametrize("seed", [0, 1])
def test_heldout_names_and_pairs_never_occur_in_training(seed: int) -> None:
    train, heldout = examples("train", 3000, seed=seed), examples("heldout", 500, seed=seed)
    names = {json.loads(example["completion"])["name"] for example in train}
    pairs = {item for example in train for item in items(example)}
    assert names.isdisjoint(json.loads(example["completion"])["name"] for example in heldout)
    assert pairs.isdisjoint(items(example)[0] for example in heldout)
    assert {example["prompt"] for example in train}.isdisjoint(example["prompt"] for example in heldout)


def test_a_wrong_split_or_count_is_refused() -> None:
    with pytest.raises(DataError, match=r"no split 'held-out'.*Did you mean 'heldout'"):
        examples("held-out", 3)
    with pytest.raises(DataError, match="-1"):
        examples("train", -1)
    assert examples("train", 0) == []


def test_the_world_of_the_base_knows_the_words_but_never_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(SCRIPT), *sys.path])
    for name in ("words", "passages", "stories"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    world = runpy.run_path(str(SCRIPT / "world.py"))
    texts = list(itertools.islice(world["documents"](0), 5000))
    everything = "\n".join(texts)
    assert not [key for key in ('"name":', '"town":', '"day":', '"items":') if "{" + key in everything]
    known = set(everything.replace('"', " ").replace(",", " ").replace(".", " ").split())
    words = [
        *demo_task.HELDOUT_NAMES,
        *demo_task.TRAIN_NAMES,
        *demo_task.TOWNS,
        *demo_task.DAYS,
        *demo_task.COLOURS,
        *demo_task.THINGS,
    ]
    assert [word for word in words if word not in known] == []
    assert list(itertools.islice(world["documents"](0), 5000)) == texts
