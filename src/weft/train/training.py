"""`train`: a base, a file of examples and a recipe become a run folder with an adapter.

Everything that can be wrong is found before the first step: recipe, data, base, sites, folder. The base is afterwards what
it was before, whatever happens in between.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from weft.adapter import Provenance
from weft.core.bank import Bank
from weft.errors import RecipeError, RunError, RunStoppedError
from weft.models.attach import attach
from weft.spec import LoraSpec
from weft.train import checkpoints
from weft.train.inputs import Inputs, Texts, longest, prepare, read
from weft.train.opening import BaseLike, as_before, describe_base, open_base, with_head
from weft.train.proof import make_proof
from weft.train.recipe import Recipe
from weft.train.run import Folder, Report, Run, describe_environment
from weft.train.schedule import Facts, Schedule, settle
from weft.train.session import Outcome, Session, check_names, training_arguments

__all__ = ["train"]

SLOT = "trained"


def train(
    *,
    base: BaseLike = None,
    data: Any = None,
    eval_data: Any = None,
    spec: LoraSpec | None = None,
    recipe: Recipe | None = None,
    out: str | os.PathLike[str],
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Run:
    """Train a LoRA adapter on a frozen base.

    Args:
        base: a directory in Hugging Face layout, a hub id, None for the embedded base, or a (model, tokenizer) pair,
            which is given back as it was.
        data: a path, a hub data set, or a list of dicts; the kind is recognised, see `weft.data.load_examples`.
        eval_data: the same for the evaluation; or a share of the training data to hold out, as in 0.1; or None.
        spec: what to adapt and how; may be in the recipe instead. For a classification the head is added.
        recipe: how to train; None: the stable defaults.
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
    folder = Folder(out)
    job = (
        _resumed(folder, base, data, eval_data, spec, recipe)
        if resume
        else _Job(base, data, eval_data, _one_recipe(spec, recipe))
    )
    if resume and folder.finished:
        return Run.open(out)
    main = int(os.environ.get("RANK", "0")) == 0
    if not resume and main:
        folder.check(overwrite)
    check_names(job.recipe)
    texts = read(job.recipe, job.data, job.eval_data)
    model, tokenizer = open_base(job.base, labels=texts.train.labels or None, dtype=_dtype(job.recipe))
    with as_before(model):
        return _train(
            job, folder, texts, model, tokenizer, resume=resume, main=main, overwrite=overwrite, progress=progress
        )


@dataclass(frozen=True)
class _Job:
    """What is asked for, wherever it was said."""

    base: BaseLike
    data: Any
    eval_data: Any
    recipe: Recipe

    @property
    def spec(self) -> LoraSpec:
        return self.recipe.spec or LoraSpec()


def _train(
    job: _Job,
    folder: Folder,
    texts: Texts,
    model: nn.Module,
    tokenizer: Any,
    *,
    resume: bool,
    main: bool,
    overwrite: bool,
    progress: bool | None,
) -> Run:
    recipe = job.recipe
    inputs = prepare(recipe, texts, model, tokenizer)
    kind = inputs.train.kind
    schedule = settle(recipe, _facts(inputs, model, recipe))
    spec = with_head(job.spec, model) if kind == "classification" else job.spec
    batches = inputs.first_batches(recipe) if spec.init in ("eva", "lora_ga") else None
    recipe = recipe.replace(spec=spec, kind=kind, max_length=longest(recipe, model, tokenizer))
    with attach(model, {SLOT: spec}, batches=batches, seed=recipe.seed) as bank:
        known = {"fingerprint": bank.adapter(SLOT).provenance.base.to_dict(), "data": _digests(inputs)}  # type: ignore[union-attr]
        environment = describe_environment() | known | {"inputs": _inputs_of(job)}
        if resume:
            _check_same(folder, known)
        if main:
            environment = _write_start(folder, recipe, environment, resume=resume, overwrite=overwrite)
        provenance = Provenance(
            data=tuple(
                {"role": role, **{k: v for k, v in part.items() if k not in ("account", "summary")}}
                for role, part in inputs.data.items()
            ),
            recipe={**recipe.to_dict(), "spec": None, "learning_rate": schedule.learning_rate, "steps": schedule.steps},
            versions=environment["versions"],
            created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )
        held = folder.lock() if main else None
        try:
            session = Session(
                model, bank, SLOT, recipe, schedule, inputs, folder,
                training_arguments(recipe, schedule, folder, inputs.train.packed),
                lambda: bank.adapter(SLOT, provenance), progress,
            )  # fmt: skip
            outcome = session.run()
            if outcome.stopped == "signal":
                last = checkpoints.newest(folder.checkpoints)
                raise RunStoppedError(
                    f"stopped at step {outcome.steps} of {schedule.steps}, kept in {last}; go on: weft train --resume {shlex.quote(str(folder.root))}"
                )
            return _finish(folder, bank, inputs, schedule, provenance, outcome, main)
        finally:
            if held is not None:
                held.close()


