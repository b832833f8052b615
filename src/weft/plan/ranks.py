"""Which rank: a rule of thumb, and two rules that look at the user's data; the middle one of the three is recommended.

- **thumb**: size of the base and kind of task, as guides give it. It knows neither the data nor how much of them there is.
- **capacity**: bits that the run can learn against bits that the adapter can hold (`weft.plan.capacity`).
- **spectrum**: directions that the gradient of the first batches needs (`weft.plan.spectra`).

Each of them is wrong somewhere: the first where the data are few or strange, the second where bits of the data repeat what the base can nearly do, the
third where later steps need other directions than the first. The middle of three is right as long as two of them are about right. How
far that holds on real tasks is measured in docs/results.md.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import torch
from torch import nn

from weft.core.sites import find_sites
from weft.data import Encoded
from weft.errors import PlanError
from weft.models.targets import resolve_default
from weft.plan.budget import ITEMSIZE, Spending, spend
from weft.plan.capacity import BITS_A_PARAMETER, DataBits, bits_of, rank_for_bits
from weft.plan.sizes import in_words
from weft.plan.spectra import SiteSpectrum, site_spectra
from weft.spec import LoraSpec
from weft.train.inputs import Inputs, prepare, read
from weft.train.opening import BaseLike, as_before, open_base, with_head
from weft.train.recipe import Recipe
from weft.train.schedule import MEASURED_ALPHA, Schedule, settle
from weft.train.training import dtype_of, facts_of, one_recipe, width_of

__all__ = ["ENERGY", "MOST", "RankAdvice", "Rule", "by_capacity", "by_spectrum", "by_thumb", "recommend_rank"]

ENERGY = 0.99
"""Share of its gradient's energy that a site should hold, in the mean over sites. Chosen on e2e, tinyshakespeare and gsm8k."""

MOST = 256
"""The largest rank that is recommended; beyond it, full fine-tuning is the plainer way."""

BATCHES = 8
"""Batches that are looked at."""

STATE = 16
"""Bytes that a trained number takes with AdamW in float32: itself, its gradient, two moments."""

_BY_KIND = {"classification": 4}
_OTHER_KINDS = 16
_USUAL_WIDTH = 4096


@dataclass(frozen=True)
class Rule:
    """What one rule says.

    Attributes:
        name: ``"thumb"``, ``"capacity"`` or ``"spectrum"``.
        wanted: the rank, not rounded. rank: the next power of two, within what base and `MOST` allow.
        reason: in words, with the numbers that it is from.
    """

    name: str
    wanted: float
    rank: int
    reason: str


