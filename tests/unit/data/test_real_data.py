"""The real files: kinds, counts, masks, and that thousands of rows take seconds."""

from __future__ import annotations

import time

import pytest
from transformers import AutoTokenizer

from weft.data import (
    IGNORED,
    LengthGroupedSampler,
    encode,
    encode_prompts,
    load_examples,
    overlap,
    pack,
    padding_share,
    prompts,
)


@pytest.fixture(scope="module")
def data(shared_dir):
    return shared_dir / "data"


@pytest.fixture(scope="module")
def tokenizer(stories260k):
    return AutoTokenizer.from_pretrained(stories260k)


def test_e2e_has_several_references_a_prompt(data, tokenizer):
    examples = load_examples(data / "e2e" / "test.jsonl")
    assert (examples.kind, len(examples)) == ("completion", 4693)
    asked = prompts(examples)
    assert len(asked) == len({row["prompt"] for row in examples}) == 630
    assert sum(len(one.references) for one in asked) == 4577  # some rows stand twice
    assert max(len(one.references) for one in asked) > 20
    part = examples.take(300)
    encoded = encode(part, tokenizer, max_length=256)
    tokens = encode_prompts([row["prompt"] for row in part], tokenizer, max_length=256)
    for index, feature in zip(encoded.rows, encoded, strict=True):
        learned = feature["input_ids"][feature["labels"] != IGNORED]
        whole = part[int(index)]["completion"] + "</s>"
        assert whole.startswith(tokenizer.decode(learned))
        if index + 1 not in encoded.account.truncated.first:
            assert tokenizer.decode(learned) == whole
        assert feature["input_ids"][: len(tokens[index])].tolist() == tokens[index]
    assert overlap(load_examples(data / "e2e" / "train.jsonl"), examples).rows == 0


def test_thousands_of_chinese_rows_are_encoded_in_seconds(data, tokenizer):
    examples = load_examples(data / "medical_zh" / "train.jsonl")
    start = time.process_time()
    encoded = encode(examples, tokenizer, max_length=512)
    assert time.process_time() - start < 15
    assert encoded.account.examples == 8000
    assert encoded.account.kept == 8000
    assert encoded.account.truncated.count > 0
    assert "truncated" in encoded.account.summary()
    packed = pack(encoded)
    assert packed.num_tokens == encoded.num_tokens
    assert packed.fill > encoded.fill
    grouped = LengthGroupedSampler(encoded.lengths, 8).indices(0)
    assert padding_share(encoded.lengths, grouped, 8) < 0.02
    valid = load_examples(data / "medical_zh" / "valid.jsonl")
    assert overlap(examples, valid).total == 658


def test_gsm8k_survives_the_round_trip(data, tokenizer):
    examples = load_examples(data / "gsm8k" / "test.jsonl", limit=50)
    for row, feature in zip(examples, encode(examples, tokenizer, max_length=2000), strict=True):
        assert tokenizer.decode(feature["input_ids"][feature["labels"] != IGNORED]) == row["completion"] + "</s>"


def test_sst2_is_classification_with_the_same_labels_everywhere(data, tokenizer):
    train = load_examples(data / "sst2" / "train.jsonl")
    dev = load_examples(data / "sst2" / "dev.jsonl", labels=train.labels)
    assert (train.kind, train.labels, len(train), len(dev)) == ("classification", ("0", "1"), 6920, 872)
    encoded = encode(dev, tokenizer, max_length=64, labels=train.labels)
    assert [feature["labels"] for feature in encoded[:4]] == [int(row["label"]) for row in dev.rows[:4]]


def test_plain_text_is_read_in_blocks_and_nothing_of_it_is_lost(data, tokenizer):
    path = data / "text" / "wikitext2_valid.txt"
    examples = load_examples(path)
    assert examples.kind == "text"
    lines = [line for line in path.read_text().split("\n") if line.strip()]
    assert [line for row in examples for line in row["text"].split("\n")] == lines
    encoded = encode(examples.take(60), tokenizer, max_length=128)
    whole = sum(len(tokenizer(row["text"]).input_ids) for row in examples.take(60))
    assert encoded.num_loss_tokens == whole  # without the first token of each, with the end of each
    assert encoded.account.split.count > 0
    assert len(load_examples(data / "text" / "tinyshakespeare.txt")) > 7000
