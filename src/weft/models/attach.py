"""weft.attach: a bank on a model, with what is known of its architecture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from weft.core.bank import Bank
from weft.core.bank import attach as attach_bank
from weft.models.targets import resolve_default
from weft.spec import LoraSpec

__all__ = ["attach"]


def attach(
    model: nn.Module,
    specs: Mapping[str, LoraSpec] | LoraSpec,
    *,
    batches: Iterable[Mapping[str, Any]] | None = None,
    seed: int | None = None,
) -> Bank:
    """Hang trainable adapters on a base. ``targets="default"`` becomes the architecture's usual choice.

    Args:
        model: the base, any `torch.nn.Module`. Frozen while attached; its bytes never change.
        specs: a spec by adapter name; one spec alone is called ``"default"``. The first one is in use.
        batches: model inputs with labels, for initialisations that look at data (``"eva"``, ``"lora_ga"``).
        seed: of the random factors; None: torch's own generator.

    Returns:
        The bank; also a context manager that detaches at its end.

    Raises:
        BankError: the model has a bank already.
        TargetError: a part of a spec matches nothing; whatever is raised, the model is left as it was.

    Example:
        >>> model, tokenizer = weft.load_base()
        >>> with weft.attach(model, {"mine": weft.LoraSpec(rank=8, targets=["q_proj", "v_proj"])}) as bank:
        ...     train(model)                      # any loop over the parameters that require a gradient
        ...     adapter = bank.adapter("mine")
    """
    named = {"default": specs} if isinstance(specs, LoraSpec) else specs
    resolved = {name: resolve_default(model, spec) for name, spec in named.items()}
    return attach_bank(model, resolved, batches=batches, seed=seed)
