"""The real step of a training, run on fake tensors, and the course of memory that it takes.

Forward, loss, backward and optimizer are those of `weft.train`; the batch is the largest that the settings allow, with every token learned.
This module does not know what is chosen from its figures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.core.bank import Bank
from weft.plan.course import PARTS, Course, Segment, Vector, stretch
from weft.plan.layers import Stacks
from weft.plan.tape import Tape
from weft.spec import LoraSpec
from weft.train.scoring import keeps_logits, losses, wanted_positions

__all__ = ["Batch", "StepSettings", "batch_of", "trace"]


@dataclass(frozen=True)
class Batch:
    """What goes into a step.

    Attributes:
        rows, length: B and T; the length means nothing to models of images.
        padded: rows differ in length, so that an attention mask has to be made.
    """

    rows: int
    length: int
    padded: bool = True


@dataclass(frozen=True)
class StepSettings:
    """How the step is done.

    Attributes:
        batch: of one forward.
        precision: ``"no"``, ``"bf16"`` or ``"fp16"``: autocast.
        accumulates: gradients of an earlier forward are there already.
        vocabulary: a tensor of this width is one of logits.
        logits_to_keep: the loss asks for the logits that it needs.
        loss_chunk: tokens whose logits exist at a time, or None.
        whole: trace every layer.
    """

    batch: Batch
    precision: str = "no"
    accumulates: bool = False
    vocabulary: int = 0
    loss_chunk: int | None = None
    whole: bool = False


def batch_of(model: nn.Module, batch: Batch, device: str) -> dict[str, Tensor]:
    """A batch as the model wants it: token ids, pixels, labels."""
    import inspect

    config: Any = model.config
    names = inspect.signature(model.forward).parameters
    inputs: dict[str, Tensor] = {}
    ids: dict[str, Any] = {"dtype": torch.long, "device": device}
    if "pixel_values" in names:
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        dtype = next((p.dtype for p in model.parameters()), torch.float32)
        shape = (batch.rows, getattr(vision, "num_channels", 3), height, width)
        inputs["pixel_values"] = torch.zeros(shape, dtype=dtype, device=device)
    if "input_ids" in names:
        inputs["input_ids"] = torch.zeros(batch.rows, batch.length, **ids)
        if "attention_mask" in names:
            inputs["attention_mask"] = torch.ones(batch.rows, batch.length, **ids)
    if "labels" in names:
        one = _one_label(model)
        inputs["labels"] = torch.zeros((batch.rows,) if one else (batch.rows, batch.length), **ids)
    return inputs


@contextlib.contextmanager
def _mask_made(padded: bool) -> Iterator[None]:
    """Whether transformers makes an attention mask: it does for fake tensors, for it can't see that all their rows are full."""
    from transformers import masking_utils as module

    masking_utils: Any = module
    before = masking_utils.is_tracing
    if not padded:
        masking_utils.is_tracing = lambda tensor=None: False
    try:
        yield
    finally:
        masking_utils.is_tracing = before


def _one_label(model: nn.Module) -> bool:
    return "Classification" in type(model).__name__ and "Token" not in type(model).__name__


def trace(model: nn.Module, stacks: Stacks, settings: StepSettings, bank: Bank | None = None, slot: str = "") -> Course:
    """The course of one step of the whole model.

    Args:
        model: of fake tensors, with its adapters and its measures on it; as `stacks` saw it.
        stacks: of the model.
        bank, slot: the adapter that is trained; without, what requires a gradient is.
    """
    device = str(next(model.parameters()).device.type)
    model.train()
    with stacks.shortened() as short, _mask_made(settings.batch.padded):
        for parameter in short.parameters():
            parameter.grad = None
        inputs = batch_of(short, settings.batch, device)
        work = _Work.of(short, settings, bank, slot)
        if settings.accumulates:
            work.run(stacks, inputs, Tape())
        tape = Tape()
        tape.ignore(_held(short, inputs))
        marks = work.run(stacks, inputs, tape)
        segments = _segments(tape, marks, [p.grad for p in short.parameters() if p.grad is not None], settings)
        for parameter in short.parameters():
            parameter.grad = None
    return stretch(segments, [stack.stands_for for stack in stacks.stacks])


def _held(model: nn.Module, inputs: dict[str, Tensor]) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    yield from inputs.values()
    for parameter in model.parameters():
        if parameter.grad is not None:
            yield parameter.grad


@dataclass
class _Mark:
    """From this place on the tape: a layer, or what is outside of layers."""

    at: int
    flops: int
    layer: tuple[int, int, str] | None
    phase: str


@dataclass
class _Shown:
    """A bank, as far as its sites are in the shortened model."""

    model: nn.Module
    bank: Bank

    def named_parameters(self, slot: str) -> Iterator[tuple[str, nn.Parameter]]:
        there = {id(parameter) for parameter in self.model.parameters()}
        return ((name, found) for name, found in self.bank.named_parameters(slot) if id(found) in there)

    def spec(self, slot: str) -> LoraSpec:
        return self.bank.spec(slot)


