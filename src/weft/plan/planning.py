"""`plan`: what a training takes, before anything is allocated; and a recipe that fits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from weft.errors import PlanError, RecipeError
from weft.plan.calibration import Speed, calibrate
from weft.plan.measures import Measure, choose, measures
from weft.plan.memory import Gauge, Memory
from weft.plan.sizes import bytes_of
from weft.plan.skeleton import BaseLike, find_config
from weft.plan.subject import Counts, Subject
from weft.spec import LoraSpec
from weft.train.recipe import Recipe

__all__ = ["Plan", "plan"]

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Plan:
    """What a training takes.

    Attributes:
        counts: numbers of base and adapter.
        bytes: of the LoRA training at its highest moment, by part. full: the same for training all weights; None: not asked for.
        flops: floating point operations of an optimizer step. seconds: that it takes, if the machine was measured.
        measures: what each measure saves and costs here. recipe: with the measures that were chosen.
        given: memory of the recipe as it was given. budget: bytes, or None. fits: within the budget; None without one.
    """

    model: str
    seq_len: int
    device: str
    counts: Counts
    bytes: Memory
    full: Memory | None
    given: Memory
    measures: tuple[Measure, ...]
    recipe: Recipe
    original: Recipe
    budget: int | None = None
    seconds: float | None = None
    speed: Speed | None = None

    @property
    def flops(self) -> float:
        """Floating point operations of an optimizer step."""
        return self.bytes.flops

    @property
    def fits(self) -> bool | None:
        """Whether it stays within the budget; None without one."""
        return None if self.budget is None else self.bytes.total <= self.budget

    @property
    def saved(self) -> float:
        """Share of the base's parameters that are not trained."""
        return 1 - self.counts.trained / self.counts.base

    @property
    def changes(self) -> dict[str, Any]:
        """What was changed in the recipe to fit."""
        before, after = self.original.to_dict(), self.recipe.to_dict()
        return {name: after[name] for name in after if after[name] != before[name]}

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "model": self.model, "seq_len": self.seq_len, "device": self.device, "counts": dataclasses.asdict(self.counts),
            "bytes": self.bytes.to_dict(), "full": self.full.to_dict() if self.full else None, "given": self.given.to_dict(),
            "flops": self.flops, "seconds": self.seconds,
            "flops_per_second": self.speed.flops if self.speed else None,
            "budget": self.budget, "fits": self.fits, "changes": self.changes, "recipe": self.recipe.to_dict(),
            "measures": [measure.to_dict() for measure in self.measures],
        }  # fmt: skip

    def text(self) -> str:
        """For people."""
        from weft.plan.text import text

        return text(self)


def plan(
    base: BaseLike = None,
    spec: LoraSpec | None = None,
    recipe: Recipe | None = None,
    *,
    seq_len: int | None = None,
    batch_size: int | None = None,
    budget: str | int | None = None,
    full: bool = True,
    table: bool = True,
    measure: bool = False,
    device: str = "auto",
    labels: int | None = None,
    padded: bool = True,
) -> Plan:
    """What a training takes, from the base's configuration alone: nothing is allocated.

    The real step (forward, loss, backward, optimizer) runs on tensors without data; what it makes, keeps and frees is counted. Of
    layers that are alike one is followed. The batch is the largest that the settings allow, with every token learned: a batch of
    shorter rows takes less.

    Args:
        base: a directory, hub id, config.json, configuration or dict; see `weft.plan.skeleton.find_config`.
        spec: what to adapt; None: that of the recipe, or the defaults.
        recipe: how to train; None: the defaults.
        seq_len: tokens of a row; None: ``max_length`` of the recipe, else 1024 or what the base allows.
        batch_size: rows of a forward; None: the recipe's.
        budget: as in ``"24GiB"``: choose the cheapest measures that fit.
        full: count a training of all weights too. table: count each measure alone.
        measure: measure this machine's speed, for `Plan.seconds`; takes a few seconds.
        device: ``"cpu"`` or ``"cuda"``; ``"auto"``: a GPU where there is one. A plan for a GPU needs none.
        labels: of a classification; None: the task that the configuration names.
        padded: rows of a batch differ in length, so that an attention mask is made.

    Raises:
        PlanError: a size that can't be read; a model that can't be followed without data.
        BudgetError: a budget that can't be met; says by how much.
        BaseError: no configuration. TargetError: the spec matches nothing.

    Example:
        >>> found = plan({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100,
        ...               "num_attention_heads": 4, "intermediate_size": 128}, seq_len=16, full=False, table=False)  # doctest: +SKIP
        >>> found.bytes.factors  # doctest: +SKIP
    """
    limit = None if budget is None else bytes_of(budget)
    where = _device(device, recipe)
    config = find_config(base)
    recipe = (recipe or Recipe()) if batch_size is None else (recipe or Recipe()).replace(batch_size=batch_size)
    spec = spec or recipe.spec or LoraSpec()
    recipe = recipe.replace(spec=spec)
    length = seq_len if seq_len is not None else recipe.max_length or _usual_length(config)
    _check_length(length, config)
    gauge = Gauge(Subject(config, spec, where, labels), length, padded)
    given = gauge.memory(recipe)
    known: list[Measure] = []
    if table or (limit is not None and given.total > limit):
        known = measures(gauge, recipe, given)
    chosen, found = (recipe, given) if limit is None or given.total <= limit else choose(gauge, recipe, limit, known)
    whole = None
    if full:
        plain = chosen.replace(quantize=None, freeze_below=None, loss_chunk=None, offload=[])
        whole = Gauge(Subject(config, None, where, labels), length, padded, overhead=gauge.before).memory(plain)
    speed = calibrate(where, gauge.precision(chosen), chosen.dtype) if measure else None
    return Plan(
        model=type(gauge.subject.built(chosen).model).__name__, seq_len=length, device=where, counts=gauge.counts(chosen), bytes=found,
        full=whole, given=given, measures=tuple(known) if table else (), recipe=chosen, original=recipe, budget=limit,
        seconds=found.flops / speed.flops if speed else None, speed=speed,
    )  # fmt: skip


def _device(device: str, recipe: Recipe | None) -> str:
    if device not in DEVICES:
        raise PlanError(f"device={device!r}; expected one of {', '.join(DEVICES)}")
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() and (recipe is None or recipe.device != "cpu") else "cpu"


def _usual_length(config: Any) -> int:
    from weft.train.inputs import DEFAULT_LENGTH

    return min(_positions(config) or DEFAULT_LENGTH, DEFAULT_LENGTH)


def _positions(config: Any) -> int | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limits = (getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return min((int(limit) for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def _check_length(length: int, config: Any) -> None:
    if not isinstance(length, int) or isinstance(length, bool) or length < 2:
        raise PlanError(f"seq_len={length!r}; expected a whole number of at least 2")
    allowed = _positions(config)
    if allowed is not None and length > allowed:
        raise RecipeError(f"seq_len={length}, but this base goes up to {allowed} tokens; lower it")
