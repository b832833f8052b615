"""Where NaN or infinity was first: in factors, in the outputs of a forward, in gradients.

This module does not know the trainer or what becomes of the run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weft.core.site import Site
from weft.core.slots import Slot

__all__ = ["Place", "bad_factors", "bad_gradients", "watched_outputs"]

Slots = Mapping[str, tuple[Site, Slot]]


@dataclass(frozen=True)
class Place:
    """Where it was.

    Attributes:
        what: ``"loss"``, ``"gradient"`` or ``"factors"``.
        site: path of the site; None: at none.
        where: in words.
    """

    what: str
    site: str | None = None
    where: str = ""

    def words(self) -> str:
        """For a message: begins with a comma, or is empty."""
        return f", {self.where}," if self.where else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in a line of the log."""
        return {"what": self.what, "site": self.site, "where": self.where}


def bad_factors(slots: Slots) -> Place | None:
    """The first site, in the order of the model, whose factors are not finite; None: all are."""
    bad = [
        path for path, (_, slot) in slots.items() if not all(_is_finite(leaf) for leaf in (slot.lora_A, slot.lora_B))
    ]
    return Place("factors", bad[0], f"the factors at {bad[0]}{_more(bad)} are not finite") if bad else None


def bad_gradients(slots: Slots) -> Place:
    """The last site, in the order of the model, whose gradients are not finite: the backward comes there first."""
    bad = [
        path for path, (_, slot) in slots.items()
        if not all(leaf.grad is None or _is_finite(leaf.grad) for leaf in (slot.lora_A, slot.lora_B))
    ]  # fmt: skip
    if not bad:
        return Place("gradient")
    return Place("gradient", bad[-1], f"first in the backward at {bad[-1]}{_more(bad)}")


@dataclass
class Seen:
    """What a forward's outputs were like.

    Attributes:
        first: paths of the modules whose outputs are not finite, in the order in which they were done.
    """

    first: list[str] = field(default_factory=list)

    def place(self, what: str, slots: Slots) -> Place:
        """The first module; a site where it is one, or holds one."""
        if not self.first:
            return Place(what, None, "every module's output is finite: it is in the loss itself")
        path = self.first[0]
        site = path if path in slots else None
        return Place(what, site, f"the output of {path} was the first that is not finite")


@contextlib.contextmanager
def watched_outputs(model: nn.Module) -> Iterator[Seen]:
    """While this lasts, outputs of all modules are looked at; costs a sum of each, so only where something is wrong already."""
    seen = Seen()
    handles = []
    for path, module in model.named_modules():
        if path and ".weft." not in f".{path}." and not path.endswith(".weft"):
            handles.append(module.register_forward_hook(_hook(seen, path)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _hook(seen: Seen, path: str) -> Any:
    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if not seen.first and not all(_is_finite(tensor) for tensor in _tensors(output)):
            seen.first.append(path)

    return look


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for part in output.values():
            yield from _tensors(part)
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach()).all())


def _more(paths: list[str]) -> str:
    return "" if len(paths) == 1 else f" (and at {len(paths) - 1} more)"
