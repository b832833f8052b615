"""weft.attach: a bank on a model, with what is known of its architecture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from weft.core.bank import Bank
from weft.core.bank import attach as attach_bank
from weft.core.towers import towers_of
from weft.models.targets import resolve_default
from weft.spec import LoraSpec

__all__ = ["attach", "resolved_spec"]


def attach(
    model: nn.Module,
    specs: Mapping[str, LoraSpec | Mapping[str, LoraSpec]] | LoraSpec,
    *,
    batches: Iterable[Mapping[str, Any]] | None = None,
    seed: int | None = None,
) -> Bank:
    """Hang trainable adapters on a base. ``targets="default"`` becomes the architecture's usual choice.

    Args:
        model: the base, any `torch.nn.Module`. Frozen while attached; its bytes never change.
        specs: a spec by adapter name; one spec alone is called ``"default"``. The first one is in use. In the place of a spec may
            stand one by part of the model, ``{"mine": {"text_model": spec, "vision_model": spec}}``, see `LoraSpec.towers`; of a
            `weft.TwoTower` its projections and head are then trained whole.
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
    resolved = {name: resolved_spec(model, spec) for name, spec in named.items()}
    return attach_bank(model, resolved, batches=batches, seed=seed)


def resolved_spec(model: nn.Module, spec: LoraSpec | Mapping[str, LoraSpec]) -> LoraSpec:
    """A spec as the core wants it: towers as one spec, usual sites by name, heads of a two-tower model among what is trained whole.

    Raises:
        TargetError, SpecError: see `weft.attach`.
    """
    if not isinstance(spec, LoraSpec):
        spec = LoraSpec(towers=spec)
    if not spec.towers:
        return resolve_default(model, spec)
    parts = towers_of(model, spec)
    towers = {name: resolve_default(parts[name], tower) for name, tower in spec.towers.items()}
    heads = () if spec.save_modules else tuple(getattr(model, "weft_heads", ()))
    return spec.replace(towers=towers, save_modules=(*spec.save_modules, *heads))
