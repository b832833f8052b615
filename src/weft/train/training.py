"""`train`: a base, a file of examples and a recipe become a run folder with an adapter.

Everything that can be wrong is found before the first step: recipe, data, base, sites, folder. The base is afterwards what
it was before, whatever happens in between.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import PartialState  # type: ignore[import-untyped]
from torch import nn

from weft.adapter import Adapter, Provenance
from weft.core.bank import Bank
from weft.core.loading import base_weights
from weft.core.sites import find_sites
from weft.errors import RecipeError, RunError, RunStoppedError, UnsupportedError
from weft.identity import Fingerprint, fingerprint
from weft.models.attach import attach
from weft.models.targets import in_parts, resolve_default
from weft.models.towers import sites_of_images
from weft.spec import LoraSpec
from weft.train import checkpoints
from weft.train.adaptive import Adaptive, check_spec
from weft.train.answering import check_answer
from weft.train.ends import unlearned_end
from weft.train.facts import facts_for
from weft.train.general import general_text
from weft.train.inputs import Inputs, Texts, prepare, read
from weft.train.offload import Parked
from weft.train.opening import BaseLike, as_before, open_base, with_head
from weft.train.page import SAMPLES, draw
from weft.train.pair_inputs import PairTexts, check_pair_base, open_towers, pair_spec, prepare_pairs, read_pairs
from weft.train.pair_settings import PAIR_KINDS
from weft.train.progress import say
from weft.train.proof import make_proof
from weft.train.quantized import quantise, require
from weft.train.recipe import CLASSIFYING, Recipe
from weft.train.recompute import above, check_below, recomputable
from weft.train.run import Folder, Report, Run, describe_environment, plain_json, write_beside
from weft.train.samples import record_samples
from weft.train.schedule import Facts, Schedule, settle
from weft.train.session import Outcome, Session, check_names, training_arguments
from weft.train.sharding import check_whole
from weft.train.vision_settings import VisionSettings

__all__ = [
    "digests_of",
    "dtype_of",
    "facts_of",
    "name_of",
    "not_for_peft",
    "one_recipe",
    "process_count",
    "provenance_of",
    "train",
    "width_of",
]

SLOT = "trained"
OBJECT = "(given)"
"""Stands in environment.json for a model or data that the caller brought."""


def train(
    *,
    base: BaseLike = None,
    data: Any = None,
    eval_data: Any = None,
    images: str | os.PathLike[str] | None = None,
    spec: LoraSpec | None = None,
    recipe: Recipe | None = None,
    adaptive: Adaptive | None = None,
    out: str | os.PathLike[str],
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Run:
    """Train a LoRA adapter on a frozen base.

    Args:
        base: a directory in Hugging Face layout, a hub id, None for the embedded base, or a (model, tokenizer) pair,
            which is given back as it was. For ``kind="contrastive"`` and ``"fused"`` two of them,
            ``{"text_model": …, "vision_model": …}``, or one CLIP-like base.
        data: a path, a hub data set, or a list of dicts; the kind is recognised, see `weft.data.load_examples`.
        eval_data: the same for the evaluation; or a share of the training data to hold out, as in 0.1; or None.
        images: the folder that the data's paths of images begin in, and never leave; None: the folder of the data.
        spec: what to adapt and how; may be in the recipe instead. For a classification the head is added.
        recipe: how to train; None: the stable defaults.
        adaptive: ranks that change while it trains: `GrowOnPlateau`, `BudgetRanks` or `ShrinkBySpectrum`; may be in the recipe instead.
        out: the run folder; must not exist, or be empty, unless `resume` or `overwrite`.
        resume: go on from the newest checkpoint in `out`, to the same result as without the break. Base, data and
            recipe are those of the run; what is given as well must agree. A finished run is returned as it is.
        overwrite: replace a run that stands in `out`.
        progress: None: a bar on a terminal and plain lines elsewhere; True: plain lines; False: silence.

    Returns:
        The run: ``.adapter``, ``.report``, ``.log``, ``.path``.

    Raises:
        RecipeError: a contradiction, before anything starts.
        DataError, BaseError, SpecError: data, base or spec can't be used; before anything starts.
        RunError: the folder can't be used; or a signal stopped the run (the message says how to go on).
        NotFiniteError: the loss is not finite any more; the last good checkpoint stays.

    Example:
        >>> run = weft.train(base="path/to/model", data="train.jsonl", eval_data=0.05, out="runs/first")  # doctest: +SKIP
        >>> print(run.report.text())  # doctest: +SKIP
    """
    call = _Call(Folder(out), resume, overwrite, progress)
    recipe = with_adaptive(recipe, adaptive)
    job = (
        call.resumed(_Job(base, data, eval_data, images, Recipe()), spec, recipe)
        if resume
        else _Job(base, data, eval_data, images, one_recipe(spec, recipe))
    )
    if resume and call.folder.finished:
        return Run.open(out)
    if not resume and call.main:
        call.folder.check(overwrite)
    check_names(job.recipe)
    if job.recipe.quantize:
        require(job.recipe.quantize)
    if job.recipe.kind in PAIR_KINDS or isinstance(job.base, Mapping):
        return _train_pairs(call, job)
    texts = read(job.recipe, job.data, job.eval_data, images=job.images).for_base(job.base)
    call.say(texts.train.summary(), *([texts.evaluated.summary()] if texts.evaluated else []))
    model, tokenizer = open_base(
        job.base, labels=texts.train.labels or None, dtype=dtype_of(job.recipe), kind=texts.kind
    )
    with as_before(model):
        return _train(call, job, texts, model, tokenizer)


@dataclass(frozen=True)
class _Job:
    """What is to be trained, wherever it was said."""

    base: BaseLike
    data: Any
    eval_data: Any
    images: Any
    recipe: Recipe

    @property
    def spec(self) -> LoraSpec:
        return self.recipe.spec or LoraSpec()

    def names(self) -> dict[str, Any]:
        """How to find base and data again; objects can't be."""
        named = {"base": self.base, "data": self.data, "eval_data": self.eval_data, "images": self.images}
        return {name: name_of(value) for name, value in named.items()}


