"""Rules about data: copies between training and evaluation, truncation, empty answers, one label, prompts that are learned.

They need no step: what is wrong is known before the first one.
"""

from __future__ import annotations

from weft.diagnosis.finding import Severity
from weft.diagnosis.record import Record
from weft.diagnosis.rules import Sign, rule

__all__ = ["copies", "empty", "leak", "one_answer", "prompt_learned", "truncated"]


@rule("evaluation-in-training", "examples that are in training and evaluation")
def leak(record: Record) -> Sign | None:
    """What is learned by heart makes the evaluation look better than it is."""
    shared, asked = (int(record.fact("data", "eval", name) or 0) for name in ("shared", "asked"))
    total = int(record.fact("data", "eval", "examples") or 0)
    if not total or not shared:
        return None
    share = shared / total
    severity: Severity = "high" if share > 0.5 else "medium" if share > 0.02 else "low"
    evidence = f"{shared:,} of {total:,} evaluation examples ({share:.0%}) are in the training data, word for word ({asked:,} with the same question)."
    advice = "Take them out of one of the two; without them the evaluation says how well others will be answered."
    return Sign(severity, evidence, advice, numbers={"shared": shared, "asked": asked, "of": total})


@rule("copies", "training examples that repeat others")
def copies(record: Record) -> Sign | None:
    """They are learned several times an epoch."""
    again, total = (int(record.fact("data", "train", name) or 0) for name in ("copies", "examples"))
    if not total or again < max(2, 0.1 * total):
        return None
    evidence = f"{again:,} of {total:,} training examples ({again / total:.0%}) repeat another, word for word."
    advice = "Take the copies out, unless they are meant as weights: each is learned once more an epoch."
    return Sign("medium" if again > 0.3 * total else "low", evidence, advice, numbers={"copies": again, "of": total})


@rule("truncated", "examples that lost tokens")
def truncated(record: Record) -> Sign | None:
    """The end of an answer matters most: what is cut there teaches not to stop."""
    counts = {
        name: int(record.fact("data", "train", name) or 0)
        for name in ("kept", "truncated", "prompt_cut", "completion_cut")
    }
    if not counts["kept"] or counts["truncated"] < 0.02 * counts["kept"]:
        return None
    share = counts["truncated"] / counts["kept"]
    ends = counts["completion_cut"] / counts["kept"]
    severity: Severity = (
        "high" if ends > 0.8 and record.fact("kind") in ("completion", "chat") else "medium" if share > 0.1 else "low"
    )
    evidence = (
        f"{counts['truncated']:,} of {counts['kept']:,} examples ({share:.0%}) are longer than max_length and were cut: {counts['prompt_cut']:,} at the "
        f"prompt's beginning, {counts['completion_cut']:,} at the end."
    )
    advice = "Raise max_length as far as base and memory allow (weft plan says what it takes), or shorten or split the examples."
    return Sign(severity, evidence, advice, numbers={"share": share, "ends": ends})


@rule("empty-answers", "examples without anything to learn")
def empty(record: Record) -> Sign | None:
    """They are left out; many of them say that a column or a template is not what was meant."""
    total = int(record.fact("data", "train", "examples") or 0)
    bare, masked = (int(record.fact("data", "train", name) or 0) for name in ("empty", "masked"))
    if not total or bare + masked < max(1, 0.01 * total):
        return None
    share = (bare + masked) / total
    severity: Severity = "high" if share > 0.5 else "medium" if share > 0.05 else "low"
    evidence = f"{bare + masked:,} of {total:,} training examples ({share:.0%}) have nothing to learn: {bare:,} empty, {masked:,} with no token left after masking and truncation."
    advice = (
        "Look at these rows: which column holds the answer (--columns), and whether the prompt alone fills max_length."
    )
    return Sign(severity, evidence, advice, numbers={"empty": bare, "masked": masked, "of": total})


@rule("one-answer", "the label or answer is always the same")
def one_answer(record: Record) -> Sign | None:
    """There is nothing to be told apart."""
    most = record.fact("data", "train", "most_common")
    total = int(record.fact("data", "train", "examples") or 0)
    if not isinstance(most, dict) or total < 4:
        return None
    share, what = float(most["share"]), str(most["what"])
    if share < 0.95:
        return None
    severity: Severity = "high" if share > 0.99 else "medium"
    evidence = f"The {what} is {most['text']!r} in {share:.0%} of {total:,} training examples."
    advice = f"See that the right column is read, and balance the examples: with one {what} a model learns to say it whatever is asked."
    return Sign(severity, evidence, advice, numbers={"share": share, "of": total})


@rule("prompt-learned", "the prompt is part of the loss")
def prompt_learned(record: Record) -> Sign | None:
    """With ``mask_prompt=False``, where there are prompts."""
    if record.fact("mask_prompt") is not False or record.fact("kind") not in ("completion", "chat", "image-text"):
        return None
    tokens, learned = (int(record.fact("data", "train", name) or 0) for name in ("tokens", "loss_tokens"))
    share = f" ({learned / tokens:.0%} of all tokens are learned)" if tokens else ""
    evidence = f"mask_prompt is false: the loss is on prompts too{share}, and they say how questions are asked, not how they are answered."
    advice = "Set mask_prompt=true, unless the prompts are to be learned as well."
    return Sign("medium", evidence, advice, numbers={"learned": learned, "tokens": tokens})