@dataclass(frozen=True)
class RankAdvice:
    """The recommended rank, why, and what training with it takes.

    Attributes:
        rank: the middle one of the three rules' ranks.
        rules: what each rule says.
        spec, recipe: to train with; `recipe` holds `spec`.
        learning_rate, rate_reason: the peak that `weft.train` will use.
        steps, epochs, tokens: length of the run; tokens go through the base, padding not counted.
        numbers: parameters that one rank takes at all sites together.
        data: what there is to learn.
        spectra: by site, in the order of the model.
        seconds: the run's time, where the time of a step is known (`at_speed`).
        sources: how base and data are named on the command line.
    """

    rank: int
    rules: tuple[Rule, ...]
    spec: LoraSpec
    recipe: Recipe
    learning_rate: float
    rate_reason: str
    steps: int
    epochs: float
    tokens: int
    numbers: int
    data: DataBits
    spectra: tuple[SiteSpectrum, ...]
    seconds: float | None = None
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        """Of an adapter of the recommended rank."""
        return sum(min(self.rank, site.most) * site.numbers for site in self.spectra)

    def at_speed(self, seconds_per_step: float, tokens_per_step: int | None = None) -> RankAdvice:
        """The same, with the time that the run takes.

        Args:
            seconds_per_step: of an optimizer step, as it was measured.
            tokens_per_step: of that step, whose rows may be longer than those of the data; None: as long.
        """
        share = 1.0 if tokens_per_step is None else min(1.0, self.tokens / (self.steps * tokens_per_step))
        return dataclasses.replace(self, seconds=seconds_per_step * self.steps * share)

    def spend(self, budget: str | int) -> Spending:
        """Ranks by site within a budget of bytes; see `weft.plan.budget.spend`."""
        return spend(budget, self.spectra)

    def recipe_within(self, budget: str | int) -> Recipe:
        """The recipe with ranks by site instead of one rank."""
        return self.recipe.replace(spec=self.spend(budget).spec(self.spec))

    def command(self) -> str:
        """The command line that trains with it."""
        parts = ["weft", "train"]
        for name, value in self.sources.items():
            parts += [f"--{name}", value]
        return shlex.join(
            [*parts, "--set", f"rank={self.rank}", "--set", f"alpha={self.spec.alpha:g}", "--out", "runs/NAME"]
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data; spectra without their single directions."""
        plain = {
            name: value
            for name, value in vars(self).items()
            if name not in ("spec", "recipe", "rules", "data", "spectra", "sources")
        }
        sites = [{"path": site.path, "d_out": site.d_out, "d_in": site.d_in, "effective_rank": site.effective_rank, "energy": site.total}
                 for site in self.spectra]  # fmt: skip
        return {
            **plain, "num_parameters": self.num_parameters, "rules": [vars(rule) for rule in self.rules], "data": self.data.to_dict(),
            "sites": sites, "spec": self.spec.to_dict(), "command": self.command(),
        }  # fmt: skip

    def text(self) -> str:
        """The advice for people: the rank, each rule's reason, the run, and how to start it."""
        trained = self.num_parameters
        lines = [
            f"rank {self.rank}, the middle one of three rules:",
            *(
                line
                for rule in self.rules
                for line in _wrapped(f"  {rule.name:8}  rank {rule.rank:>3}: {rule.reason}", 12)
            ),
            f"{trained:,} numbers: {in_words(trained * ITEMSIZE)} as a file, {in_words(trained * STATE)} in training with AdamW",
            *_wrapped(f"learning rate {self.rate_reason}", 2),
            f"{self.data.examples:,} examples, {self.epochs:.3g} epoch{'' if self.epochs == 1 else 's'}: {self.steps:,} steps, {self.tokens:,} tokens"
            + (f", at least {_time(self.seconds)}" if self.seconds is not None else ""),
            *(line for said in _busiest(self.spectra) for line in _wrapped(said, 2)),
            self.command(),
        ]
        return "\n".join(lines)


def recommend_rank(
    base: BaseLike = None,
    data: Any = None,
    *,
    spec: LoraSpec | None = None,
    recipe: Recipe | None = None,
    memory: int | None = None,
    batches: int = BATCHES,
) -> RankAdvice:
    """Look at base and data, and say which rank to train with, which learning rate, and where the directions are needed.

    The base is loaded and run forward and backward over some batches; it is left as it was.

    Args:
        base, data: as in `weft.train`.
        spec: what to adapt; its rank is passed over. recipe: how to train; None: the defaults.
        memory: bytes that the factors with their gradients and optimizer may take; None: no limit.
        batches: how many to look at.

    Raises:
        DataError, BaseError, SpecError, RecipeError: as in `weft.train`, before anything is computed.
        PlanError: not even rank 1 fits into `memory`.

    Example:
        >>> advice = recommend_rank(data="train.jsonl")  # doctest: +SKIP
        >>> weft.train(data="train.jsonl", recipe=advice.recipe, out="runs/first")  # doctest: +SKIP
    """
    wanted = one_recipe(spec, recipe)
    texts = read(wanted, data, None)
    model, tokenizer = open_base(base, labels=texts.train.labels or None, dtype=dtype_of(wanted))
    with as_before(model):
        if not isinstance(base, tuple) and torch.cuda.is_available() and wanted.device != "cpu":
            model.to("cuda")
        inputs = prepare(wanted, texts, model, tokenizer)
        if not isinstance(inputs.train, Encoded):
            raise PlanError(
                f"kind={inputs.train.kind!r}: a rank is recommended for texts alone so far; train with one rank and look at it with "
                "weft doctor, or let it grow: --set adaptive.kind=grow"
            )
        chosen = resolve_default(model, wanted.spec or LoraSpec())
        chosen = with_head(chosen, model) if inputs.train.kind == "classification" else chosen
        sites = find_sites(model, chosen).sites
        size = min(wanted.batch_size, max(1, len(inputs.train) // 2))
        spectra, loss = site_spectra(model, sites, inputs.first_batches(wanted.replace(batch_size=size), batches))
        schedule = _schedule(wanted, inputs, model, chosen)
        found = bits_of(inputs.train, loss, min(1.0, schedule.epochs))
        rules = _rules(inputs.train, width_of(model), found, spectra, memory)
    rank = sorted(rule.rank for rule in rules)[1]
    final = chosen.replace(rank=rank, alpha=MEASURED_ALPHA, rslora=False, rank_pattern={}, alpha_pattern={})
    final = final.replace(
        targets=(wanted.spec or LoraSpec()).targets, save_modules=(wanted.spec or LoraSpec()).save_modules
    )
    return RankAdvice(
        rank, rules, final, wanted.replace(spec=final), schedule.learning_rate, schedule.rate_reason, schedule.steps, schedule.epochs,
        round(inputs.train.num_tokens * schedule.epochs), sum(site.numbers for site in spectra), found, tuple(spectra),
        sources={name: str(value) for name, value in (("base", base), ("data", data)) if isinstance(value, str | bytes) or hasattr(value, "__fspath__")},
    )  # fmt: skip


def _schedule(recipe: Recipe, inputs: Inputs, model: nn.Module, spec: LoraSpec) -> Schedule:
    """As training will settle it: with the alpha that is recommended, and with evaluation data to come."""
    facts = facts_of(inputs, model, recipe, spec)
    return settle(recipe, dataclasses.replace(facts, evaluated=True, alpha=MEASURED_ALPHA))


def _rules(
    train: Encoded, width: int, data: DataBits, spectra: Sequence[SiteSpectrum], memory: int | None
) -> tuple[Rule, ...]:
    """All three, each within the ranks that there are and that fit."""
    numbers = sum(site.numbers for site in spectra)
    most = min(MOST, max(site.most for site in spectra))
    why = ""
    if memory is not None:
        fits = memory // (STATE * numbers)
        if fits < 1:
            raise PlanError(
                f"{in_words(memory)} for the factors and their optimizer: rank 1 at {len(spectra)} sites takes {in_words(STATE * numbers)}; "
                "adapt fewer sites, or give more"
            )
        if fits < most:
            most, why = fits, f"; at most {fits} fits into {in_words(memory)}"
    found = (
        ("thumb", *by_thumb(train.kind, width)),
        ("capacity", *by_capacity(data, numbers)),
        ("spectrum", *by_spectrum(spectra)),
    )
    return tuple(Rule(name, wanted, _rounded(wanted, most), reason + why) for name, wanted, reason in found)


def _rounded(wanted: float, most: int) -> int:
    """The next power of two, up or down by the ratio; at least 1, and at most the largest power of two that is allowed."""
    power = round(math.log2(max(wanted, 1.0)))
    return int(2 ** min(power, int(math.log2(most))))


def by_thumb(kind: str, width: int) -> tuple[float, str]:
    """The rule of thumb: 4 for a classification and 16 for what writes, times √(4096 / width), at most four times.

    Guides say: the larger the model, the higher the rank. It is the other way round: a rank of a wide model has more parameters, and
    larger models need fewer directions for one task. Memory, the third thing that guides name, hardly depends on the rank.

    Args:
        kind: of the examples. width: hidden size of the base; 0: unknown.

    Source:
        Aghajanyan et al. 2020, Intrinsic dimensionality explains the effectiveness of language model fine-tuning, arXiv:2012.13255;
        Biderman et al. 2024, LoRA learns less and forgets less, arXiv:2405.09673 (high ranks for new domains).
    """
    start = _BY_KIND.get(kind, _OTHER_KINDS)
    times = min(4.0, max(0.5, math.sqrt(_USUAL_WIDTH / width))) if width else 1.0
    what = "a classification needs little" if kind == "classification" else f"{kind} data"
    return start * times, f"a rule of thumb: {start} for {what}, times {times:.2g} for a width of {width or 'unknown'}"


def by_capacity(data: DataBits, numbers: int) -> tuple[float, str]:
    """The rank at which the adapter can hold all that the run can learn; see `weft.plan.capacity`."""
    wanted = rank_for_bits(data.bits, numbers)
    share = f", of which the run sees {data.seen:.0%}" if data.seen < 1 else ""
    thing = "labels" if data.classifies else "tokens"
    bits = f"{data.loss / math.log(2):.3g} bits each in the base's code"
    if data.packed < data.by_base:
        bits += f", {data.packed / max(1, data.tokens):.3g} " + (
            "by how often each occurs" if data.classifies else "packed"
        )
    return wanted, (
        f"{data.tokens:,} {thing} to learn, {bits}{share}: {data.bits:,.0f} bits at most; "
        f"one rank has {numbers:,} numbers, which hold {BITS_A_PARAMETER * numbers:,.0f} bits"
    )


def by_spectrum(spectra: Sequence[SiteSpectrum], energy: float = ENERGY) -> tuple[float, str]:
    """The smallest rank that holds, in the mean over sites, a share of the energy that halves of the first batches agree on.

    The mean of shares, and not the share of all energy: AdamW moves every site by its learning rate, however small its gradient is.
    """
    most = max(len(site.energies) for site in spectra)
    share = [
        sum(site.captured(rank) / (sum(site.energies) or 1.0) for site in spectra) / len(spectra)
        for rank in range(1, most + 1)
    ]
    rank = next((rank for rank, held in enumerate(share, 1) if held >= energy), most)
    return float(rank), (
        f"the gradients of the first batches need {rank} direction{'s' if rank > 1 else ''} for {energy:.0%} of their energy "
        f"(rank 1 holds {share[0]:.0%}), the mean over sites"
    )


def _busiest(spectra: Sequence[SiteSpectrum], count: int = 3) -> list[str]:
    """Where a direction more captures most."""
    total = sum(site.total for site in spectra)
    if len(spectra) < 2 or not total:
        return []
    first = sorted(spectra, key=lambda site: -site.total)[:count]
    return [f"most of the gradient is at {', '.join(f'{site.path} ({site.total / total:.0%})' for site in first)}; "
            "--sites BYTES spends a budget by site"]  # fmt: skip


def _wrapped(line: str, indent: int) -> list[str]:
    return wrap(line, 80, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def _time(seconds: float) -> str:
    """A length of time for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
