"""Several processes (`accelerate launch`, torchrun): either each has its own users, or all have the same users and other rows.

    users   no gradient is ever sent; each process has a bank, checkpoints and a queue of its own
    rows    every adapter's batch is spread over the processes, and gradients are added up: batches are those of `weft.train`
            on as many processes

This module does not know adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.errors import RunError

__all__ = ["MODES", "World"]

MODES = ("auto", "users", "rows")


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        count, rank: how many, and which one this is. mode: ``"users"`` or ``"rows"``.
    """

    count: int = 1
    rank: int = 0
    mode: str = "users"
    device: str = "cpu"

    @classmethod
    def join(cls, mode: str, users: int, cpu: bool) -> World:
        """Meet the other processes, if the environment says that there are any.

        Args:
            mode: one of `MODES`; ``"auto"``: users where there are enough of them, else rows.

        Raises:
            RunError: an unknown mode.
        """
        if mode not in MODES:
            raise RunError(f"processes={mode!r}: expected one of {', '.join(MODES)}")
        from weft.train.training import process_count

        if process_count() == 1:
            return cls(device="cpu" if cpu else "cuda")
        from accelerate import PartialState  # type: ignore[import-untyped]

        state = PartialState(cpu=cpu)
        chosen = mode if mode != "auto" else "users" if users >= 2 * state.num_processes else "rows"
        return cls(state.num_processes, state.process_index, chosen, str(state.device))

    @property
    def main(self) -> bool:
        """This process writes what is written once."""
        return self.rank == 0

    @property
    def rows(self) -> int:
        """Processes that share each adapter's rows."""
        return self.count if self.mode == "rows" else 1

    @property
    def row_rank(self) -> int:
        """Which of them this is."""
        return self.rank if self.mode == "rows" else 0

    @property
    def writes(self) -> bool:
        """This process writes folders of users."""
        return self.mode == "users" or self.main

    def own(self, names: Sequence[str]) -> list[str]:
        """The users of this process."""
        return list(names[self.rank :: self.count]) if self.mode == "users" else list(names)

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            torch.distributed.barrier()

    def reducer(self) -> Callable[[Tensor], Any] | None:
        """Adds a tensor up over the processes, in place; None where rows are not shared."""
        return None if self.rows == 1 else _add_up

    def share(self) -> Callable[[dict[str, float]], dict[str, float]] | None:
        """The same for losses by adapter."""
        if self.rows == 1:
            return None

        def add(losses: dict[str, float]) -> dict[str, float]:
            values = torch.tensor([losses[key] for key in sorted(losses)], dtype=torch.float64, device=self.device)
            _add_up(values)
            return dict(zip(sorted(losses), values.tolist(), strict=True))

        return add

    def measurer(self, measure: Callable[[Sequence[Any]], list[Any]]) -> Callable[[list[Any]], list[Any]] | None:
        """Spreads an evaluation over the processes; all get all results."""
        if self.rows == 1:
            return None

        def spread(pieces: list[Any]) -> list[Any]:
            parts: list[Any] = [None] * self.count
            torch.distributed.all_gather_object(parts, measure(pieces[self.rank :: self.count]))
            return [parts[index % self.count][index // self.count] for index in range(len(pieces))]

        return spread

    def any(self, asked: bool) -> bool:
        """Whether some process of those that share rows was asked."""
        if self.rows == 1:
            return asked
        flag = torch.tensor(int(asked), device=self.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag)


def _add_up(tensor: Tensor) -> None:
    torch.distributed.all_reduce(tensor)
