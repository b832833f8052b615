"""How good generated texts and predicted labels are.

Texts are compared in words, or in characters where the script writes no spaces between words. This module does not know
models.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

__all__ = ["accuracy", "bleu", "exact_match", "macro_f1", "rouge_l", "text_metrics", "tokenizer_for"]

_SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_KANA = re.compile("[\u3040-\u30ff\u31f0-\u31ff]")
_UNIT = re.compile(f"{_SPACELESS.pattern}|(?:(?!{_SPACELESS.pattern})[^\\W_])+", re.UNICODE)


def tokenizer_for(texts: Sequence[str]) -> str:
    """The tokeniser of sacrebleu for these references, by their script: ``13a``, ``zh`` or ``char``.

    Half of the letters decide. Chinese takes ``zh``; Japanese, Thai and others without spaces take ``char``.
    """
    joined = "".join(texts)
    letters = sum(character.isalpha() for character in joined)
    spaceless = len(_SPACELESS.findall(joined))
    if not letters or spaceless * 2 < letters:
        return "13a"
    han = len(_HAN.findall(joined))
    return "zh" if han * 2 >= spaceless and len(_KANA.findall(joined)) * 10 < spaceless else "char"


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU, 0 to 100, by sacrebleu with the tokeniser of `tokenizer_for`.

    Args:
        texts: one generated text a prompt.
        references: the right answers of each prompt; their number may differ.

    Source:
        Post 2018, A Call for Clarity in Reporting BLEU Scores, arXiv:1804.08771.
    """
    from sacrebleu.metrics.bleu import BLEU

    if not texts:
        return 0.0
    most = max(len(answers) for answers in references)
    streams: list[Any] = [[answers[i] if i < len(answers) else None for answers in references] for i in range(most)]
    tokenize = tokenizer_for([answer for answers in references for answer in answers])
    return float(BLEU(tokenize=tokenize).corpus_score(list(texts), streams).score)


def rouge_l(text: str, references: Sequence[str]) -> float:
    """ROUGE-L (F1 of the longest common subsequence), 0 to 1, against the reference that it is nearest to.

    Words are runs of letters and digits, without case; each character of a script without spaces is one.

    Source:
        Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries.
    """
    return max((_rouge_l(_units(text), _units(reference)) for reference in references), default=0.0)


def _units(text: str) -> list[str]:
    return _UNIT.findall(unicodedata.normalize("NFKC", text).lower())


def _rouge_l(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return 0.0
    previous = [0] * (len(wanted) + 1)
    for unit in found:
        current = [0]
        for i, other in enumerate(wanted):
            current.append(previous[i] + 1 if unit == other else max(previous[i + 1], current[i]))
        previous = current
    common = previous[-1]
    return 2 * common / (len(found) + len(wanted))


def exact_match(text: str, references: Sequence[str]) -> bool:
    """The text is one of the references, spaces at the ends and runs of spaces aside."""
    return _plain(text) in {_plain(reference) for reference in references}


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def text_metrics(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """``exact_match`` (0 to 1), ``bleu`` (0 to 100) and ``rouge_l`` (0 to 1), over all prompts."""
    pairs = list(zip(texts, references, strict=True))
    count = max(1, len(pairs))
    return {
        "exact_match": sum(exact_match(text, answers) for text, answers in pairs) / count,
        "bleu": bleu(texts, references),
        "rouge_l": sum(rouge_l(text, answers) for text, answers in pairs) / count,
    }


def accuracy(predicted: Sequence[int], wanted: Sequence[int]) -> float:
    """Share of right labels, 0 to 1."""
    return sum(a == b for a, b in zip(predicted, wanted, strict=True)) / max(1, len(wanted))


def macro_f1(predicted: Sequence[int], wanted: Sequence[int]) -> float:
    """Mean over the labels that occur of F1, 0 to 1: a rare label counts as much as a frequent one."""
    scores = []
    for label in sorted({*predicted, *wanted}):
        hits = sum(a == b == label for a, b in zip(predicted, wanted, strict=True))
        total = sum(a == label for a in predicted) + sum(b == label for b in wanted)
        scores.append(2 * hits / total)
    return sum(scores) / max(1, len(scores))
