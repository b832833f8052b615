"""How a row is measured: time shuffled and interleaved, memory from the allocator's own events."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch

__all__ = ["interleaved", "median_ratio", "peak_bytes", "ratios"]


def interleaved(steps: Mapping[str, Callable[[], None]], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each step in each round; the order is shuffled within a round, the first round is thrown away.

    On a CPU the process's own time is taken (one thread: what others do on the machine counts less); on a GPU events.
    """
    clock = _cuda_seconds if device.startswith("cuda") else _process_seconds
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        order = list(steps)
        random.shuffle(order)
        for name in order:
            seconds = clock(steps[name])
            if number:
                times[name].append(seconds)
    return times


def ratios(times: Mapping[str, list[float]], name: str, over: str = "base") -> list[float]:
    """Ratio by round."""
    return [mine / other for mine, other in zip(times[name], times[over], strict=True)]


def median_ratio(times: Mapping[str, list[float]], name: str, over: str = "base") -> float:
    """The median of the ratios of a round."""
    return statistics.median(ratios(times, name, over))


def peak_bytes(step: Callable[[], None], device: str = "cpu") -> int:
    """Most bytes that one step holds beyond what was there before it."""
    step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    held = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _process_seconds(step: Callable[[], None]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def _cuda_seconds(step: Callable[[], None]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000
