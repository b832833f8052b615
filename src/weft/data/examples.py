"""Examples: rows of one kind that know where they are from. An immutable value.

Does not know tokenizers.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weft.data.kinds import REQUIRED, recognise
from weft.data.messages import last_answer
from weft.data.pictured import IMAGE_KINDS, image_kind, recognise_images
from weft.data.sources import read_table
from weft.errors import DataError, some_names

__all__ = ["Examples", "Overlap", "load_examples", "overlap"]

_SHAPES = {**REQUIRED, "classify-images": ("image", "label"), "image-text": ("messages", "images")}
_COUNTED = {**_SHAPES, "chat": ("messages", "tools"), "completion": ("prompt", "completion", "references")}


@dataclass(frozen=True)
class Examples(Sequence[Mapping[str, Any]]):
    """Rows of one kind, ready to be encoded.

    Attributes:
        kind: one of `KINDS`.
        rows: one dict an example; see `weft.data` for the columns of each kind.
        numbers: for people: the line, row or block (`unit`) of the source that each example is from, counted from 1.
        labels: for classification, the names of the classes in the order of their ids; else None.
        source: what was read; for messages and provenance.
        notes: what was decided while reading, to be said.
        images: the folder that paths of images are in.
    """

    kind: str
    rows: tuple[Mapping[str, Any], ...]
    numbers: tuple[int, ...]
    labels: tuple[str, ...] | None = None
    source: str = "examples"
    unit: str = "row"
    notes: tuple[str, ...] = ()
    images: str | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    @functools.cached_property
    def digest(self) -> str:
        """sha256 over kind, label names and the columns that count, in order: the same in any file format."""
        digest = hashlib.sha256(json.dumps([self.kind, self.labels]).encode())
        for key in self._keys:
            digest.update(b"\n" + key.encode())
        return digest.hexdigest()

    @functools.cached_property
    def _keys(self) -> list[str]:
        """Each row's columns that count, as canonical JSON."""
        names = _COUNTED[self.kind]
        return [_canonical({name: row[name] for name in names if name in row}) for row in self.rows]

    @functools.cached_property
    def _asked(self) -> list[str]:
        """What each row asks: rows with the same question belong together."""
        return [_canonical(_question(self.kind, row)) for row in self.rows]

    @property
    def questions(self) -> int:
        """How many different prompts, texts or conversations there are: a part can be held out where they are at least two."""
        return len(set(self._asked))

    def where(self, index: int) -> str:
        """Where a row stands: ``"train.jsonl, line 18"``."""
        return f"{self.source}, {self.unit} {self.numbers[index]}"

    def summary(self) -> str:
        """One line: source, count, kind and what is worth knowing."""
        shape = "{" + ", ".join(_SHAPES[self.kind]) + "}"
        words = f"{self.source}: {len(self):,} {'example' if len(self) == 1 else 'examples'} of {shape} ({self.kind})"
        if self.labels is not None:
            words += f", {len(self.labels)} labels: {some_names(self.labels)}"
        return "; ".join((words, *self.notes))

    def take(self, count: int) -> Examples:
        """The first rows."""
        return self._select(range(min(count, len(self))), self.source)

    def split(self, fraction: float = 0.1, *, seed: int = 0) -> tuple[Examples, Examples]:
        """Split off a part for evaluation. Rows with the same prompt, text or conversation stay on one side.

        Args:
            fraction: about what share of the rows goes to the second part; each part gets at least one.
            seed: the same seed splits the same rows in the same way.

        Returns:
            The larger part and the part for evaluation, both in the order of the source.

        Raises:
            DataError: a fraction outside of (0, 1); all rows ask the same.
        """
        if not 0 < fraction < 1:
            raise DataError(f"split: fraction={fraction}: expected more than 0 and less than 1")
        groups: dict[str, list[int]] = {}
        for index, key in enumerate(self._asked):
            groups.setdefault(key, []).append(index)
        if len(groups) < 2:
            raise DataError(
                f"{self.source}: nothing can be held out of {'its only row' if len(self) == 1 else f'{len(self)} rows that all ask the same'}; "
                "give a file for evaluation"
            )
        members = list(groups.values())
        random.Random(seed).shuffle(members)
        wanted = max(1, round(fraction * len(self)))
        taken: list[int] = []
        while len(taken) < wanted and len(members) > 1:
            taken += members.pop()
        held = sorted(taken)
        rest = sorted(index for group in members for index in group)
        return self._select(rest, f"{self.source} (train part)"), self._select(held, f"{self.source} (held-out part)")

    def as_chat(self, system: str | None = None) -> Examples:
        """Prompts and completions as conversations of two messages, for models that were tuned on a chat template.

        Raises:
            DataError: text and classification have no conversation.
        """
        if self.kind == "chat":
            return self
        if self.kind != "completion":
            raise DataError(
                f"{self.source}: {self.kind} examples can't become conversations; expected {{prompt, completion}}"
            )
        before = [{"role": "system", "content": system}] if system else []
        rows = []
        for row in self.rows:
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
            extra = {"references": row["references"]} if "references" in row else {}
            rows.append({"messages": [*before, *turns], **extra})
        return replace(self, kind="chat", rows=tuple(rows))

    def _select(self, indices: Sequence[int], source: str) -> Examples:
        rows, numbers = tuple(self.rows[i] for i in indices), tuple(self.numbers[i] for i in indices)
        return replace(self, rows=rows, numbers=numbers, source=source)