def _finish(
    folder: Folder, bank: Bank, inputs: Inputs, schedule: Schedule, provenance: Provenance, outcome: Outcome, main: bool
) -> Run:
    """Snapshot, proof, adapter, report."""
    bank.use(SLOT)
    evaluation = {f"eval_{name}": value for name, value in outcome.adapter.items()}
    evaluation |= {f"base_{name}": value for name, value in outcome.base.items()}
    adapter = bank.adapter(SLOT, dataclasses.replace(provenance, evaluation=evaluation))
    adapter.check_finite()
    adapter = adapter.replace(proof=make_proof(bank.model, inputs.evaluated or inputs.train))
    report = Report(
        base=outcome.base,
        adapter=outcome.adapter,
        steps=outcome.steps,
        epochs=outcome.epochs,
        tokens=outcome.tokens,
        seconds=outcome.seconds,
        tokens_per_second=outcome.tokens_per_second,
        train_loss=outcome.train_loss,
        best_step=outcome.best_step,
        stopped=outcome.stopped,
        learning_rate=schedule.learning_rate,
        rate_reason=schedule.rate_reason,
        trainable=sum(parameter.numel() for _, parameter in bank.named_parameters(SLOT)),
        digest=adapter.digest,
        data=inputs.data,
        notes=(*inputs.notes, *bank.notes(SLOT)),
    )
    if main:
        adapter.save(folder.adapter, overwrite=True)
        folder.save_report(report, folder.root.name)
    return Run(folder.root, adapter, report)


def _one_recipe(spec: LoraSpec | None, recipe: Recipe | None) -> Recipe:
    recipe = recipe or Recipe()
    if spec is None:
        return recipe
    if recipe.spec is not None and recipe.spec != spec:
        odd = [name for name, value in spec.to_dict().items() if recipe.spec.to_dict()[name] != value]
        raise RecipeError(f"spec and recipe.spec differ in {', '.join(odd)}; give one of them")
    return dataclasses.replace(recipe, spec=spec)


def _resumed(
    folder: Folder, base: BaseLike, data: Any, eval_data: Any, spec: LoraSpec | None, recipe: Recipe | None
) -> _Job:
    """The job of a run folder, with what the caller gives again for what can't be written down."""
    folder.require()
    stored = folder.read_environment().get("inputs", {})
    saved = Recipe.load(folder.recipe)
    asked = _one_recipe(spec, recipe) if spec is not None or recipe is not None else None
    if asked is not None:
        ours, theirs = saved.to_dict(), asked.to_dict()
        odd = [name for name in theirs if name not in ("spec", "kind", "max_length") and theirs[name] != ours[name]]
        if odd:
            raise RecipeError(
                f"{folder.recipe}: a resumed run keeps its recipe, and what is given differs in {', '.join(odd)}; leave the recipe out, or start anew"
            )
    given: dict[str, Any] = {"base": base, "data": data, "eval_data": eval_data}
    for name, value in given.items():
        if value is None:
            if stored.get(name) == "(given)":
                raise RunError(
                    f"{folder.root}: this run's {name} was an object, which can't be read from the folder; give {name} again"
                )
            given[name] = stored.get(name)
    return _Job(given["base"], given["data"], given["eval_data"], saved)


def _check_same(folder: Folder, known: Mapping[str, Any]) -> None:
    """Base and data are those of the run.

    Raises:
        RunError: says what differs.
    """
    before = folder.read_environment()
    if before.get("fingerprint") != known["fingerprint"]:
        raise RunError(
            f"{folder.root}: this run was started on another base ({before.get('fingerprint', {}).get('name')}); give the same, or start a new run"
        )
    odd = [role for role, digest in known["data"].items() if before.get("data", {}).get(role) != digest]
    if odd or set(before.get("data", {})) != set(known["data"]):
        raise RunError(
            f"{folder.root}: the data changed since the run was started ({', '.join(odd) or 'evaluation data'}); bring the files back, or start a new run"
        )


def _write_start(
    folder: Folder, recipe: Recipe, environment: dict[str, Any], *, resume: bool, overwrite: bool
) -> dict[str, Any]:
    """Make the folder, or bring the log of a killed run back to its newest checkpoint."""
    if not resume:
        folder.create(overwrite)
        folder.save_recipe(recipe)
        folder.save_environment(environment)
        return environment
    checkpoints.clean(folder.checkpoints)
    there = checkpoints.steps(folder.checkpoints)
    folder.rewind_log(there[-1] if there else 0)
    before = folder.read_environment()
    again = {"started": environment["started"], "command": environment["command"], "versions": environment["versions"]}
    environment = {**before, "resumed": [*before.get("resumed", []), again]}
    folder.save_environment(environment)
    return environment


def _facts(inputs: Inputs, model: nn.Module, recipe: Recipe) -> Facts:
    import torch

    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    widths = (getattr(config, name, None) for name in ("hidden_size", "n_embd", "d_model"))
    return Facts(
        features=len(inputs.train),
        evaluated=inputs.evaluated is not None,
        kind=inputs.train.kind,
        width=next((int(width) for width in widths if isinstance(width, int)), 0),
        family=str(getattr(config, "model_type", "")),
        processes=int(os.environ.get("WORLD_SIZE", "1")),
        cpu=recipe.device == "cpu" or not torch.cuda.is_available(),
    )


def _digests(inputs: Inputs) -> dict[str, str]:
    return {role: part["digest"] for role, part in inputs.data.items()}


def _inputs_of(job: _Job) -> dict[str, Any]:
    """How to name base and data again; objects can't be."""
    plain = (str, os.PathLike, float)
    named = {"data": job.data, "eval_data": job.eval_data}
    found = {name: (value if isinstance(value, float) else os.fspath(value)) if isinstance(value, plain) else None if value is None else "(given)"
             for name, value in named.items()}  # fmt: skip
    return {"base": describe_base(job.base), **found}


def _dtype(recipe: Recipe) -> str | None:
    return None if recipe.dtype == "auto" else recipe.dtype
