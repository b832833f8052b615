"""The trainer for pairs: `AdapterTrainer` with a loss over the whole batch, learning rates by tower, and retrieval as evaluation.

The loss compares all pairs of a batch, also over processes; with accumulation each micro-batch is compared by itself. Each line of the
log has the norm of the gradient by tower, and how far the embeddings are spread: a tower that learns nothing, and embeddings that fall
together, are seen there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from weft.models.pair_losses import pair_loss
from weft.train.pair_settings import TOWERS, PairSettings
from weft.train.retrieval import recalls, spread
from weft.train.trainer import AdapterTrainer, rate_and_decay

__all__ = ["FusedTrainer", "PairTrainer", "compared"]


def compared(model: nn.Module, outputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(text, image, scale, bias) of a forward: of `weft.TwoTower`, or of CLIP- and SigLIP-like models of transformers."""
    text, image = (nn.functional.normalize(part, dim=-1) for part in (outputs.text_embeds, outputs.image_embeds))
    scale, bias = getattr(outputs, "scale", None), getattr(outputs, "bias", None)
    if scale is None:
        inner: Any = getattr(model, "module", model)
        scale = inner.logit_scale.exp()
        bias = getattr(inner, "logit_bias", None)
    return text, image, scale, scale.new_zeros(()) if bias is None else bias


class FusedTrainer(AdapterTrainer):
    """Learning rates and gradient norms by tower, for any loss."""

    settings: PairSettings = PairSettings()
    _seen: dict[str, float]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Parameters in groups by learning rate and weight decay, the rates by tower."""
        if self.optimizer is None:
            opt_model: Any = self.model if model is None else model
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, opt_model)
            rate = settings.get("lr", self.args.learning_rate)
            groups: dict[tuple[float, float], list[nn.Parameter]] = {}
            for name, parameter in opt_model.named_parameters():
                if parameter.requires_grad:
                    own = rate_and_decay(
                        name, self._rate_of(name, rate), self.args.weight_decay, self.setup.lora_plus_ratio
                    )
                    groups.setdefault(own, []).append(parameter)
            self.optimizer = kind(
                [{"params": part, "lr": own, "weight_decay": decay} for (own, decay), part in groups.items()],
                **settings,
            )
        return self.optimizer

    def _rate_of(self, name: str, rate: float) -> float:
        tower = _tower_of(name)
        own = self.settings.heads_learning_rate if tower == "heads" else self.settings.towers[tower].learning_rate
        return rate if own is None else own

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As its parent's; notes gradient norms where a line of the log will be written."""
        loss = super().training_step(*args, **kwargs)
        step = self.state.global_step + 1
        if step == 1 or step % max(1, int(self.args.logging_steps)) == 0:
            sums: dict[str, float] = {}
            for name, tensor in self._trained.items():
                if tensor.grad is not None:
                    key = f"grad_norm_{_tower_of(name)}"
                    sums[key] = sums.get(key, 0.0) + float(tensor.grad.detach().float().square().sum())
            self._note({name: value**0.5 for name, value in sums.items()})
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's, with what was noted."""
        if "loss" in logs:
            logs = {**logs, **getattr(self, "_seen", {})}
            self._seen = {}
        super().log(logs, *args, **kwargs)

    def _note(self, values: dict[str, float]) -> None:
        self._seen = {**getattr(self, "_seen", {}), **values}


class PairTrainer(FusedTrainer):
    """Trains by comparing texts and images."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The loss of the pairs of all processes; a mean over the rows of an optimizer step."""
        rest = dict(inputs)
        labels, images = rest.pop("labels"), rest.pop("image_ids", None)
        text, image, scale, bias = compared(model, outputs := model(**rest))
        loss = pair_loss(
            text, image, scale, bias, labels, images, loss=self.settings.loss, duplicates=self.settings.duplicates
        )
        self._note({"spread_text": spread(text), "spread_image": spread(image), "scale": float(scale.detach())})
        if num_items_in_batch is not None:
            loss = loss * (len(labels) * self.args.world_size / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Retrieval over all pairs of all processes, and the loss by batch, weighted by rows."""
        model: Any = self.model
        training = model.training
        model.eval()
        parts: list[list[Tensor]] = []
        try:
            with torch.no_grad():
                for batch in dataloader:
                    inputs = self._prepare_inputs(batch)
                    labels, images = inputs.pop("labels"), inputs.pop("image_ids")
                    with self.accelerator.autocast():
                        text, image, scale, bias = compared(model, model(**inputs))
                    found = (text, image, labels, images)
                    parts.append(
                        list(self.accelerator.gather_for_metrics(found) if self.args.world_size > 1 else found)
                    )
                    self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        finally:
            model.train(training)
        total = _evaluated(parts, scale, bias, self.settings)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in total.items()}
        nothing: Any = None
        return EvalLoopOutput(
            predictions=nothing, label_ids=nothing, metrics=metrics, num_samples=sum(len(part[0]) for part in parts)
        )


@torch.no_grad()
def _evaluated(parts: list[list[Tensor]], scale: Tensor, bias: Tensor, settings: PairSettings) -> dict[str, float]:
    """Loss and retrieval of embedded batches; rows are known to this process alone."""
    from weft.models.pair_losses import LOSSES, positives

    rows = sum(len(part[0]) for part in parts)
    loss = sum(
        float(LOSSES[settings.loss](text, image, scale, bias, positives(labels, images), settings.duplicates))
        * len(text)
        for text, image, labels, images in parts
    )
    text, image, labels, images = (torch.cat([part[place] for part in parts]) for place in range(4))
    return {
        "loss": loss / rows,
        **recalls(text, image, labels.tolist(), images.tolist()),
        "spread_text": spread(text),
        "spread_image": spread(image),
    }


def _tower_of(name: str) -> str:
    plain = name.removeprefix("module.")
    return next((tower for tower in TOWERS if plain.startswith(f"{tower}.")), "heads")
