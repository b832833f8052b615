"""Cross-entropy in parts: the logits of a large vocabulary are never there whole, neither in the forward nor in the backward.

The body runs once, and the model's own forward then runs around it part by part, with a body that only hands over its hidden states:
so whatever the model does to its logits (soft-capping, a scale, an adapted head) is done by the model. Each part's gradient is made
right after its loss, while its logits are there; nothing is computed twice. `reference_sum` is the slow, obvious form.

Shapes: B rows, T tokens, K positions whose next token is learned in some row, t of them in a part, d width, V vocabulary.
This module does not know trainers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.core.bank import Bank
from weft.errors import RecipeError
from weft.train.scoring import IGNORED, keeps_logits, wanted_positions

__all__ = ["ChunkedLoss", "reference_sum"]

Head = Callable[[Tensor], Tensor]


class ChunkedLoss:
    """The loss of a causal language model, ``tokens`` logits at a time.

    Args:
        model: with a bank on it; not wrapped.
        bank: says what is trained. slot: the adapter.
        tokens: logits at once, at least one position of each row.

    Raises:
        RecipeError: the model has no body and head that could run apart; or the head is a site with dropout.
    """

    def __init__(self, model: nn.Module, bank: Bank, slot: str, tokens: int) -> None:
        self.model, self.tokens = model, tokens
        self.body = _body(model, tokens)
        inside = f"{model.base_model_prefix}."
        self._of_head = lambda: [(n, p) for n, p in bank.named_parameters(slot) if not n.startswith(inside)]
        if bank.spec(slot).dropout and any(name.endswith("lora_A") for name, _ in self._of_head()):
            raise RecipeError(
                f"loss_chunk={tokens}: the head is a site with dropout={bank.spec(slot).dropout}, whose draws would depend on the parts; "
                "set dropout=0, take the head out of the targets, or leave loss_chunk out"
            )
        self._hidden: Any = None
        self._hands = False
        self._probe()

    def prepare(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Model inputs so that the forward makes no logits."""
        none = torch.empty(0, dtype=torch.long, device=inputs["input_ids"].device)
        return {**inputs, "logits_to_keep": none}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Remember the hidden states of the forward inside."""

        def see(module: nn.Module, args: Any, output: Any) -> None:
            if not self._hands:
                self._hidden = output

        handle = self.body.register_forward_hook(see)
        try:
            yield
        finally:
            handle.remove()
            self._hidden = None

    def total(self, labels: Tensor) -> tuple[Tensor, int]:
        """The sum of the losses of all that is learned, and how much that is; inside of `watching`, after the forward."""
        hidden, targets = self._wanted(labels)
        step = max(1, self.tokens // len(labels))
        parts = list(zip(hidden.split(step, dim=1), targets.split(step, dim=1), strict=True))  # type: ignore[no-untyped-call]
        trained = [parameter for _, parameter in self._of_head()]  # asked each time: adaptive ranks make new ones
        with self._handing() as head:
            result: Tensor = _Total.apply(head, parts, hidden, *trained)  # type: ignore[no-untyped-call]
        return result, int((targets != IGNORED).sum())

    @torch.no_grad()
    def by_row(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Losses summed by row in float64, and how many each row has: (B,) and (B,); as `weft.train.scoring.by_row`."""
        hidden, targets = self._wanted(labels)
        sums = hidden.new_zeros(len(labels), dtype=torch.float64)
        step = max(1, self.tokens // len(labels))
        with self._handing() as head:
            for part, wanted in zip(hidden.split(step, dim=1), targets.split(step, dim=1), strict=True):  # type: ignore[no-untyped-call]
                sums += _losses(head(part), wanted).double().sum(1)
        return sums, (targets != IGNORED).sum(1)

    @torch.no_grad()
    def _probe(self) -> None:
        """See on two tokens that the model's forward around the body gives the model's logits."""
        training = self.model.training
        self.model.eval()
        ids = torch.zeros(1, 2, dtype=torch.long, device=next(self.body.parameters()).device)
        try:
            with self.watching():
                expected = self.model(input_ids=ids, use_cache=False).logits
                seen = self._hidden is not None and self._hidden[0].shape[:2] == ids.shape
                if seen:
                    with self._handing() as head:
                        seen = torch.equal(head(self._hidden[0]), expected)
        finally:
            self.model.train(training)
        if not seen:
            raise _refusal(self.model, self.tokens)

    def _wanted(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K, d) hidden states and the (B, K) tokens that follow them."""
        hidden = self._hidden[0]
        positions = wanted_positions(labels).to(hidden.device)
        whole = len(positions) == hidden.shape[1] - 1
        return hidden[:, :-1] if whole else hidden[:, positions], labels[:, positions + 1].to(hidden.device)

    @contextlib.contextmanager
    def _handing(self) -> Iterator[Head]:
        """The model's forward as a function of hidden states (B, t, d) alone, to logits (B, t, V)."""
        form, handed = type(self._hidden), None

        def body(*args: Any, **kwargs: Any) -> Any:
            return form(last_hidden_state=handed)

        def head(part: Tensor) -> Tensor:
            nonlocal handed
            handed = part
            ids = torch.zeros(part.shape[:2], dtype=torch.long, device=part.device)
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
            return logits

        had = self.body.__dict__.get("forward")
        self.body.forward, self._hands = body, True
        try:
            yield head
        finally:
            self._hands = False
            del self.body.__dict__["forward"]
            if had is not None:
                self.body.__dict__["forward"] = had


class _Total(torch.autograd.Function):
    """The sum over the parts. Gradients are those of the sum, so that they are neither tiny nor huge in half precision."""

    @staticmethod
    def forward(
        ctx: Any, head: Head, parts: Sequence[tuple[Tensor, Tensor]], hidden: Tensor, *trained: nn.Parameter
    ) -> Tensor:
        wants = [hidden.requires_grad, *(parameter.requires_grad for parameter in trained)]
        sums: list[Tensor] = []
        gradients: list[Tensor] = []
        ours = [torch.zeros_like(parameter) for parameter in trained]
        for part, targets in parts:
            with torch.set_grad_enabled(any(wants)):
                given = part.detach().requires_grad_(hidden.requires_grad)
                total = _losses(head(given), targets).sum()
                sums.append(total.detach())
                if any(wants):
                    inputs = [given, *trained] if hidden.requires_grad else list(trained)
                    found = list(torch.autograd.grad(total, inputs))
                    if hidden.requires_grad:
                        gradients.append(found.pop(0))
                    for mine, gradient in zip(ours, found, strict=True):
                        mine += gradient
        ctx.save_for_backward(*([torch.cat(gradients, dim=1)] if gradients else []), *ours)
        ctx.through = bool(gradients)
        return torch.stack(sums).sum() if sums else hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = [gradient * grad.to(gradient.dtype) for gradient in ctx.saved_tensors]
        return (None, None, *([] if ctx.through else [None]), *found)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, t) losses in at least float32; 0 where nothing is learned."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED).view(
        targets.shape
    )


def reference_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """The slow, obvious form: all logits (B, T, V) at once, and the sum of what is learned of labels (B, T)."""
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=IGNORED)


def _body(model: nn.Module, tokens: int) -> nn.Module:
    """The part of a causal language model that makes hidden states."""
    name = getattr(model, "base_model_prefix", "")
    body = getattr(model, name, None) if name else None
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(body, nn.Module) or body is model or head is None or not keeps_logits(model):
        raise _refusal(model, tokens)
    if any(module is head for module in body.modules()):
        raise _refusal(model, tokens)
    return body


def _refusal(model: nn.Module, tokens: int) -> RecipeError:
    return RecipeError(
        f"loss_chunk={tokens}: {type(model).__name__} is no causal language model whose body and head can run apart (a body under its "
        "base_model_prefix that makes the hidden states, output embeddings outside of it, logits_to_keep); leave loss_chunk out"
    )