@dataclass(frozen=True)
class _Call:
    """Where the run goes, and how it was asked for."""

    folder: Folder
    resume: bool
    overwrite: bool
    progress: bool | None

    @property
    def main(self) -> bool:
        """This process writes; others train along."""
        return int(os.environ.get("RANK", "0")) == 0

    def say(self, *lines: str) -> None:
        """Tell the user on stderr."""
        if self.main and self.progress is not False:
            say(*lines)

    def resumed(self, asked: _Job, spec: LoraSpec | None, recipe: Recipe | None) -> _Job:
        """The job of a run folder, with what the caller gives again for what can't be written down."""
        folder = self.folder.require()
        stored = folder.read_environment().get("inputs", {})
        saved = Recipe.load(folder.recipe)
        if spec is not None or recipe is not None:
            _check_recipe(folder, saved, one_recipe(spec, recipe))
        given: dict[str, Any] = {name: getattr(asked, name) for name in ("base", "data", "eval_data", "images")}
        for name, value in given.items():
            if value is None and stored.get(name) == OBJECT:
                raise RunError(
                    f"{folder.root}: this run's {name} was an object, which can't be read from the folder; give {name} again"
                )
            given[name] = stored.get(name) if value is None else value
        return _Job(**given, recipe=saved)

    def start(self, recipe: Recipe, environment: dict[str, Any]) -> Any:
        """Make the folder, or bring the log of a killed run back to its newest checkpoint. Returns the lock."""
        folder = self.folder
        if not self.resume:
            folder.create(self.overwrite)
            lock = folder.lock()
            folder.save_recipe(recipe)
            folder.save_environment(environment)
            return lock
        lock = folder.lock()
        checkpoints.clean(folder.checkpoints)
        there = checkpoints.steps(folder.checkpoints)
        folder.rewind_log(there[-1] if there else 0)
        before = folder.read_environment()
        again = {name: environment[name] for name in ("started", "command", "versions")}
        folder.save_environment({**before, "resumed": [*before.get("resumed", []), again]})
        self.say(f"going on from step {there[-1]}" if there else "no checkpoint yet: from the start")
        return lock


