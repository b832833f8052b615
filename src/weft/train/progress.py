"""What is seen while a run goes on: the log, a progress bar, and a stop at Ctrl-C that loses nothing.

Callbacks of `transformers.Trainer`. The bar goes to stderr; where that is no terminal, there is a plain line now and then.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import TrainerCallback

from weft.train.bars import counter, progress_bar, say
from weft.train.watching import Watch, logged

__all__ = ["LogWriter", "Progress", "StopOnSignal", "counter", "progress_bar", "say"]


class LogWriter(TrainerCallback):
    """Gives a line for each logged step and each evaluation to ``write``; counts tokens and time.

    Args:
        write: takes one plain mapping.
        watch: adds its numbers to a line, and is given every line after it was written.
    """

    def __init__(self, write: Callable[[Mapping[str, Any]], None], watch: Watch | None = None) -> None:
        self.write = write
        self.watch = watch
        self.tokens = 0
        self.tokens_per_second = 0.0
        self.seconds = 0.0
        self._started = self._marked = time.monotonic()
        self._first_tokens = self._marked_tokens = 0
        self.first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._started = self._marked = time.monotonic()
        self._first_tokens = self._marked_tokens = state.num_input_tokens_seen
        self.first_step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Write the line."""
        now = time.monotonic()
        self.seconds = now - self._started
        self.tokens = int(state.num_input_tokens_seen)
        row = logged(logs or {})
        if row is None:
            return
        if "loss" in row:
            speed = (self.tokens - self._marked_tokens) / max(now - self._marked, 1e-9)
            self._marked, self._marked_tokens = now, self.tokens
            self.tokens_per_second = (self.tokens - self._first_tokens) / max(self.seconds, 1e-9)
            row |= {"tokens_per_second": round(speed, 1)}
            row |= {} if self.watch is None else self.watch.numbers(self.tokens)
        else:
            self._marked = now
        line = {"step": state.global_step, **row, "seconds": round(self.seconds, 3)}
        if state.is_world_process_zero:
            self.write(line)
        if self.watch is not None:
            self.watch.take(line)


class Progress(TrainerCallback):
    """Loss, tokens a second and time left.

    Args:
        log: the log writer, which counts.
        mode: None: a bar on a terminal, plain lines elsewhere; True: plain lines; False: silence.
    """

    def __init__(self, log: LogWriter, mode: bool | None) -> None:
        self.log = log
        self.mode = mode
        self._bar: Any = None
        self._task: Any = None
        self._loss = ""
        self._lines_every = 1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        if self.mode is False or not state.is_world_process_zero:
            return
        self._lines_every = max(1, state.max_steps // 20)
        if self.mode is None and sys.stderr.isatty():
            self._bar = progress_bar()
            self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step, note="")
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance it."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, description="training")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say that an evaluation runs."""
        if self._bar is not None:
            self._bar.update(self._task, description="evaluating")

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Show loss and speed, or print a line."""
        logs = logs or {}
        if self.mode is False or not state.is_world_process_zero or not ("loss" in logs or "eval_loss" in logs):
            return
        if "loss" in logs:
            self._loss = f"loss {logs['loss']:.4f}"
        pace = f"{self._loss}  {self.log.tokens_per_second:,.0f} tokens/s"
        text = f"eval loss {logs['eval_loss']:.4f}" if "eval_loss" in logs else pace
        if self._bar is not None:
            self._bar.update(self._task, note=f"{text}  {pace}" if "eval_loss" in logs else pace)
        elif "eval_loss" in logs or state.global_step % self._lines_every < max(1, args.logging_steps):
            done = max(1, state.global_step - self.log.first_step)
            left = (state.max_steps - state.global_step) * self.log.seconds / done
            rest = f", {left:.0f} s left" if "loss" in logs else ""
            say(f"step {state.global_step}/{state.max_steps}: {text}{rest}")

    def tell(self, line: str) -> None:
        """A line for the user, above the bar."""
        if self.mode is False:
            return
        if self._bar is None:
            say(line)
        else:
            self._bar.console.print(line, markup=False, highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Take the bar away, also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class StopOnSignal(TrainerCallback):
    """The first Ctrl-C (or a scheduler's SIGTERM) ends the run after its step, with a checkpoint; the second at once.

    Attributes:
        stopped: a signal ended the run.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._asked = False

    @property
    def asked(self) -> bool:
        """A signal came."""
        return self._asked

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the run if it was asked for."""
        asked = self._asked
        if args.world_size > 1 and state.global_step % max(1, state.logging_steps) == 0:
            asked = _any_process(asked, args.device)
        elif args.world_size > 1:
            return
        if asked and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take over SIGINT and SIGTERM; only in the main thread, where Python allows it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        say("", "stopping after this step, with a checkpoint; once more to stop at once")


def _any_process(asked: bool, device: Any) -> bool:
    """Whether some process was asked: all stop at the same step."""
    import torch
    import torch.distributed as dist

    flag = torch.tensor(int(asked), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)
