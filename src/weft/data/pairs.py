"""Pairs of a text and an image: rows of a file, decoded images, and batches of both.

    {"image": "cats/17.png", "text": "a photo of a cat"}                  one pair a row
    {"image": "cats/17.png", "text": "my cat", "label": "pet"}            to classify text and image together

Equal texts, and equal images, have equal numbers, so that a loss knows what belongs together. Does not know models.

Shapes: B rows, T tokens, H and W pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from weft.data.pictures import CACHE_BYTES, Album, Remarks
from weft.data.sources import read_table
from weft.data.transforms import ImageTransform
from weft.errors import DataError, ImageError, did_you_mean, some_names

__all__ = ["Gallery", "PairCollator", "PairFeatures", "Pairs", "load_pairs"]

IMAGE = ("image", "image_path", "file_name", "file", "path", "img")
TEXT = ("text", "caption", "captions", "sentence", "description")
LABEL = ("label", "class", "category_id")
SHOWN = 3


@dataclass(frozen=True)
class Gallery(Sequence[Any]):
    """Images of Pillow in RGB, by row: those that fit are kept decoded, the others are decoded when they are asked for.

    Attributes:
        references: where each is. album: has them.
    """

    references: tuple[Any, ...]
    album: Album

    def __len__(self) -> int:
        return len(self.references)

    def __getitem__(self, index: Any) -> Any:
        return self.album.get(self.references[index]).image

    def chosen(self, rows: Sequence[int]) -> Gallery:
        """Some of the rows, of the same album."""
        return Gallery(tuple(self.references[row] for row in rows), self.album)


@dataclass(frozen=True)
class Pairs:
    """Pairs, whose images have all been decoded once.

    Attributes:
        texts, images: by row.
        text_ids, image_ids: numbers by row, equal for equal ones.
        prints: digests of the pixels, by row.
        labels: names of the classes; empty where rows have none. classes: by row.
        source, digest: of the rows. notes: what the user should know: images that were left out.
    """

    texts: tuple[str, ...]
    images: Gallery
    text_ids: tuple[int, ...]
    image_ids: tuple[int, ...]
    prints: tuple[str, ...]
    source: str
    digest: str
    labels: tuple[str, ...] = ()
    classes: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def split(self, share: float, seed: int) -> tuple[Pairs, Pairs]:
        """Most of the pairs, and a share of them held out, by image: all captions of an image are on one side.

        Raises:
            DataError: nothing would be left on one side.
        """
        import random

        images = sorted(set(self.image_ids))
        count = max(1, round(share * len(images)))
        if count >= len(images):
            raise DataError(f"{self.source}: {len(images)} images are too few to hold out {share:g} of them")
        held = set(random.Random(seed).sample(images, count))
        return self.chosen([i not in held for i in self.image_ids]), self.chosen([i in held for i in self.image_ids])

    def chosen(self, keep: Sequence[bool]) -> Pairs:
        """Some of the rows."""
        rows = [index for index, kept in enumerate(keep) if kept]

        def part(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[row] for row in rows) if values else ()

        texts, prints, classes = part(self.texts), part(self.prints), part(self.classes)
        digest = _digest(texts, prints, classes)
        return Pairs(
            texts, self.images.chosen(rows), part(self.text_ids), part(self.image_ids), prints, self.source, digest, self.labels, classes, self.notes,
        )  # fmt: skip

    def summary(self) -> str:
        """One line for people."""
        texts, images = len(set(self.text_ids)), len(set(self.image_ids))
        classes = f", {len(self.labels)} classes" if self.labels else ""
        return f"{len(self):,} pairs of {images:,} images and {texts:,} texts{classes}"


def load_pairs(
    source: Any,
    images: str | os.PathLike[str] | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    labels: Sequence[str] | None = None,
    labelled: bool = False,
    cache_bytes: int = CACHE_BYTES,
) -> Pairs:
    """Read pairs and decode every image once; one that can't be read is left out, with a note, as what was done to others.

    Args:
        source: JSON lines or another table, see `weft.data.load_examples`; or a list of dicts, whose images may be Pillow's or arrays
            (H, W, 3) of bytes; or `Pairs`.
        images: the folder that paths of images begin in, and may not leave; None: that of the file.
        columns: ``{"image": …, "text": …, "label": …}`` where the columns are called otherwise.
        labels: names of the classes where they are known.
        labelled: rows have to have a class.
        cache_bytes: of decoded pixels that stay in memory.

    Raises:
        DataError: no such file, columns or folder; an unknown class; or no image can be read.
    """
    if isinstance(source, Pairs):
        return source
    table = read_table(source)
    named = _columns(table.rows[0], dict(columns or {}), labelled, table.name)
    root = _root(source, images)
    album, remarks = Album(None if root is None else str(root), cache_bytes), Remarks()
    opened: dict[Any, tuple[int, str]] = {}
    kept, bad = [], []
    for index, row in enumerate(table.rows):
        text, name = row.get(named["text"]), row.get(named["image"])
        if not isinstance(text, str) or not text.strip():
            bad.append(f"{table.where(index)}: no text")
            continue
        key = name if isinstance(name, str) else id(name)
        if key not in opened:
            try:
                found = album.get(_checked(name, root))
            except ImageError as problem:
                bad.append(f"{table.where(index)}: {problem}")
                continue
            remarks.add(table.numbers[index], found)
            opened[key] = (len(opened), _print(found.image))
        kept.append((text, name, row.get(named["label"]) if "label" in named else None, *opened[key]))
    if not kept:
        raise DataError(f"{table.name}: none of {len(table.rows):,} pairs can be used: {'; '.join(bad[:SHOWN])}")
    texts, references, said, image_ids, prints = (tuple(part) for part in zip(*kept, strict=True))
    notes = (
        *table.notes,
        *([f"{len(bad):,} of {len(table.rows):,} pairs were left out: {'; '.join(bad[:SHOWN])}"] if bad else []),
        *remarks.notes(table.unit),
    )
    names, classes = _classes(said, labels, table.name) if "label" in named else ((), ())
    numbers = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    return Pairs(
        texts, Gallery(references, album), tuple(numbers[text] for text in texts), image_ids, prints, table.name,
        _digest(texts, prints, classes), names, classes, notes,
    )  # fmt: skip


def _columns(row: Mapping[str, Any], said: dict[str, str], labelled: bool, name: str) -> dict[str, str]:
    found = {}
    for what, usual in (("image", IMAGE), ("text", TEXT), ("label", LABEL)):
        wanted = [said[what]] if what in said else usual
        there = next((column for column in wanted if column in row), None)
        if there is not None:
            found[what] = there
        elif what != "label" or labelled or what in said:
            raise DataError(
                f"{name}: pairs have an image, a text{' and a label' if labelled else ''}; there is no column {wanted[0]!r}, only "
                f"{some_names(row, 8)}.{did_you_mean(wanted[0], row)} Say which with columns={{{what!r}: …}} (--columns {what}=COLUMN)"
            )
    return found


def _root(source: Any, images: str | os.PathLike[str] | None) -> Path | None:
    if images is not None:
        folder = Path(images).expanduser()
        if not folder.is_dir():
            raise DataError(
                f"{folder}: no such folder of images; give the one that the data's paths begin in (--images DIR)"
            )
        return folder
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        return path if path.is_dir() else path.parent
    return None


def _checked(value: Any, root: Path | None) -> Any:
    """A reference that an album can follow.

    Raises:
        ImageError: no image, an array of another kind, a path that begins nowhere.
    """
    if isinstance(value, np.ndarray) and (value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3):
        raise ImageError(f"an array {value.shape} of {value.dtype}; expected (H, W, 3) of uint8")
    if value is None or (isinstance(value, str) and not value):
        raise ImageError("no image")
    if isinstance(value, str) and root is None:
        raise ImageError(
            f"{value}: the data are no file, so that nobody knows where this path begins; give images=FOLDER"
        )
    return value


def _print(image: Any) -> str:
    return hashlib.sha256(f"{image.size};".encode() + image.tobytes()).hexdigest()


def _classes(values: Sequence[Any], labels: Sequence[str] | None, name: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    texts = [str(value) for value in values]
    if any(value is None for value in values):
        raise DataError(f"{name}: {sum(value is None for value in values):,} pairs have no label")
    known = tuple(labels) if labels else tuple(sorted(set(texts)))
    places = {label: index for index, label in enumerate(known)}
    odd = sorted(set(texts) - places.keys())
    if odd:
        raise DataError(f"{name}: unknown label {odd[0]!r}.{did_you_mean(odd[0], known)} Known: {some_names(known)}")
    return known, tuple(places[text] for text in texts)


def _digest(texts: Sequence[str], prints: Sequence[str], classes: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps([list(texts), list(prints), list(classes)]).encode()).hexdigest()


@dataclass
class PairFeatures:
    """Pairs as a trainer's data set: token ids and pixels by row.

    Attributes:
        kind: ``"contrastive"`` or ``"fused"``.
        tokens: ids by row.
        transform: from images to tensors; with ``seed`` training images are augmented, differently each epoch.
        lengths: tokens by row.
        budget: bytes of tensors that stay in memory.
    """

    pairs: Pairs
    tokens: list[list[int]]
    transform: ImageTransform
    kind: str
    seed: int | None = None
    epoch: int = 0
    packed: bool = False
    budget: int = CACHE_BYTES
    _still: dict[int, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def lengths(self) -> Any:
        """Tokens by row."""
        return np.array([len(ids) for ids in self.tokens])

    def __getitem__(self, index: int) -> dict[str, Any]:
        pairs = self.pairs
        label = pairs.classes[index] if self.kind == "fused" else pairs.text_ids[index]
        return {
            "input_ids": self.tokens[index],
            "pixel_values": self.pixels(index),
            "labels": label,
            "image_ids": pairs.image_ids[index],
        }

    def pixels(self, index: int) -> Any:
        """(3, H, W) of one row."""
        if self.seed is not None and self.transform.augment:
            return self.transform(self.pairs.images[index], seed=f"{self.seed}-{self.epoch}-{index}")
        key = self.pairs.image_ids[index]
        if key in self._still:
            return self._still[key]
        made = self.transform(self.pairs.images[index])
        if (len(self._still) + 1) * made.numel() * made.element_size() <= self.budget:
            self._still[key] = made
        return made


@dataclass(frozen=True)
class PairCollator:
    """Rows of `PairFeatures` to a batch for a two-tower model.

    Attributes:
        pad_id: the token that fills up. classify: labels are classes; the numbers of images are left out.
    """

    pad_id: int
    classify: bool

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """``input_ids``, ``attention_mask`` (B, T); ``pixel_values`` (B, 3, H, W); ``labels``, ``image_ids`` (B,)."""
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), longest), self.pad_id)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
            mask[index, : len(row["input_ids"])] = 1
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        }
        batch["labels"] = torch.tensor([row["labels"] for row in rows])
        if not self.classify:
            batch["image_ids"] = torch.tensor([row["image_ids"] for row in rows])
        return batch
