"""Examples as a value: digest, splits, overlaps, conversations of prompts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.data import load_examples, overlap
from weft.errors import DataError


def asked(*prompts):
    return load_examples([{"prompt": prompt, "completion": f"answer {n}"} for n, prompt in enumerate(prompts)])


def test_the_digest_is_that_of_the_examples_not_of_their_file():
    first = load_examples([{"prompt": "a", "completion": "b", "id": 1}])
    assert first.digest == load_examples([{"completion": "b", "prompt": "a"}]).digest
    assert len(first.digest) == 64
    others = [
        load_examples([{"prompt": "a", "completion": "c"}]),
        load_examples([{"prompt": "ab", "completion": ""}]),
        load_examples([{"prompt": "a", "completion": "b", "references": ["b"]}]),
        load_examples([{"text": "a", "label": "b"}]),
        load_examples([{"text": "a", "label": "b"}], labels=("b", "c")),
        asked("a", "b"),
        asked("b", "a"),
        first.as_chat(),
    ]
    assert len({first.digest, *(other.digest for other in others)}) == len(others) + 1


@given(st.lists(st.integers(0, 12), min_size=2, max_size=40), st.floats(0.01, 0.99), st.integers(0, 3))
def test_a_split_keeps_every_row_once_and_every_prompt_on_one_side(prompts, fraction, seed):
    examples = asked(*(f"p{number}" for number in prompts))
    if len(set(prompts)) < 2:
        with pytest.raises(DataError, match="nothing can be held out"):
            examples.split(fraction, seed=seed)
        return
    train, held = examples.split(fraction, seed=seed)
    assert sorted([*train.numbers, *held.numbers]) == list(examples.numbers)
    assert list(train.numbers) == sorted(train.numbers)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}
    assert len(train) >= 1
    assert len(held) >= 1
    again = examples.split(fraction, seed=seed)
    assert (again[0].digest, again[1].digest) == (train.digest, held.digest)
    assert overlap(train, held).count == 0


def test_a_split_is_about_as_large_as_asked_for_and_depends_on_the_seed():
    examples = asked(*(f"p{number}" for number in range(1000)))
    train, held = examples.split(0.1, seed=1)
    assert (len(train), len(held)) == (900, 100)
    assert held.digest != examples.split(0.1, seed=2)[1].digest
    assert held.where(0) == f"list of 1,000 rows (held-out part), row {held.numbers[0]}"
    for fraction in (0, 1, -0.5):
        with pytest.raises(DataError, match="fraction"):
            examples.split(fraction)


def test_splits_of_classes_keep_all_label_names():
    examples = load_examples([{"text": f"t{n}", "label": n % 3} for n in range(9)])
    assert all(part.labels == ("0", "1", "2") for part in examples.split(0.2))


def test_overlap_counts_rows_and_prompts_and_warns():
    train, other = (
        asked("a", "b", "c"),
        load_examples(
            [
                {"prompt": "x", "completion": "y"},
                {"prompt": "b", "completion": "answer 1"},
                {"prompt": "c", "completion": "z"},
            ]
        ),
    )
    found = overlap(train, other)
    assert (found.rows, found.prompts, found.count, found.total) == (1, 2, 2, 3)
    assert "2 of 3 evaluation examples" in found.warning()
    assert "row 2" in found.warning()
    assert overlap(train, asked("d")).warning() == ""
    assert overlap(train, load_examples([{"text": "a"}])).count == 0


def test_prompts_become_conversations():
    examples = load_examples([{"prompt": "a", "completion": "b", "references": ["c"]}])
    talk = examples.as_chat("Be brief.")
    assert talk.kind == "chat"
    assert [m["role"] for m in talk[0]["messages"]] == ["system", "user", "assistant"]
    assert talk.as_chat() is talk
    assert len(examples.as_chat()[0]["messages"]) == 2
    with pytest.raises(DataError, match="can't become conversations"):
        load_examples([{"text": "a"}]).as_chat()


def test_examples_are_a_sequence_and_can_be_loaded_again():
    examples = asked("a", "b", "c")
    assert [row["prompt"] for row in examples] == ["a", "b", "c"]
    assert examples[-1]["prompt"] == "c"
    assert load_examples(examples) is examples
    assert len(load_examples(examples, limit=2)) == 2
    assert len(examples.take(9)) == 3
    with pytest.raises(DataError, match="these examples are 'completion'"):
        load_examples(examples, kind="text")
