"""Pairs of a text and an image: rows of a file, decoded images, and batches of both.

    {"image": "cats/17.png", "text": "a photo of a cat"}                  one pair a row
    {"image": "cats/17.png", "text": "my cat", "label": "pet"}            to classify text and image together

Equal texts, and equal images, have equal numbers, so that a loss knows what belongs together. Does not know models.

Shapes: B rows, T tokens, H and W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from weft.data.images import open_image
from weft.data.sources import read_table
from weft.data.transforms import ImageTransform
from weft.errors import DataError, ImageError, did_you_mean, some_names

__all__ = ["PairCollator", "PairFeatures", "Pairs", "load_pairs"]

IMAGE = ("image", "image_path", "file_name", "file", "path", "img")
TEXT = ("text", "caption", "captions", "sentence", "description")
LABEL = ("label", "class", "category_id")
SHOWN = 3


@dataclass(frozen=True)
class Pairs:
    """Pairs, with their images decoded.

    Attributes:
        texts, images: by row; images of Pillow in RGB, one object for each different image.
        text_ids, image_ids: numbers by row, equal for equal ones.
        labels: names of the classes; empty where rows have none. classes: by row.
        source, digest: of the rows. notes: what the user should know: images that were left out.
    """

    texts: tuple[str, ...]
    images: tuple[Any, ...]
    text_ids: tuple[int, ...]
    image_ids: tuple[int, ...]
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

        digest = _digest([self.texts[row] for row in rows], [str(self.image_ids[row]) for row in rows])
        return Pairs(
            part(self.texts), part(self.images), part(self.text_ids), part(self.image_ids), self.source, digest, self.labels,
            part(self.classes), self.notes,
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
) -> Pairs:
    """Read pairs and decode their images; an image that can't be read is left out, with a note.

    Args:
        source: JSON lines or another table, see `weft.data.load_examples`; or a list of dicts, whose images may be Pillow's or arrays
            (H, W, 3) of bytes; or `Pairs`.
        images: the folder that paths of images begin in, and may not leave; None: that of the file.
        columns: ``{"image": …, "text": …, "label": …}`` where the columns are called otherwise.
        labels: names of the classes where they are known.
        labelled: rows have to have a class.

    Raises:
        DataError: no such file, columns or folder; an unknown class; or no image can be read.
    """
    if isinstance(source, Pairs):
        return source
    table = read_table(source)
    named = _columns(table.rows[0], dict(columns or {}), labelled, table.name)
    root = _root(source, images)
    opened: dict[Any, tuple[int, Any]] = {}
    texts, pictures, image_ids, found, bad = [], [], [], [], []
    for index, row in enumerate(table.rows):
        text, name = row.get(named["text"]), row.get(named["image"])
        if not isinstance(text, str) or not text.strip():
            bad.append(f"{table.where(index)}: no text")
            continue
        key = name if isinstance(name, str) else id(name)
        if key not in opened:
            try:
                opened[key] = (len(opened), _image(name, root))
            except ImageError as problem:
                bad.append(f"{table.where(index)}: {problem}")
                continue
        texts.append(text)
        image_ids.append(opened[key][0])
        pictures.append(opened[key][1])
        found.append(row.get(named["label"]) if "label" in named else None)
    if not texts:
        raise DataError(f"{table.name}: none of {len(table.rows):,} pairs can be used: {'; '.join(bad[:SHOWN])}")
    notes = (
        *table.notes,
        *([f"{len(bad):,} of {len(table.rows):,} pairs were left out: {'; '.join(bad[:SHOWN])}"] if bad else []),
    )
    names, classes = _classes(found, labels, table.name) if "label" in named else ((), ())
    numbers = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    keys = [str(row.get(named["image"])) if isinstance(row.get(named["image"]), str) else "" for row in table.rows]
    return Pairs(
        tuple(texts), tuple(pictures), tuple(numbers[text] for text in texts), tuple(image_ids), table.name, _digest(texts, keys), names, classes,
        notes,
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


def _image(value: Any, root: Path | None) -> Any:
    if isinstance(value, np.ndarray):
        from PIL import Image

        if value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3:
            raise ImageError(f"an array {value.shape} of {value.dtype}; expected (H, W, 3) of uint8")
        return Image.fromarray(value)
    if value is None or (isinstance(value, str) and not value):
        raise ImageError("no image")
    if isinstance(value, str) and root is None:
        raise ImageError(
            f"{value}: the data are no file, so that nobody knows where this path begins; give images=FOLDER"
        )
    return open_image(value, root=root)


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


def _digest(texts: Sequence[str], keys: Sequence[str]) -> str:
    import hashlib
    import json

    return hashlib.sha256(json.dumps([list(texts), list(keys)]).encode()).hexdigest()


@dataclass
class PairFeatures:
    """Pairs as a trainer's data set: token ids and pixels by row.

    Attributes:
        kind: ``"contrastive"`` or ``"fused"``.
        tokens: ids by row.
        transform: from images to tensors; with ``seed`` training images are augmented, differently each epoch.
        lengths: tokens by row.
    """

    pairs: Pairs
    tokens: list[list[int]]
    transform: ImageTransform
    kind: str
    seed: int | None = None
    epoch: int = 0
    packed: bool = False
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
        image = self.pairs.images[index]
        if self.seed is not None and self.transform.augment:
            return self.transform(image, seed=f"{self.seed}-{self.epoch}-{index}")
        key = self.pairs.image_ids[index]
        if key not in self._still:
            self._still[key] = self.transform(image)
        return self._still[key]


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
