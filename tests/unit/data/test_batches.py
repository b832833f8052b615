"""Batches: padding, and an order in which padding is rare."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tests.unit.data.conftest import byte_tokenizer, word_tokenizer
from weft.data import IGNORED, LengthGroupedSampler, collator, encode, load_examples, pack, padding_share
from weft.errors import DataError

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def encoded():
    return encode(
        load_examples([{"prompt": "p" * n, "completion": "c" * (n % 3 + 1)} for n in range(1, 12)]),
        TOKENIZER,
        max_length=24,
    )


def test_padding_is_masked_and_not_learned(encoded):
    collate = collator(TOKENIZER, "completion", pad_to_multiple_of=8)
    batch = collate([encoded[0], encoded[5]])
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    assert batch["input_ids"].shape == (2, 16)
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    for row, index in enumerate((0, 5)):
        size = int(encoded.lengths[index])
        assert batch["input_ids"][row, :size].tolist() == encoded[index]["input_ids"].tolist()
        assert batch["input_ids"][row, size:].eq(TOKENIZER.pad_token_id).all()
        assert batch["labels"][row, size:].eq(IGNORED).all()
        assert batch["attention_mask"][row].tolist() == [1] * size + [0] * (16 - size)


def test_classes_are_one_label_a_row():
    tokenizer = word_tokenizer(["good", "bad"])
    examples = load_examples([{"text": "good good", "label": "b"}, {"text": "bad", "label": "a"}])
    encoded = encode(examples, tokenizer, max_length=8)
    batch = collator(tokenizer, encoded.kind)(encoded[:2])
    assert batch["labels"].tolist() == [1, 0]
    assert batch["input_ids"].tolist() == [[2, 4, 4, 3], [2, 5, 3, 0]]


def test_packed_batches_have_positions_and_no_mask(encoded):
    packed = pack(encoded, 30)
    collate = collator(TOKENIZER, packed.kind, packed=packed.packed)
    batch = collate([packed[0], packed[len(packed) - 1]])
    assert set(batch) == {"input_ids", "labels", "position_ids", "use_cache"}
    assert batch["use_cache"] is False
    short = len(packed[len(packed) - 1]["input_ids"])
    assert short < batch["input_ids"].shape[1]
    assert batch["position_ids"][1, short:].tolist() == list(range(batch["input_ids"].shape[1] - short))
    assert batch["labels"][1, short:].eq(IGNORED).all()


def test_mistakes_are_refused(encoded):
    packed = pack(encoded)
    with pytest.raises(DataError, match="for separate features"):
        collator(TOKENIZER, "completion")([packed[0]])
    with pytest.raises(DataError, match="for packed features"):
        collator(TOKENIZER, "completion", packed=True)([encoded[0]])
    with pytest.raises(DataError, match="no features"):
        collator(TOKENIZER, "completion")([])
    with pytest.raises(DataError, match="can't be packed"):
        collator(TOKENIZER, "classification", packed=True)
    with pytest.raises(DataError, match="expected one of"):
        collator(TOKENIZER, "completions")
    with pytest.raises(DataError, match="packed already"):
        pack(packed)
    with pytest.raises(DataError, match="does not fit"):
        pack(encoded, 6)


def test_a_pad_token_is_found_where_the_tokenizer_has_none():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    assert collator(tokenizer, "text").pad_id == tokenizer.eos_token_id


def test_collator_and_sampler_work_in_a_loader(encoded):
    sampler = LengthGroupedSampler(encoded.lengths, 4, seed=3)
    collate = pickle.loads(pickle.dumps(collator(TOKENIZER, "completion")))  # noqa: S301
    loader = DataLoader(encoded, batch_size=4, sampler=sampler, collate_fn=collate)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in loader)
    assert tokens == encoded.num_tokens
    assert len(loader) == 3


@given(st.lists(st.integers(1, 100), max_size=70), st.integers(1, 9), st.integers(0, 3), st.integers(1, 6))
def test_an_epoch_has_every_index_once_and_depends_on_seed_and_epoch_alone(lengths, size, epoch, megabatch):
    sampler = LengthGroupedSampler(lengths, size, seed=7, megabatch=megabatch)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths)))
    assert order == list(sampler) == LengthGroupedSampler(lengths, size, seed=7, megabatch=megabatch).indices(epoch)
    assert len(sampler) == len(lengths)
    if len(lengths) >= size and megabatch > 1:
        assert max(lengths[index] for index in order[:size]) == max(
            lengths[index] for index in order[: len(order) // size * size]
        )


def test_orders_differ_by_epoch_and_seed():
    lengths = list(range(100))
    orders = [LengthGroupedSampler(lengths, 4, seed=seed).indices(epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_grouping_saves_padding():
    lengths = np.random.default_rng(0).integers(5, 500, 2000)
    grouped, shuffled = (LengthGroupedSampler(lengths, 8, megabatch=size).indices(0) for size in (50, 1))
    assert padding_share(lengths, grouped, 8) < 0.03
    assert padding_share(lengths, shuffled, 8) > 0.3
    assert padding_share([], [], 8) == 0.0
    with pytest.raises(DataError, match="at least 1"):
        LengthGroupedSampler([1], 0)
