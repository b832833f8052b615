"""Ranks that change while a trainer runs: when, where, by how much, and the record of it.

One class for each kind of `weft.train.adaptive`, all of them callbacks that hold what they decide by. That state is in every checkpoint
(``ranks.json``), beside rank and scale of each site, so that a resumed run takes the same decisions. Decisions are made by the first process
and told to the others. This module does not compute factors (`weft.core.resizing`) and no optimizer state (`weft.train.moments`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import EarlyStoppingCallback, TrainerCallback

from weft.core.bank import Bank
from weft.core.resizing import Resize, blocks_of, fitted, grown, kept_directions, rank_of, truncated
from weft.core.site import Site
from weft.core.slots import Slot
from weft.errors import RunError
from weft.train.adaptive import Adaptive, BudgetRanks, GrowOnPlateau, ShrinkBySpectrum
from weft.train.importance import Importance, allocate, budget_at, direction_scores
from weft.train.schedule import Schedule
from weft.train.streams import stream_seed

__all__ = ["RANKS", "Ranks", "describe", "fit", "ranks_for"]

RANKS = "ranks.json"
IMPORTANCE = "importance.safetensors"

T = TypeVar("T")
Moves = dict[str, tuple[int, int]]
"""Rank before and after, by path of the site."""


class Ranks(TrainerCallback):
    """What all kinds share: the sites, the record, the checkpoint.

    Args:
        plan: what was asked for.
        bank: with the adapter ``slot``, which is trained.
        schedule: the settled recipe. seed: the recipe's.
        write: takes a line for the run's log. tell: takes a line for the user.

    Attributes:
        changes: the record: ``{"step", "change", "why", "ranks": {path: [before, after]}}``.
        trainer: set by the trainer that this belongs to.
    """

    def __init__(
        self,
        plan: Any,
        bank: Bank,
        slot: str,
        schedule: Schedule,
        seed: int = 0,
        write: Callable[[dict[str, Any]], None] = lambda row: None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.plan, self.bank, self.slot, self.schedule, self.seed = plan, bank, slot, schedule, seed
        self.write, self.tell = write, tell
        self.changes: list[dict[str, Any]] = []
        self.trainer: Any = None

    def ranks(self) -> dict[str, int]:
        """Rank by site, now."""
        return {path: rank_of(*found) for path, found in self.bank.slots(self.slot).items()}

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """An evaluation is over, and every other callback has seen it."""

    def finish(self) -> bool:
        """The training is over and its result stands in the bank; whether it was changed once more."""
        return False

    # the record

    def apply(self, changes: Mapping[str, Resize]) -> None:
        """Change the sites, with optimizer and wrappers."""
        lost = self.trainer.resize(changes)
        if lost and self.trainer.is_world_process_zero():
            name = self.trainer.args.optim
            self.tell(f"the state of {name} can't follow a change of ranks: at {lost} parameters it begins anew")

    def note(self, step: int, moves: Moves, why: str, **more: Any) -> None:
        """Put a change of ranks on record."""
        change = describe(moves)
        row = {"step": step, "change": change, "why": why, **more}
        self.changes.append({**row, "ranks": {path: list(pair) for path, pair in moves.items()}})
        if self.trainer.is_world_process_zero():
            self.write(self.changes[-1])
            self.tell(f"step {step}: {change}, {why}")

    def record(self) -> dict[str, Any]:
        """What the report says: every change, and the ranks of the sites now."""
        return {"changes": [dict(row) for row in self.changes], "sites": self.ranks()}

    # the checkpoint

    def state(self) -> dict[str, Any]:
        """What decisions depend on, as plain data."""
        return {}

    def load(self, state: Mapping[str, Any], folder: Path) -> None:
        """The inverse of `state`."""

    def save(self, folder: Path) -> None:
        """Write sizes, record and state into the folder of a checkpoint."""
        slots = self.bank.slots(self.slot)
        sites = {path: [rank_of(site, slot), slot.scale] for path, (site, slot) in slots.items()}
        values = {"sites": sites, "changes": self.changes, "state": self.state()}
        (folder / RANKS).write_text(json.dumps(values) + "\n", encoding="utf-8")

    def restore(self, folder: Path) -> None:
        """Go on where the checkpoint's run was; `fit` has been called."""
        values = _read(folder)
        self.changes = list(values["changes"])
        self.load(values["state"], folder)

    # help for the kinds

    def _stopping(self) -> list[Any]:
        """The callbacks that may end the run early; looked up each time, for a resumed trainer makes new ones."""
        return [item for item in self.trainer.callback_handler.callbacks if isinstance(item, EarlyStoppingCallback)]

    def _go_on(self) -> bool:
        """Take early stopping back; whether it wanted to end the run."""
        wanted = False
        for item in self._stopping():
            wanted = wanted or item.early_stopping_patience_counter >= item.early_stopping_patience
            item.early_stopping_patience_counter = 0
        if wanted:
            self.trainer.control.should_training_stop = False
        return wanted

    def _agreed(self, value: T) -> T:
        """The first process's value, on all."""
        if self.trainer.args.world_size == 1:
            return value
        held = [value]
        torch.distributed.broadcast_object_list(held, src=0, device=self.trainer.args.device)
        return held[0]


