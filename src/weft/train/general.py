"""A text that the base should still know after a training: its loss, before and at every evaluation. Where forgetting is seen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from weft.data import collator, encode, load_examples
from weft.data.encoded import Encoded
from weft.errors import DataError, RecipeError
from weft.train.inputs import longest
from weft.train.recipe import Recipe
from weft.train.scoring import score
from weft.train.watching import Watch

__all__ = ["BUILT_IN", "GeneralText", "GeneralWatch", "general_text"]

BUILT_IN = "english"
MOST = 64
"""Rows that are looked at: the loss is to be compared with itself."""


@dataclass(frozen=True)
class GeneralText:
    """Encoded texts.

    Attributes:
        source: where they are from.
    """

    encoded: Encoded
    tokenizer: Any
    batch_size: int
    source: str

    def loss(self, model: nn.Module) -> float:
        """Nats a token, with whatever adapter is in use."""
        return score(model, self._batches(), False)["loss"]

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        collate = collator(self.tokenizer, self.encoded.kind)
        for start in range(0, len(self.encoded), self.batch_size):
            yield collate(self.encoded[start : start + self.batch_size])


def general_text(recipe: Recipe, model: nn.Module, tokenizer: Any, kind: str) -> GeneralText | None:
    """What the recipe names; None: nothing.

    Raises:
        RecipeError: the model is no causal language model on texts.
        DataError: the texts can't be read.
    """
    if recipe.general is None:
        return None
    if kind not in ("completion", "chat", "text"):
        raise RecipeError(
            f"general={recipe.general!r}: the loss on a general text is taken for causal language models, and these are {kind} examples; leave it out"
        )
    if recipe.general == BUILT_IN:
        whole = files("weft.data").joinpath("general_english.txt").read_text(encoding="utf-8")
        rows: Any = [{"text": part.replace("\n", " ").strip()} for part in whole.split("\n\n") if part.strip()]
    else:
        rows = recipe.general
    examples = load_examples(rows).take(MOST)
    encoded = encode(examples, tokenizer, max_length=longest(recipe, model, tokenizer), mask_prompt=recipe.mask_prompt)
    if not len(encoded):
        raise DataError(f"general={recipe.general!r}: no text is left: {encoded.account.summary()}")
    return GeneralText(encoded, tokenizer, recipe.eval_batch_size or 2 * recipe.batch_size, str(recipe.general))


class GeneralWatch(TrainerCallback):
    """Takes the loss of the base before the first step, and of the adapter at every evaluation (where there are none: checkpoint)."""

    def __init__(self, text: GeneralText, watch: Watch) -> None:
        self.text, self.watch = text, watch

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """The base's."""
        if self.watch.record.of("general"):
            return
        bank = self.watch.trainer.setup.bank
        before = bank.current
        bank.use(None)
        try:
            self._measure(0, model, args)
        finally:
            bank.use(before)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """The adapter's."""
        self._measure(state.global_step, model, args)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """The adapter's, in a run without evaluations."""
        if args.eval_strategy == "no" and state.global_step:
            self._measure(state.global_step, model, args)

    def _measure(self, step: int, model: Any, args: Any) -> None:
        with self.watch.trainer.accelerator.autocast():
            loss = self.text.loss(model)
        self.watch.put({"step": step, "of": "general", "general_loss": loss})
