"""Examples with an image and a class, checked one by one, and batches of pixels out of them.

Every image is decoded once before a training starts: what is broken is known, counted and left out by then, and what was
decoded is kept as long as it fits. Does not know models.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from weft.data.account import Account, Tally
from weft.data.examples import Examples
from weft.data.images import Opened, read_image
from weft.data.transforms import augmented
from weft.errors import DataError, ImageError, did_you_mean, some_names

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

__all__ = ["CACHE_BYTES", "Album", "EncodedImages", "ImageCollator", "encode_images"]

CACHE_BYTES = 512 * 2**20
"""Decoded pixels that are kept in memory; images beyond are decoded again when they are needed."""


@dataclass
class Album:
    """Images by reference, decoded when they are asked for; those that came first stay in memory.

    An album never drops an image for another one: in a training every image is asked for once an epoch, and a cache that
    is smaller than the epoch would drop each just before its turn.

    Attributes:
        root: the folder of paths.
        budget: bytes of decoded pixels that stay.
        decoded: how often an image was decoded.
    """

    root: str | None
    budget: int = CACHE_BYTES
    decoded: int = 0
    _kept: dict[Any, Opened] = field(default_factory=dict)
    _bytes: int = 0

    def get(self, reference: Any) -> Opened:
        """One image.

        Raises:
            ImageError: see `weft.data.images.read_image`.
        """
        key = reference if isinstance(reference, str | bytes) else id(reference)
        if key in self._kept:
            return self._kept[key]
        if hasattr(reference, "__array_interface__"):
            from PIL import Image as pillow

            reference = pillow.fromarray(np.asarray(reference).squeeze())
        elif reference == "":
            raise ImageError("no image")
        found = read_image(reference, root=self.root)
        self.decoded += 1
        size = 3 * found.image.width * found.image.height
        if self._bytes + size <= self.budget:
            self._bytes += size
            self._kept[key] = found
        return found


@dataclass(frozen=True, eq=False)
class EncodedImages(Sequence[dict[str, Any]]):
    """n images with their classes. ``encoded[i]`` is ``{"image": RGB image, "labels": int, "row": int}``.

    Attributes:
        labels: names of the classes. classes: (n,) int64.
        rows: index of the example that each is from.
        references: where each image is; album: has them.
        digest: sha256 over pixels and classes.
    """

    account: Account
    labels: tuple[str, ...]
    classes: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    references: tuple[Any, ...]
    album: Album
    digest: str
    kind: str = "classify-images"
    packed: bool = False
    max_length: int = 0

    def __len__(self) -> int:
        return len(self.references)

    def __getitem__(self, index: Any) -> Any:
        image = self.album.get(self.references[index]).image
        return {"image": image, "labels": int(self.classes[index]), "row": int(self.rows[index])}

    @property
    def features(self) -> EncodedImages:
        """The features: the object itself."""
        return self

    @functools.cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Ones: images have no length."""
        return np.ones(len(self), dtype=np.int64)

    @property
    def num_tokens(self) -> int:
        """None of them: images."""
        return 0

    @property
    def num_loss_tokens(self) -> int:
        """Classes that are learned."""
        return len(self)


class Remarks:
    """What was done to images, counted."""

    def __init__(self) -> None:
        self._tallies: dict[str, Tally] = {}

    def add(self, number: int, opened: Opened) -> None:
        """Count one image of this row."""
        for remark in opened.remarks:
            self._tallies.setdefault(remark, Tally()).add(number)

    def notes(self, unit: str) -> list[str]:
        """One line a remark."""
        return [f"images {remark}: {tally.words(unit)}" for remark, tally in self._tallies.items()]


def encode_images(
    examples: Examples,
    *,
    labels: Sequence[str] | None = None,
    cache_bytes: int = CACHE_BYTES,
    tick: Callable[[int], None] | None = None,
) -> EncodedImages:
    """Decode every image once, and number the classes.

    Args:
        examples: of the kind ``"classify-images"``.
        labels: the training set's label names; None: the examples' own.
        cache_bytes: of decoded pixels that stay in memory.
        tick: called with 1 after each image.

    Raises:
        DataError: an unknown label, or no image can be read; says why the first can't.
    """
    names = tuple(labels if labels is not None else examples.labels or ())
    ids = {name: number for number, name in enumerate(names)}
    account, remarks = Account(examples=len(examples), unit=examples.unit), Remarks()
    album, digest = Album(examples.images, cache_bytes), hashlib.sha256()
    rows: list[int] = []
    for index, row in enumerate(examples.rows):
        if row["label"] not in ids:
            raise DataError(
                f"{examples.where(index)}: unknown label {row['label']!r}; the training set has {some_names(names, 12)}."
                f"{did_you_mean(row['label'], names)}"
            )
        try:
            opened = album.get(row["image"])
        except ImageError as error:
            account.drop_image(examples.numbers[index], str(error))
        else:
            rows.append(index)
            remarks.add(examples.numbers[index], opened)
            digest.update(f"{row['label']}:{opened.image.size};".encode() + opened.image.tobytes())
        if tick is not None:
            tick(1)
    account.kept = account.features = account.loss_tokens = len(rows)
    account.notes += remarks.notes(examples.unit)
    if not rows:
        raise DataError(
            f"{examples.source}: none of {len(examples):,} images can be read; the first: {account.reasons[0]}. Paths begin in "
            f"{examples.images}; --images DIR chooses another folder"
        )
    classes = np.array([ids[examples.rows[index]["label"]] for index in rows], dtype=np.int64)
    references = tuple(examples.rows[index]["image"] for index in rows)
    return EncodedImages(account, names, classes, np.array(rows), references, album, digest.hexdigest())


@dataclass(frozen=True)
class ImageCollator:
    """Images to a batch ``{"pixel_values": (B, 3, H, W), "labels": (B,) int64}``. Can be pickled for workers.

    Attributes:
        prepare: takes a list of RGB images and gives the tensor.
        augment: names out of `weft.data.transforms.AUGMENTATIONS`, for images that come with a seed.
    """

    prepare: Callable[[list[Image]], Tensor]
    augment: tuple[str, ...] = ()

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch."""
        import torch

        images = [
            augmented(item["image"], self.augment, item["seed"]) if self.augment and "seed" in item else item["image"]
            for item in features
        ]
        labels = torch.tensor([item["labels"] for item in features], dtype=torch.long)
        return {"pixel_values": self.prepare(images), "labels": labels}
