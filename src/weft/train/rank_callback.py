"""Ranks that change, in transformers' Trainer: its events go to `weft.train.ranks`, and what that decides to optimizer and processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from weft.core.resizing import Resize
from weft.core.site import Site
from weft.core.slots import Slot
from weft.spec import LoraSpec
from weft.train.ranks import Ranks

if TYPE_CHECKING:
    from collections.abc import Callable

    from weft.core.bank import Bank

__all__ = ["RankCallback", "TrainerHost"]

T = TypeVar("T")


class TrainerHost:
    """A `weft.train.ranks.Host`: the adapter ``slot`` of a bank, trained by a Trainer.

    Attributes:
        trainer: set by the trainer, when it is made. rate_at: the schedule. tell: takes a line for the user.
    """

    def __init__(self, bank: Bank, slot: str, rate_at: Callable[[float], float], tell: Callable[[str], None]) -> None:
        self.bank, self.slot, self.rate_at, self.tell = bank, slot, rate_at, tell
        self.trainer: Any = None

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return int(self.trainer.state.global_step)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return int(self.trainer.state.max_steps)

    @property
    def main(self) -> bool:
        """The first process."""
        return bool(self.trainer.is_world_process_zero())

    @property
    def spec(self) -> LoraSpec:
        """As the adapter began."""
        return self.bank.spec(self.slot)

    def slots(self) -> Mapping[str, tuple[Site, Slot]]:
        """Those of the bank."""
        return self.bank.slots(self.slot)

    def resize(self, changes: Mapping[str, Resize]) -> None:
        """Sites, optimizer and wrappers."""
        lost = self.trainer.resize(changes)
        if lost and self.main:
            name = self.trainer.args.optim
            self.tell(f"the state of {name} can't follow a change of ranks: at {lost} parameters it begins anew")

    def stopping(self) -> bool:
        """Whether the patience of an early stop is used up."""
        return any(item.early_stopping_patience_counter >= item.early_stopping_patience for item in self._callbacks())

    def go_on(self) -> None:
        """Take it back."""
        wanted = self.stopping()
        for item in self._callbacks():
            item.early_stopping_patience_counter = 0
        if wanted:
            self.trainer.control.should_training_stop = False

    def forget_best(self) -> None:
        """Trainer's own record of the best checkpoint."""
        state = self.trainer.state
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def agreed(self, value: T) -> T:
        """The first process's value, on all."""
        if self.trainer.args.world_size == 1:
            return value
        held = [value]
        torch.distributed.broadcast_object_list(held, src=0, device=self.trainer.args.device)
        return held[0]

    def _callbacks(self) -> list[Any]:
        """Those that may end the run early; looked up each time, for a resumed trainer makes new ones."""
        return [item for item in self.trainer.callback_handler.callbacks if isinstance(item, EarlyStoppingCallback)]


class RankCallback(TrainerCallback):
    """Trainer's events for `Ranks`. Evaluations are told by the trainer itself, after every other callback."""

    def __init__(self, ranks: Ranks, trainer: Any) -> None:
        self.ranks, self.trainer = ranks, trainer
        self._rates: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first forward."""
        self.ranks.step_begins()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are clipped: show them, and set the rate of this one step."""
        if self.ranks.watches():
            self._show()
        factor, self._rates = self.ranks.rate_factor(), []
        if factor == 1.0:
            return
        groups = self.trainer.optimizer.param_groups
        self._rates = [group["lr"] for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate * factor

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The schedule's rate again."""
        for group, rate in zip(self.trainer.optimizer.param_groups if self._rates else (), self._rates, strict=True):
            group["lr"] = rate

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step is counted."""
        self.ranks.step_ended()

    def _show(self) -> None:
        scaled = self.trainer.accelerator.scaler is not None
        for path, (_, slot) in self.ranks.host.slots().items():
            for leaf, parameter in (("A", slot.lora_A), ("B", slot.lora_B)):
                gradient = parameter.grad
                if gradient is None or (scaled and not bool(torch.isfinite(gradient).all())):
                    continue
                self.ranks.saw(path, leaf, parameter, gradient)
