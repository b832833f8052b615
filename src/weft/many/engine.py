"""Forward, backward and measuring of forwards that hold rows of several adapters; and the slow, obvious engine.

    Engine      what all engines do: batches, losses, measures
    Apart       each adapter by itself, one after another, with torch's own AdamW: the reference, and the way for adapters
                that can't be stacked (heads that are trained whole, convolutions …)

`weft.many.together.Together` is the fast one. This module knows batches and banks, not users, schedules or folders.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapter import Adapter, Provenance
from weft.core.bank import Bank
from weft.core.dropout import own_stream
from weft.core.resizing import Resize
from weft.core.site import Site
from weft.data import Collator, collator
from weft.many.adamw import BETAS, EPSILON
from weft.many.losses import find_head, head_losses, model_losses
from weft.many.pieces import OVERHEAD, Piece, compose
from weft.spec import LoraSpec
from weft.train.moments import carry
from weft.train.ranks import fits, sizes
from weft.train.scoring import by_row, keeps_logits, losses, wanted_positions
from weft.train.trainer import rate_and_decay

__all__ = ["Apart", "Engine", "Measured", "Move", "Settings"]


@dataclass(frozen=True)
class Settings:
    """What all adapters of a run share.

    Attributes:
        budget: most tokens in one forward, padding included.
        overhead: what one more forward costs, in tokens.
        bf16: run in bfloat16 by autocast.
        reduce: adds up gradients over processes, in place; None: there is one.
    """

    budget: int = 1024
    overhead: int = OVERHEAD
    bf16: bool = False
    reduce: Any = None


@dataclass(frozen=True)
class Move:
    """One optimizer step of one adapter.

    Attributes:
        rate, ratio, decay: learning rate, that of B over it (None: the same), weight decay.
        clip: largest norm of its gradient; 0: any.
        step: steps that it has done before.
        watch: takes path, ``"A"`` or ``"B"``, factor and gradient of every site, after clipping and before it moves; None: nobody.
    """

    key: str
    rate: float
    clip: float
    decay: float
    ratio: float | None
    step: int
    watch: Callable[[str, str, Tensor, Tensor], None] | None = None


@dataclass(frozen=True)
class Measured:
    """Losses of the rows of one piece.

    Attributes:
        sums: (rows,) float64; counts: (rows,) learned tokens or labels.
        predicted, labels: (rows,) of a classification, else None.
    """

    sums: Tensor
    counts: Tensor
    predicted: Tensor | None = None
    labels: Tensor | None = None


class Engine:
    """A base, a bank on it, and how forwards of several adapters are made."""

    def __init__(self, model: nn.Module, bank: Bank, tokenizer: Any, settings: Settings | None = None) -> None:
        self.model, self.bank = model, bank  # `draws`: the base has dropout of its own
        self.settings = settings or Settings()
        self.device = next(model.parameters()).device
        self._tokenizer = tokenizer
        self._collators: dict[tuple[bool, bool], Collator] = {}
        self._head = find_head(model)
        self._keeps = keeps_logits(model)
        self.draws = has_dropout(model)

    # what an engine is

    def enter(self, key: str, spec: LoraSpec, seed: int, batches: Any = None) -> None:
        """A place for a new adapter."""
        raise NotImplementedError

    def leave(self, key: str) -> None:
        """Take an adapter out."""
        raise NotImplementedError

    def parts(self, key: str) -> dict[str, Tensor]:
        """Everything that is trained of an adapter, by name: the tensors themselves, or views of them."""
        raise NotImplementedError

    def moments(self, key: str) -> dict[str, Tensor]:
        """The optimizer's state of an adapter, by name: the tensors themselves, or views of them."""
        raise NotImplementedError

    def step(self, moves: Sequence[Move]) -> dict[str, float]:
        """Clip and move each adapter by its own gradient, and forget gradients.

        Returns:
            by adapter the norm that its gradient had. An adapter whose norm is not finite is not moved.
        """
        raise NotImplementedError

    def forget(self) -> None:
        """Drop all gradients."""
        raise NotImplementedError

    def slots(self, key: str) -> Mapping[str, tuple[Site, Any]]:
        """What stands at the sites of an adapter, by path."""
        raise NotImplementedError

    def resize(self, key: str, changes: Mapping[str, Resize]) -> None:
        """Give an adapter's sites more, fewer or other directions; the optimizer's state goes along."""
        raise NotImplementedError

    @contextlib.contextmanager
    def routed(self, part: Sequence[Piece], seeded: bool) -> Iterator[None]:
        """The route of a forward: every row its adapter, with its own dropout."""
        entries = [piece.key for piece in part for _ in range(piece.rows)]
        seeds = [seed for piece in part for seed in piece.seeds] if seeded else None
        with self.bank.route(entries, seeds=seeds):
            yield

    @contextlib.contextmanager
    def using(self, key: str | None) -> Iterator[None]:
        """One adapter for all rows."""
        with self.bank.route(key):
            yield

    def forwards(self, pieces: Sequence[Piece]) -> list[list[Piece]]:
        """Which pieces are computed together."""
        if self.draws and any(piece.seeds for piece in pieces):  # what the base drops would depend on the neighbours
            return [[piece] for piece in sorted(pieces, key=lambda piece: piece.micro)]
        return compose(pieces, self.settings.budget, self.settings.overhead)

    # what all do

    def copy(self, key: str) -> dict[str, Tensor]:
        """A copy of an adapter's trained tensors, on the CPU."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.parts(key).items()}

    def state(self, key: str) -> dict[str, Tensor]:
        """A copy of all that is needed to go on with an adapter elsewhere, on the CPU."""
        moments = {f"moment/{name}": tensor.detach().to("cpu", copy=True) for name, tensor in self.moments(key).items()}
        return {f"factor/{name}": tensor for name, tensor in self.copy(key).items()} | moments

    def sizes(self, key: str) -> dict[str, list[float]]:
        """Rank and scale of an adapter's sites."""
        return sizes(self.slots(key))

    def fit(self, key: str, wanted: Mapping[str, Sequence[float]]) -> None:
        """Make room for factors of other `sizes`, which are written then."""
        slots = self.slots(key)
        changes = fits(slots, wanted) if wanted else {}
        if changes:
            self.resize(key, changes)

    @torch.no_grad()
    def put(self, key: str, factors: Mapping[str, Tensor]) -> None:
        """Write trained tensors back."""
        for name, tensor in self.parts(key).items():
            tensor.copy_(factors[name])

    @torch.no_grad()
    def restore(self, key: str, state: Mapping[str, Tensor]) -> None:
        """Be where `state` was taken."""
        self.put(
            key, {name.removeprefix("factor/"): tensor for name, tensor in state.items() if name.startswith("factor/")}
        )
        for name, tensor in self.moments(key).items():
            tensor.copy_(state[f"moment/{name}"])

    def adapter(self, key: str, provenance: Provenance | None = None) -> Adapter:
        """A snapshot of an adapter as a value."""
        return self.bank.adapter(key, provenance)

    def train(self, pieces: Sequence[Piece]) -> dict[str, float]:
        """Forward and backward of all pieces; gradients add up.

        Returns:
            by adapter the sum of its weighted losses: the mean over what it learns, where this process has all its rows.
        """
        found: dict[str, float] = {}
        self.model.train()
        for part in self.forwards(pieces):
            with (
                self.routed(part, seeded=True),
                own_stream(part[0].stream) if self.draws else contextlib.nullcontext(),
            ):
                total, values, rows, weights = self._losses(part)
                total.backward()  # type: ignore[no-untyped-call]
            sums, _ = by_row(values * weights[rows], rows, len(weights))
            for piece, own in _by_piece(part, sums):
                assert piece.key is not None
                found[piece.key] = found.get(piece.key, 0.0) + float(own.sum())
        return found

    @torch.no_grad()
    def measure(self, pieces: Sequence[Piece]) -> list[Measured]:
        """Losses by row, in the order of the pieces; nothing is drawn and nothing learned."""
        found: dict[int, Measured] = {}
        training = self.model.training
        self.model.eval()
        try:
            for part in self.forwards(pieces):
                with self.routed(part, seeded=False):
                    self._measure(part, found)
        finally:
            self.model.train(training)
        return [found[id(piece)] for piece in pieces]

    def _measure(self, part: Sequence[Piece], found: dict[int, Measured]) -> None:
        if part[0].classifies:
            inputs, labels, weights = self._batch(part)
            logits = self._logits(inputs)
            values, rows = losses(logits, labels)
            guesses: Tensor | None = logits.argmax(-1)
        else:
            _, values, rows, weights = self._losses(part)
            guesses, labels = None, None
        sums, counts = by_row(values, rows, len(weights))
        start = 0
        for piece in part:
            own = slice(start, start + piece.rows)
            start += piece.rows
            pair = (None, None) if guesses is None or labels is None else (guesses[own].cpu(), labels[own].cpu())
            found[id(piece)] = Measured(sums[own].cpu(), counts[own].cpu(), *pair)

    def _logits(self, inputs: Mapping[str, Any]) -> Tensor:
        with self._autocast():
            logits: Tensor = self.model(**inputs).logits
        return logits

    def _losses(self, part: Sequence[Piece]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weighted sum, losses, their rows, and the weights by row."""
        inputs, labels, weights = self._batch(part)
        with self._autocast():
            if self._head is not None and not part[0].classifies and self._untouched(part):
                return *head_losses(self._head, inputs, labels, weights), weights
            if self._keeps and not part[0].classifies:
                inputs["logits_to_keep"] = wanted_positions(labels)
            return *model_losses(self.model, inputs, labels, weights), weights

    def _untouched(self, part: Sequence[Piece]) -> bool:
        """Whether the head is the base's own in this forward."""
        assert self._head is not None
        return "_weft" not in self._head.linear.__dict__

    def _batch(self, part: Sequence[Piece]) -> tuple[dict[str, Any], Tensor, Tensor]:
        """Inputs, labels and weights by row."""
        kind = (part[0].packed, part[0].classifies)
        if kind not in self._collators:
            name = "classification" if kind[1] else "text"
            self._collators[kind] = collator(self._tokenizer, name, packed=kind[0])
        batch = self._collators[kind]([feature for piece in part for feature in piece.features])
        inputs = {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        weights = [piece.weight for piece in part for _ in range(piece.rows)]
        wide = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
        return inputs, inputs.pop("labels"), torch.tensor(weights, dtype=wide, device=self.device)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16)


def has_dropout(model: nn.Module) -> bool:
    """Whether the base itself drops something in training, in a module or by its config."""
    if any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in model.modules()):
        return True
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    return any("drop" in name and isinstance(value, float) and value > 0 for name, value in settings.items())


