"""One training on a model with a bank: Trainer's arguments, callbacks, the loop, and what came of it.

Does not know how bases and data were found, and not what becomes of the result.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState, TrainingArguments

from weft.adapter import Adapter
from weft.core.bank import Bank
from weft.errors import MissingDependencyError, RecipeError, did_you_mean
from weft.train import checkpoints
from weft.train.answering import GoBack, RunWatch, factor_of, go_back
from weft.train.general import GeneralText, GeneralWatch
from weft.train.inputs import Features, Inputs
from weft.train.offload import Parked, kept_away
from weft.train.pair_settings import PAIR_KINDS
from weft.train.progress import LogWriter, Progress, StopOnSignal
from weft.train.quantized import unsaid
from weft.train.rank_callback import TrainerHost
from weft.train.ranks import ranks_for
from weft.train.recipe import CLASSIFYING, Recipe
from weft.train.recompute import checkpointing
from weft.train.run import Folder, plain_json
from weft.train.schedule import Schedule, rate_at
from weft.train.trainer import AdapterTrainer, Setup

__all__ = ["Outcome", "Session", "check_names", "plain_metrics", "training_arguments"]


@dataclass(frozen=True)
class Outcome:
    """What a training came to.

    Attributes:
        base, adapter: metrics on the evaluation data, by plain names (``loss``, ``perplexity`` …).
        best_step: of the checkpoint that was restored; None: the last one stays.
        stopped: ``"end"``, ``"early"`` or ``"signal"``.
        ranks: the record of ranks that changed, see `weft.train.ranks.Ranks.record`; empty where they didn't.
        findings: what the rules of `weft.diagnosis` found in the run, as plain data, worst first.
    """

    base: dict[str, float]
    adapter: dict[str, float]
    steps: int
    epochs: float
    tokens: int
    seconds: float
    tokens_per_second: float
    train_loss: float | None
    best_step: int | None
    stopped: str
    ranks: dict[str, Any] = field(default_factory=dict)
    findings: tuple[dict[str, Any], ...] = ()


@dataclass
class Session:
    """Everything that one training needs; `run` does it.

    Attributes:
        model: with `bank` on it; `slot` is trained.
        snapshot: writes the adapter that a checkpoint holds into its folder.
        progress: see `weft.train.progress.Progress`.
        parked: the weights that are off the device.
        facts: see `weft.train.facts`. general: what is to be still known afterwards; None: nobody looks.
    """

    model: nn.Module
    bank: Bank
    slot: str
    recipe: Recipe
    schedule: Schedule
    inputs: Inputs
    folder: Folder
    args: TrainingArguments
    snapshot: Callable[[Path], object]
    progress: bool | None = None
    parked: Parked | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    general: GeneralText | None = None

    def run(self) -> tuple[Adapter | None, Outcome]:
        """Train from the start, or from the newest checkpoint in the folder, to the end.

        Returns:
            the adapter, None where a signal stopped the run; and what came of it.
        """
        self._bar = bar = Progress(LogWriter(self.folder.append_log), self.progress)
        self._watch = watch = RunWatch(
            self.recipe.on_trouble, self.folder, self.facts, bar.tell, self.args.process_index == 0
        )
        log = bar.log
        log.watch = watch
        stop = StopOnSignal()
        with checkpointing(self.model, self.recipe), _calm(), unsaid():
            trainer = self._trainer([log, bar, stop])
            try:
                base = {} if trainer.sharded else self._measure_base(trainer)
                trainer = self._train_through(trainer, [log, bar, stop], stop)
                best = None if stop.stopped else trainer.restore_best()
                base = base or self._measure_base(trainer)
                final = {} if stop.stopped else self._finish_ranks(trainer)
                with trainer.whole():
                    trained = None if stop.stopped else self.bank.adapter(self.slot)
                trainer.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            finally:
                bar.close()
        outcome = self._outcome(trainer, log, stop, base, best)
        return trained, replace(outcome, adapter=final or outcome.adapter)

    def _train_through(
        self, trainer: AdapterTrainer, callbacks: list[TrainerCallback], stop: StopOnSignal
    ) -> AdapterTrainer:
        """Train to the end; a run that answers by itself goes back and on in between. Returns the trainer that got there."""
        while True:
            try:
                self._train(trainer, stop)
                return trainer
            except GoBack as why:
                row = go_back(self.folder, why, trainer.state.global_step)
            trainer.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self._watch.begin()
            self._bar.tell(
                f"{row['rule']} at step {row['seen']}: back to step {row['step']}, on with {row['factor']:g} of the learning rate "
                f"({self.schedule.learning_rate * row['factor']:.3g})"
            )
            trainer = self._trainer(callbacks)

    def _trainer(self, callbacks: list[TrainerCallback]) -> AdapterTrainer:
        callbacks = [*callbacks, self._watch]
        if self.schedule.patience:
            callbacks.append(EarlyStoppingCallback(self.schedule.patience))
        if self.general is not None:
            callbacks.append(GeneralWatch(self.general, self._watch))
        sampler = self.inputs.sampler(self.recipe, self.args.world_size)
        setup = Setup(
            bank=self.bank,
            slot=self.slot,
            schedule=self.schedule,
            sampler=sampler,
            eval_order=self.inputs.eval_order(),
            classifies=self.inputs.train.kind in (*CLASSIFYING, "fused"),
            lora_plus_ratio=self.recipe.lora_plus_ratio,
            snapshot=self.snapshot,
            keep=self.recipe.keep,
            loss_chunk=self.recipe.loss_chunk,
            ranks=ranks_for(
                self.recipe.adaptive,
                TrainerHost(self.bank, self.slot, rate_at(self.recipe.schedule, self.schedule), self._tell),
                self.schedule,
                self.recipe.seed,
                self._log_once,
                self._tell,
            ),
            around=self._around,
            placed=self.parked is not None,
            watch=self._watch,
            rate=factor_of(self.folder),
        )
        evaluated = self.inputs.evaluated
        trainer = self._kind_of_trainer()(
            self.model,
            self.args,
            setup,
            train_dataset=Features(self.inputs.train, sampler, self.recipe.seed),
            eval_dataset=None if evaluated is None else Features(evaluated),
            data_collator=self.inputs.collate,
            eval_collator=self.inputs.collate_eval,
            callbacks=callbacks,
        )
        if "tensorboard" in self.recipe.report_to and trainer.is_world_process_zero():
            from torch.utils.tensorboard import SummaryWriter
            from transformers.integrations.integration_utils import TensorBoardCallback

            trainer.add_callback(TensorBoardCallback(SummaryWriter(str(self.folder.trackers / "tensorboard"))))
        for silent in list(trainer.callback_handler.callbacks):
            if type(silent).__name__ in ("PrinterCallback", "ProgressCallback"):
                trainer.remove_callback(silent)
        return trainer

    def _log_once(self, row: dict[str, Any]) -> None:
        """A line for the log that a killed run may have written already."""
        if plain_json(row) not in self.folder.read_log():
            self.folder.append_log(row)

    def _tell(self, line: str) -> None:
        self._bar.tell(line)

    def _finish_ranks(self, trainer: AdapterTrainer) -> dict[str, float]:
        """What an adaptive rank does last, to the factors that were chosen; metrics of the result where it did something."""
        ranks = trainer.setup.ranks
        if ranks is None or not ranks.finish() or self.inputs.evaluated is None:
            return {}
        loop = trainer.evaluation_loop(trainer.get_eval_dataloader(), "result")
        return plain_metrics(dict(loop.metrics or {}))

    @contextlib.contextmanager
    def _around(self) -> Iterator[None]:
        """Where saved tensors wait, as `Recipe.offload` says."""
        with contextlib.ExitStack() as stack:
            if "activations" in self.recipe.offload:
                stack.enter_context(kept_away(self.model, parked=self.parked))
            elif self.parked is not None:
                stack.enter_context(self.parked.noting())
            yield

    def _kind_of_trainer(self) -> type[AdapterTrainer]:
        """For pairs of texts and images one that knows towers."""
        if self.recipe.kind not in PAIR_KINDS:
            return AdapterTrainer
        from weft.train.pair_inputs import settings_of
        from weft.train.pair_trainer import FusedTrainer, PairTrainer

        parent = PairTrainer if self.recipe.kind == "contrastive" else FusedTrainer
        return type(parent.__name__, (parent,), {"settings": settings_of(self.recipe)})

    def _train(self, trainer: AdapterTrainer, stop: StopOnSignal) -> None:
        last = checkpoints.newest(self.folder.checkpoints)
        if last is not None and _is_end(last, self.schedule):
            trainer.take_over(last)
            return
        with stop.listening():
            trainer.train(resume_from_checkpoint=str(last) if last else None)

    def _measure_base(self, trainer: AdapterTrainer) -> dict[str, float]:
        """Metrics of the base on the evaluation data; logged as step 0."""
        if self.inputs.evaluated is None:
            return {}
        before = self.bank.current
        self.bank.use(None)
        try:
            loop = trainer.evaluation_loop(trainer.get_eval_dataloader(), "base")
        finally:
            self.bank.use(before)
        found = dict(loop.metrics or {})
        if not self._watch.record.of("base"):
            self._watch.put({"step": 0, "of": "base", **found})
        return plain_metrics(found)

    def _outcome(
        self, trainer: AdapterTrainer, log: LogWriter, stop: StopOnSignal, base: dict[str, float], best: int | None
    ) -> Outcome:
        state = trainer.state
        measured = [
            row for row in state.log_history if "eval_loss" in row and row["step"] == (best or state.global_step)
        ]
        trained = [row["loss"] for row in state.log_history if "loss" in row]
        early = state.global_step < self.schedule.steps
        return Outcome(
            base=base,
            adapter=plain_metrics(measured[-1]) if measured else {},
            steps=state.global_step,
            epochs=float(state.epoch or 0),
            tokens=int(state.num_input_tokens_seen),
            seconds=log.seconds,
            tokens_per_second=log.tokens_per_second,
            train_loss=trained[-1] if trained else None,
            best_step=best,
            stopped="signal" if stop.stopped else "early" if early else "end",
            ranks=trainer.setup.ranks.record() if trainer.setup.ranks is not None else {},
            findings=() if stop.stopped else tuple(finding.to_dict() for finding in self._watch.findings),
        )


def training_arguments(recipe: Recipe, schedule: Schedule, folder: Folder, packed: bool) -> TrainingArguments:
    """The settled recipe in Trainer's words."""
    import torch

    cpu = recipe.device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    with _calm():
        args = TrainingArguments(
            output_dir=str(folder.checkpoints),
            run_name=folder.root.name,
            per_device_train_batch_size=recipe.batch_size,
            per_device_eval_batch_size=recipe.eval_batch_size or 2 * recipe.batch_size,
            gradient_accumulation_steps=recipe.accumulation,
            max_steps=schedule.steps,
            learning_rate=schedule.learning_rate,
            lr_scheduler_type=recipe.schedule if recipe.schedule != "constant" else "constant_with_warmup",
            warmup_steps=schedule.warmup_steps,
            weight_decay=recipe.weight_decay,
            max_grad_norm=recipe.clip,
            optim=recipe.optimizer,
            logging_strategy="steps",
            logging_first_step=True,
            logging_steps=schedule.log_every,
            logging_nan_inf_filter=False,
            eval_strategy="steps" if schedule.eval_every else "no",
            eval_steps=schedule.eval_every or None,
            save_strategy="steps",
            save_steps=schedule.save_every,
            metric_for_best_model=schedule.metric if schedule.eval_every else None,
            greater_is_better=schedule.higher_is_better,
            seed=recipe.seed,
            data_seed=recipe.seed,
            bf16=schedule.precision == "bf16",
            fp16=schedule.precision == "fp16",
            use_cpu=cpu,
            torch_compile=recipe.compile,
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_num_workers=recipe.workers,
            dataloader_pin_memory=not cpu,
            report_to=[name for name in recipe.report_to if name != "tensorboard"] or "none",
            disable_tqdm=True,
            include_num_input_tokens_seen="all" if packed else "non_padding",
            restore_callback_states_from_checkpoint=True,
            ddp_find_unused_parameters=False,
            average_tokens_across_devices=True,
        )
    args.load_best_model_at_end = (
        schedule.best
    )  # said later, for Trainer would refuse more checkpoints than evaluations
    if args.n_gpu > 1:
        args._n_gpu = 1  # DataParallel is not what anybody wants: several GPUs are for `accelerate launch`
    return args


