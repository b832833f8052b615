"""Weights by search: the mixture with the least loss on some examples, found without gradients and with few evaluations.

The single adapters, their mean and the weights that were given are tried first, so that the result is never worse on the examples than any
of them; from the best of them CMA-ES goes on.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from weft.compose.assembling import reported
from weft.compose.job import prepare
from weft.compose.losses import Judge
from weft.compose.methods import Method, Options
from weft.compose.mixing import mix, proved
from weft.compose.parents import Parent
from weft.compose.report import Mixture
from weft.compose.updates import Ground
from weft.errors import MixError
from weft.train.bars import counter, say

__all__ = ["BOUND", "find", "minimise"]

BOUND = 1.5
"""Weights are searched in [-1.5, 1.5], as in LoraHub."""

_SPREAD = 0.3
_DIGITS = 4


def find(
    parents: tuple[Parent, ...], method: Method, options: Options, *, whole: str, base: Any, data: Any, evaluations: int,
    allow_other_base: bool, progress: bool | None,
) -> Mixture:  # fmt: skip
    """The mixture of these parents with the least loss on data.

    Raises:
        MixError: fewer than two adapters, weights by pattern, fewer evaluations than starting points.

    Source:
        Huang et al. 2023, LoraHub, arXiv:2307.13269; Hansen 2016, The CMA evolution strategy: a tutorial, arXiv:1604.00772.
    """
    weights = [parent.weight for parent in parents]
    if len(parents) < 2:
        raise MixError("a search needs at least two adapters")
    start = [weight for weight in weights if not isinstance(weight, Mapping)]
    if len(start) < len(weights):
        raise MixError("a search finds one weight for each adapter; weights by pattern can't be where it starts")
    least = len(parents) + 2
    if isinstance(evaluations, bool) or not isinstance(evaluations, int) or evaluations < least:
        raise MixError(f"evaluations={evaluations!r}; a search of {len(parents)} adapters needs at least {least}")
    with Judge.opened(base, data, parents) as judge:
        job = prepare(parents, method, options, whole, Ground(judge.model), allow_other_base)

        def loss(trial: Sequence[float]) -> float:
            candidate = job.weighted(list(trial))
            return judge.loss(mix(candidate, False) if candidate.live else None)

        names = [parent.name for parent in parents]
        with counter("searching", evaluations, progress) as tick:
            trials: list[dict[str, Any]] = []
            for trial, value in minimise(loss, start, evaluations, options.seed):
                trials.append({"weights": dict(zip(names, trial, strict=True)), "loss": value})
                tick(1)
                _tell(trials, evaluations, progress)
        best = min(trials, key=lambda trial: trial["loss"])
        chosen = job.weighted(list(best["weights"].values()))
        if not chosen.live:
            raise MixError(
                f"no mixture was better than the base (loss {best['loss']:.4f}): these adapters don't help with these examples"
            )
        made = reported(judge.judged(mix(chosen, False), chosen, progress), trials=tuple(trials))
        return proved(made, chosen)


def _tell(trials: Sequence[Mapping[str, Any]], evaluations: int, progress: bool | None) -> None:
    """A line for every evaluation where there is no bar."""
    if progress is False or (progress is None and sys.stderr.isatty()):
        return
    last, best = trials[-1], min(trial["loss"] for trial in trials)
    said = ", ".join(f"{name} {weight:g}" for name, weight in last["weights"].items())
    say(f"{len(trials)}/{evaluations}: loss {last['loss']:.4f} (best {best:.4f}) at {said}")


def minimise(
    loss: Callable[[Sequence[float]], float], start: Sequence[float], evaluations: int, seed: int
) -> Iterator[tuple[tuple[float, ...], float]]:
    """Yield every evaluation: weights (rounded to four digits) and loss.

    Args:
        loss: of weights.
        start: weights that are tried first.
        evaluations: how many.
        seed: the same seed gives the same search; numpy's own random state is left alone.
    """
    n = len(start)
    seen: list[tuple[tuple[float, ...], float]] = []

    def tried(weights: Sequence[float]) -> tuple[tuple[float, ...], float]:
        rounded = tuple(round(float(weight), _DIGITS) + 0.0 for weight in weights)
        value = loss(rounded)
        seen.append((rounded, value if np.isfinite(value) else float("inf")))
        return seen[-1]

    first = [tuple(start), tuple([1.0 / n] * n), *(tuple(float(i == k) for i in range(n)) for k in range(n))]
    for weights in list(dict.fromkeys(first))[:evaluations]:
        yield tried(weights)
    best = np.clip(min(seen, key=lambda one: one[1])[0], -BOUND, BOUND)
    strategy = _strategy(best, seed)
    while len(seen) < evaluations:
        asked = strategy.ask()
        values = []
        for weights in asked[: evaluations - len(seen)]:
            one = tried(weights)
            values.append(one[1])
            yield one
        if len(values) == len(asked):
            strategy.tell(asked, values)


def _strategy(start: Any, seed: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it can't plot
        import cma  # type: ignore[import-untyped]

    stream = np.random.default_rng(seed)
    settings = {
        "bounds": [-BOUND, BOUND],
        "randn": lambda *shape: stream.standard_normal(shape),
        "seed": np.nan,
        "verbose": -9,
    }
    return cma.CMAEvolutionStrategy(list(start), _SPREAD, settings)
