"""Conversations: what the assistant says is learned, through the token that ends its turn, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.unit.data.conftest import CHATML, GENERATION, byte_tokenizer, word_tokenizer
from weft.data import IGNORED, Prompt, encode, encode_prompts, load_examples, prompts
from weft.errors import DataError

PLAIN, MARKED = byte_tokenizer(template=CHATML), byte_tokenizer(template=GENERATION)
SAID = st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=8)


def talk(*turns, **more):
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def runs(tokenizer, feature) -> list[str]:
    """The texts that are learned, one for each unbroken range."""
    found, current = [], []
    for token, label in zip(feature["input_ids"], feature["labels"], strict=True):
        if label != IGNORED:
            assert label == token
            current.append(int(token))
        elif current:
            found.append(tokenizer.decode(current))
            current = []
    return [*found, tokenizer.decode(current)] if current else found


def refused(rows, tokenizer, **options) -> str:
    with pytest.raises(DataError) as caught:
        encode(load_examples(rows), tokenizer, max_length=1000, **options)
    return str(caught.value)


@given(st.lists(st.tuples(SAID, SAID), min_size=1, max_size=4), st.booleans(), st.sampled_from([PLAIN, MARKED]))
def test_answers_and_their_ends_are_learned_and_nothing_else(turns, system, tokenizer):
    messages = [("system", "be good")] if system else []
    for question, answer in turns:
        messages += [("user", question), ("assistant", answer)]
    examples = load_examples([talk(*messages)])
    answers = [answer + "</s>" for _, answer in turns]
    if not any(answer.strip() for _, answer in turns):
        assert "dropped as empty 1" in refused([talk(*messages)], tokenizer)
        return
    feature = encode(examples, tokenizer, max_length=1000)[0]
    assert runs(tokenizer, feature) == answers
    last = encode(examples, tokenizer, max_length=1000, learn="last")[0]
    assert runs(tokenizer, last) == answers[-1:]
    assert last["input_ids"].tolist() == feature["input_ids"].tolist()
    assert tokenizer.decode(feature["input_ids"]) == tokenizer.apply_chat_template(
        examples[0]["messages"], tokenize=False
    )
    assert list(feature["input_ids"]).count(tokenizer.bos_token_id) == 0


def test_generation_blocks_give_the_mask_of_transformers():
    messages = talk(("user", "how?"), ("assistant", "so 😀"), ("user", "what?"), ("assistant", "that"))["messages"]
    theirs = MARKED.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    feature = encode(load_examples([{"messages": messages}]), MARKED, max_length=100)[0]
    assert feature["input_ids"].tolist() == theirs["input_ids"]
    assert (feature["labels"] != IGNORED).astype(int).tolist() == theirs["assistant_masks"]


def test_a_block_that_ends_in_white_space_does_not_learn_what_follows():
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} {% endgeneration %}"
        "{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
    )
    tokenizer = word_tokenizer(["a", "b", "c", "d"])
    tokenizer.chat_template = template
    messages = talk(("user", "a"), ("assistant", "b"), ("user", "c d"))
    encoded = encode(load_examples([messages]), tokenizer, max_length=100)
    assert encoded[0]["labels"].tolist() == [IGNORED, 5, IGNORED, IGNORED]
    assert "teach no token that ends the assistant's turn" in encoded.account.summary()


def test_prompts_for_generation_are_what_stands_before_the_answer():
    rows = [
        talk(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
        talk(("user", "e")),
        talk(("user", "f"), ("assistant", "g"), references=["g", "h"]),
    ]
    examples = load_examples(rows)
    asked = prompts(examples)
    assert [one.references for one in asked] == [("d",), ("g", "h")]
    tokens = encode_prompts(asked, PLAIN, max_length=1000)
    feature = encode(examples.take(1), PLAIN, max_length=1000, learn="last")[0]
    assert feature["input_ids"][: len(tokens[0])].tolist() == tokens[0]
    assert (feature["labels"] != IGNORED).argmax() == len(tokens[0])
    assert PLAIN.decode(tokens[1]) == "<|user|>\nf</s>\n<|assistant|>\n"
    assert encode_prompts([[{"role": "user", "content": "f"}]], PLAIN, max_length=1000) == tokens[1:]
    assert PLAIN.decode(encode_prompts([asked[1]], PLAIN, max_length=4)[0]) == "</s>\n<|assistant|>\n"


def test_tools_reach_the_template():
    tokenizer = byte_tokenizer(template="{% if tools %}{{ tools[0]['name'] }}:{% endif %}" + CHATML)
    row = talk(("user", "a"), ("assistant", "b"), tools=[{"name": "clock"}])
    encoded = encode(load_examples([row]), tokenizer, max_length=100)
    assert tokenizer.decode(encoded[0]["input_ids"]).startswith("clock:<|user|>")
    assert runs(tokenizer, encoded[0]) == ["b</s>"]
    asked = prompts(load_examples([row]))
    assert isinstance(asked[0], Prompt)
    assert tokenizer.decode(encode_prompts(asked, tokenizer, max_length=100)[0]).startswith("clock:")


def test_no_template_is_an_error_with_a_way_out(tmp_path):
    tokenizer = byte_tokenizer()
    row = talk(("user", "a"), ("assistant", "b"))
    message = refused([row], tokenizer)
    assert "has no chat template" in message
    assert "{prompt, completion}" in message
    with pytest.raises(DataError, match="has no chat template"):
        encode_prompts([row["messages"]], tokenizer, max_length=10)
    path = tmp_path / "mine.jinja"
    assert "no such chat template" in refused([row], tokenizer, chat_template=str(path))
    path.write_text(CHATML)
    for template in (CHATML, str(path)):
        assert runs(tokenizer, encode(load_examples([row]), tokenizer, max_length=100, chat_template=template)[0]) == [
            "b</s>"
        ]


def test_a_template_that_is_not_prefix_stable_is_an_error_with_ways_out():
    thinking = (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{% if m['role'] == 'assistant' and loop.last %}(thinks)\n{% endif %}"
        "{{ m['content'] }}</s>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    tokenizer = byte_tokenizer(template=thinking)
    several = talk(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    message = refused([talk(("user", "a"), ("assistant", "b")), several], tokenizer)
    assert "row 2" in message
    assert "not prefix-stable: up to message 2" in message
    assert "learn='last'" in message
    feature = encode(load_examples([several]), tokenizer, max_length=100, learn="last")[0]
    assert runs(tokenizer, feature) == ["(thinks)\nd</s>"]


def test_a_template_that_refuses_is_quoted():
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('The user speaks first') }}{% endif %}" + CHATML
    message = refused([talk(("assistant", "b"))], byte_tokenizer(template=strict))
    assert "row 1: the chat template refuses this conversation (roles assistant): The user speaks first" in message
    broken = byte_tokenizer(template="{{ messages[7]['content'] + 1 }}")
    assert "refuses this conversation" in refused([talk(("user", "a"), ("assistant", "b"))], broken)


def test_templates_without_an_end_get_one():
    bare = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = byte_tokenizer(template=bare)
    encoded = encode(load_examples([talk(("user", "a"), ("assistant", "b"))]), tokenizer, max_length=100)
    assert runs(tokenizer, encoded[0]) == ["b\n</s>"]
    other_end = byte_tokenizer(template=CHATML.replace("</s>", "<|system|>"))
    encoded = encode(load_examples([talk(("user", "a"), ("assistant", "b"))]), other_end, max_length=100)
    assert runs(other_end, encoded[0]) == ["b<|system|>\n"]
    assert encoded.account.notes == []


def test_conversations_that_teach_nothing_are_dropped_and_counted():
    rows = [
        talk(("user", "a"), ("assistant", "b")),
        talk(("user", "a")),
        talk(("user", "a"), ("assistant", " ")),
        talk(),
        talk(("user", "x" * 90), ("assistant", "b")),
    ]
    account = encode(load_examples(rows), PLAIN, max_length=40).account
    assert account.kept == 1
    assert account.masked.first == [2, 5]
    assert account.empty.first == [3, 4]
    assert account.truncated.first == [5]
    whole = encode(load_examples(rows), PLAIN, max_length=40, mask_prompt=False)
    assert whole.account.kept == 3


def test_cut_conversations_keep_their_beginning():
    encoded = encode(load_examples([talk(("user", "a"), ("assistant", "b" * 50))]), PLAIN, max_length=20)
    assert len(encoded[0]["input_ids"]) == 20
    assert set(runs(PLAIN, encoded[0])[0]) == {"b"}
    assert encoded.account.completion_cut.count == 1


def test_an_answer_that_shares_a_token_with_its_opening_is_said():
    core = Tokenizer(models.BPE({"a": 0, ":": 1, "b": 2, ":b": 3, "</s>": 4}, [(":", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}a:{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    encoded = encode(load_examples([talk(("user", "a"), ("assistant", "ba"))]), tokenizer, max_length=100)
    assert encoded[0]["input_ids"].tolist() == [0, 1, 0, 0, 3, 0, 4]
    assert encoded[0]["labels"].tolist() == [IGNORED] * 5 + [0, 4]
    assert "1 answers begin inside of a token" in encoded.account.summary()