class Growing(Ranks):
    """`GrowOnPlateau`: decided at an evaluation, done before the next step; the checkpoint in between knows that it is due."""

    plan: GrowOnPlateau

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.best: float | None = None
        self.waited = self.cooling = 0
        self.due: dict[str, int] = {}
        self.last: int | None = None
        self._rates: list[float] = []

    def state(self) -> dict[str, Any]:
        """Progress so far, and a growth that is due."""
        return {"best": self.best, "waited": self.waited, "cooling": self.cooling, "due": self.due, "last": self.last}

    def load(self, state: Mapping[str, Any], folder: Path) -> None:
        """The inverse."""
        self.best, self.waited, self.cooling, self.last = (
            state[name] for name in ("best", "waited", "cooling", "last")
        )
        self.due = {path: int(rank) for path, rank in state["due"].items()}

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """Progress or not; a growth when there was none for long enough, or when the run would be stopped for it."""
        step, name = self.trainer.state.global_step, self.schedule.metric
        value = float(metrics[name])
        if self._is_progress(value):
            self.best, self.waited = value, 0
        elif self.cooling:
            self.cooling -= 1
        else:
            self.waited += 1
        wanted = any(item.early_stopping_patience_counter >= item.early_stopping_patience for item in self._stopping())
        if not self._agreed(self.waited >= self.plan.patience or wanted) or step >= self._last_step():
            return
        slots = self.bank.slots(self.slot)
        new = {path: self._possible(path, *found) for path, found in slots.items()}
        self.due = {path: rank for path, rank in new.items() if rank > rank_of(*slots[path])}
        if not self.due:
            return
        self._go_on()
        stagnant = f"{name.replace('_', ' ')} {value:.4g} stagnant for {max(self.waited, 1)} evaluation{'s' if self.waited > 1 else ''}"
        moves = {path: (rank_of(*slots[path]), rank) for path, rank in self.due.items()}
        self.waited, self.cooling, self.last = 0, self.plan.cooldown, step
        self.note(step, moves, stagnant)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Grow, if it is due."""
        if not self.due:
            return
        spec, slots = self.bank.spec(self.slot), self.bank.slots(self.slot)
        changes = {}
        for place, (path, rank) in enumerate(self.due.items()):
            seed = stream_seed(self.seed, state.global_step, place, row=rank)
            change = grown(*slots[path], rank, rslora=spec.rslora, init=spec.init, seed=seed)
            if change is not None:
                changes[path] = change
        self.due = {}
        self.apply(changes)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The short warm-up after a growth."""
        since = None if self.last is None else state.global_step - self.last
        self._rates = []
        if since is None or since >= self.plan.warmup:
            return
        groups = self.trainer.optimizer.param_groups
        self._rates = [group["lr"] for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate * (since + 1) / (self.plan.warmup + 1)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The schedule's rate again."""
        for group, rate in zip(self.trainer.optimizer.param_groups if self._rates else (), self._rates, strict=True):
            group["lr"] = rate

    def _last_step(self) -> float:
        """The step from which nothing grows any more."""
        total = float(self.trainer.state.max_steps)
        return total if self.plan.until == 1 else self.plan.until * total

    def _is_progress(self, value: float) -> bool:
        if self.best is None:
            return value == value
        gain = value - self.best if self.schedule.higher_is_better else self.best - value
        return gain > self.plan.min_change * abs(self.best)

    def _possible(self, path: str, site: Site, slot: Slot) -> int:
        """The next rank of a site: what the plan says, as far as its matrix has room and its groups divide it."""
        rank = rank_of(site, slot)
        unit = site.groups
        room = max(rank, min(site.d_in, site.d_out // unit) * unit)
        wanted = min(self.plan.next_rank(rank), room)
        return int(rank + max(0, (wanted - rank) // unit * unit))


class Budgeting(Ranks):
    """`BudgetRanks`: scores at every optimizer step, directions taken away in stages."""

    plan: BudgetRanks

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.importance = Importance(self.plan.beta1, self.plan.beta2)
        steps = self.schedule.steps
        self.first = round(self.plan.warmup * steps)
        self.end = max(self.first + 1, steps - round(self.plan.final * steps))
        self.every = self.plan.every or max(1, round((self.end - self.first) / 10))
        ranks = self.ranks()
        self.begin = sum(ranks.values())
        self.goal = max(round(self.plan.target_rank * len(ranks)), self.plan.min_rank * len(ranks))

    def met(self) -> bool:
        """The budget is met: ranks are final."""
        return sum(self.ranks().values()) <= self.goal

    def state(self) -> dict[str, Any]:
        """Where it started; the scores are in a file of their own."""
        return {"begin": self.begin}

    def save(self, folder: Path) -> None:
        """With the scores."""
        from safetensors.torch import save_file

        super().save(folder)
        parts = {"sensitivity": self.importance.sensitivity, "uncertainty": self.importance.uncertainty}
        tensors = {f"{part}:{name}": tensor.cpu() for part, held in parts.items() for name, tensor in held.items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / IMPORTANCE)

    def load(self, state: Mapping[str, Any], folder: Path) -> None:
        """The inverse."""
        from safetensors.torch import load_file

        self.begin = int(state["begin"])
        devices = {path: slot.lora_A.device for path, (_, slot) in self.bank.slots(self.slot).items()}
        for key, tensor in load_file(folder / IMPORTANCE).items():
            part, _, name = key.partition(":")
            held = self.importance.sensitivity if part == "sensitivity" else self.importance.uncertainty
            held[name] = tensor.to(devices[name.rpartition(":")[0]])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the gradients of this step in."""
        if state.global_step >= self.end or self.met():
            return
        scaled = self.trainer.accelerator.scaler is not None
        for path, (_, slot) in self.bank.slots(self.slot).items():
            for leaf, parameter in (("A", slot.lora_A), ("B", slot.lora_B)):
                gradient = parameter.grad
                if gradient is None or (scaled and not bool(torch.isfinite(gradient).all())):
                    continue
                self.importance.see(f"{path}:{leaf}", parameter, gradient)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take away what the budget of this step has no room for."""
        step = state.global_step
        due = self.first < step < self.end and (step - self.first) % self.every == 0
        if not (due or step == self.end) or not self.importance.sensitivity or self.met():
            return
        slots, before = self.bank.slots(self.slot), self.ranks()
        budget = budget_at(step, self.first, self.end, self.begin, self.goal)
        kept = self._agreed({path: index.cpu() for path, index in self._allocated(budget).items()})
        changes = {
            path: kept_directions(index.to(slots[path][1].lora_A.device))
            for path, index in kept.items()
            if index.shape[1] < blocks_of(*slots[path])[0].shape[1]
        }
        if not changes:
            return
        self._follow(changes)
        self.apply(changes)
        after = self.ranks()
        moves = {path: (before[path], after[path]) for path in changes}
        self.note(step, moves, f"budget {budget} of {self.begin} directions")
        if self.met():
            self._begin_anew(state)

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """Nothing ends the run before the ranks are final."""
        if not self.met():
            self._go_on()

    def _allocated(self, budget: int) -> dict[str, Tensor]:
        slots = self.bank.slots(self.slot)
        scores, units = {}, {}
        for path, (site, slot) in slots.items():
            A, B = (self.importance.of(f"{path}:{leaf}") for leaf in "AB")
            units[path] = rank_of(site, slot) // blocks_of(site, slot)[0].shape[1]
            scores[path] = direction_scores(*_as_blocks(site, slot, A, B))
        return allocate(scores, budget, self.plan.min_rank, units)

    def _follow(self, changes: Mapping[str, Resize]) -> None:
        """Scores of directions that stay."""
        slots = self.bank.slots(self.slot)
        for path, change in changes.items():
            site, slot = slots[path]
            for held in (self.importance.sensitivity, self.importance.uncertainty):
                A, B = _as_blocks(site, slot, held[f"{path}:A"], held[f"{path}:B"])
                held[f"{path}:A"], held[f"{path}:B"] = change.A(A), change.B(B)

    def _begin_anew(self, state: Any) -> None:
        """Only what has the final ranks may be the best checkpoint, and be waited for."""
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        self._go_on()


class Shrinking(Ranks):
    """`ShrinkBySpectrum`: at the end, and every so many steps before it where that is asked for."""

    plan: ShrinkBySpectrum

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Shrink, if it is time."""
        step, every = state.global_step, self.plan.every
        if every and step >= self.plan.start * state.max_steps and step % every == 0 and step < state.max_steps:
            self._shrink(step)

    def finish(self) -> bool:
        """Shrink the result."""
        return self._shrink(self.trainer.state.global_step)

    def _cut(self, site: Site, slot: Slot) -> tuple[Resize, float] | None:
        limit, least = self.plan.limit, self.plan.min_rank
        return truncated(site, slot, energy=limit.get("energy"), error=limit.get("error"), least=least)

    def _shrink(self, step: int) -> bool:
        slots, before = self.bank.slots(self.slot), self.ranks()
        found = {path: self._cut(*pair) for path, pair in slots.items()}
        changes = {path: item[0] for path, item in found.items() if item is not None}
        if not changes:
            return False
        self.apply(changes)
        after = self.ranks()
        lost = max(item[1] for item in found.values() if item is not None)
        (name, limit), *_ = self.plan.limit.items()
        why = f"{name} {limit:g}: at most {lost:.2%} of an update's norm lost"
        self.note(step, {path: (before[path], after[path]) for path in changes}, why, lost=lost)
        return True


def ranks_for(plan: Adaptive | None, *args: Any, **kwargs: Any) -> Ranks | None:
    """The callback for what a recipe asks for; the other arguments are those of `Ranks`."""
    if plan is None:
        return None
    kinds: dict[type, type[Ranks]] = {GrowOnPlateau: Growing, BudgetRanks: Budgeting, ShrinkBySpectrum: Shrinking}
    return kinds[type(plan)](plan, *args, **kwargs)


def fit(bank: Bank, slot: str, folder: Path) -> bool:
    """Make room for the factors of a checkpoint; whether anything had to change.

    Raises:
        RunError: the checkpoint doesn't say its sizes, or has other sites.
    """
    sites = _read(folder)["sites"]
    slots = bank.slots(slot)
    if sites.keys() != slots.keys():
        raise RunError(
            f"{folder / RANKS}: this checkpoint has other sites than the model; base and spec must be those of the run"
        )
    found = {path: fitted(*pair, int(sites[path][0]), float(sites[path][1])) for path, pair in slots.items()}
    changes = {path: change for path, change in found.items() if change is not None}
    if changes:
        bank.resize(slot, changes)
        for path in changes:
            slots[path][1].__dict__["scale"] = float(sites[path][1])  # not by way of a quotient
    return bool(changes)


def describe(moves: Moves) -> str:
    """Changes of rank in a few words: ``rank 4 → 8 at 10 sites``."""
    kinds = Counter(moves.values())
    if len(kinds) <= 3:
        return ", ".join(
            f"rank {before} → {after} at {count} site{'s' if count > 1 else ''}"
            for (before, after), count in sorted(kinds.items())
        )
    befores, afters = zip(*moves.values(), strict=True)
    return f"{sum(befores)} → {sum(afters)} directions at {len(moves)} sites, ranks {min(befores)}–{max(befores)} → {min(afters)}–{max(afters)}"


def _read(folder: Path) -> dict[str, Any]:
    path = folder / RANKS
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path}: this checkpoint's ranks can't be read: {error}; remove its folder to go on from the one before"
        ) from error


def _as_blocks(site: Site, slot: Slot, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors of the shapes of a slot's factors as (n, r, i) and (n, o, r)."""
    like_A, like_B = blocks_of(site, slot)
    return A.reshape(like_A.shape), B.reshape(like_B.shape)
