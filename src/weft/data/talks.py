"""Conversations with images: tokens as the base's processor writes them, the loss on what the assistant says.

A processor puts many tokens in the place of one image, how many depends on the image. What the assistant says is therefore
found in the text with one token an image, as for any conversation, and moved by what each image before it adds; that the
tokens there are the same is checked. Pixels are made batch by batch, by the processor's own image processor.
Does not know models.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from weft.data.account import Account
from weft.data.chat import Conversation, Template
from weft.data.encoded import IGNORED
from weft.data.examples import Examples
from weft.data.pictures import CACHE_BYTES, Album, Remarks
from weft.errors import BaseError, DataError, ImageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["EncodedTalks", "TalkCollator", "TalkWriter", "encode_talks"]


@dataclass(frozen=True)
class Written:
    """One conversation in tokens: (t,) ids, (t,) which are learned, what else the processor says of each token."""

    ids: npt.NDArray[np.int64]
    learned: npt.NDArray[np.bool_]
    more: Mapping[str, npt.NDArray[np.int64]]
    last_image: int = 0


@dataclass(frozen=True, eq=False)
class EncodedTalks(Sequence[dict[str, Any]]):
    """n conversations. ``encoded[i]`` has ``input_ids`` and ``labels`` (t,), ``images``, and what the processor adds to tokens.

    Attributes:
        written: the tokens of each. references: where the images of each are; album: has them.
        rows: index of the example that each is from. digest: sha256 over tokens and pixels.
    """

    account: Account
    written: tuple[Written, ...]
    references: tuple[tuple[Any, ...], ...]
    rows: npt.NDArray[np.int64]
    album: Album
    digest: str
    max_length: int
    kind: str = "image-text"
    packed: bool = False
    labels: None = None

    def __len__(self) -> int:
        return len(self.written)

    def __getitem__(self, index: Any) -> Any:
        one = self.written[index]
        return {
            "input_ids": one.ids,
            "labels": np.where(one.learned, one.ids, IGNORED),
            "images": [self.album.get(reference).image for reference in self.references[index]],
            "more": dict(one.more),
        }

    @property
    def features(self) -> EncodedTalks:
        """The features: the object itself."""
        return self

    @functools.cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each, those of its images among them."""
        return np.array([len(one.ids) for one in self.written], dtype=np.int64)

    @property
    def num_tokens(self) -> int:
        """All of them."""
        return int(self.lengths.sum())

    @property
    def num_loss_tokens(self) -> int:
        """Those that are learned."""
        return int(sum(one.learned.sum() for one in self.written))


