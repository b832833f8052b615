"""Ranks that change while an adapter is trained: when, where, by how much, and the record of it.

One class for each kind of `weft.train.adaptive`, which holds what it decides by. That state is in every checkpoint (of a single run
``ranks.json``), beside rank and scale of each site, so that a resumed run takes the same decisions. Decisions are made by the first process
and told to the others. Who trains is a `Host`: a Trainer (`weft.train.rank_callback`) or a place in a batch of many (`weft.many.ranking`).
This module does not compute factors (`weft.core.resizing`) and no optimizer state (`weft.train.moments`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from weft.core.bank import Bank
from weft.core.resizing import Resize, blocks_of, fitted, grown, kept_directions, rank_of, truncated
from weft.core.site import Site
from weft.core.slots import Slot
from weft.errors import RunError
from weft.spec import LoraSpec
from weft.train.adaptive import Adaptive, BudgetRanks, GrowOnPlateau, ShrinkBySpectrum
from weft.train.importance import Importance, allocate, budget_at, direction_scores
from weft.train.schedule import Schedule
from weft.train.streams import stream_seed

__all__ = ["RANKS", "Host", "Ranks", "describe", "fit", "fits", "ranks_for", "sizes"]

RANKS = "ranks.json"
IMPORTANCE = "importance.safetensors"

T = TypeVar("T")
Moves = dict[str, tuple[int, int]]
"""Rank before and after, by path of the site."""


class Host(Protocol):
    """Who trains the adapter, as far as ranks know it.

    Attributes:
        step: optimizer steps that are done. steps: of the whole run. main: this process writes what is written once.
    """

    @property
    def step(self) -> int:
        """Done so far."""

    @property
    def steps(self) -> int:
        """Of the whole run."""

    @property
    def main(self) -> bool:
        """Whether it writes."""

    @property
    def spec(self) -> LoraSpec:
        """As the adapter began."""

    def rate_at(self, step: float) -> float:
        """The schedule's learning rate, at a step or between two."""

    def slots(self) -> Mapping[str, tuple[Site, Slot]]:
        """What stands at each site, by path."""

    def resize(self, changes: Mapping[str, Resize]) -> None:
        """Change sites, and what the optimizer holds of them."""

    def stopping(self) -> bool:
        """Whether early stopping is about to end the run."""

    def go_on(self) -> None:
        """It isn't: the evaluations are counted from here."""

    def forget_best(self) -> None:
        """No evaluation so far may be the best."""

    def agreed(self, value: T) -> T:
        """The first process's value, on all."""


