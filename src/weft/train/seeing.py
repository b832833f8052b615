"""Answers to prompts with images, by a base that sees.

Stands on the model's own ``generate``, as `weft.train.generation` does for text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from weft.data.images import open_image
from weft.data.talks import TalkWriter
from weft.errors import DataError

__all__ = ["answers", "sees"]


def sees(processor: Any) -> bool:
    """Whether this is a processor for text and images."""
    return hasattr(processor, "image_processor") and hasattr(processor, "tokenizer")


@torch.no_grad()
def answers(
    model: nn.Module, processor: Any, prompts: Sequence[Any], images: Sequence[Sequence[Any]] | None, config: Any
) -> list[list[int]]:
    """Tokens of the answers, one prompt after the other.

    Args:
        prompts: texts; or lists of messages with parts of the type image.
        images: paths, bytes or images of Pillow, a list a prompt; they stand before the prompt's text. None: none.
        config: of the generation.

    Raises:
        DataError: lists of unequal length, an empty prompt; an image that can't be read.
    """
    given = [[] for _ in prompts] if images is None else list(images)
    if len(given) != len(prompts):
        raise DataError(f"{len(prompts)} prompts and {len(given)} lists of images; give a list of images a prompt")
    writer, found = TalkWriter(processor), []
    device = next(model.parameters()).device
    for index, (prompt, several) in enumerate(zip(prompts, given, strict=True)):
        if not prompt:
            raise DataError(f"prompt {index} is empty; expected text or messages")
        parts = [{"type": "image"} for _ in several] + [{"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": parts}] if isinstance(prompt, str) else list(prompt)
        pixels = [open_image(image) for image in several]
        inputs = writer.inputs(writer.prompt(messages), pixels, return_tensors="pt")
        inputs = {name: value.to(device) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        generate: Any = model.generate
        tokens = generate(**inputs, generation_config=config)[0, inputs["input_ids"].shape[1] :].tolist()
        found.append(tokens)
    return found