def _train_pairs(call: _Call, job: _Job) -> Run:
    """Texts and images: two towers, or a CLIP-like model."""
    check_pair_base(job.recipe, job.base)
    pairs = read_pairs(job.recipe, job.data, job.eval_data, job.images)
    model, processor = open_towers(
        job.recipe, job.base, len(pairs.train.labels) or None if pairs.kind == "fused" else None, dtype_of(job.recipe)
    )
    with as_before(model):
        return _train(call, job, pairs, model, processor)


def _spec_of(spec: LoraSpec, recipe: Recipe, model: nn.Module, kind: str) -> LoraSpec:
    """The spec with a classification's head in it, or with the sites of the parts of a model that sees."""
    settings = recipe.vision or VisionSettings()
    if kind == "classify-images":
        spec = sites_of_images(model, spec)
    if kind in CLASSIFYING and settings.head == "train":
        return with_head(spec, model)
    if kind == "image-text":
        named = bool(spec.towers) or spec.targets not in ("default", "all-linear")
        parts = {name: getattr(settings, name) for name in ("language", "vision", "projector")}
        if named and parts != {name: getattr(VisionSettings(), name) for name in parts}:
            raise RecipeError(
                f"vision: {', '.join(f'{name}={value}' for name, value in parts.items())} choose parts where the spec names no sites, and this one has "
                f"targets={spec.targets!r}; leave one of the two out"
            )
        return in_parts(model, spec, language=settings.language, vision=settings.vision, projector=settings.projector)
    return spec


def _train(call: _Call, job: _Job, texts: Texts | PairTexts, model: nn.Module, tokenizer: Any) -> Run:
    recipe, folder = job.recipe, call.folder
    inputs: Any
    if isinstance(texts, PairTexts):
        inputs, spec = prepare_pairs(recipe, texts, model, tokenizer), pair_spec(recipe, job.spec, model)
    else:
        inputs = prepare(recipe, texts, model, tokenizer, call.progress)
        spec = _spec_of(job.spec, recipe, model, inputs.train.kind)
    if recipe.adaptive is not None:
        check_spec(recipe.adaptive, spec)
    check_answer(recipe.on_trouble, process_count())
    schedule = settle(recipe, facts_of(inputs, model, recipe, spec))
    general = general_text(recipe, model, tokenizer, inputs.train.kind)
    batches = inputs.first_batches(recipe) if any(own.init in ("eva", "lora_ga") for own in spec.everywhere()) else None
    most = inputs.max_length or recipe.max_length
    recipe = recipe.replace(spec=spec, kind=texts.kind, max_length=most, general=name_of(recipe.general))
    low = recipe.freeze_below
    adapted = above(model, spec, low)
    stored = _quantised(job, recipe, model, adapted)
    with attach(model, {SLOT: adapted}, batches=batches, seed=recipe.seed) as bank:
        for without, kept in stored.items():
            bank.stands_for(kept, without)
        check_below(model, (name for name, _ in bank.named_parameters(SLOT)), low, spec.layers_pattern)
        begin = bank.adapter(SLOT)
        assert begin.provenance.base is not None
        known = {
            "fingerprint": begin.provenance.base.to_dict(),
            "data": digests_of(inputs),
            "processes": process_count(),
        }
        if call.resume:
            _check_same(folder, known)
        end = unlearned_end(model, tokenizer, begin.sites, begin.modules) if inputs.train.kind == "completion" else None
        notes = (*inputs.notes, *bank.notes(SLOT), *((end,) if end else ()), *(problem := not_for_peft(begin)))
        facts = facts_for(recipe, schedule, texts, inputs, _trained(bank), _dtype_in(model))
        environment = describe_environment() | known | {"inputs": job.names(), "facts": facts}
        provenance = provenance_of(inputs, recipe, schedule, environment["versions"])
        with contextlib.ExitStack() as stack:
            if call.main:
                stack.enter_context(call.start(recipe, environment))
            args = training_arguments(recipe, schedule, folder, inputs.train.packed)
            PartialState().wait_for_everyone()
            parked = stack.enter_context(_parked(recipe, model, args.device)) if "base" in recipe.offload else None
            call.say(*_headline(inputs, schedule, bank), *(f"note: {note}" for note in notes))
            session = Session(
                model, bank, SLOT, recipe, schedule, inputs, folder, args,
                lambda target: bank.adapter(SLOT, provenance).save(target, for_peft=not problem), call.progress, parked,
                facts, general,
            )  # fmt: skip
            trained, outcome = session.run()
            if trained is None:
                raise RunStoppedError(
                    f"stopped at step {outcome.steps} of {schedule.steps}, kept in {checkpoints.newest(folder.checkpoints)}; "
                    f"go on: weft train --resume {shlex.quote(str(folder.root))}"
                )
            if recipe.adaptive is None:
                check_whole(trained, begin)
            adapter = _result(bank, trained, inputs, provenance, outcome)
            report = _report(bank, inputs, schedule, outcome, adapter, notes)
            if call.main:
                adapter.save(folder.adapter, overwrite=True, for_peft=not problem)
                folder.save_report(report, folder.root.name)
                _picture(call, recipe, model, tokenizer, bank, inputs, adapter)
            return Run(folder.root, adapter, report)