class Apart(Engine):
    """The slow, obvious engine: adapter after adapter, torch's AdamW for each."""

    def __init__(self, model: nn.Module, bank: Bank, tokenizer: Any, settings: Settings | None = None) -> None:
        super().__init__(model, bank, tokenizer, settings)
        self._optimizers: dict[str, torch.optim.AdamW] = {}

    def enter(self, key: str, spec: LoraSpec, seed: int, batches: Any = None) -> None:
        """A slot of the bank, with the factors that `weft.attach` gives."""
        self.bank.add(key, spec, batches=batches, seed=seed)
        self._optimizers[key] = torch.optim.AdamW(
            [{"params": [parameter], "name": name} for name, parameter in self.bank.named_parameters(key)],
            lr=0.0, betas=BETAS, eps=EPSILON,
        )  # fmt: skip

    def leave(self, key: str) -> None:
        """Drop the slot."""
        del self._optimizers[key]
        self.bank.drop(key)

    def forwards(self, pieces: Sequence[Piece]) -> list[list[Piece]]:
        """Each piece by itself."""
        return [[piece] for piece in sorted(pieces, key=lambda piece: piece.micro)]

    def parts(self, key: str) -> dict[str, Tensor]:
        """The slot's parameters."""
        return dict(self.bank.named_parameters(key))

    def moments(self, key: str) -> dict[str, Tensor]:
        """Adam's moments and step counts."""
        found: dict[str, Tensor] = {}
        for group in self._optimizers[key].param_groups:
            (parameter,) = group["params"]
            state = self._optimizers[key].state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            found |= {f"{group['name']}/{name}": state[name] for name in ("step", "exp_avg", "exp_avg_sq")}
        return found

    def slots(self, key: str) -> Mapping[str, tuple[Site, Any]]:
        """Those of the bank."""
        return self.bank.slots(key)

    def resize(self, key: str, changes: Mapping[str, Resize]) -> None:
        """New parameters in the slot, which the optimizer takes over."""
        carry(self._optimizers[key], self.bank.resize(key, changes))

    def step(self, moves: Sequence[Move]) -> dict[str, float]:
        """`torch.nn.utils.clip_grad_norm_` and `torch.optim.AdamW`, adapter by adapter."""
        norms = {}
        for move in moves:
            optimizer = self._optimizers[move.key]
            parameters = [group["params"][0] for group in optimizer.param_groups]
            for parameter in parameters:
                if self.settings.reduce is not None and parameter.grad is not None:
                    self.settings.reduce(parameter.grad)
            norm = torch.nn.utils.clip_grad_norm_(parameters, move.clip or float("inf"))
            norms[move.key] = float(norm)
            for group in optimizer.param_groups:
                group["lr"], group["weight_decay"] = rate_and_decay(group["name"], move.rate, move.decay, move.ratio)
            if torch.isfinite(norm):
                if move.watch is not None:
                    _show(self.bank.slots(move.key), move.watch)
                optimizer.step()
        self.forget()
        return norms

    def forget(self) -> None:
        """Drop all gradients."""
        for optimizer in self._optimizers.values():
            optimizer.zero_grad()


def _show(slots: Mapping[str, tuple[Site, Any]], watch: Callable[[str, str, Tensor, Tensor], None]) -> None:
    for path, (_, slot) in slots.items():
        for leaf, parameter in (("A", slot.lora_A), ("B", slot.lora_B)):
            if parameter.grad is not None:
                watch(path, leaf, parameter, parameter.grad)


def _by_piece(part: Sequence[Piece], values: Tensor) -> Iterator[tuple[Piece, Tensor]]:
    """Each piece with its rows' values."""
    start = 0
    for piece in part:
        yield piece, values[start : start + piece.rows]
        start += piece.rows