@dataclass
class _Work:
    """Forward, loss and backward as `AdapterTrainer` does them.

    Attributes:
        chunked: the loss in parts, or None. seeds: of rows, where dropout draws by row.
    """

    model: nn.Module
    settings: StepSettings
    bank: Bank | None
    slot: str
    chunked: Any = None
    seeds: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, settings: StepSettings, bank: Bank | None, slot: str) -> _Work:
        """What a model, a bank and the settings mean."""
        work = cls(model, settings, bank, slot)
        if bank is None:
            return work
        if settings.loss_chunk is not None:
            from weft.train.chunked import ChunkedLoss

            with Tape():  # answers what the loss asks of the model
                shown: Any = _Shown(model, bank)
                work.chunked = ChunkedLoss(model, shown, slot, settings.loss_chunk)
        if any(own.dropout for own in bank.spec(slot).everywhere()):
            work.seeds = tuple(range(settings.batch.rows))
        return work

    def run(self, stacks: Stacks, inputs: dict[str, Tensor], tape: Tape) -> list[_Mark]:
        """Forward, loss and backward; gives where what began."""
        marks = [_Mark(0, 0, None, "forward")]

        def mark(layer: tuple[int, int, str] | None, phase: str) -> None:
            marks.append(_Mark(tape.now, tape.flops, layer, phase))

        device = next(iter(inputs.values())).device.type
        route: Any = contextlib.nullcontext()
        if self.bank is not None and self.seeds:
            route = self.bank.route([self.slot] * len(self.seeds), seeds=self.seeds)
        with _marking(self.model, stacks, marks, mark), route, tape:
            with _autocast(device, self.settings.precision):
                loss = self._loss(inputs, mark)
            mark(None, "backward")
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
            mark(None, "end")
        return marks

    def _loss(self, inputs: dict[str, Tensor], mark: Any) -> Tensor:
        """The loss; models without labels get the mean of their first output."""
        labels = inputs.get("labels")
        if self.chunked is not None and labels is not None:
            with self.chunked.watching():
                self._forward(inputs)
                mark(None, "loss")
                total, count = self.chunked.total(labels)
                return total / count  # type: ignore[no-any-return]
        outputs = self._forward(inputs)
        mark(None, "loss")
        if labels is None:
            first = next(value for value in outputs.values() if isinstance(value, Tensor) and value.requires_grad)
            return first.float().mean()
        values, _ = losses(outputs.logits, labels)
        return values.sum() / len(values)

    def _forward(self, inputs: dict[str, Tensor]) -> Any:
        from accelerate.utils.operations import convert_outputs_to_fp32  # type: ignore[import-untyped]

        labels = inputs.get("labels")
        given: dict[str, Any] = dict(inputs)
        if not getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            given.pop("labels", None)
        if self.chunked is not None:
            given = self.chunked.prepare(given)
        elif labels is not None and labels.dim() == 2 and keeps_logits(self.model):
            given["logits_to_keep"] = wanted_positions(labels)
        call = convert_outputs_to_fp32(self.model.forward) if self.settings.precision != "no" else self.model
        return call(**given)


@contextlib.contextmanager
def _marking(model: nn.Module, stacks: Stacks, marks: list[_Mark], mark: Any) -> Iterator[None]:
    """Hooks that mark where layers begin and end; none of them changes what is computed or kept."""
    handles = []

    def forward_only() -> bool:
        return all(found.phase != "backward" for found in marks)

    for number, stack in enumerate(stacks.stacks):
        layers = list(model.get_submodule(stack.path))  # type: ignore[call-overload]
        for place, layer in enumerate(layers):

            def begin(module: nn.Module, args: Any, _at: tuple[int, int] = (number, place)) -> None:
                if forward_only():
                    mark((*_at, "forward"), "forward")

            def end(
                module: nn.Module, args: Any, out: Any, _at: tuple[int, int] = (number, place), _last: bool = place == len(layers) - 1
            ) -> None:  # fmt: skip
                if not forward_only():
                    return
                if _last:
                    mark(None, "forward")
                first = out if isinstance(out, Tensor) else next((t for t in out if isinstance(t, Tensor)), None)
                if first is not None and first.requires_grad:
                    first.register_hook(lambda _: mark((*_at, "backward"), "backward"))  # type: ignore[no-untyped-call]

            handles += [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _autocast(device: str, precision: str) -> contextlib.AbstractContextManager[Any]:
    if precision == "no":
        return contextlib.nullcontext()
    return torch.autocast(device, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)


def _segments(tape: Tape, marks: list[_Mark], gradients: list[Tensor], settings: StepSettings) -> list[Segment]:
    """The tape, cut at the marks, with bytes by part."""
    last = tape.now
    forward_end = next((mark.at for mark in marks if mark.phase == "backward"), last)
    owned = {id(storage) for gradient in gradients if (storage := tape.of(gradient)) is not None}
    deltas: list[tuple[int, int]] = [(0, 0)] * last
    for storage in tape.storages:
        part = PARTS.index(_part(storage, forward_end, id(storage) in owned, settings.vocabulary))
        deltas[storage.born] = (part, storage.size)
        if storage.died is not None:
            deltas[storage.died] = (part, -storage.size)
    found = []
    ends = [*(mark.at for mark in marks[1:]), last]
    flop_ends = [*(mark.flops for mark in marks[1:]), tape.flops]
    for mark, end, flops in zip(marks, ends, flop_ends, strict=True):
        change, peak = _extent(deltas[mark.at : end])
        phase = "backward" if mark.phase == "end" else mark.phase
        found.append(Segment(mark.layer, change, peak, flops - mark.flops, phase))
    return found


def _part(storage: Any, forward_end: int, is_gradient: bool, vocabulary: int) -> str:
    if is_gradient:
        return "gradients"
    if vocabulary and storage.width == vocabulary:
        return "logits"
    survives = storage.born < forward_end and (storage.died is None or storage.died >= forward_end)
    return "activations" if survives else "temporary"


def _extent(deltas: list[tuple[int, int]]) -> tuple[Vector, Vector]:
    """(what is left at the end, the highest moment), by part, above the start."""
    live = [0] * len(PARTS)
    total = best = 0
    high = tuple(live)
    for part, size in deltas:
        live[part] += size
        total += size
        if total > best:
            best, high = total, tuple(live)
    return tuple(map(float, live)), tuple(map(float, high))
