"""What a recipe means for one run: how many steps, which learning rate, when to log, evaluate and save.

A `Recipe` may leave these open; here they are settled, once the number of examples and the base are known, and what
contradicts them is refused before anything starts. This module does not know the trainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from weft.errors import RecipeError
from weft.train.adaptive import GrowOnPlateau
from weft.train.recipe import CLASSIFYING, METRICS, Recipe

__all__ = ["Facts", "Schedule", "learning_rate_for", "rate_at", "settle"]

FULL_RATE = 5e-5
"""Learning rate of full fine-tuning at a width of 2000, from which the rule starts."""

WIDTH_EXPONENTS = {"llama": 0.781, "qwen": 0.0775}
SHORT_RUN = 100
MEASURED_ALPHA = 32.0


@dataclass(frozen=True)
class Facts:
    """What must be known of data, base and machine to settle a recipe.

    Attributes:
        features: training features: examples, or rows once they are packed.
        evaluated: there is evaluation data.
        kind: of the examples.
        width: hidden size of the base; 0 where its config doesn't say.
        family: ``model_type`` of its config.
        processes: training processes.
        cpu: it will run on a CPU.
        alpha: scale times rank of the spec; its alpha, unless it is rank-stabilised.
    """

    features: int
    evaluated: bool
    kind: str
    width: int = 0
    family: str = ""
    processes: int = 1
    cpu: bool = True
    alpha: float = 32.0


@dataclass(frozen=True)
class Schedule:
    """A recipe, settled. All intervals are in optimizer steps.

    Attributes:
        steps: optimizer steps of the run; an epoch has `steps_per_epoch`.
        learning_rate: the peak; `rate_reason` says where it is from.
        best: the checkpoint of the best metric is restored at the end.
        patience: evaluations without a better metric after which to stop; 0: never.
    """

    steps: int
    steps_per_epoch: int
    warmup_steps: int
    learning_rate: float
    rate_reason: str
    log_every: int
    eval_every: int
    save_every: int
    best: bool
    metric: str
    higher_is_better: bool
    patience: int
    precision: str

    @property
    def epochs(self) -> float:
        """Passes over the data."""
        return self.steps / self.steps_per_epoch


def learning_rate_for(width: int, family: str, steps: int, alpha: float = MEASURED_ALPHA) -> tuple[float, str]:
    """The rule for LoRA's learning rate, and how it came to its number, in words.

    ``5e-5 · m · (2000 / width) ** p · f(32 / alpha)``: full fine-tuning's rate at a width of 2000, times m = 10, or 15 in runs of
    fewer than 100 steps, times a power of the width that depends on the family: p = 0.781 for Llama, 0.0775 for Qwen,
    and 0 for those that were not measured. It is nearly independent of the rank (4 to 512) where alpha is 32. With a larger
    alpha the last factor is 32 / alpha (at least 1/8), which keeps the first steps of ΔW: Adam moves B by the learning rate, whatever the scale.
    With a smaller one it is the root of that (at most 4): A moves by the learning rate as well, and the scale doesn't make up for that.

    What counts is scale times rank, of which alpha 32 is one way of many: ``alpha = rank`` asks for a rate that falls with the rank, and so does rsLoRA
    (scale alpha / √rank). That is why an adapter with ranks by site keeps one alpha at all of them.

    Args:
        width: hidden size of the base; 0: unknown.
        family: ``model_type`` of its config.
        steps: optimizer steps of the run.
        alpha: scale times rank.

    Source:
        Schulman et al. 2025, LoRA Without Regret (thinkingmachines.ai/blog/lora), and the widths' exponents of the
        authors' tinker-cookbook. Kalajdzievski 2023, rsLoRA, arXiv:2312.03732, for the scale. Measured: docs/results.md, "Which rank".
    """
    times = 15 if steps < SHORT_RUN else 10
    exponent = next((value for name, value in WIDTH_EXPONENTS.items() if family.lower().startswith(name)), 0.0)
    ratio = MEASURED_ALPHA / abs(alpha)
    scaled = min(4.0, ratio**0.5) if ratio > 1 else max(1 / 8, ratio)
    rate = scaled * FULL_RATE * times * ((2000 / width) ** exponent if width else 1.0)
    rounded = float(f"{rate:.2g}")
    run = f"a run of {steps} steps" if steps < SHORT_RUN else "LoRA"
    return (
        rounded,
        f"{rounded:g}: {times} x full fine-tuning's, for {run} on {family or 'a base'} of width {width or 'unknown'}, alpha {alpha:g}",
    )


def settle(recipe: Recipe, facts: Facts) -> Schedule:
    """Settle what the recipe leaves open.

    Raises:
        RecipeError: what the recipe asks for can't be with these data and this base.
    """
    _check(recipe, facts)
    batches = math.ceil(math.ceil(facts.features / recipe.batch_size) / facts.processes)
    per_epoch = max(1, math.ceil(batches / recipe.accumulation))
    steps = recipe.max_steps or max(1, math.ceil((recipe.epochs or 3) * per_epoch))
    warmup = _warmup(recipe, steps)
    rate, reason = learning_rate_for(facts.width, facts.family, steps, facts.alpha)
    if recipe.learning_rate is not None:
        rate, reason = recipe.learning_rate, f"{recipe.learning_rate:g}: as the recipe says"
    eval_every, save_every = _intervals(recipe, steps)
    best = recipe.best and facts.evaluated
    patience = 5 if recipe.patience is None else recipe.patience
    return Schedule(
        steps=steps,
        steps_per_epoch=per_epoch,
        warmup_steps=warmup,
        learning_rate=rate,
        rate_reason=reason,
        log_every=recipe.log_every or max(1, min(50, steps // 100)),
        eval_every=eval_every if facts.evaluated else 0,
        save_every=save_every,
        best=best,
        metric=recipe.best_metric,
        higher_is_better=METRICS[recipe.best_metric] == "higher",
        patience=patience if facts.evaluated else 0,
        precision=_precision(recipe, facts),
    )


def _intervals(recipe: Recipe, steps: int) -> tuple[int, int]:
    """(eval_every, save_every); where only one is given, the other follows."""
    auto = max(1, min(500, math.ceil(steps / 10)))
    if recipe.eval_every:
        return recipe.eval_every, recipe.save_every or recipe.eval_every
    if recipe.save_every:
        return math.ceil(auto / recipe.save_every) * recipe.save_every, recipe.save_every
    return auto, auto


def _warmup(recipe: Recipe, steps: int) -> int:
    ratio = 0.1 if recipe.warmup_ratio is None else recipe.warmup_ratio
    warmup = math.ceil(ratio * steps) if recipe.warmup_steps is None else recipe.warmup_steps
    given = recipe.warmup_steps is not None or recipe.warmup_ratio is not None
    if warmup >= steps and warmup > 0 and given:
        raise RecipeError(
            f"the warm-up of {warmup} steps is not shorter than the run of {steps} steps: the full learning rate would "
            "never be reached; lower warmup_steps or warmup_ratio, or train longer"
        )
    return min(warmup, steps - 1)


def rate_at(name: str, schedule: Schedule) -> Callable[[float], float]:
    """The learning rate by step, whole or between two: exactly what transformers' scheduler of that name gives."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=schedule.learning_rate)
    known = name if name != "constant" else "constant_with_warmup"
    scheduler: Any = get_scheduler(known, optimizer, schedule.warmup_steps, schedule.steps)
    factor = scheduler.lr_lambdas[0]
    return lambda step: schedule.learning_rate * factor(step)


