"""Recognising: which kind, what is said about it, and every value that is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from weft.data import KINDS, load_examples
from weft.errors import DataError

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def refused(rows, **options) -> str:
    with pytest.raises(DataError) as caught:
        load_examples(rows, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        ({"prompt": "a", "completion": "b"}, "completion", "1 example of {prompt, completion}"),
        ({"prompt": "a", "references": ["b", "c"]}, "completion", "{prompt, completion}"),
        ({"messages": TALK}, "chat", "{messages}"),
        ({"text": "a"}, "text", "{text}"),
        ({"text": "a", "label": 1}, "classification", "1 labels: '1'"),
    ],
)
def test_kinds_are_recognised_and_said(row, kind, words):
    found = load_examples([row])
    assert found.kind == kind
    assert words in found.summary()
    assert "\n" not in found.summary()
    assert load_examples([row], kind=kind).kind == kind


def test_precedence_is_the_order_of_kinds_and_is_said():
    row = {"messages": TALK, "prompt": "a", "completion": "b", "text": "c", "label": "d"}
    assert KINDS == ("chat", "completion", "classification", "text")
    for kind in KINDS:
        found = load_examples([row])
        assert found.kind == kind
        assert load_examples([row], kind="text").kind == "text"
        if kind not in ("classification", "text"):
            assert "could also be read as" in found.summary()
        for name in {"chat": ["messages"], "completion": ["prompt"], "classification": ["label"], "text": []}[kind]:
            del row[name]


def test_extra_columns_are_kept_ignored_and_said():
    found = load_examples([{"text": "a", "id": 7, "more": [1]}])
    assert found[0]["id"] == 7
    assert "ignored columns: 'id', 'more'" in found.summary()
    assert found.digest == load_examples([{"text": "a"}]).digest


def test_other_names_are_never_guessed_but_proposed():
    message = refused([{"question": "a", "answer": "b", "id": 1}])
    assert 'columns={"prompt": "question", "completion": "answer"}' in message
    assert "--columns prompt=question,completion=answer" in message
    assert "--columns prompt=instruction+input,completion=output" in refused(
        [{"instruction": "a", "input": "", "output": "b"}]
    )
    assert "--columns text=sentence" in refused([{"sentence": "a", "label": 1}])
    assert "--columns messages=conversations" in refused([{"conversations": TALK}])
    assert "--columns prompt=…" in refused([{"x": "a", "y": "b"}])
    assert "every value is null" in refused([{"text": None}])


def test_columns_are_mapped_and_joined():
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Hi", "input": "", "output": "Ho"}]
    found = load_examples(rows, columns={"prompt": "instruction+input", "completion": "output"})
    assert [row["prompt"] for row in found] == ["Add.\n1 2", "Hi"]
    assert set(found[0]) == {"prompt", "completion"}
    swapped = load_examples(
        [{"prompt": "a", "completion": "b"}], columns={"prompt": "completion", "completion": "prompt"}
    )
    assert dict(swapped[0]) == {"prompt": "b", "completion": "a"}
    found = load_examples([{"prompt": "a", "question": "q", "completion": "b"}], columns={"prompt": "question"})
    assert found[0]["prompt"] == "q"
    assert "own columns 'prompt' are not used" in found.summary()
    assert load_examples([{"a+b": "x"}], columns={"text": "a+b"})[0]["text"] == "x"


def test_mistakes_in_a_mapping():
    rows = [{"question": "a", "answer": "b"}]
    assert "no column 'qestion'" in refused(rows, columns={"prompt": "qestion", "completion": "answer"})
    assert "Did you mean 'question'?" in refused(rows, columns={"prompt": "qestion", "completion": "answer"})
    assert "Did you mean 'prompt'" in refused(rows, columns={"promt": "question"})
    assert "kind='chta'" in refused(rows, kind="chta")
    assert "needs the columns 'text', 'label'" in refused([{"text": "a"}], kind="classification")


def test_conversations_of_other_tools_are_mapped():
    rows = [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello", "weight": None}]}]
    message = refused(rows, columns={"messages": "conversations"})
    assert "--columns role=from,content=value" in message
    found = load_examples(rows, columns={"messages": "conversations", "role": "from", "content": "value"})
    assert found[0]["messages"] == TALK
    assert load_examples([{"messages": json.dumps(TALK)}]).digest == load_examples([{"messages": TALK}]).digest


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hello", "expected a list, or JSON of one"),
        ({"role": "user"}, "'messages' is a dict"),
        (["hello"], "message 1 is a str"),
        ([{"content": "a"}], "expected 'role' and 'content'"),
        ([{"role": "user", "content": 3}], "is a number"),
        ([{"role": "user", "content": None}], "has no 'content'"),
        ([{"role": "user", "content": [{"type": "audio", "url": "x"}]}], "part of type 'audio'"),
        ([{"role": 1, "content": "a"}], "is a number"),
    ],
)
def test_messages_that_are_none(messages, said):
    assert said in refused([{"messages": TALK}, {"messages": messages}])
    assert "row 2" in refused([{"messages": TALK}, {"messages": messages}])


def test_parts_of_text_are_joined_and_tool_calls_need_no_content():
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    calls = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]
    found = load_examples(
        [
            {"messages": [TALK[0], {"role": "assistant", "content": parts}]},
            {"messages": calls, "tools": [{"name": "f"}]},
        ]
    )
    assert found[0]["messages"] == TALK
    assert found[1]["messages"] == [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]
    assert "'tools' is a number" in refused([{"messages": TALK, "tools": 3}])


@pytest.mark.parametrize("value", [3, 3.5, True, ["a", 2], {"a": 1}, b"bytes", np.float32(1)])
def test_values_that_are_no_text(value):
    message = refused([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": value}])
    assert "row 2: 'completion' is " in message
    assert "expected text" in message


def test_half_characters_are_refused(write):
    path = write("a.jsonl", '{"text": "fine"}\n{"text": "half \\ud83d"}\n')
    message = refused(path)
    assert "line 2: 'text' holds half of a character" in message
    assert load_examples(write("b.jsonl", '{"text": "\\ud83d\\ude00"}'))[0]["text"] == "😀"


def test_missing_values_are_said_and_become_empty(write):
    found = load_examples(
        write(
            "a.jsonl", '{"prompt": "a", "completion": null}\n{"prompt": "b", "completion": "c"}\n{"completion": "d"}\n'
        )
    )
    assert [row["completion"] for row in found] == ["", "c", "d"]
    assert "1 without 'completion' (first: line 1)" in found.summary()
    assert "1 without 'prompt' (first: line 3)" in found.summary()


def test_rows_of_several_kinds_are_refused():
    message = refused([{"prompt": "a", "completion": "b"}, {"text": "c"}])
    assert "row 2: rows of several kinds: this one has {text}, others have {prompt, completion}" in message


def test_several_completions_become_several_examples():
    found = load_examples([{"prompt": "a", "completion": ["b", "c"]}, {"prompt": "d", "completion": "e"}])
    assert [(row["prompt"], row["completion"]) for row in found] == [("a", "b"), ("a", "c"), ("d", "e")]
    assert found.numbers == (1, 1, 2)
    assert "3 examples" in found.summary()
    assert [row["completion"] for row in load_examples([{"prompt": "a", "references": ["b", "c"]}])] == ["b", "c"]
    kept = load_examples([{"prompt": "a", "completion": "b", "references": ["x", "y"]}])
    assert (kept[0]["completion"], kept[0]["references"]) == ("b", ["x", "y"])
    assert load_examples([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": []}])[1]["completion"] == ""


def label_rows(*labels):
    return [{"text": f"text {number}", "label": label} for number, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ((10, 2, 0), ("0", "2", "10")),
        (("10", "2", "0"), ("0", "2", "10")),
        ((1.0, 0.0), ("0", "1")),
        ((-1, 1, 0), ("-1", "0", "1")),
        (("pos", "neg", "pos"), ("neg", "pos")),
        ((True, False), ("false", "true")),
        ((1, "other"), ("1", "other")),
    ],
)
def test_label_names_are_collected_sorted_and_stable(labels, names):
    assert load_examples(label_rows(*labels)).labels == names
    assert load_examples(label_rows(*reversed(labels))).labels == names


def test_labels_of_the_training_set_hold_for_other_sets():
    train = load_examples(label_rows("neutral", "pos", "neg"))
    assert load_examples(label_rows("pos"), labels=train.labels).labels == ("neg", "neutral", "pos")
    message = refused(label_rows("pos", "netural"), labels=train.labels)
    assert "row 2: unknown label 'netural'" in message
    assert "Did you mean 'neutral'" in message


@pytest.mark.parametrize(
    ("label", "said"),
    [(None, "no label"), ("", "no label"), (0.5, "a number"), ([1], "a list"), (float("nan"), "a number")],
)
def test_labels_that_are_none(label, said):
    message = refused(label_rows(1, label))
    assert "row 2" in message
    assert said in message


def test_hidden_labels_of_declared_classes_are_refused():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(text=datasets.Value("string"), sentiment=datasets.ClassLabel(names=["neg", "pos"]))
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "sentiment": [1, -1]}, features=features)
    message = refused(data, columns={"label": "sentiment"})
    assert "row 2: label -1" in message
    assert "not public" in message
    assert load_examples(data.select([0]), columns={"label": "sentiment"})[0]["label"] == "pos"