def _canonical(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=_hashed)


def _hashed(value: Any) -> str:
    """Bytes and pixels by their hash; anything else by its text."""
    raw = value.tobytes() if hasattr(value, "tobytes") else value
    return hashlib.sha256(raw).hexdigest() if isinstance(raw, bytes) else str(value)


def _question(kind: str, row: Mapping[str, Any]) -> Any:
    if kind == "completion":
        return row["prompt"]
    if kind in ("chat", "image-text"):
        end = last_answer(row["messages"])
        asked = row["messages"][:end] if end else row["messages"]
        return [asked, row["images"]] if kind == "image-text" else asked
    return row["image"] if kind == "classify-images" else row["text"]


def load_examples(
    source: Any,
    *,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    kind: str | None = None,
    labels: Sequence[str] | None = None,
    images: str | os.PathLike[str] | None = None,
) -> Examples:
    """Read examples and recognise their kind.

    Args:
        source: a path (.jsonl .ndjson .json .csv .tsv .txt, each also with .gz; .parquet), a folder that
            `datasets.Dataset.save_to_disk` wrote (``"folder@split"``), a hub data set
            ``"org/name[:config][@split]"``, a `datasets.Dataset`, a list of dicts, or `Examples` themselves.
        columns: weft's names for columns that have other ones: ``{"prompt": "question", "completion": "answer"}``;
            ``"a+b"`` joins two columns by a line end. ``role`` and ``content`` name the keys inside of messages.
        limit: read only so many rows from the beginning.
        kind: one of `KINDS` or `IMAGE_KINDS`. None: recognised; where several fit, the first of `KINDS`, which is said in the
            notes. With images, ``source`` may also be a folder of folders of images (their names are the classes), or a
            ``.npz`` of arrays (``"file.npz@train"``).
        labels: the label names of the training set, for an evaluation set; None: collected from the rows and sorted.
        images: the folder that paths of images begin in, and never leave; None: the folder of the source.

    Raises:
        DataError: names the file, the line, what it got, what was expected and the way out.
        MissingDependencyError: a library that this source needs is not installed.

    Example:
        >>> load_examples([{"text": "fine", "label": "good"}, {"text": "dull", "label": "bad"}]).labels
        ('bad', 'good')
    """
    if isinstance(source, Examples):
        if kind is not None and kind != source.kind:
            raise DataError(
                f"{source.source}: these examples are {source.kind!r}, asked for was {kind!r}; load the source again"
            )
        return source if limit is None else source.take(limit)
    table = read_table(source, limit)
    kind = kind if kind is not None else image_kind(table, columns)
    if kind in IMAGE_KINDS:
        found = recognise_images(table, columns, kind, labels)
        images = os.fspath(images) if images is not None else _folder_of(source)
    else:
        found, images = recognise(table, columns, kind, labels), None
    numbers = tuple(table.numbers[index] for index in found.indices)
    return Examples(
        found.kind,
        tuple(found.rows),
        numbers,
        found.labels,
        table.name,
        table.unit,
        (*table.notes, *found.notes),
        images,
    )


def _folder_of(source: Any) -> str:
    """Where paths begin that stand in a source."""
    path = Path(source) if isinstance(source, str | os.PathLike) else Path()
    return str(path if path.is_dir() else path.parent)


@dataclass(frozen=True)
class Overlap:
    """What evaluation examples share with training examples.

    Attributes:
        rows: evaluation examples that are training examples, word for word.
        prompts: evaluation examples whose prompt (text, conversation before the answer) is in the training set too.
        total: evaluation examples.
        first: where the first of them stand, in words.
    """

    rows: int
    prompts: int
    total: int
    first: str = ""

    @property
    def count(self) -> int:
        """Evaluation examples that share their prompt or more."""
        return max(self.rows, self.prompts)

    def warning(self) -> str:
        """A warning in a sentence; empty where nothing is shared."""
        if not self.count:
            return ""
        return (
            f"{self.count:,} of {self.total:,} evaluation examples are also asked in the training set ({self.rows:,} with the same "
            f"answer; first: {self.first}): what is learned by heart makes the evaluation look better than it is"
        )


def overlap(train: Examples, evaluation: Examples) -> Overlap:
    """Evaluation examples that the training set has too; exact comparison, extra columns don't count."""
    if train.kind != evaluation.kind:
        return Overlap(0, 0, len(evaluation))
    rows, asked = set(train._keys), set(train._asked)
    same = [index for index, key in enumerate(evaluation._keys) if key in rows]
    shared = [index for index, key in enumerate(evaluation._asked) if key in asked]
    first = evaluation.where(min((*same[:1], *shared[:1]))) if same or shared else ""
    return Overlap(len(same), len(shared), len(evaluation), first)