def _picture(
    call: _Call, recipe: Recipe, model: nn.Module, tokenizer: Any, bank: Bank, inputs: Inputs, adapter: Adapter
) -> None:
    """samples.json and report.html. The training is done and written by now: what fails here is said, and no more."""
    path = call.folder.root / SAMPLES
    if recipe.samples and process_count() == 1 and recipe.kind not in PAIR_KINDS:
        try:
            found = record_samples(model, tokenizer, bank, SLOT, inputs, recipe.samples)
            write_beside(path, json.dumps(plain_json(found), indent=1, ensure_ascii=False) + "\n")
        except Exception as error:  # noqa: BLE001 - whatever a model's own generate does, the result stands
            call.say(f"note: no samples were written ({type(error).__name__}: {error})")
    problem = draw(call.folder, adapter)
    if problem:
        call.say(f"note: {problem}")


def _quantised(job: _Job, recipe: Recipe, model: nn.Module, spec: LoraSpec) -> dict[tuple[str, ...], Fingerprint]:
    """Quantise the base where the recipe says so; returns the fingerprints that it had before, by modules that are left out."""
    if recipe.quantize is None:
        return {}
    if isinstance(job.base, tuple):
        raise RecipeError(
            f"quantize={recipe.quantize!r} replaces layers of the base, and this model was given as an object, to be left as it is; "
            "give its path"
        )
    whole = find_sites(model, resolve_default(model, spec)).save_modules
    stored = {paths: fingerprint(model, base_weights(model, paths)) for paths in {(), whole}}
    quantise(model, recipe.quantize, whole)
    return stored


@contextlib.contextmanager
def _parked(recipe: Recipe, model: nn.Module, device: Any) -> Iterator[Parked]:
    """The layers' weights off the device for the time of a training."""
    layers = recomputable(model)
    if not layers or process_count() > 1:
        why = f"{type(model).__name__} has no layers that could take turns" if not layers else "several processes train"
        raise RecipeError(f"offload={list(recipe.offload)}: {why}; leave 'base' out")
    parked = Parked(layers, device)
    try:
        parked.place_rest(model)
        yield parked
    finally:
        parked.give_back()


