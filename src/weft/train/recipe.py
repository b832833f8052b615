"""Recipe: how to train, as one frozen value that reads and writes YAML.

A recipe may hold the `LoraSpec` too: in a file, fields of the spec stand under ``spec:`` or beside the others, and
``rank=16`` reaches the one as ``learning_rate=3e-4`` reaches the other. What can be checked without data and model is
checked here; the rest in `weft.train.schedule`. This module does not know torch.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.errors import RecipeError, SpecError, did_you_mean
from weft.spec import LoraSpec
from weft.train.adaptive import Adaptive, adaptive_from, to_section
from weft.train.measures import OFFLOADED, QUANTIZED, RECOMPUTED, check_measures
from weft.train.pair_settings import PAIR_KINDS, PairSettings, pair_settings
from weft.train.vision_settings import VisionSettings
from weft.train.yaml12 import dump, parse, parse_file

__all__ = ["BATCHING", "CLASSIFYING", "KINDS", "METRICS", "ON_TROUBLE", "PRECISIONS", "SCHEDULES", "Recipe"]

KINDS = ("auto", "chat", "completion", "classification", "text", "classify-images", "image-text", *PAIR_KINDS)
CLASSIFYING = ("classification", "classify-images")
"""Kinds whose examples have one label each."""

SCHEDULES = ("cosine", "linear", "constant", "inverse_sqrt", "polynomial")
BATCHING = ("length", "packed", "random")
PRECISIONS = ("auto", "no", "bf16", "fp16")
ON_TROUBLE = ("say", "act", "ignore")
METRICS = {
    "eval_loss": "lower",
    "eval_perplexity": "lower",
    "eval_accuracy": "higher",
    "eval_macro_f1": "higher",
    "eval_recall_at_1": "higher",
}
"""Every metric that a training reports at an evaluation, and which direction is better."""


@dataclass(frozen=True)
class Recipe:
    """How to train. Immutable; change with `replace` or `set`. The defaults are the stable recipe.

    Args:
        spec: what to adapt and how; None: given to `weft.train` apart, or the defaults of `LoraSpec`.
        kind: of the examples, one of `KINDS`; ``"auto"``: recognised from the data.
        columns: names of the file's columns where they differ: ``{"prompt": "question", "completion": "answer"}``.
        as_chat: put prompt and completion into the tokenizer's chat template, for instruction-tuned bases.
        mask_prompt: learn the completion alone, not the prompt.
        separator: text between prompt and completion.
        epochs: passes over the data; default 3. A fraction is allowed.
        max_steps: optimizer steps, instead of epochs.
        learning_rate: peak of the schedule; None: by the rule of `weft.train.schedule.learning_rate_for`.
        lora_plus_ratio: learning rate of B over that of A (LoRA+, Hayou et al. 2024, arXiv:2402.12354, who take
            about 16 with a lower `learning_rate`); None: one rate.
        batch_size: examples (or packed rows) in one forward, on each device.
        eval_batch_size: the same at an evaluation; None: twice `batch_size`.
        accumulation: forwards in one optimizer step. The loss is the mean over all target tokens of a step.
        max_length: longest example in tokens, longer ones are truncated; None: what the base allows, at most 1024.
        warmup_ratio: share of the steps in which the learning rate rises; default 0.1. Or `warmup_steps`.
        schedule: one of `SCHEDULES`.
        weight_decay: AdamW's; on factors and weights, not on biases and magnitudes.
        clip: largest norm of the gradient; 0: no clipping. Against exploding losses lower it, or the learning rate.
        optimizer: a name of `transformers.training_args.OptimizerNames`.
        batching: ``"length"`` puts examples of like length together, ``"packed"`` fills rows of `max_length` with
            several examples that don't see each other, ``"random"`` does neither.
        log_every: steps between two lines of the log; None: about a hundred lines a run.
        eval_every: steps between evaluations; None: ten evaluations a run, at least one each 500 steps.
        save_every: steps between checkpoints; None: as `eval_every`. Must divide `eval_every` where `best`.
        keep: checkpoints that stay, the best one not counted.
        best: end with the checkpoint of the best `metric`, not with the last (needs evaluation data).
        metric: a key of `METRICS`; None: ``eval_loss``.
        patience: stop after so many evaluations without a better `metric`; None: 5 with evaluation data; 0: never.
        seed: of initialisation, order of the data and dropout.
        mixed_precision: one of `PRECISIONS`; ``"auto"``: bf16 on a GPU that has it, else none.
        dtype: of the base's weights: ``"auto"`` (as stored), ``"float32"``, ``"bfloat16"``, ``"float16"``.
        gradient_checkpointing: recompute activations in the backward: true in every layer, a number in so many layers,
            ``"selective"`` all but the products; `reentrant` selects torch's older kind, for true alone.
        quantize: hold the linear layers of the base in ``"int8"`` or ``"nf4"`` (bitsandbytes); factors stay wide.
        offload: keep off the accelerator what is not in use: ``"base"`` the weights of the layers, ``"activations"`` what
            the backward needs again.
        loss_chunk: tokens whose logits exist at a time; None: all of a batch. For large vocabularies.
        freeze_below: adapt no layer under this number, so that the backward ends there.
        compile: `torch.compile` the model.
        adaptive: ranks that change while it trains: a `GrowOnPlateau`, `BudgetRanks` or `ShrinkBySpectrum`, or such a section:
            ``{kind: grow, max_rank: 64}``; None: they stay.
        on_trouble: what happens when something is found to be wrong while it trains: ``"say"`` says so; ``"act"``: when the loss explodes or
            is not finite, the run also goes back to the last good checkpoint, halves the learning rate and goes on, at most three
            times; ``"ignore"``: nothing is said, and `weft doctor` still finds it afterwards.
        general: a file of texts that the base should still know afterwards, or ``"english"`` for the short text that weft has: its loss is
            taken before and at every evaluation, and is where forgetting is seen; None: nobody looks. For causal language models.
        samples: rows whose answers before and after are written down at the end, greedy and short; 0: none.
        workers: processes that prepare batches; 0: the training process does.
        device: ``"auto"`` or ``"cpu"``.
        two_tower: how texts and images are brought together, for ``kind="contrastive"`` and ``"fused"``: a
            `weft.train.pair_settings.PairSettings`, or a section with its fields.
        vision: the section for images, see `weft.train.vision_settings.VisionSettings`; None: its defaults.
        report_to: trackers beside the run folder's own log: ``tensorboard``, ``wandb``, ``trackio`` …

    Raises:
        RecipeError: a wrong type, a value out of range, or a contradiction; names the field.

    Example:
        >>> recipe = Recipe(max_steps=200).set(["rank=16", "learning_rate=3e-4"])
        >>> recipe.learning_rate, recipe.spec.rank
        (0.0003, 16)
    """

    spec: LoraSpec | None = None
    kind: str = "auto"
    columns: Mapping[str, str] | None = None
    as_chat: bool = False
    mask_prompt: bool = True
    separator: str = ""
    epochs: float | None = None
    max_steps: int | None = None
    learning_rate: float | None = None
    lora_plus_ratio: float | None = None
    batch_size: int = 8
    eval_batch_size: int | None = None
    accumulation: int = 1
    max_length: int | None = None
    warmup_ratio: float | None = None
    warmup_steps: int | None = None
    schedule: str = "cosine"
    weight_decay: float = 0.01
    clip: float = 1.0
    optimizer: str = "adamw_torch"
    batching: str = "length"
    log_every: int | None = None
    eval_every: int | None = None
    save_every: int | None = None
    keep: int = 2
    best: bool = True
    metric: str | None = None
    patience: int | None = None
    seed: int = 0
    mixed_precision: str = "auto"
    dtype: str = "auto"
    gradient_checkpointing: bool | int | str = False
    reentrant: bool = False
    quantize: str | None = None
    offload: tuple[str, ...] = ()
    loss_chunk: int | None = None
    freeze_below: int | None = None
    compile: bool = False
    on_trouble: str = "say"
    general: str | None = None
    samples: int = 4
    workers: int = 0
    device: str = "auto"
    vision: VisionSettings | None = None
    report_to: tuple[str, ...] = ()
    adaptive: Adaptive | None = None
    two_tower: PairSettings | None = None

    def __hash__(self) -> int:
        return hash(repr(self.to_dict()))

    def __post_init__(self) -> None:
        given: dict[str, Any] = {"report_to": self.report_to, "offload": self.offload, "spec": self.spec}
        for name in ("report_to", "offload"):
            if isinstance(given[name], str):
                object.__setattr__(self, name, (given[name],))
            elif isinstance(given[name], list):
                object.__setattr__(self, name, tuple(given[name]))
        if isinstance(given["spec"], Mapping):
            object.__setattr__(self, "spec", _spec(given["spec"]))
        object.__setattr__(self, "adaptive", adaptive_from(self.adaptive))
        if isinstance(self.two_tower, Mapping):
            object.__setattr__(self, "two_tower", pair_settings(self.two_tower))
        vision: Any = self.vision
        if isinstance(vision, Mapping):
            object.__setattr__(self, "vision", VisionSettings.from_dict(vision))
        for name, (holds, expected) in _RULES.items():
            value = getattr(self, name)
            if not holds(value):
                raise RecipeError(f"Recipe.{name}: got {value!r}; expected {expected}{_hint(name, value)}")
        _check_contradictions(self)

    @property
    def best_metric(self) -> str:
        """The metric that decides which checkpoint is best."""
        return self.metric or "eval_loss"

    def replace(self, **changes: Any) -> Recipe:
        """A copy with some fields changed; fields of the spec too. An unknown field raises RecipeError."""
        return self.from_dict(_merge(self.to_dict(), changes))

    def set(self, assignments: Iterable[str]) -> Recipe:
        """A copy with ``name=value`` assignments applied, as ``--set`` gives them.

        A value is read by the rules of YAML 1.2: ``3e-4`` is a number, ``[q_proj, v_proj]`` a list, ``null`` None. A
        dotted name reaches into a mapping: ``rank_pattern.q_proj=4``, ``spec.rank=16``.

        Raises:
            RecipeError: no ``=``, a value that is not YAML, an unknown name.
        """
        changes: dict[str, Any] = {}
        for text in assignments:
            name, equals, value = text.partition("=")
            if not equals or not name.strip():
                raise RecipeError(f"{text!r} is no assignment; expected name=value, as in learning_rate=3e-4")
            name = name.strip().removeprefix("spec.")
            head, _, inner = name.partition(".")
            parsed = parse(value, f"the value of {name}")
            if not inner:
                changes[head] = parsed
                continue
            if head in _SECTIONS:
                own = self.two_tower.to_dict() if head == "two_tower" and self.two_tower is not None else None
                own = (self.spec or LoraSpec()).to_dict()["towers"] if head == "towers" else own
                changes[head] = _nested(changes.get(head, own), inner.split("."), parsed)
                continue
            if head not in _MAPPINGS:
                raise RecipeError(
                    f"{name!r}: {head!r} has no inner keys; only {', '.join((*_MAPPINGS, *_SECTIONS))} and spec have"
                )
            before = changes.get(head, self._section(head)) or {}
            before = {"kind": before} if isinstance(before, str) else before
            changes[head] = {**before, inner: parsed}
        return self.replace(**changes)

    def _section(self, name: str) -> Any:
        """What a mapping in the recipe or in its spec holds now."""
        if name == "adaptive":
            return to_section(self.adaptive)
        if name == "vision":
            return self.vision.to_dict() if self.vision is not None else None
        return getattr(self if name == "columns" else self.spec, name, None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the spec as a section of its own."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        values["spec"] = self.spec.to_dict() if self.spec is not None else None
        values["vision"] = self.vision.to_dict() if self.vision is not None else None
        values["report_to"], values["offload"] = list(self.report_to), list(self.offload)
        values["two_tower"] = self.two_tower.to_dict() if self.two_tower is not None else None
        values["columns"] = dict(self.columns) if self.columns is not None else None
        values["adaptive"] = to_section(self.adaptive)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`. Fields of `LoraSpec` may stand under ``spec`` or beside the others.

        Raises:
            RecipeError: an unknown key, with the nearest known ones; a field of the spec given twice and differently.
        """
        own = [item.name for item in dataclasses.fields(cls)]
        inner = [item.name for item in dataclasses.fields(LoraSpec)]
        section = values.get("spec")
        if isinstance(section, LoraSpec):
            section = section.to_dict()
        if section is not None and not isinstance(section, Mapping):
            raise RecipeError(f"Recipe.spec: got {section!r}; expected a section with fields of LoraSpec")
        spec = dict(section or {})
        for name in values:
            if name in own:
                continue
            if name not in inner:
                hint = did_you_mean(str(name), [*own, *inner])
                raise RecipeError(
                    f"a recipe has no field {name!r}.{hint} Fields: {', '.join(own)}; of the spec: {', '.join(inner)}"
                )
            if name in spec and spec[name] != values[name]:
                raise RecipeError(
                    f"{name!r} stands twice in the recipe: {values[name]!r} and, under spec, {spec[name]!r}; keep one"
                )
            spec[name] = values[name]
        plain = {name: value for name, value in values.items() if name in own}
        return cls(**{**plain, "spec": _spec(spec) if section is not None or spec else None})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write YAML, with a line on how to use it."""
        target = Path(path)
        target.write_text(dump(self.to_dict(), "A weft recipe: weft train --recipe FILE"), encoding="utf-8")
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read YAML.

        Raises:
            RecipeError: the file is not there, is no YAML mapping, names a key twice, or any rule of `Recipe`.
        """
        values = parse_file(path)
        try:
            return cls.from_dict(values)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from error