class TalkWriter:
    """Conversations with images as a processor writes them.

    Raises:
        BaseError: the processor has no image processor, tokenizer or token for an image.
        DataError: no chat template.
    """

    def __init__(self, processor: Any) -> None:
        if not (hasattr(processor, "image_processor") and hasattr(processor, "tokenizer")):
            raise BaseError(
                f"conversations with images need a processor for text and images, and this base has {type(processor).__name__}; "
                "copy preprocessor_config.json and processor_config.json of the model beside its config.json"
            )
        self.processor, self.tokenizer = processor, processor.tokenizer
        template = getattr(processor, "chat_template", None)
        self.template = Template(self.tokenizer, template if isinstance(template, str) else None)

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text up to where the assistant answers."""
        return self.template.render(Conversation(messages, None, "prompt"), prompt=True)

    def inputs(self, text: str, images: Sequence[Any], **options: Any) -> Any:
        """What the processor makes of one text and its images."""
        given = {"images": [list(images)]} if images else {}
        try:
            return self.processor(text=[text], **given, add_special_tokens=False, **options)
        except (ValueError, TypeError, IndexError, KeyError) as error:
            raise DataError(f"the processor refuses this text with {len(images)} images: {error}") from error

    def write(self, talk: Conversation, images: Sequence[Any], mask_prompt: bool) -> Written:
        """Tokens, and which are learned.

        Raises:
            DataError: the template has no place for an image, or writes it in a way that can't be followed.
        """
        text = self.template.render(talk)
        ids, said = self.template.encode([talk], False)[0]
        found = self.inputs(text, images)
        whole = list(found["input_ids"][0])
        more = {name: list(values[0]) for name, values in found.items()
                if name not in ("input_ids", "attention_mask") and _by_token(values, len(whole))}  # fmt: skip
        places = self._places(talk, ids, text, len(images))
        ended = len(ids) - len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        whole += ids[len(ids) - ended :] if ended else []
        grown = self._grown(images, len(whole) - len(ids), [ids[place] for place in places])
        learned, shift, images_seen = np.zeros(len(whole), dtype=np.bool_), 0, 0
        end = 0
        for at, (token, answer) in enumerate(zip(ids, said, strict=True)):
            if images_seen < len(places) and at == places[images_seen]:
                shift += grown[images_seen]
                images_seen += 1
                end = at + shift + 1
                continue
            if at + shift >= len(whole) or whole[at + shift] != token:
                raise DataError(
                    f"{talk.where}: the processor writes this conversation otherwise than its chat template (token {at + 1}), so the "
                    "assistant's words can't be found; is the processor of this model?"
                )
            learned[at + shift] = answer or not mask_prompt
        learned[:1] = False
        width = len(whole)
        extra = {
            name: np.array([*values, *[0] * (width - len(values))], dtype=np.int64) for name, values in more.items()
        }
        return Written(np.array(whole, dtype=np.int64), learned, extra, end)

    def _places(self, talk: Conversation, ids: Sequence[int], text: str, count: int) -> list[int]:
        """Where in the tokens each image stands, as one token."""
        names = [getattr(self.processor, name, None) for name in ("boi_token", "image_token")] + ["<image>"]
        for name in names:
            token = self.tokenizer.convert_tokens_to_ids(name) if isinstance(name, str) else None
            if token is None or token == self.tokenizer.unk_token_id:
                continue
            places = [at for at, one in enumerate(ids) if one == token]
            if len(places) == count:
                return places
        raise DataError(
            f"{talk.where}: {count} images, but the chat template writes another number of places for them; its text begins with "
            f"{text[:80]!r}. Does the template know parts of the type 'image'?"
        )

    def _grown(self, images: Sequence[Any], total: int, places: Sequence[int]) -> list[int]:
        """By how many tokens each image's place grows."""
        if len({image.size for image in images}) <= 1:
            return [total // len(images)] * len(images) if images else []
        texts = [self.tokenizer.convert_ids_to_tokens(place) for place in places]
        alone = [self.inputs(text, [image])["input_ids"][0] for text, image in zip(texts, images, strict=True)]
        return [len(tokens) - 1 for tokens in alone]


def _by_token(values: Any, length: int) -> bool:
    first = values[0] if len(values) else ()
    return isinstance(first, list | tuple) and len(first) == length and all(isinstance(one, int) for one in first)


def encode_talks(
    examples: Examples,
    processor: Any,
    *,
    max_length: int,
    mask_prompt: bool = True,
    cache_bytes: int = CACHE_BYTES,
    tick: Callable[[int], None] | None = None,
) -> EncodedTalks:
    """Tokens of conversations with images. An image is never cut: where it does not fit, the example is dropped and counted.

    Args:
        examples: of the kind ``"image-text"``.
        processor: of transformers, for text and images.
        max_length: in tokens, those of the images among them.
        mask_prompt: learn what the assistant says alone; False: all text, but never an image's tokens.
        cache_bytes: of decoded pixels that stay in memory.
        tick: called with 1 after each example.

    Raises:
        DataError: nothing is left to learn; says why. BaseError: a processor without images.
    """
    writer, account, remarks = TalkWriter(processor), Account(examples=len(examples), unit=examples.unit), Remarks()
    album, digest = Album(examples.images, cache_bytes), hashlib.sha256()
    written: list[Written] = []
    rows: list[int] = []
    for index, row in enumerate(examples.rows):
        number = examples.numbers[index]
        if tick is not None:
            tick(1)
        if not any(message["role"] == "assistant" and message["content"] for message in row["messages"]):
            account.empty.add(number)
            continue
        try:
            opened = [album.get(reference) for reference in row["images"]]
        except ImageError as error:
            account.drop_image(number, str(error))
            continue
        talk = Conversation(row["messages"], None, examples.where(index))
        one = writer.write(talk, [image.image for image in opened], mask_prompt)
        if len(one.ids) > max_length:
            if one.last_image > max_length or not one.learned[:max_length].any():
                account.masked.add(number)
                continue
            account.truncated.add(number)
            account.completion_cut.add(number)
            more = {name: values[:max_length] for name, values in one.more.items()}
            one = Written(one.ids[:max_length], one.learned[:max_length], more, one.last_image)
        if not one.learned.any():
            account.masked.add(number)
            continue
        for image in opened:
            remarks.add(number, image)
            digest.update(image.image.tobytes())
        digest.update(one.ids.tobytes() + one.learned.tobytes())
        written.append(one)
        rows.append(index)
    account.kept = account.features = len(rows)
    account.tokens, account.loss_tokens = (
        sum(len(one.ids) for one in written),
        int(sum(one.learned.sum() for one in written)),
    )
    account.notes += remarks.notes(examples.unit)
    if not rows:
        raise DataError(
            f"{examples.source}: none of {len(examples):,} examples is left to learn from: {account.summary()}. Check "
            f"max_length={max_length} and the folder of images ({examples.images}; --images DIR chooses another)"
        )
    references = tuple(tuple(examples.rows[index]["images"]) for index in rows)
    return EncodedTalks(account, tuple(written), references, np.array(rows), album, digest.hexdigest(), max_length)


@dataclass(frozen=True)
class TalkCollator:
    """Conversations to a batch for ``model(**batch)``: padded tokens, and pixels as the processor lays them out."""

    processor: Any

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """``input_ids``, ``labels``, ``attention_mask`` (B, T) int64, and what the image processor gives."""
        import torch

        tokenizer = self.processor.tokenizer
        pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
        width = max(len(item["input_ids"]) for item in features)

        def filled(rows: Sequence[Any], fill: int) -> Tensor:
            return torch.from_numpy(
                np.stack([np.pad(row, (0, width - len(row)), constant_values=fill) for row in rows])
            )

        batch = {
            "input_ids": filled([item["input_ids"] for item in features], pad),
            "labels": filled([item["labels"] for item in features], IGNORED),
            "attention_mask": filled([np.ones(len(item["input_ids"]), dtype=np.int64) for item in features], 0),
        }
        names = {name for item in features for name in item["more"]}
        for name in sorted(names):
            empty = np.zeros(0, dtype=np.int64)
            batch[name] = filled([item["more"].get(name, empty) for item in features], 0)
        images = [item["images"] for item in features if item["images"]]
        if images:
            found = self.processor.image_processor(images=images, return_tensors="pt")
            batch |= {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
        return batch
