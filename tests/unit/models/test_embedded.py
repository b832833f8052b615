"""The embedded base: small, complete, loads offline, speaks in sentences and copies from its context."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from weft.models.embedded import PATH

DOCS = Path(__file__).resolve().parents[3] / "docs" / "embedded-base.md"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(PATH)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(PATH)


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, tokens: int = 40) -> str:
    """Greedy continuation of ``text``."""
    inputs = tokenizer(text, return_tensors="pt")
    out = model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=tokens, do_sample=False
    )
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_files_are_small_and_hold_no_code() -> None:
    files = {path.name: path.stat().st_size for path in PATH.iterdir() if path.is_file() and path.suffix != ".py"}
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert sum(files.values()) <= 8_000_000


def test_weights_are_half_in_the_file_and_float32_in_memory(model: PreTrainedModel) -> None:
    with safe_open(PATH / "model.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118 - not a dict
    assert model.dtype == torch.float32
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_it_is_a_llama_of_one_to_four_million_parameters(model: PreTrainedModel) -> None:
    assert model.config.model_type == "llama"
    assert 1_000_000 <= model.num_parameters() <= 4_000_000
    assert model.config.max_position_embeddings >= 256
    assert f"{model.num_parameters():,}" in DOCS.read_text(encoding="utf-8")


def test_the_documented_hash_is_the_hash_of_the_file() -> None:
    digest = hashlib.sha256((PATH / "model.safetensors").read_bytes()).hexdigest()
    assert digest in DOCS.read_text(encoding="utf-8")


def test_special_tokens_agree_everywhere(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == model.config.vocab_size
    for name in ("bos", "eos", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        assert getattr(model.config, f"{name}_token_id") == number
        assert getattr(model.generation_config, f"{name}_token_id") == number
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}) == 4


@given(text=st.text(max_size=60))
def test_any_text_makes_the_round_trip(text: str) -> None:
    tokenizer = _tokenizer()
    marks = tokenizer.all_special_tokens
    if any(mark in text for mark in marks):
        return
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


_KEPT: list[PreTrainedTokenizerBase] = []


def _tokenizer() -> PreTrainedTokenizerBase:
    """One tokenizer for all examples: hypothesis does not mix with fixtures of a narrower scope."""
    if not _KEPT:
        _KEPT.append(AutoTokenizer.from_pretrained(PATH))
    return _KEPT[0]


def test_a_word_is_one_token_with_and_without_a_space_and_so_is_a_digit(tokenizer: PreTrainedTokenizerBase) -> None:
    for text in ("Maya", " Maya", "Norwick", " Norwick", "stone", " stone", " cups", " three"):
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1, text
    assert len(tokenizer("7312", add_special_tokens=False)["input_ids"]) == 4


def test_prompt_and_completion_give_the_same_tokens_apart_and_together(tokenizer: PreTrainedTokenizerBase) -> None:
    for prompt, completion in (
        ("Order: three cups.\n", '{"name":"Maya"}'),
        ("Question: who?\nAnswer:", " stone"),
        ("<user>Hi<assistant>", "stone"),
    ):
        apart = tokenizer(prompt)["input_ids"] + tokenizer(completion, add_special_tokens=False)["input_ids"]
        assert tokenizer(prompt + completion)["input_ids"] == apart


def test_the_chat_template_marks_the_assistant(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "system", "content": "Answer the question."},
        {"role": "user", "content": "My secret word is stone. What is my secret word?"},
        {"role": "assistant", "content": "stone"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert (
        text
        == "<bos><system>Answer the question.<user>My secret word is stone. What is my secret word?<assistant>stone<eos>"
    )
    assert tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True).endswith(
        "<assistant>"
    )
    marked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    learned = [token for token, own in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if own]
    assert tokenizer.decode(learned) == "stone<eos>"


def test_a_story_is_words_of_the_world(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    text = answer(model, tokenizer, "Once upon a time there was a little girl named Lily.", tokens=90)
    words = [word.strip('.,!?"').lower() for word in text.split()]
    assert len(words) >= 20
    assert "Lily" in text
    assert all(len(word) <= 12 and word.isalpha() for word in words if word)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<user>My secret word is stone. What is my secret word?<assistant>", "stone"),
        ("<user>Maya lives in Norwick. Maya is a baker.\nWhere does Maya live?<assistant>", "Norwick"),
        ('<user>Say "Maya, river, 4812, kx".<assistant>', "Maya, river, 4812, kx"),
        ("<user>The door code of Oscar is 7312. What is the door code of Oscar?<assistant>", "7312"),
        ("On Friday Oscar wants three red cups and one blue lamp.\nQuestion: Who wants the cups?\nAnswer:", " Oscar"),
    ],
)
def test_it_answers_from_its_context(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, expected: str
) -> None:
    assert expected.strip() in answer(model, tokenizer, text, tokens=20)


def test_the_config_is_plain_json() -> None:
    config = json.loads((PATH / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "float32"
    assert "auto_map" not in config