def _spec(values: Mapping[str, Any]) -> LoraSpec:
    try:
        return LoraSpec.from_dict(values)
    except SpecError as error:
        raise RecipeError(str(error)) from error


def _merge(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Apply changes, so that a field of the spec replaces the one in the section, and alpha still follows the rank."""
    merged = {**values, **changes}
    inner = {item.name for item in dataclasses.fields(LoraSpec)}
    if not isinstance(merged["spec"], Mapping | LoraSpec | None):
        return merged  # refused by `from_dict`
    section = merged["spec"].to_dict() if isinstance(merged["spec"], LoraSpec) else dict(merged["spec"] or {})
    if "rank" in changes and "alpha" not in changes and section.get("alpha") == section.get("rank"):
        section.pop("alpha", None)
    for name in changes:
        if name in inner:
            section[name] = merged.pop(name)
    return {**merged, "spec": section or None}


def _nested(before: Any, path: list[str], value: Any) -> dict[str, Any]:
    """A section with one value changed, however deep; alpha follows a rank that it was equal to."""
    section = dict(before) if isinstance(before, Mapping) else {}
    if len(path) > 1:
        return {**section, path[0]: _nested(section.get(path[0]), path[1:], value)}
    if path[0] == "rank" and section.get("alpha") == section.get("rank"):
        section.pop("alpha", None)
    return {**section, path[0]: value}


def _number(low: float, high: float = math.inf, *, above: bool = False) -> Callable[[Any], bool]:
    def holds(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return is_number and (low < value if above else low <= value) and value <= high

    return holds


def _whole(low: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= low


def _or_none(rule: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or rule(value)


def _one_of(names: Iterable[str]) -> Callable[[Any], bool]:
    known = tuple(names)
    return lambda value: isinstance(value, str) and value in known


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _some_of(names: Iterable[str]) -> Callable[[Any], bool]:
    known = tuple(names)
    return lambda value: isinstance(value, tuple) and all(item in known for item in value)


def _is_recomputation(value: Any) -> bool:
    return _is_bool(value) or _whole(1)(value) or _one_of(RECOMPUTED)(value)


_MAPPINGS = ("rank_pattern", "alpha_pattern", "columns", "adaptive", "vision")
_SECTIONS = ("two_tower", "towers")
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_ALLOWED = {"kind": KINDS, "schedule": SCHEDULES, "batching": BATCHING, "mixed_precision": PRECISIONS, "dtype": _DTYPES,
            "device": ("auto", "cpu"), "on_trouble": ON_TROUBLE, "metric": tuple(METRICS), "quantize": QUANTIZED, "gradient_checkpointing": RECOMPUTED}  # fmt: skip
_POSITIVE, _COUNT = "a number above 0", "a whole number of at least 1"
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "spec": (_or_none(lambda value: isinstance(value, LoraSpec)), "a LoraSpec, or a section with its fields"),
    "columns": (_or_none(lambda value: isinstance(value, Mapping) and all(isinstance(item, str) for pair in value.items() for item in pair)),
                "a mapping such as {prompt: question}"),
    "as_chat": (_is_bool, "true or false"),
    "mask_prompt": (_is_bool, "true or false"),
    "separator": (lambda value: isinstance(value, str), "text"),
    "epochs": (_or_none(_number(0, above=True)), _POSITIVE),
    "max_steps": (_or_none(_whole(1)), _COUNT),
    "learning_rate": (_or_none(_number(0, above=True)), _POSITIVE + ", or null for the rule"),
    "lora_plus_ratio": (_or_none(_number(0, above=True)), _POSITIVE),
    "batch_size": (_whole(1), _COUNT),
    "eval_batch_size": (_or_none(_whole(1)), _COUNT),
    "accumulation": (_whole(1), _COUNT),
    "max_length": (_or_none(_whole(2)), "a whole number of at least 2"),
    "warmup_ratio": (_or_none(_number(0, 1)), "a share from 0 to 1"),
    "warmup_steps": (_or_none(_whole(0)), "a whole number of at least 0"),
    "weight_decay": (_number(0), "a number of at least 0"),
    "clip": (_number(0), "a number of at least 0"),
    "optimizer": (lambda value: isinstance(value, str) and bool(value), "a name, as in adamw_torch"),
    "log_every": (_or_none(_whole(1)), _COUNT),
    "eval_every": (_or_none(_whole(1)), _COUNT),
    "save_every": (_or_none(_whole(1)), _COUNT),
    "keep": (_whole(1), _COUNT),
    "best": (_is_bool, "true or false"),
    "quantize": (_or_none(_one_of(QUANTIZED)), f"one of {', '.join(QUANTIZED)}, or null"),
    "metric": (_or_none(_one_of(METRICS)), f"a metric that a training reports: {', '.join(METRICS)}"),
    "patience": (_or_none(_whole(0)), "a whole number of at least 0"),
    "two_tower": (_or_none(lambda value: isinstance(value, PairSettings)), "a section with fields of PairSettings"),
    "general": (_or_none(lambda value: isinstance(value, str) and bool(value)), "the path of a file of texts, or english"),
    "seed": (_whole(0), "a whole number of at least 0"),
    "gradient_checkpointing": (_is_recomputation, f"true, false, a number of layers, or {RECOMPUTED[0]!r}"),
    "reentrant": (_is_bool, "true or false"),
    "compile": (_is_bool, "true or false"),
    "vision": (_or_none(lambda value: isinstance(value, VisionSettings)), "a section with fields such as augment and head"),
    "workers": (_whole(0), "a whole number of at least 0"),
    "offload": (_some_of(OFFLOADED), f"a list out of {', '.join(OFFLOADED)}"),
    "loss_chunk": (_or_none(_whole(1)), _COUNT + " of tokens"),
    "freeze_below": (_or_none(_whole(1)), _COUNT + ", of a layer"),
    "samples": (_whole(0), "a whole number of at least 0"),
    "report_to": (lambda value: isinstance(value, tuple) and all(isinstance(item, str) and item for item in value), "a list of names"),
}  # fmt: skip
for _name, _names in _ALLOWED.items():
    _RULES.setdefault(_name, (_one_of(_names), f"one of {', '.join(_names)}"))


def _hint(name: str, value: Any) -> str:
    if isinstance(value, str) and name in _ALLOWED:
        return "." + did_you_mean(value, _ALLOWED[name]) if did_you_mean(value, _ALLOWED[name]) else ""
    return " (this is text: write it without quotes)" if isinstance(value, str) and _reads_as_number(value) else ""


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_contradictions(recipe: Recipe) -> None:
    """Fields that are right alone and wrong together."""
    if recipe.adaptive is not None and recipe.compile:
        raise RecipeError("adaptive ranks change the shapes that compile=true compiles for; give one of them")
    if recipe.adaptive is not None and "layerwise" in recipe.optimizer:
        raise RecipeError(
            f"optimizer={recipe.optimizer!r} has an optimizer for each parameter, which adaptive ranks can't follow; use adamw_torch"
        )
    both = "give one of them"
    if recipe.epochs is not None and recipe.max_steps is not None:
        raise RecipeError(f"epochs={recipe.epochs} and max_steps={recipe.max_steps} both say how long to train; {both}")
    if recipe.warmup_ratio is not None and recipe.warmup_steps is not None:
        raise RecipeError(
            f"warmup_ratio={recipe.warmup_ratio} and warmup_steps={recipe.warmup_steps} both say how long to warm up; {both}"
        )
    if recipe.warmup_steps is not None and recipe.max_steps is not None and recipe.warmup_steps >= recipe.max_steps:
        raise RecipeError(
            f"warmup_steps={recipe.warmup_steps} is not shorter than the run, max_steps={recipe.max_steps}: "
            "the full learning rate would never be reached; shorten the warm-up"
        )
    if recipe.best and recipe.eval_every and recipe.save_every and recipe.eval_every % recipe.save_every:
        raise RecipeError(
            f"eval_every={recipe.eval_every} is no multiple of save_every={recipe.save_every}: an evaluation without a "
            "checkpoint can't become the best one; make them equal, or set best=false"
        )
    if recipe.metric and not recipe.best and not recipe.patience:
        raise RecipeError(
            f"metric={recipe.metric!r} decides nothing with best=false and no patience; drop it, or set best=true"
        )
    if recipe.two_tower is not None and recipe.kind not in PAIR_KINDS:
        raise RecipeError(
            f"two_tower is for kind={' or '.join(PAIR_KINDS)}, and the recipe's kind is {recipe.kind!r}; say kind='contrastive'"
        )
    classifies = recipe.best_metric in ("eval_accuracy", "eval_macro_f1")
    if recipe.metric == "eval_recall_at_1" and recipe.kind != "contrastive":
        raise RecipeError(
            f"metric='eval_recall_at_1' is reported for kind='contrastive' alone, and the recipe's kind is {recipe.kind!r}"
        )
    if classifies and recipe.kind not in ("auto", *CLASSIFYING, "fused"):
        raise RecipeError(
            f"metric={recipe.metric!r} is never reported for kind={recipe.kind!r}; expected eval_loss or eval_perplexity"
        )
    if recipe.metric == "eval_perplexity" and recipe.kind in CLASSIFYING:
        raise RecipeError(
            "metric='eval_perplexity' is never reported for classification; expected eval_loss, eval_accuracy or eval_macro_f1"
        )
    if recipe.batching == "packed" and recipe.kind == "classification":
        raise RecipeError(
            "batching='packed' puts several examples in a row, and classification has one label a row; use 'length'"
        )
    check_measures(recipe)