def check_names(recipe: Recipe) -> None:
    """Names that only the libraries know: the optimizer and the trackers.

    Raises:
        RecipeError: an unknown name, with near ones.
        MissingDependencyError: a tracker that is not installed.
    """
    import importlib.util

    from transformers.training_args import OptimizerNames

    optimizers = [item.value for item in OptimizerNames]
    if recipe.optimizer not in optimizers:
        raise RecipeError(
            f"optimizer={recipe.optimizer!r} is unknown.{did_you_mean(recipe.optimizer, optimizers)} Known: {', '.join(optimizers)}"
        )
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    trackers = sorted(INTEGRATION_TO_CALLBACK)
    for name in recipe.report_to:
        if name not in trackers:
            raise RecipeError(
                f"report_to={name!r} is unknown.{did_you_mean(name, trackers)} Known: {', '.join(trackers)}"
            )
        if name in ("tensorboard", "wandb", "trackio", "mlflow") and importlib.util.find_spec(name) is None:
            raise MissingDependencyError(f"report_to={name!r} needs a library that is not here: pip install {name}")


def plain_metrics(metrics: dict[str, Any]) -> dict[str, float]:
    """Metrics without prefix and without timings."""
    kept = ("loss", "perplexity", "accuracy", "macro_f1", "recall_at_1")
    ways = tuple(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))
    return {name: float(metrics[f"eval_{name}"]) for name in (*kept, *ways) if f"eval_{name}" in metrics}


def _is_end(checkpoint: Path, schedule: Schedule) -> bool:
    """Whether a run that was killed after this checkpoint had nothing left to do."""
    state = TrainerState.load_from_json(str(checkpoint / checkpoints.TRAINER_STATE))
    early = state.stateful_callbacks.get("EarlyStoppingCallback", {})
    early = early[-1] if isinstance(early, list) else early
    waited = early.get("attributes", {}).get("early_stopping_patience_counter", 0)
    return state.global_step >= schedule.steps or bool(schedule.patience and waited >= schedule.patience)


@contextlib.contextmanager
def _calm() -> Iterator[None]:
    """Without the remarks that libraries make about each other's defaults."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*", category=UserWarning)
        yield