def _headline(inputs: Inputs, schedule: Schedule, bank: Bank) -> list[str]:
    """What a person wants to know before it starts."""
    count = _trained(bank)
    best = f", best {schedule.metric} kept" if schedule.best else ""
    return [
        *(f"{role}: {part['summary']}" for role, part in inputs.data.items()),
        f"{count:,} numbers to train; {schedule.steps:,} steps, {schedule.epochs:.2f} epochs{best}",
        f"learning rate {schedule.rate_reason}; warm-up {schedule.warmup_steps} steps",
    ]


def _trained(bank: Bank) -> int:
    return sum(parameter.numel() for _, parameter in bank.named_parameters(SLOT))


def _dtype_in(model: nn.Module) -> str:
    """The base's dtype, as ``float32``."""
    kind = next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), None)
    return str(kind).removeprefix("torch.")


def not_for_peft(adapter: Adapter) -> tuple[str, ...]:
    """A note if PEFT's files can't express this spec; found out before the training, by writing its start."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            adapter.save(os.path.join(folder, "adapter"))
        except UnsupportedError as problem:
            return (f"weft alone will read this adapter, for PEFT's files can't express it: {problem}",)
    return ()


def provenance_of(inputs: Inputs, recipe: Recipe, schedule: Schedule, versions: Mapping[str, str]) -> Provenance:
    """Where an adapter comes from, as far as it is known before the training."""
    kept = ("source", "digest", "examples", "kind", "labels")
    data = ({"role": role, **{name: part[name] for name in kept if name in part}} for role, part in inputs.data.items())
    settled = {"spec": None, "learning_rate": schedule.learning_rate, "steps": schedule.steps}
    return Provenance(
        data=tuple(data),
        recipe=recipe.to_dict() | settled,
        versions=versions,
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )


def _result(bank: Bank, trained: Adapter, inputs: Inputs, provenance: Provenance, outcome: Outcome) -> Adapter:
    """The adapter, with its provenance, evaluation and golden prompts."""
    trained.check_finite()
    bank.use(SLOT)
    evaluation = {f"eval_{name}": value for name, value in outcome.adapter.items()}
    evaluation |= {f"base_{name}": value for name, value in outcome.base.items()}
    came = dataclasses.replace(provenance, evaluation=evaluation, base=trained.provenance.base)
    if provenance.recipe and provenance.recipe.get("quantize"):
        return trained.replace(provenance=came)  # answers of the quantised base would prove nothing on the stored one
    proof = (
        {}
        if inputs.train.kind in PAIR_KINDS
        else make_proof(bank.model, inputs.evaluated or inputs.train, inputs.collate_eval)
    )
    return trained.replace(provenance=came, proof=proof)


def _report(
    bank: Bank, inputs: Inputs, schedule: Schedule, outcome: Outcome, adapter: Adapter, notes: tuple[str, ...]
) -> Report:
    return Report(
        **{item.name: getattr(outcome, item.name) for item in dataclasses.fields(outcome)},
        learning_rate=schedule.learning_rate,
        rate_reason=schedule.rate_reason,
        trainable=_trained(bank),
        digest=adapter.digest,
        data=inputs.data,
        notes=notes,
    )


def one_recipe(spec: LoraSpec | None, recipe: Recipe | None) -> Recipe:
    """The recipe with the spec in it.

    Raises:
        RecipeError: both name a spec, and these differ.
    """
    recipe = recipe or Recipe()
    if spec is None:
        return recipe
    if recipe.spec is not None and recipe.spec != spec:
        odd = [name for name, value in spec.to_dict().items() if recipe.spec.to_dict()[name] != value]
        raise RecipeError(f"spec and recipe.spec differ in {', '.join(odd)}; give one of them")
    return dataclasses.replace(recipe, spec=spec)


def with_adaptive(recipe: Recipe | None, adaptive: Adaptive | None) -> Recipe | None:
    """The recipe with what is given beside it.

    Raises:
        RecipeError: both name an adaptive rank, and these differ.
    """
    if adaptive is None:
        return recipe
    recipe = recipe or Recipe()
    if recipe.adaptive not in (None, adaptive):
        raise RecipeError(f"adaptive={adaptive} and recipe.adaptive={recipe.adaptive} differ; give one of them")
    return dataclasses.replace(recipe, adaptive=adaptive)


def _check_recipe(folder: Folder, saved: Recipe, asked: Recipe) -> None:
    """A resumed run keeps its recipe.

    Raises:
        RecipeError: what is given differs; names the fields.
    """
    settled = ("spec", "kind", "max_length", "general")
    odd = [name for name, value in asked.to_dict().items() if name not in settled and value != saved.to_dict()[name]]
    if asked.spec is not None and saved.spec is not None:
        kept = saved.spec.to_dict()
        odd += [name for name, value in asked.spec.to_dict().items() if name != "save_modules" and value != kept[name]]
    if odd:
        raise RecipeError(
            f"{folder.recipe}: a resumed run keeps its recipe, and what is given differs in {', '.join(odd)}; leave the recipe "
            "out, or start a new run"
        )


def _check_same(folder: Folder, known: Mapping[str, Any]) -> None:
    """Base and data are those of the run.

    Raises:
        RunError: says what differs.
    """
    before = folder.read_environment()
    here, there = (Fingerprint.from_dict(part["fingerprint"]) for part in (known, before))
    if here.differences(there):
        raise RunError(
            f"{folder.root}: this run was started on another base ({there.name}): {'; '.join(here.differences(there))}; give the same, or "
            "start a new run"
        )
    if before.get("processes") != known["processes"]:
        raise RunError(
            f"{folder.root}: this run was started on {before.get('processes')} processes, and here are {known['processes']}: batches "
            "would be others; take as many, or start a new run"
        )
    odd = [role for role, digest in known["data"].items() if before.get("data", {}).get(role) != digest]
    if odd or set(before.get("data", {})) != set(known["data"]):
        raise RunError(
            f"{folder.root}: the data changed since the run was started ({', '.join(odd) or 'evaluation data'}); bring the files back, or start a new run"
        )


def facts_of(inputs: Inputs, model: nn.Module, recipe: Recipe, spec: LoraSpec) -> Facts:
    """What a schedule is settled by."""
    import torch

    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return Facts(
        features=len(inputs.train),
        evaluated=inputs.evaluated is not None,
        kind=inputs.train.kind,
        width=width_of(model),
        family=str(getattr(config, "model_type", "")),
        processes=process_count(),
        cpu=recipe.device == "cpu" or not torch.cuda.is_available(),
        alpha=(own := spec.everywhere()[0]).scale_at("") * own.rank_at(""),
    )


def width_of(model: nn.Module) -> int:
    """Hidden size of a base; 0 where its config doesn't say."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    widths = (getattr(config, name, None) for name in ("hidden_size", "n_embd", "d_model"))
    return next((int(width) for width in widths if isinstance(width, int)), 0)


def digests_of(inputs: Inputs) -> dict[str, str]:
    """Digests of the data by role."""
    return {role: part["digest"] for role, part in inputs.data.items()}


def name_of(value: Any) -> Any:
    """A path (absolute where it is one), a hub id or a number, as it can be written down."""
    if value is None or isinstance(value, float):
        return value
    if isinstance(value, Mapping):
        named = {name: name_of(part) for name, part in value.items()}
        return OBJECT if OBJECT in named.values() else named
    if not isinstance(value, str | os.PathLike):
        return OBJECT
    text = os.fspath(value)
    return os.path.abspath(text) if os.path.exists(text) else text


def process_count() -> int:
    """Processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def dtype_of(recipe: Recipe) -> str | None:
    """The dtype that a base is to be loaded in; None: as stored."""
    return None if recipe.dtype == "auto" else recipe.dtype