class Ranks:
    """What all kinds share: the record and the checkpoint; and when they are called.

    Args:
        plan: what was asked for.
        host: who trains.
        schedule: the settled recipe. seed: the recipe's.
        write: takes a line for the run's log. tell: takes a line for the user.

    Attributes:
        changes: the record: ``{"step", "change", "why", "ranks": {path: [before, after]}}``.
    """

    def __init__(
        self,
        plan: Any,
        host: Host,
        schedule: Schedule,
        seed: int = 0,
        write: Callable[[dict[str, Any]], None] = lambda row: None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.plan, self.host, self.schedule, self.seed = plan, host, schedule, seed
        self.write, self.tell = write, tell
        self.changes: list[dict[str, Any]] = []

    def ranks(self) -> dict[str, int]:
        """Rank by site, now."""
        return {path: rank_of(*found) for path, found in self.host.slots().items()}

    # when they are called, in this order

    def step_begins(self) -> None:
        """Before the first forward of a step."""

    def watches(self) -> bool:
        """Whether `saw` wants the gradients of the step that is on."""
        return False

    def saw(self, path: str, leaf: str, value: Tensor, gradient: Tensor) -> None:
        """A, or B, and its gradient after clipping, before the optimizer moves it; in the order of the slot's factor."""

    def rate_factor(self) -> float:
        """What the schedule's learning rate is multiplied with in the step that is on."""
        return 1.0

    def step_ended(self) -> None:
        """The step is counted."""

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """An evaluation is over, and everything else has seen it."""

    def finish(self) -> bool:
        """The training is over and its result stands in the sites; whether it was changed once more."""
        return False

    # the record

    def note(self, step: int, moves: Moves, why: str, **more: Any) -> None:
        """Put a change of ranks on record."""
        change = describe(moves)
        row = {"step": step, "change": change, "why": why, **more}
        self.changes.append({**row, "ranks": {path: list(pair) for path, pair in moves.items()}})
        if self.host.main:
            self.write(self.changes[-1])
            self.tell(f"step {step}: {change}, {why}")

    def record(self) -> dict[str, Any]:
        """What the report says: every change, and the ranks of the sites now."""
        return {"changes": [dict(row) for row in self.changes], "sites": self.ranks()}

    # the checkpoint

    def state(self) -> dict[str, Any]:
        """What decisions depend on, as plain data."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """What decisions depend on, as tensors."""
        return {}

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """The inverse of both."""

    def save(self, folder: Path) -> None:
        """Write sizes, record and state into the folder of a checkpoint."""
        from safetensors.torch import save_file

        values = {"sites": sizes(self.host.slots()), "changes": self.changes, "state": self.state()}
        (folder / RANKS).write_text(json.dumps(values) + "\n", encoding="utf-8")
        if held := self.tensors():
            save_file({name: tensor.cpu().contiguous() for name, tensor in held.items()}, folder / IMPORTANCE)

    def restore(self, folder: Path) -> None:
        """Go on where the checkpoint's run was; `fit` has been called."""
        from safetensors.torch import load_file

        values, path = _read(folder), folder / IMPORTANCE
        self.changes = list(values["changes"])
        self.load(values["state"], load_file(path) if path.exists() else {})


class Growing(Ranks):
    """`GrowOnPlateau`: decided at an evaluation, done before the next step; the checkpoint in between knows that it is due."""

    plan: GrowOnPlateau

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.best: float | None = None
        self.waited = self.cooling = 0
        self.due: dict[str, int] = {}
        self.last: int | None = None

    def state(self) -> dict[str, Any]:
        """Progress so far, and a growth that is due."""
        return {"best": self.best, "waited": self.waited, "cooling": self.cooling, "due": self.due, "last": self.last}

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """The inverse."""
        self.best, self.waited, self.cooling, self.last = (
            state[name] for name in ("best", "waited", "cooling", "last")
        )
        self.due = {path: int(rank) for path, rank in state["due"].items()}

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """Progress or not; a growth when there was none for long enough, or when the run would be stopped for it."""
        step, name = self.host.step, self.schedule.metric
        value = float(metrics[name])
        if self._is_progress(value):
            self.best, self.waited = value, 0
        elif self.cooling:
            self.cooling -= 1
        else:
            self.waited += 1
        if not self.host.agreed(self.waited >= self.plan.patience or self.host.stopping()) or step >= self._last_step():
            return
        slots = self.host.slots()
        new = {path: self._possible(path, *found) for path, found in slots.items()}
        self.due = {path: rank for path, rank in new.items() if rank > rank_of(*slots[path])}
        if not self.due:
            return
        self.host.go_on()
        stagnant = f"{name.replace('_', ' ')} {value:.4g} stagnant for {max(self.waited, 1)} evaluation{'s' if self.waited > 1 else ''}"
        moves = {path: (rank_of(*slots[path]), rank) for path, rank in self.due.items()}
        self.waited, self.cooling, self.last = 0, self.plan.cooldown, step
        self.note(step, moves, stagnant)

    def step_begins(self) -> None:
        """Grow, if it is due."""
        if not self.due:
            return
        spec, slots = self.host.spec, self.host.slots()
        changes = {}
        for place, (path, rank) in enumerate(self.due.items()):
            seed = stream_seed(self.seed, self.host.step, place, row=rank)
            change = grown(*slots[path], rank, rslora=spec.rslora, init=spec.init, seed=seed)
            if change is not None:
                changes[path] = change
        self.due = {}
        self.host.resize(changes)

    def rate_factor(self) -> float:
        """The schedule begun anew, and the short warm-up, after a growth."""
        if self.last is None:
            return 1.0
        step, steps, since = self.host.step, self.host.steps, self.host.step - self.last
        factor = min(1.0, (since + 1) / (self.plan.warmup + 1))
        usual = self.host.rate_at(step)
        if self.plan.restart and usual > 0:
            peak = self.schedule.warmup_steps
            factor *= self.host.rate_at(peak + (steps - peak) * since / max(1, steps - self.last)) / usual
        return factor

    def _last_step(self) -> float:
        """The step from which nothing grows any more."""
        total = float(self.host.steps)
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
        """Where it started."""
        return {"begin": self.begin}

    def tensors(self) -> dict[str, Tensor]:
        """The scores."""
        parts = {"sensitivity": self.importance.sensitivity, "uncertainty": self.importance.uncertainty}
        return {f"{part}:{name}": tensor for part, held in parts.items() for name, tensor in held.items()}

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """The inverse."""
        self.begin = int(state["begin"])
        devices = {path: slot.lora_A.device for path, (_, slot) in self.host.slots().items()}
        for key, tensor in tensors.items():
            part, _, name = key.partition(":")
            held = self.importance.sensitivity if part == "sensitivity" else self.importance.uncertainty
            held[name] = tensor.to(devices[name.rpartition(":")[0]])

    def watches(self) -> bool:
        """Until the ranks are final."""
        return self.host.step < self.end and not self.met()

    def saw(self, path: str, leaf: str, value: Tensor, gradient: Tensor) -> None:
        """Score every entry."""
        self.importance.see(f"{path}:{leaf}", value, gradient)

    def step_ended(self) -> None:
        """Take away what the budget of this step has no room for."""
        step = self.host.step
        due = self.first < step < self.end and (step - self.first) % self.every == 0
        if not (due or step == self.end) or not self.importance.sensitivity or self.met():
            return
        slots, before = self.host.slots(), self.ranks()
        budget = budget_at(step, self.first, self.end, self.begin, self.goal)
        kept = self.host.agreed({path: index.cpu() for path, index in self._allocated(budget).items()})
        changes = {
            path: kept_directions(index.to(slots[path][1].lora_A.device))
            for path, index in kept.items()
            if index.shape[1] < blocks_of(*slots[path])[0].shape[1]
        }
        if not changes:
            return
        self._follow(changes)
        self.host.resize(changes)
        after = self.ranks()
        moves = {path: (before[path], after[path]) for path in changes}
        self.note(step, moves, f"budget {budget} of {self.begin} directions")
        if self.met():  # only what has the final ranks may be the best, and be waited for
            self.host.forget_best()
            self.host.go_on()

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """Nothing ends the run before the ranks are final."""
        if not self.met():
            self.host.go_on()

    def _allocated(self, budget: int) -> dict[str, Tensor]:
        slots = self.host.slots()
        scores, units = {}, {}
        for path, (site, slot) in slots.items():
            A, B = (self.importance.of(f"{path}:{leaf}") for leaf in "AB")
            units[path] = rank_of(site, slot) // blocks_of(site, slot)[0].shape[1]
            scores[path] = direction_scores(*_as_blocks(site, slot, A, B))
        return allocate(scores, budget, self.plan.min_rank, units)

    def _follow(self, changes: Mapping[str, Resize]) -> None:
        """Scores of directions that stay."""
        slots = self.host.slots()
        for path, change in changes.items():
            site, slot = slots[path]
            for held in (self.importance.sensitivity, self.importance.uncertainty):
                A, B = _as_blocks(site, slot, held[f"{path}:A"], held[f"{path}:B"])
                held[f"{path}:A"], held[f"{path}:B"] = change.A(A), change.B(B)


class Shrinking(Ranks):
    """`ShrinkBySpectrum`: at the end, and every so many steps before it where that is asked for."""

    plan: ShrinkBySpectrum

    def step_ended(self) -> None:
        """Shrink, if it is time."""
        step, steps, every = self.host.step, self.host.steps, self.plan.every
        if every and step >= self.plan.start * steps and step % every == 0 and step < steps:
            self._shrink(step)

    def finish(self) -> bool:
        """Shrink the result."""
        return self._shrink(self.host.step)

    def _cut(self, site: Site, slot: Slot) -> tuple[Resize, float] | None:
        limit, least = self.plan.limit, self.plan.min_rank
        return truncated(site, slot, energy=limit.get("energy"), error=limit.get("error"), least=least)

    def _shrink(self, step: int) -> bool:
        slots, before = self.host.slots(), self.ranks()
        found = {path: self._cut(*pair) for path, pair in slots.items()}
        changes = {path: item[0] for path, item in found.items() if item is not None}
        if not changes:
            return False
        self.host.resize(changes)
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
    sites, slots = _read(folder)["sites"], bank.slots(slot)
    if sites.keys() != slots.keys():
        raise RunError(
            f"{folder / RANKS}: this checkpoint has other sites than the model; base and spec must be those of the run"
        )
    changes = fits(slots, sites)
    if changes:
        bank.resize(slot, changes)
    return bool(changes)


def sizes(slots: Mapping[str, tuple[Site, Slot]]) -> dict[str, list[float]]:
    """Rank and scale of each site, as plain data."""
    return {path: [rank_of(site, slot), slot.scale] for path, (site, slot) in slots.items()}


def fits(slots: Mapping[str, tuple[Site, Slot]], wanted: Mapping[str, Sequence[float]]) -> dict[str, Resize]:
    """What makes room for factors of other `sizes`; nothing where they are those that stand there."""
    found = {path: fitted(*pair, int(wanted[path][0]), float(wanted[path][1])) for path, pair in slots.items()}
    return {path: change for path, change in found.items() if change is not None}


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
