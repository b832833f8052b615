"""The whole story on a small base: plan, train, compare, merge, prove. Offline, in a minute or two on two cores.

    demo = Demo()                    # runs/demo, or runs/demo-2 … where that is taken
    demo.plan()                      # parameters and bytes, before anything is trained
    demo.train()                     # a run folder
    demo.compare()                   # held-out exact match of base and adapter, and what they say to one prompt
    demo.merge(), demo.prove()
    demo.files()

Each step gives a value; printing is the command line's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from weft.core.merge import MergeReport
from weft.demo_task import examples
from weft.errors import RunError
from weft.merging import merge_to_directory
from weft.models.attach import attach
from weft.models.load import load_base
from weft.spec import LoraSpec
from weft.train.evaluation import Evaluation, evaluate
from weft.train.proof import ProofReport, prove
from weft.train.recipe import Recipe
from weft.train.run import Run
from weft.train.training import train

__all__ = ["RECIPE", "Bytes", "Demo", "DemoPlan", "free_folder"]

RECIPE = Recipe(
    spec=LoraSpec(rank=16, alpha=32),
    max_steps=150,
    batch_size=16,
    learning_rate=5e-3,
    batching="random",  # how long a record is says how many items it has: batches of one length would unlearn to count
    eval_every=50,
    separator="\n",
)
TRAINED, CHECKED, ASKED = 3000, 40, 60
"""Examples to learn from, to take the loss of during training, and to answer at the end; the latter two are held out."""
ANSWER_TOKENS = 96


@dataclass(frozen=True)
class Bytes:
    """What a training keeps in memory beside activations."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class DemoPlan:
    """What will be trained, counted on the model itself.

    Attributes:
        base_parameters: numbers of the base; adapter_parameters: numbers that are trained.
        sites: how many modules are adapted.
        base_bytes: the frozen weights.
        adapter: factors, their gradients, and AdamW's two moments.
        full: the same if the whole base was trained, in its own dtype.
    """

    base_parameters: int
    adapter_parameters: int
    sites: int
    base_bytes: int
    adapter: Bytes
    full: Bytes


class Demo:
    """The story's state: a folder, a base, and what came of each step.

    Args:
        out: the folder; None: the first free one of ``runs/demo``, ``runs/demo-2`` …
        base: as in `weft.train`; None: the embedded base.
        recipe: how to train.
        trained, checked, asked: numbers of examples.

    Raises:
        RunError: ``out`` is not empty.
    """

    def __init__(
        self,
        out: str | os.PathLike[str] | None = None,
        *,
        base: str | os.PathLike[str] | None = None,
        recipe: Recipe = RECIPE,
        trained: int = TRAINED,
        checked: int = CHECKED,
        asked: int = ASKED,
    ) -> None:
        self.folder = free_folder() if out is None else Path(out)
        if out is not None and self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise RunError(f"{self.folder}: this is not an empty folder; give the demo another name")
        self.base = base
        self.recipe = recipe
        self.run: Run | None = None
        self.learned = _rows("train", trained)
        heldout = _rows("heldout", checked + asked)
        self.checked, self.asked = heldout[:checked], heldout[checked:]

    @cached_property
    def model(self) -> tuple[nn.Module, Any]:
        """The base and its tokenizer, loaded once."""
        return load_base(self.base)

    @property
    def result(self) -> Run:
        """The run.

        Raises:
            RunError: `train` has not been called.
        """
        if self.run is None:
            raise RunError("the demo has not trained yet: call train() first")
        return self.run

    def plan(self) -> DemoPlan:
        """Count numbers and bytes of the base, and of the adapter on it."""
        model, _ = self.model
        weights = list(model.parameters())
        with attach(model, {"plan": self.recipe.spec or LoraSpec()}) as bank:
            factors = [parameter for _, parameter in bank.named_parameters("plan")]
            sites = len(bank.adapter("plan").sites)
        return DemoPlan(
            base_parameters=sum(weight.numel() for weight in weights),
            adapter_parameters=sum(factor.numel() for factor in factors),
            sites=sites,
            base_bytes=_bytes(weights),
            adapter=_trained_bytes(factors),
            full=_trained_bytes(weights),
        )

    def write_data(self) -> Path:
        """Write the examples as JSON lines into the folder; gives the folder of the files."""
        place = self.folder / "data"
        place.mkdir(parents=True)
        for name, rows in (("train", self.learned), ("valid", self.checked), ("test", self.asked)):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (place / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        return place

    def train(self, progress: bool | None = False) -> Run:
        """Train the adapter."""
        data = self.write_data()
        self.run = train(
            base=self.base, data=data / "train.jsonl", eval_data=data / "valid.jsonl", recipe=self.recipe,
            out=self.folder / "run", progress=progress,
        )  # fmt: skip
        return self.run

    def compare(self, progress: bool | None = False) -> Evaluation:
        """Answer held-out prompts with the base and with the adapter."""
        return evaluate(
            base=self.model, adapter=self.result.adapter, data=self.folder / "data" / "test.jsonl", limit=None, batch_size=self.batch,
            max_new_tokens=ANSWER_TOKENS, progress=progress,
        )  # fmt: skip

    @property
    def batch(self) -> int:
        """Prompts to answer at once."""
        return max(1, len(self.asked) // 2)

    def merge(self) -> tuple[Path, MergeReport]:
        """Write the adapter into a plain model directory."""
        return merge_to_directory(base=self.model, adapter=self.result.adapter, out=self.folder / "merged")

    def prove(self) -> ProofReport:
        """Load the adapter from its files, and see that it does what it did when it was saved."""
        return prove(self.result.path, self.model[0])

    def files(self) -> Mapping[Path, int]:
        """What was written, with bytes; folders as a whole."""
        places = [self.folder / "data", self.folder / "run" / "adapter", self.folder / "run", self.folder / "merged"]
        return {place: _size(place) for place in places if place.exists()}


def _rows(split: str, count: int) -> list[dict[str, str]]:
    """Examples of the task; the line break between message and record is the recipe's separator."""
    return [{**row, "prompt": row["prompt"].removesuffix("\n")} for row in examples(split, count)]


def free_folder(name: str = "demo") -> Path:
    """The first of runs/demo, runs/demo-2 … that doesn't exist."""
    place, number = Path("runs") / name, 1
    while place.exists():
        number += 1
        place = Path("runs") / f"{name}-{number}"
    return place


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _trained_bytes(tensors: list[Any]) -> Bytes:
    """Weights, gradients of the same type, and AdamW's two moments of the same type."""
    once = _bytes(tensors)
    return Bytes(weights=once, gradients=once, optimizer=2 * once)


def _size(place: Path) -> int:
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
