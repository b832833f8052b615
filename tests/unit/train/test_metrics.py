"""Metrics of texts and labels."""

from __future__ import annotations

import random

import pytest

from weft.train.metrics import accuracy, bleu, exact_match, macro_f1, rouge_l, text_metrics, tokenizer_for


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hello world", "13a"),
        ("你好,世界 ok", "zh"),
        ("こんにちは世界", "char"),
        ("สวัสดี", "char"),
        ("123", "13a"),
        ("привет", "13a"),
    ],
)
def test_the_script_of_the_references_chooses_the_tokeniser(text: str, name: str) -> None:
    assert tokenizer_for([text]) == name


def test_bleu_takes_several_references_of_any_number() -> None:
    references = [["the cat sat on the mat today", "a cat sat on the mat"], ["it rains a lot here in spring"]]
    texts = ["a cat sat on the mat", "it rains a lot here in spring"]
    assert bleu(texts, references) == pytest.approx(100)
    assert bleu(["the dog", "no"], references) < 20
    assert bleu([], []) == 0


def test_chinese_is_compared_by_characters() -> None:
    assert bleu(["今天天气很好我们去公园"], [["今天天气很好我们去公园玩"]]) > 70
    assert rouge_l("今天天气很好", ["今天天气不好"]) == pytest.approx(5 / 6)


def test_rouge_l_takes_the_nearest_reference() -> None:
    assert rouge_l("the cat sat", ["a dog ran", "The cat, sat!"]) == 1
    assert rouge_l("", ["a"]) == 0
    assert rouge_l("a b c d", ["a x c d"]) == pytest.approx(0.75)


def test_rouge_l_agrees_with_the_well_known_package() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="compares with rouge-score").RougeScorer(["rougeL"])
    for _ in range(50):
        text, reference = (" ".join(random.choices("abcdefgh", k=random.randint(1, 12))) for _ in range(2))
        assert rouge_l(text, [reference]) == pytest.approx(scorer.score(reference, text)["rougeL"].fmeasure)


def test_exact_match_forgives_spaces_alone() -> None:
    assert exact_match(" 42\n", ["41", "42"])
    assert not exact_match("42.", ["42"])
    assert text_metrics(["42", "x"], [["42"], ["y"]])["exact_match"] == 0.5


def test_macro_f1_counts_rare_labels_as_much() -> None:
    wanted = [0] * 9 + [1]
    assert accuracy([0] * 10, wanted) == 0.9
    assert macro_f1([0] * 10, wanted) == pytest.approx((2 * 9 / 19) / 2)
    assert macro_f1(wanted, wanted) == 1
