"""The trainer: `transformers.Trainer` with a bank on its model. A subclass, not a copy.

What is changed: checkpoints hold the adapter and not the base, and are complete or not there; the loss of an evaluation is
a mean over tokens; B may have a learning rate of its own; the order of the data is a function of seed and epoch, dropout one of
seed and step; a loss that is not finite stops the run. All else (mixed precision, accumulation, DDP, FSDP, DeepSpeed, trackers) is Trainer's.
This module does not know files of data, recipes' texts or run folders.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import EvalLoopOutput

from weft.core.bank import Bank
from weft.core.dropout import own_stream
from weft.core.resizing import Resize
from weft.errors import NotFiniteError, RecipeError, RunError
from weft.train import checkpoints
from weft.train.chunked import ChunkedLoss
from weft.train.moments import carry, rewrap
from weft.train.not_finite import Place, bad_factors, bad_gradients, watched_outputs
from weft.train.rank_callback import RankCallback, TrainerHost
from weft.train.ranks import Ranks, fit
from weft.train.schedule import Schedule
from weft.train.scoring import Score, keeps_logits, losses, wanted_positions
from weft.train.sharding import whole_parameters
from weft.train.streams import stream_seed
from weft.train.watching import Watch

__all__ = ["AdapterTrainer", "Setup", "parameter_groups", "rate_and_decay"]


@dataclass(frozen=True)
class Setup:
    """What an `AdapterTrainer` needs beside Trainer's own arguments.

    Attributes:
        bank: on the model that is trained; slot is the adapter's name in it.
        schedule: the settled recipe.
        sampler: gives the order of the training features; has ``set_epoch``.
        eval_order: order of the evaluation features, so that rows of like length come together.
        classifies: labels are one a row.
        lora_plus_ratio: learning rate of B over that of A, or None.
        snapshot: writes an adapter into the folder of a checkpoint; None: none is written.
        keep: checkpoints that stay, the best one not counted. Trainer's own limit would remove the last one too.
        loss_chunk: tokens whose logits exist at a time; None: all of a batch.
        ranks: changes the ranks of the sites while it trains; None: they stay.
        around: entered around each forward that is trained on, for what decides where saved tensors wait.
        placed: the model is where it belongs already.
        watch: is told losses and gradients of every step; None: nobody looks.
        rate: what is left of the recipe's learning rates, of all groups of parameters.
    """

    bank: Bank
    slot: str
    schedule: Schedule
    sampler: Any
    eval_order: list[int]
    classifies: bool = False
    lora_plus_ratio: float | None = None
    snapshot: Callable[[Path], object] | None = None
    keep: int = 2
    loss_chunk: int | None = None
    ranks: Ranks | None = None
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    placed: bool = False
    watch: Watch | None = None
    rate: float = 1.0


class AdapterTrainer(Trainer):
    """Trains one slot of a bank. See the module's text for what differs from its parent."""

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        setup: Setup,
        *,
        train_dataset: Dataset[Any],
        eval_dataset: Dataset[Any] | None,
        data_collator: Callable[[list[Any]], dict[str, Tensor]],
        eval_collator: Callable[[list[Any]], dict[str, Tensor]] | None = None,
        callbacks: list[TrainerCallback],
    ) -> None:
        self.setup = setup
        self.folder = Path(args.output_dir or "")
        self._eval_collator = eval_collator or data_collator
        self._keeps_logits = not setup.classifies and not args.torch_compile and keeps_logits(model)
        self._trained = _trained_tensors(model, setup.bank, setup.slot)
        self._micro = (-1, 0)
        self._chunked: ChunkedLoss | None = None
        if setup.loss_chunk is not None:
            self._chunked = ChunkedLoss(model, setup.bank, setup.slot, setup.loss_chunk)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_loss_func=_summed_loss if self._chunked is None else self._loss_in_parts,
            callbacks=[_Epochs(setup.sampler), *callbacks, *([RankCallback(setup.ranks, self)] if setup.ranks else [])],
        )
        if self._chunked is not None and self.sharded:
            raise RecipeError(
                f"loss_chunk={setup.loss_chunk}: FSDP and DeepSpeed hold the head in pieces, which parts of a batch can't gather; "
                "leave loss_chunk out"
            )
        if setup.watch is not None:
            setup.watch.trainer = self
        if setup.ranks is not None:
            assert isinstance(setup.ranks.host, TrainerHost)
            setup.ranks.host.trainer = self
            if self.sharded:
                raise RecipeError(
                    "adaptive ranks need whole factors on each process, and FSDP or DeepSpeed cut them up; train with DDP, or leave adaptive out"
                )

    @property
    def sharded(self) -> bool:
        """FSDP or DeepSpeed hold the model, and have checkpoints of their own."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    # the step

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Trainer's, without the logits that nobody wants."""
        with self.setup.around():
            if self._chunked is not None and "labels" in inputs:
                with self._chunked.watching():
                    return super().compute_loss(model, self._chunked.prepare(inputs), *args, **kwargs)
            if self._keeps_logits and "labels" in inputs:
                inputs = {**inputs, "logits_to_keep": wanted_positions(inputs["labels"])}
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not self.setup.placed:
            super()._move_model_to_device(model, device)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Trainer's; images without text count as one each."""
        if "input_ids" in inputs:
            super()._track_num_input_tokens(inputs)
        else:
            self.state.num_input_tokens_seen += len(inputs["labels"]) * self.args.world_size

    def _loss_in_parts(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """As `_summed_loss`; the logits are made part by part."""
        assert self._chunked is not None
        total, count = self._chunked.total(labels)
        return total / (count if num_items_in_batch is None else num_items_in_batch)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's; dropout has a stream of its own, and a loss that is not finite ends the run.

        Raises:
            NotFiniteError: says at which step, and what to change.
        """
        step = self.state.global_step
        self._micro = (step, self._micro[1] + 1 if self._micro[0] == step else 0)
        with (
            own_stream(stream_seed(self.args.seed, *self._micro, self.args.process_index)),
            self._dropping(args, kwargs),
        ):
            loss: Tensor = super().training_step(*args, **kwargs)
        value = float(loss)
        if not math.isfinite(value):
            place = self._first_not_finite(kwargs["inputs"] if "inputs" in kwargs else args[1], args, kwargs)
            raise NotFiniteError(self._diverged(f"the loss is {value}{place.words()}", place))
        if self.setup.watch is not None:
            self.setup.watch.tally.loss(step, value)
            ids = (kwargs["inputs"] if "inputs" in kwargs else args[1]).get("input_ids")
            self.setup.watch.tally.positions += 0 if ids is None else ids.numel() * self.args.world_size
        return loss

    def _first_not_finite(self, inputs: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Place:
        """Where it began, by the same forward once more."""
        slots = {} if self.sharded else self.setup.bank.slots(self.setup.slot)
        place = bad_factors(slots)
        if place is not None or self.sharded:
            return place or Place("loss")
        with (
            own_stream(stream_seed(self.args.seed, *self._micro, self.args.process_index)),
            self._dropping(args, kwargs),
            watched_outputs(self.model) as seen,
            torch.no_grad(),
        ):
            self.compute_loss(self.model, self._prepare_inputs(inputs))
        return seen.place("loss", slots)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; the time that it takes is time in which nothing is trained."""
        started = time.perf_counter()
        found = super().get_batch_samples(*args, **kwargs)
        if self.setup.watch is not None:
            self.setup.watch.tally.waited += time.perf_counter() - started
        return found

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Trainer's; a gradient that is not finite ends the run before it gets into the factors.

        Raises:
            NotFiniteError: names the site.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.setup.watch is not None and norm is not None:
            self.setup.watch.tally.norms.append(norm)
        scaled = self.accelerator.scaler is not None  # fp16: the step is left out, and the scale lowered
        if norm is None or scaled or self.sharded or math.isfinite(float(norm)):
            return norm
        place = bad_gradients(self.setup.bank.slots(self.setup.slot))
        raise NotFiniteError(self._diverged(f"the gradient's norm is {float(norm)}{place.words()}", place))

    def _dropping(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
        """Dropout by row: each row of the batch has a seed of its own, so that neighbours and padding change nothing."""
        bank, slot = self.setup.bank, self.setup.slot
        if not any(own.dropout for own in bank.spec(slot).everywhere()):
            return contextlib.nullcontext()
        inputs = kwargs["inputs"] if "inputs" in kwargs else args[1]
        rows, process = len(inputs["labels"]), self.args.process_index
        seeds = [stream_seed(self.args.seed, *self._micro, process, row) for row in range(rows)]
        return bank.route([slot] * rows, seeds=seeds)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: Trainer's way walks over all parameters at every forward."""
        return 0

    def _diverged(self, what: str, place: Place | None = None) -> str:
        """The message of an error; the watch is told."""
        if self.setup.watch is not None and place is not None:
            self.setup.watch.put({"step": self.state.global_step + 1, "of": "not-finite", **place.to_dict()})
        last = checkpoints.newest(self.folder)
        kept = f"the last good factors are in {last}" if last else "there is no checkpoint yet"
        return (
            f"{what} at step {self.state.global_step + 1} of {self.state.max_steps}; {kept}. Train again with a lower learning rate "
            f"(now {self.setup.schedule.learning_rate:g}), a longer warm-up (now {self.setup.schedule.warmup_steps} steps) or a lower clip "
            f"(now {self.args.max_grad_norm:g})"
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW or another over the slot's parameters alone, in groups by weight decay and learning rate."""
        if self.optimizer is None:
            opt_model: Any = self.model if model is None else model
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, opt_model)
            ratio = self.setup.lora_plus_ratio
            groups = parameter_groups(
                opt_model, settings.get("lr", self.args.learning_rate), self.args.weight_decay, ratio
            )
            self.optimizer = kind(groups, **settings)
        return self.optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with rates that may have been lowered in the course of the run."""
        if self.lr_scheduler is None and self.setup.rate != 1.0:
            assert self.optimizer is not None
            for group in self.optimizer.param_groups:
                group["lr"] *= self.setup.rate
        return super().create_scheduler(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's; the rates are those of now, which may be lower than when the checkpoint was written."""
        inner: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        rates = list(getattr(inner, "base_lrs", ()))
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not rates or rates == list(inner.base_lrs):
            return
        assert self.optimizer is not None
        for group, now, before in zip(self.optimizer.param_groups, rates, inner.base_lrs, strict=True):
            group["lr"], group["initial_lr"] = group["lr"] * (now / before), now
        inner.base_lrs = rates
        inner._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def resize(self, changes: Mapping[str, Resize]) -> int:
        """Change directions at sites, in the middle of a run; optimizer and DDP take the new parameters over.

        Returns:
            parameters whose optimizer state could not be carried and begins anew.
        """
        swaps = self.setup.bank.resize(self.setup.slot, changes)
        self._trained = _trained_tensors(self.model, self.setup.bank, self.setup.slot)
        lost = 0 if self.optimizer is None else carry(self.optimizer, swaps)
        rewrap(self.model_wrapped)
        return lost

    def _get_learning_rate(self) -> float:
        """Trainer's, as ranks that grew have it."""
        ranks, rate = self.setup.ranks, super()._get_learning_rate()
        return rate if ranks is None else rate * ranks.rate_factor()

    # the data

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.setup.sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int]:
        return _Order(self.setup.eval_order)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Trainer's, with the collator for evaluations: their rows are never packed."""
        training, self.data_collator = self.data_collator, self._eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training

    # evaluation

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Metrics over all rows of all processes: a mean over tokens, not over batches. Predictions are not kept."""
        model: Any = self.model_wrapped if self.sharded else self.model
        training = model.training
        model.eval()
        gather = self.accelerator.gather_for_metrics if self.args.world_size > 1 else None
        total = Score(self.setup.classifies, gather)
        try:
            with torch.no_grad():
                for batch in dataloader:
                    inputs = self._prepare_inputs(batch)
                    labels = inputs.pop("labels")
                    with self.accelerator.autocast():
                        self._score(total, model, inputs, labels)
                    self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        finally:
            model.train(training)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in total.metrics().items()}
        nothing: Any = None
        return EvalLoopOutput(predictions=nothing, label_ids=nothing, metrics=metrics, num_samples=total.rows)

    def _score(self, total: Score, model: Any, inputs: dict[str, Any], labels: Tensor) -> None:
        if self._chunked is not None:
            with self._chunked.watching():
                model(**self._chunked.prepare(inputs))
                total.take(*self._chunked.by_row(labels))
            return
        if self._keeps_logits:
            inputs = {**inputs, "logits_to_keep": wanted_positions(labels)}
        total.add(model(**inputs).logits, labels)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; then ranks are decided about, after every other callback whatever their order."""
        metrics = super()._evaluate(*args, **kwargs)
        if self.setup.ranks is not None:
            self.setup.ranks.evaluated(metrics)
        return metrics

    # checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder, step = self.folder, self.state.global_step
        target = checkpoints.beside(folder, step)
        if self.args.should_save:
            checkpoints.clean(folder)
            target.mkdir(parents=True, exist_ok=True)  # before other processes write into it
        self.accelerator.wait_for_everyone()
        self.store_flos()
        self.save_model(str(target), _internal_call=True)
        self._save_optimizer_and_scheduler(str(target))
        self._save_scaler(str(target))
        self._save_rng_state(str(target))
        best = self.state.best_global_step
        if best and (best == step or checkpoints.path_of(folder, best).is_dir()):
            self.state.best_model_checkpoint = str(checkpoints.path_of(folder, best))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            for part in [*self.callback_handler.callbacks, self.control]:
                if isinstance(part, ExportableState):
                    states: Any = self.state.stateful_callbacks
                    states[type(part).__name__] = part.state()
            self.state.save_to_json(str(target / checkpoints.TRAINER_STATE))
            checkpoints.publish(folder, step)
            checkpoints.rotate(folder, self.setup.keep, self._best_step())
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The trained tensors, and an adapter that can be loaded."""
        if not self.args.should_save:
            return
        target = Path(output_dir) if output_dir else self.folder
        tensors: Mapping[str, Tensor] = self._trained
        if state_dict:  # gathered from shards
            tensors = {name: state_dict[name] for name in self._trained}
        bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
        if bad:
            place = bad_factors(self.setup.bank.slots(self.setup.slot)) or Place("factors", None, bad[0])
            raise NotFiniteError(
                self._diverged(
                    f"{len(bad)} factors are not finite, {bad[0]} among them, so no checkpoint is written,", place
                )
            )
        if self.setup.snapshot is not None and not state_dict:
            self.setup.snapshot(target)
        target.mkdir(parents=True, exist_ok=True)
        checkpoints.save_state(target / checkpoints.STATE, tensors, self.state.global_step)
        if self.setup.ranks is not None:
            self.setup.ranks.save(target)
        if self.setup.watch is not None:
            self.setup.watch.save(target)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.setup.watch is not None:
            self.setup.watch.restore(Path(resume_from_checkpoint))
        if self.sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        self._load_factors(Path(resume_from_checkpoint))
        if self.setup.ranks is not None:
            self.setup.ranks.restore(Path(resume_from_checkpoint))

    def _load_factors(self, checkpoint: Path) -> None:
        """Copy a checkpoint's tensors into the model, whose sites get its ranks first."""
        if self.setup.ranks is not None and fit(self.setup.bank, self.setup.slot, checkpoint):
            self._trained = _trained_tensors(self.model, self.setup.bank, self.setup.slot)
        checkpoints.load_state(checkpoint / checkpoints.STATE, self._trained)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; a run folder may have been moved since the checkpoint was written."""
        found = super()._init_training_state(*args, **kwargs)
        best = self._best_step()
        self.state.best_model_checkpoint = str(checkpoints.path_of(self.folder, best)) if best else None
        return found

    def _best_step(self) -> int | None:
        best = self.state.best_global_step
        return best if best and checkpoints.path_of(self.folder, best).is_dir() else None

    def _load_best_model(self) -> None:
        self.restore_best()

    def take_over(self, checkpoint: Path) -> None:
        """Be where the run was that wrote this checkpoint, with nothing left to train."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / checkpoints.TRAINER_STATE))

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """The trained parameters in one piece, whatever holds them."""
        return whole_parameters(self.model_wrapped, self._trained)

    def restore_best(self) -> int | None:
        """Put the factors of the best checkpoint back; returns its step, None where there is none.

        Raises:
            RunError: the checkpoint is there no more.
        """
        best = self.state.best_global_step
        if not self.setup.schedule.best or not best:
            return None
        path = checkpoints.path_of(self.folder, best)
        if not path.is_dir():
            raise RunError(f"{path}: the best checkpoint is gone; the last one is {checkpoints.newest(path.parent)}")
        if self.sharded:
            super()._load_best_model()
        else:
            self._load_factors(path)
        return int(best)


def parameter_groups(
    model: nn.Module, rate: float, decay: float, lora_plus_ratio: float | None = None
) -> list[dict[str, Any]]:
    """Optimizer groups over all that requires a gradient.

    Factors, weights and embeddings decay; biases and magnitudes don't. With a ratio, B's rate is ``ratio`` times the rest's.

    Args:
        model: with a bank on it (all else is frozen), wrapped or not.
        rate: learning rate.
        decay: weight decay.
        lora_plus_ratio: rate of B over that of A; None: one rate.

    Source:
        Hayou et al. 2024, LoRA+, arXiv:2402.12354.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(rate_and_decay(name, rate, decay, lora_plus_ratio), []).append(parameter)
    by_rate = sorted(groups.items(), key=lambda item: (item[0][0] != rate, -item[0][1]))
    return [{"params": params, "lr": own_rate, "weight_decay": own_decay} for (own_rate, own_decay), params in by_rate]


def rate_and_decay(name: str, rate: float, decay: float, lora_plus_ratio: float | None) -> tuple[float, float]:
    """Learning rate and weight decay of one parameter, by the last part of its name; see `parameter_groups`."""
    leaf = name.rpartition(".")[2]
    own_rate = rate * lora_plus_ratio if lora_plus_ratio is not None and leaf == "lora_B" else rate
    return own_rate, 0.0 if leaf in ("bias", "magnitude") else decay


def _summed_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """The sum over what is learned, divided by its number in the whole optimizer step."""
    values, _ = losses(outputs.logits, labels)
    return values.sum() / (len(values) if num_items_in_batch is None else num_items_in_batch)


def _trained_tensors(model: nn.Module, bank: Bank, slot: str) -> dict[str, Tensor]:
    """Everything that a training changes, and starting products, by name."""
    tensors: dict[str, Tensor] = dict(bank.named_parameters(slot))
    known = {id(tensor) for tensor in tensors.values()}
    tensors |= {
        name: tensor for name, tensor in model.named_buffers() if ".weft." in f".{name}" and id(tensor) not in known
    }
    return tensors


class _Order(Sampler[int]):
    """A fixed order."""

    def __init__(self, indices: list[int]) -> None:
        self.indices = indices

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class _Epochs(TrainerCallback):
    """Tells the sampler its epoch, also in a resumed run on several processes, where the loader's own wrapper loses it."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))
