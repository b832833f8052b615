"""Tokens and loss masks: what is learned, exactly; what is cut, split and dropped, counted."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.unit.data.conftest import byte_tokenizer, word_tokenizer
from weft.data import IGNORED, encode, encode_prompts, load_examples, pack, prompts
from weft.errors import DataError

TOKENIZERS = {(bos, eos): byte_tokenizer(bos=bos, eos=eos) for bos in (True, False) for eos in (True, False)}
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=12)
ROOMY = 10_000


def learned(feature) -> np.ndarray:
    return feature["input_ids"][feature["labels"] != IGNORED]


def hidden(feature) -> np.ndarray:
    return feature["input_ids"][feature["labels"] == IGNORED]


def rows_of(*pairs):
    return load_examples([{"prompt": prompt, "completion": completion} for prompt, completion in pairs])


def refused(examples, tokenizer, **options) -> str:
    with pytest.raises(DataError) as caught:
        encode(examples, tokenizer, **options)
    return str(caught.value)


@given(
    st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6),
    st.sampled_from(sorted(TOKENIZERS)),
    st.sampled_from(["", "\n", " => "]),
)
def test_what_is_learned_is_the_completion_and_its_end(pairs, which, separator):
    tokenizer, (bos, eos) = TOKENIZERS[which], which
    examples = rows_of(*pairs)
    end, start = "</s>" if eos else "", "<s>" if bos else ""
    kept = [number for number, (_, completion) in enumerate(pairs) if completion.strip()]
    unlearnable = [
        n for n in kept if not bos and not eos and not pairs[n][0] + separator and len(pairs[n][1].encode()) == 1
    ]
    kept = [number for number in kept if number not in unlearnable]
    if not kept:
        assert "none of" in refused(examples, tokenizer, max_length=ROOMY, separator=separator)
        return
    encoded = encode(examples, tokenizer, max_length=ROOMY, separator=separator)
    assert encoded.rows.tolist() == kept
    assert encoded.account.empty.count == len(pairs) - len(kept) - len(unlearnable)
    assert encoded.account.masked.count == len(unlearnable)
    for number, feature in zip(kept, encoded, strict=True):
        prompt, completion = pairs[number]
        before = start + prompt + separator
        if not before:
            if not eos:
                continue  # nothing predicts a completion's first token where a tokenizer has no token to begin with
            before = "</s>"
        assert tokenizer.decode(learned(feature)) == completion + end
        assert tokenizer.decode(hidden(feature)) == before
        assert tokenizer.decode(feature["input_ids"]) == before + completion + end
        assert encode_prompts([prompt], tokenizer, max_length=ROOMY, separator=separator)[0] == hidden(feature).tolist()


@given(st.lists(st.tuples(WORDS, WORDS.filter(str.strip)), min_size=1, max_size=6), st.integers(4, 40))
def test_truncation_keeps_the_prompts_end_and_the_completions_beginning(pairs, max_length):
    tokenizer = TOKENIZERS[True, True]
    encoded = encode(rows_of(*pairs), tokenizer, max_length=max_length)
    cut = []
    for number, (prompt, completion) in enumerate(pairs):
        asked, said = prompt.encode(), completion.encode()
        feature = encoded[number]
        got_asked, got_said = hidden(feature)[1:], learned(feature)
        whole_asked = tokenizer(prompt, add_special_tokens=False).input_ids
        whole_said = [*tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        assert hidden(feature)[0] == tokenizer.bos_token_id
        assert got_asked.tolist() == whole_asked[len(whole_asked) - len(got_asked) :]
        assert got_said.tolist() == whole_said[: len(got_said)]
        room = max_length - 1
        if len(asked) + len(said) + 1 <= room:
            assert (len(got_asked), len(got_said)) == (len(asked), len(said) + 1)
        else:
            cut.append(number + 1)
            assert len(feature["input_ids"]) == max_length
            assert len(got_asked) >= min(len(asked), room // 2)
            assert len(got_said) >= min(len(said) + 1, room - room // 2)
    assert encoded.account.truncated.count == len(cut)
    assert encoded.account.truncated.first == cut[:5]


def test_cut_completions_get_no_end_and_are_said():
    encoded = encode(rows_of(("p" * 4, "c" * 50), ("p" * 50, "c"), ("p", "c")), TOKENIZERS[True, True], max_length=12)
    ends = [feature["input_ids"][-1] == 2 for feature in encoded]
    assert ends == [False, True, True]
    assert "truncated 2 (row 1, 2): 1 at the prompt's beginning, 1 at the end" in encoded.account.summary()
    assert encoded.account.to_dict()["truncated"] == {"count": 2, "first": [1, 2]}


def test_empty_and_masked_examples_are_dropped_and_counted():
    examples = load_examples([{"prompt": "a", "completion": text} for text in ("x", "", "  \n", None, "y")])
    account = encode(examples, TOKENIZERS[True, True], max_length=20).account
    assert (account.examples, account.kept, account.dropped, account.empty.first) == (5, 2, 3, [2, 3, 4])
    assert "2 of 5 examples kept" in account.summary()
    assert "dropped as empty 3 (row 2, 3, 4)" in account.summary()
    single = load_examples([{"text": "x"}, {"text": "long"}])
    assert encode(single, TOKENIZERS[False, False], max_length=20).account.masked.first == [1]
    message = refused(examples.take(0), TOKENIZERS[True, True], max_length=20)
    assert "none of 0 examples" in message
    message = refused(load_examples([{"prompt": "a", "completion": " "}]), TOKENIZERS[True, True], max_length=20)
    assert "none of 1 examples is left to learn from" in message
    assert "dropped as empty 1 (row 1)" in message


def test_special_tokens_in_the_text_are_not_doubled():
    tokenizer = TOKENIZERS[True, True]
    encoded = encode(rows_of(("<s>a", "b</s>")), tokenizer, max_length=20)
    assert tokenizer.decode(encoded[0]["input_ids"]) == "<s>ab</s>"
    encoded = encode(load_examples([{"text": "<s>ab</s>"}]), tokenizer, max_length=20)
    assert tokenizer.decode(encoded[0]["input_ids"]) == "<s>ab</s>"
    assert encode_prompts(["<s>a"], tokenizer, max_length=9) == encode_prompts(["a"], tokenizer, max_length=9)


def test_prompts_can_be_learned_too():
    encoded = encode(rows_of(("ab", "c")), TOKENIZERS[True, True], max_length=20, mask_prompt=False)
    assert encoded[0]["labels"].tolist() == [IGNORED, *encoded[0]["input_ids"][1:]]


def test_a_tokenizer_without_an_end_is_said():
    account = encode(rows_of(("ab", "c")), TOKENIZERS[True, False], max_length=20).account
    assert "no end-of-text token" in account.summary()


@given(st.lists(WORDS.filter(str.strip), min_size=1, max_size=5), st.integers(5, 30), st.booleans())
def test_long_texts_are_split_and_each_token_is_learned_once(texts, max_length, bos):
    tokenizer = TOKENIZERS[bos, True]
    encoded = encode(load_examples([{"text": text} for text in texts]), tokenizer, max_length=max_length)
    for number, text in enumerate(texts):
        whole = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        parts = [encoded[at] for at in range(len(encoded)) if encoded.rows[at] == number]
        assert all(len(part["input_ids"]) <= max_length for part in parts)
        assert np.concatenate([learned(part) for part in parts]).tolist() == (whole if bos else whole[1:])
        if bos:
            assert all(part["input_ids"][0] == tokenizer.bos_token_id for part in parts)
        for before, after in itertools.pairwise(parts):
            assert after["input_ids"][int(bos)] == before["input_ids"][-1]
    split = [number + 1 for number, text in enumerate(texts) if len(text.encode()) + 1 + bos > max_length]
    assert encoded.account.split.count == len(split)
    assert encoded.account.kept == len(texts)


def test_classification_keeps_the_tokenizers_frame():
    tokenizer = word_tokenizer(["good", "bad", "film"])
    examples = load_examples(
        [
            {"text": "good film", "label": "pos"},
            {"text": "bad bad bad film", "label": "neg"},
            {"text": " ", "label": "neg"},
        ]
    )
    encoded = encode(examples, tokenizer, max_length=5)
    assert encoded.labels == ("neg", "pos")
    assert encoded[0] == {"input_ids": pytest.approx(np.array([2, 4, 6, 3])), "labels": 1}
    assert encoded[0]["input_ids"].tolist() == tokenizer("good film").input_ids
    assert encoded[1]["input_ids"].tolist() == tokenizer("bad bad bad film", truncation=True, max_length=5).input_ids
    assert (encoded.account.truncated.first, encoded.account.empty.first) == ([2], [3])
    assert encoded.num_loss_tokens == 2
    other = encode(examples.take(1), tokenizer, max_length=5, labels=("pos", "other"))
    assert (other[0]["labels"], other.labels) == (0, ("pos", "other"))
    assert "unknown label 'pos'" in refused(examples, tokenizer, max_length=5, labels=("neg", "psoitive"))
    assert "twice" in refused(examples, tokenizer, max_length=5, labels=("neg", "pos", "neg"))


def test_options_that_make_no_sense():
    examples = rows_of(("a", "b"))
    assert "max_length=2" in refused(examples, TOKENIZERS[True, True], max_length=2)
    assert "learn='lsat'" in refused(examples, TOKENIZERS[True, True], max_length=20, learn="lsat")


def test_encoded_is_a_compact_sequence():
    encoded = encode(rows_of(("ab", "c"), ("d", "ef")), TOKENIZERS[True, True], max_length=8)
    assert encoded.tokens.dtype == np.int32
    assert encoded.learned.dtype == np.bool_
    assert encoded.features is encoded
    assert [len(feature["input_ids"]) for feature in encoded] == encoded.lengths.tolist() == [5, 5]
    assert (encoded.num_tokens, encoded.num_loss_tokens, encoded.fill) == (10, 5, 10 / 16)
    assert encoded.highest_id == max(encoded.tokens)
    assert encoded[-1]["input_ids"].tolist() == encoded[1]["input_ids"].tolist()
    assert len(encoded[0:2]) == 2
    with pytest.raises(IndexError):
        encoded[2]
    copy = pickle.loads(pickle.dumps(encoded))  # noqa: S301
    assert copy[1]["labels"].tolist() == encoded[1]["labels"].tolist()


@given(st.lists(st.tuples(WORDS, WORDS.filter(str.strip)), min_size=1, max_size=12), st.integers(0, 40))
def test_packing_loses_no_token_and_no_label(pairs, extra):
    encoded = encode(rows_of(*pairs), TOKENIZERS[True, True], max_length=30)
    packed = pack(encoded, 30 + extra)
    assert packed.packed
    assert packed.num_tokens == encoded.num_tokens
    assert packed.num_loss_tokens == encoded.num_loss_tokens
    pieces = []
    for row in packed:
        assert len(row["input_ids"]) <= 30 + extra
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"])
        starts = [*np.flatnonzero(row["position_ids"] == 0), len(row["input_ids"])]
        assert starts[0] == 0
        for start, stop in itertools.pairwise(starts):
            assert row["position_ids"][start:stop].tolist() == list(range(stop - start))
            pieces.append((row["input_ids"][start:stop].tolist(), row["labels"][start:stop].tolist()))
    alone = {
        int(index): (encoded[at]["input_ids"].tolist(), encoded[at]["labels"].tolist())
        for at, index in enumerate(encoded.rows)
    }
    assert pieces == [alone[int(index)] for index in packed.rows]
    assert sorted(packed.rows) == sorted(encoded.rows)


def test_sentencepiece_spaces_at_the_border(stories260k):
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    encoded = encode(rows_of(("name : Blue Spice", "A coffee shop .")), tokenizer, max_length=128)
    feature = encoded[0]
    assert tokenizer.decode(learned(feature)) == "A coffee shop .</s>"
    assert hidden(feature).tolist() == tokenizer("name : Blue Spice").input_ids
    assert tokenizer.decode(feature["input_ids"]) == "<s> name : Blue Spice A coffee shop .</s>"


def test_distinct_prompts_with_all_their_answers():
    examples = load_examples([
        {"prompt": "a", "completion": "1"}, {"prompt": "b", "completion": "2"}, {"prompt": "a", "completion": "3"},
        {"prompt": "a", "completion": "1"}, {"prompt": "c", "completion": ""}, {"prompt": "d", "completion": "4", "references": ["5", "6"]},
    ])  # fmt: skip
    found = prompts(examples)
    assert [(one.prompt, one.references, one.row) for one in found] == [
        ("a", ("1", "3"), 0),
        ("b", ("2",), 1),
        ("d", ("5", "6"), 5),
    ]
    assert len(prompts(examples, 1)) == 1
    assert prompts(examples, 1)[0].references == ("1", "3")
    with pytest.raises(DataError, match="no prompts to answer"):
        prompts(load_examples([{"text": "a"}]))


def test_long_prompts_lose_their_beginning_but_not_the_prefix():
    tokenizer = TOKENIZERS[True, True]
    cut = encode_prompts(["abcdef"], tokenizer, max_length=4)[0]
    assert tokenizer.decode(cut) == "<s>def"
    assert tokenizer.decode(encode_prompts(["abc"], tokenizer, max_length=1)[0]) == "c"
    assert encode_prompts([""], TOKENIZERS[False, True], max_length=4) == [[2]]
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        encode_prompts([""], TOKENIZERS[False, False], max_length=4)
    with pytest.raises(DataError, match="no room"):
        encode_prompts(["a"], tokenizer, max_length=0)
