"""The fast engine: all adapters' factors stacked, one forward and backward for the mixed batch, one optimizer for the stacks.

Adapters that can't be stacked are trained apart, in the same rounds. This module does not know users, schedules or folders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapter import Adapter, Provenance
from weft.core.bank import Bank
from weft.core.resizing import Resize
from weft.core.site import Site
from weft.many.adamw import Lines, Rates, clip_, move_, norms_by_slot
from weft.many.engine import Apart, Engine, Measured, Move, Settings
from weft.many.pieces import Piece
from weft.spec import LoraSpec

__all__ = ["Together", "stacks"]


def stacks(spec: LoraSpec) -> bool:
    """Whether adapters of this spec are trained in the stacks: nothing in it is trained whole or reads the data first."""
    return (
        not spec.save_modules
        and not spec.towers
        and spec.bias == "none"
        and spec.init not in ("eva", "lora_ga")
        and not spec.target_parameters
    )


class Together(Engine):
    """Adapters in a `weft.core.pool.Pool`."""

    def __init__(self, model: nn.Module, bank: Bank, tokenizer: Any, settings: Settings | None = None) -> None:
        super().__init__(model, bank, tokenizer, settings)
        self.pool = bank.pool()
        self.apart = Apart(model, bank, tokenizer, settings)
        self._alone: set[str] = set()

    def enter(self, key: str, spec: LoraSpec, seed: int, batches: Any = None) -> None:
        """Lines in the stacks, or a slot of its own where they can't be stacked."""
        if stacks(spec):
            self.pool.add(key, spec, seed=seed)
            return
        self.apart.enter(key, spec, seed, batches)
        self._alone.add(key)

    def leave(self, key: str) -> None:
        """Free the lines."""
        if key in self._alone:
            self._alone.discard(key)
            self.apart.leave(key)
        else:
            self.pool.drop(key)

    def parts(self, key: str) -> dict[str, Tensor]:
        """Its lines of each stack."""
        if key in self._alone:
            return self.apart.parts(key)
        return {
            f"{leaf.path}.{leaf.part}": leaf.parameter.detach()[leaf.lines[key]]
            for leaf in self.pool.leaves
            if key in leaf.lines
        }

    def moments(self, key: str) -> dict[str, Tensor]:
        """Its lines of Adam's moments; the steps are the member's own count."""
        if key in self._alone:
            return self.apart.moments(key)
        return {
            f"{leaf.path}.{leaf.part}/{name}": values[leaf.lines[key]]
            for name in ("first", "second")
            for leaf, values in zip(self.pool.leaves, self.pool.companion(name), strict=True)
            if key in leaf.lines
        }

    def slots(self, key: str) -> Mapping[str, tuple[Site, Any]]:
        """What stands at its sites."""
        return self.apart.slots(key) if key in self._alone else self.pool.slots(key)

    def resize(self, key: str, changes: Mapping[str, Resize]) -> None:
        """More or fewer lines in the stacks."""
        if key in self._alone:
            self.apart.resize(key, changes)
        else:
            self.pool.resize(key, changes, squares=("second",))

    def adapter(self, key: str, provenance: Provenance | None = None) -> Adapter:
        """A snapshot of an adapter as a value."""
        return self.bank.adapter(key, provenance)

    def train(self, pieces: Sequence[Piece]) -> dict[str, float]:
        """The stacked ones together, the others one by one."""
        stacked = [piece for piece in pieces if piece.key not in self._alone]
        place = {name: number for number, name in enumerate(self.pool.names)}
        stacked.sort(key=lambda piece: place.get(str(piece.key), -1))
        found = super().train(stacked)
        others = [piece for piece in pieces if piece.key in self._alone]
        return found | (self.apart.train(others) if others else {})

    def measure(self, pieces: Sequence[Piece]) -> list[Measured]:
        """The stacked ones and the base together, the others one by one."""
        stacked = [piece for piece in pieces if piece.key not in self._alone]
        others = [piece for piece in pieces if piece.key in self._alone]
        found = dict(zip(map(id, stacked), super().measure(stacked), strict=True))
        found |= dict(zip(map(id, others), self.apart.measure(others), strict=True))
        return [found[id(piece)] for piece in pieces]

    def step(self, moves: Sequence[Move]) -> dict[str, float]:
        """Clip and move all stacks at once."""
        stacked = [move for move in moves if move.key not in self._alone]
        norms = self._step_stacks(stacked)
        others = [move for move in moves if move.key in self._alone]
        norms |= self.apart.step(others) if others else {}
        self.forget()
        return norms

    def forget(self) -> None:
        """Drop all gradients."""
        for leaf in self.pool.leaves:
            leaf.parameter.grad = None
        self.apart.forget()

    @torch.no_grad()
    def _step_stacks(self, moves: Sequence[Move]) -> dict[str, float]:
        slots = self.pool.capacity
        lines = self._lines({move.key for move in moves})
        if not lines or not moves:
            return {move.key: 0.0 for move in moves}
        norms = norms_by_slot(lines, slots)
        at = {move.key: self.pool.number(move.key) for move in moves}
        found = dict(zip(at, norms[list(at.values())].tolist(), strict=True))
        broken = [key for key, norm in found.items() if norm != norm or norm == float("inf")]
        if broken:
            _clear(lines, self.pool.leaves, broken)
        moving = [move for move in moves if move.key not in broken]
        table = {name: torch.zeros(slots, dtype=torch.float64) for name in ("rate", "ratio", "decay", "clip")}
        steps = torch.ones(slots, dtype=torch.float64)
        for move in moving:
            slot = at[move.key]
            table["rate"][slot], table["decay"][slot], table["clip"][slot] = move.rate, move.decay, move.clip
            table["ratio"][slot] = 1.0 if move.ratio is None else move.ratio
            steps[slot] = move.step + 1
        device = lines[0].value.device
        table, steps = {name: values.to(device) for name, values in table.items()}, steps.to(device)
        clip_(lines, norms, table["clip"])
        for move in moving:
            if move.watch is not None:
                _show(lines, self.pool.leaves, move)
        move_(lines, Rates(table["rate"], table["ratio"], table["decay"], steps))
        return found

    def _lines(self, moving: set[str]) -> list[Lines]:
        """Stacks with a gradient. Lines of adapters that are not to move get none."""
        leaves = self.pool.leaves
        resting = [name for name in self.pool.names if name not in moving]
        found = []
        firsts, seconds = self.pool.companion("first"), self.pool.companion("second")
        for leaf, first, second in zip(leaves, firsts, seconds, strict=True):
            grad = leaf.parameter.grad
            grad = torch.zeros_like(leaf.parameter) if grad is None else grad
            if self.settings.reduce is not None:
                self.settings.reduce(grad)
            found.append(Lines(leaf.parameter.detach(), grad, first, second, leaf.owner, leaf.part))
        _clear(found, leaves, resting)
        return found


def _show(lines: Sequence[Lines], leaves: Sequence[Any], move: Move) -> None:
    """An adapter's factors and their gradients, as they stand at the sites."""
    assert move.watch is not None
    for item, leaf in zip(lines, leaves, strict=True):
        own = leaf.lines.get(move.key)
        if own is None or leaf.part not in ("A", "B"):
            continue
        value, gradient = item.value[own], item.grad[own]
        pair = (value, gradient) if leaf.part == "A" else (value.t(), gradient.t())
        move.watch(leaf.path, leaf.part, *pair)


def _clear(lines: Sequence[Lines], leaves: Sequence[Any], names: Sequence[str]) -> None:
    """No gradient for these adapters."""
    for item, leaf in zip(lines, leaves, strict=True):
        for name in names:
            if name in leaf.lines:
                item.grad[leaf.lines[name]] = 0
