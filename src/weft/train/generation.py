"""Text from a base, or from a base with an adapter: in batches, or piece by piece.

Stands on the model's own ``generate``. Does not know how good the text is.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from weft.adapter import Adapter
from weft.core.dropout import own_stream
from weft.errors import BaseError, DataError, RecipeError
from weft.train.opening import BaseLike, Opened, opened, trained_format
from weft.train.seeing import answers, sees

__all__ = ["Prompt", "Sampling", "continue_tokens", "encode", "encode_as", "generate", "stream"]

Prompt = str | Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        max_new_tokens: longest answer.
        temperature: 0: always the likeliest token; 1: as the model says; above: bolder.
        top_p: of the likeliest tokens, those that together have this probability; 1: all.
        top_k: of the likeliest tokens, so many; 0: all.
        repetition_penalty: above 1, tokens that were there become less likely.
        seed: of the draw; None: torch's own generator.

    Raises:
        RecipeError: a value out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        rules = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        )
        for name, holds, expected in rules:
            if not holds:
                raise RecipeError(f"Sampling.{name}: got {getattr(self, name)!r}; expected {expected}")
        if self.temperature == 0 and (self.top_p != 1 or self.top_k):
            raise RecipeError(
                "top_p and top_k choose among tokens, and temperature=0 always takes the likeliest; set a temperature"
            )


def generate(
    *,
    base: BaseLike = None,
    adapter: Adapter | str | os.PathLike[str] | None = None,
    prompts: Sequence[Prompt],
    images: Sequence[Sequence[Any]] | None = None,
    chat: bool | None = None,
    sampling: Sampling | None = None,
    batch_size: int = 8,
    dtype: str | None = None,
    device: str | None = None,
    allow_other_base: bool = False,
) -> list[str]:
    """Answers to several prompts, in their order.

    Args:
        base: as in `weft.train`.
        adapter: an adapter, its path, or None: the base answers.
        prompts: texts, or lists of messages.
        images: paths, bytes or images of Pillow, a list a prompt, for bases that see; None: none.
        chat: put texts into the chat template; None: as the adapter was trained.
        batch_size: prompts at once; like lengths come together, padded on the left.
        allow_other_base: use the adapter on a base with another fingerprint; shapes have to agree.

    Raises:
        DataError: an empty prompt, or messages for a tokenizer without a chat template.
    """
    with (
        opened(
            base, adapter, dtype=dtype, device=device, kind=_kind(images), allow_other_base=allow_other_base
        ) as ready,
        ready.using(True) as model,
    ):
        if images is not None or sees(ready.tokenizer):
            return _seen(model, ready.tokenizer, prompts, images, sampling or Sampling())
        encoded = encode(ready, prompts, chat)
        answers = continue_tokens(model, ready.tokenizer, encoded, sampling or Sampling(), batch_size)
    return [ready.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


def stream(
    *,
    base: BaseLike = None,
    adapter: Adapter | str | os.PathLike[str] | None = None,
    prompt: Prompt,
    images: Sequence[Any] | None = None,
    chat: bool | None = None,
    sampling: Sampling | None = None,
    dtype: str | None = None,
    device: str | None = None,
    allow_other_base: bool = False,
) -> Iterator[str]:
    """One answer, piece by piece as it comes; arguments as in `generate`. Stopping early stops the model."""
    with (
        opened(
            base, adapter, dtype=dtype, device=device, kind=_kind(images), allow_other_base=allow_other_base
        ) as ready,
        ready.using(True) as model,
    ):
        if images is not None or sees(ready.tokenizer):
            shown = None if images is None else [images]
            yield from _seen(model, ready.tokenizer, [prompt], shown, sampling or Sampling())
            return
        tokens = encode(ready, [prompt], chat)[0]
        yield from _pieces(model, ready.tokenizer, tokens, sampling or Sampling())


def _kind(images: Any) -> str | None:
    return None if images is None else "image-text"


def _seen(model: nn.Module, processor: Any, prompts: Sequence[Prompt], images: Any, sampling: Sampling) -> list[str]:
    """Answers of a base that sees, one prompt after the other."""
    if not sees(processor):
        raise BaseError(
            "these prompts have images, and the base has no processor for text and images; give one that sees"
        )
    config = _generation_config(model, processor.tokenizer, sampling)
    config.max_new_tokens = sampling.max_new_tokens
    with own_stream(sampling.seed), _eval(model):
        found = answers(model, processor, prompts, images, config)
    return [processor.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in found]


def encode(ready: Opened, prompts: Sequence[Prompt], chat: bool | None) -> list[list[int]]:
    """Tokens of prompts, just as they stand before the answer in training."""
    return encode_as(ready.model, ready.tokenizer, trained_format(ready.adapter), prompts, chat)


def encode_as(
    model: nn.Module, tokenizer: Any, trained: Mapping[str, Any], prompts: Sequence[Prompt], chat: bool | None
) -> list[list[int]]:
    """The same for an adapter whose `trained_format` is known.

    Raises:
        BaseError: the model can't generate. DataError: an empty prompt, or messages without a chat template.
    """
    from weft.data import Prompt as DataPrompt
    from weft.data import encode_prompts

    if not hasattr(model, "generate"):
        raise BaseError(
            f"a {type(model).__name__} classifies, it can't generate text; see how well it does with weft.evaluate (weft eval)"
        )
    chat = bool(trained.get("as_chat")) if chat is None else chat
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"prompt {index} is empty; expected text or messages")
    shaped = [
        [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt for prompt in prompts
    ]
    most = _positions(model) or 10**9
    rows = [DataPrompt(prompt, (), index) for index, prompt in enumerate(shaped)]
    return encode_prompts(rows, tokenizer, max_length=int(most) - 1, separator=trained.get("separator", ""))


def continue_tokens(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, batch_size: int,
    tick: Callable[[int], None] | None = None,
    routed: Callable[[list[int]], contextlib.AbstractContextManager[Any]] | None = None,
) -> list[list[int]]:  # fmt: skip
    """Tokens that follow each prompt, without the prompt and without what stands after its end token.

    Batches are made of prompts of like length, padded on the left.

    Args:
        tick: called with the number of prompts after each batch.
        routed: gives the route of a batch from the indices of its prompts; None: whatever is in use answers.
    """
    device = next(model.parameters()).device
    config = _generation_config(model, tokenizer, sampling)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    answers: list[list[int]] = [[] for _ in prompts]
    with own_stream(sampling.seed):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = max(len(prompts[index]) for index in chosen)
            ids = torch.full((len(chosen), width), config.pad_token_id)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(chosen):
                ids[row, width - len(prompts[index]) :] = torch.tensor(list(prompts[index]))
                mask[row, width - len(prompts[index]) :] = 1
            config.max_new_tokens = _room(model, width, sampling)
            with _eval(model), routed(chosen) if routed is not None else contextlib.nullcontext():
                found: Any = model.generate(
                    input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
                )  # type: ignore[operator]
            for row, index in enumerate(chosen):
                answers[index] = _until_end(found[row, width:].tolist(), config.eos_token_id)
            if tick is not None:
                tick(len(chosen))
    return answers


def _pieces(model: nn.Module, tokenizer: Any, tokens: list[int], sampling: Sampling) -> Iterator[str]:
    """Run ``generate`` in a thread and hand on what its streamer gives."""
    from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

    pieces: queue.Queue[str | BaseException | None] = queue.Queue()
    stop = threading.Event()

    class Hand(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.put(text)

    class Stop(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), stop.is_set(), device=input_ids.device)

    device = next(model.parameters()).device
    ids = torch.tensor([tokens], device=device)
    config = _generation_config(model, tokenizer, sampling)
    config.max_new_tokens = _room(model, len(tokens), sampling)

    def work() -> None:
        try:
            with own_stream(sampling.seed), _eval(model):
                model.generate(  # type: ignore[operator]
                    input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config,
                    streamer=Hand(tokenizer, skip_prompt=True, skip_special_tokens=True),
                    stopping_criteria=StoppingCriteriaList([Stop()]),
                )  # fmt: skip
            pieces.put(None)
        except BaseException as error:  # noqa: BLE001 - handed on to the caller's thread
            pieces.put(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            if piece:
                yield piece
    finally:
        stop.set()
        worker.join()


def _generation_config(model: nn.Module, tokenizer: Any, sampling: Sampling) -> Any:
    """A config that says everything: what the base's own config says of lengths and sampling doesn't count."""
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    ends: list[int] = []
    for value in (getattr(own, "eos_token_id", None), tokenizer.eos_token_id):
        ends += [value] if isinstance(value, int) else list(value or ())
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else 0)
    draws = (
        {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        if sampling.temperature
        else {}
    )
    return GenerationConfig(
        do_sample=bool(sampling.temperature),
        repetition_penalty=sampling.repetition_penalty if sampling.repetition_penalty != 1 else None,
        eos_token_id=sorted(set(ends)) or None,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=pad,
        **draws,
    )


def _positions(model: Any) -> int | None:
    """Positions that the base has; None where its config doesn't say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _room(model: Any, width: int, sampling: Sampling) -> int:
    """New tokens that still fit into the base's positions."""
    most = _positions(model)
    return sampling.max_new_tokens if not most else max(1, min(sampling.max_new_tokens, int(most) - width))


def _until_end(tokens: list[int], ends: Any) -> list[int]:
    stops = set(ends or ())
    return tokens[: next((index for index, token in enumerate(tokens) if token in stops), len(tokens))]


@contextlib.contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