def _precision(recipe: Recipe, facts: Facts) -> str:
    """``no``, ``bf16`` or ``fp16``."""
    if recipe.mixed_precision == "fp16" and facts.cpu:
        raise RecipeError("mixed_precision='fp16' needs a GPU; on a CPU use 'bf16' or 'no'")
    if recipe.mixed_precision != "auto":
        return recipe.mixed_precision
    if facts.cpu:
        return "no"
    import torch

    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"


def _check(recipe: Recipe, facts: Facts) -> None:
    """Contradictions between the recipe and what is there."""
    if not facts.features:
        raise RecipeError("no training example is left; see what was dropped and why in the account of the data")
    if not facts.evaluated and isinstance(recipe.adaptive, GrowOnPlateau):
        raise RecipeError(
            "adaptive growth looks at evaluations, and there is no evaluation data; give eval_data (--eval FILE, or --eval 0.1)"
        )
    if recipe.offload and facts.cpu:
        raise RecipeError(
            f"offload={list(recipe.offload)} needs a GPU: on a CPU weights and activations are in CPU memory already; leave it out. "
            "To save memory here: gradient_checkpointing, loss_chunk, dtype=bfloat16, a smaller batch_size with accumulation"
        )
    if not facts.evaluated:
        asked: dict[str, Any] = {"patience": recipe.patience, "eval_every": recipe.eval_every, "metric": recipe.metric}
        for name, value in asked.items():
            if value:
                raise RecipeError(
                    f"{name}={value!r} needs evaluation data, and there is none; give eval_data (--eval FILE)"
                )
    classifies = facts.kind in (*CLASSIFYING, "fused")
    reported = [name for name, better in METRICS.items() if _reports(facts.kind, name, better)]
    if recipe.best_metric not in reported:
        raise RecipeError(
            f"metric={recipe.best_metric!r} is never reported for {facts.kind} data; expected one of {', '.join(reported)}"
        )
    if recipe.batching == "packed" and classifies:
        raise RecipeError(
            "batching='packed' puts several examples in a row, and classification has one label a row; use 'length'"
        )


def _reports(kind: str, metric: str, better: str) -> bool:
    """Whether trainings of this kind report a metric."""
    if kind == "contrastive":
        return metric in ("eval_loss", "eval_recall_at_1")
    if kind in (*CLASSIFYING, "fused"):
        return metric not in ("eval_perplexity", "eval_recall_at_1")
    return better == "lower"
