"""Golden prompts: what an adapter said when it was saved, so that any later load can prove that it is applied.

`make_proof` -> tensors for `Adapter.proof`; `prove` -> `ProofReport`. Shapes: n prompts, t tokens, V logits.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapter import Adapter
from weft.data import Encoded
from weft.data.pictures import EncodedImages
from weft.data.talks import EncodedTalks
from weft.errors import FormatError
from weft.train.opening import opened

__all__ = ["TOLERANCES", "ProofReport", "make_proof", "proof_of", "prove"]

TOLERANCES = {
    torch.float64: 1e-5,  # the proof itself is stored in float32, 6e-8 a number
    torch.float32: 1e-3,  # 6e-8 a product; other machines sum in another order, over thousands of terms and tens of layers
    torch.float16: 3e-2,  # 5e-4 a product
    torch.bfloat16: 2e-1,  # 4e-3 a product
}
"""Largest difference of a logit, relative to the spread of the stored logits, by dtype of the base."""

PROMPTS, TOKENS, LARGE_VOCABULARY, IMAGES = 4, 32, 65536, 2


@dataclass(frozen=True)
class ProofReport:
    """Whether an adapter does on this model what it did when it was saved.

    Attributes:
        ok: the logits are those that were stored, and the base's own are not.
        error: largest difference between stored logits and those now, relative to the stored logits' spread.
        effect: the same between the logits now with and without the adapter.
        tolerance: for this dtype. prompts: how many were compared. same: prompts whose most likely token is the same.
    """

    ok: bool
    error: float
    effect: float
    tolerance: float
    dtype: str
    prompts: int
    same: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dict(vars(self))

    def text(self) -> str:
        """One line for people."""
        verdict = "proved: the adapter is applied" if self.ok else "NOT proved"
        why = ""
        if not self.ok and self.error > self.tolerance:
            why = " (the answers are not those that were stored with the adapter)"
        elif not self.ok:
            why = " (the adapter makes no difference that could be measured)"
        return (
            f"{verdict}{why}: {self.same} of {self.prompts} prompts give the same token, largest difference {self.error:.2g} "
            f"(allowed in {self.dtype}: {self.tolerance:g}), the adapter moves the logits by {self.effect:.2g}"
        )


def make_proof(
    model: nn.Module,
    features: Encoded | EncodedImages | EncodedTalks,
    collate: Callable[[list[Any]], dict[str, Tensor]] | None = None,
) -> Mapping[str, Tensor]:
    """Golden prompts and what the model says to them now.

    Args:
        model: with the adapter in use.
        features: where prompts are taken from: the start of at most 4 different ones, all of one length; or two images.
        collate: makes pixels of images.

    Returns:
        ``input_ids`` (n, t) int64 and ``logits`` (n, V) float32 at the last position; of a classifier, its logits;
        for images ``pixel_values`` (n, 3, H, W) in the place of ``input_ids``.
    """
    if isinstance(features, EncodedImages):
        assert collate is not None
        batch = collate([features[index] for index in range(min(len(features), IMAGES))])
        pixels = batch["pixel_values"]
        return {"pixel_values": pixels.clone(), "logits": last_logits(model, pixels, "pixel_values").clone()}
    if isinstance(features, EncodedTalks):
        return {}  # the pixels of a conversation have another layout in every architecture
    rows: list[Any] = []
    seen: set[bytes] = set()
    for index in range(min(len(features), 64)):
        ids = features[index]["input_ids"][:TOKENS]
        if ids.tobytes() not in seen:
            seen.add(ids.tobytes())
            rows.append(ids)
    return _golden(model, sorted(rows, key=len)[-PROMPTS:])


def proof_of(adapter: Adapter, model: nn.Module, proofs: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Golden prompts that other adapters carry, in turns, with what this one says to them; empty where none carries any.

    Args:
        adapter: for this base, which is not asked again.
        model: the base, with or without a bank; it is left as it was.
        proofs: of the others, see `Adapter.proof`.
    """
    turns = itertools.zip_longest(*(proof["input_ids"] for proof in proofs if "input_ids" in proof))
    rows = {tuple(row.tolist()): row for turn in turns for row in turn if row is not None}
    if not rows:
        return {}
    with opened((model, None), adapter, allow_other_base=True) as ready, ready.using(True):
        return _golden(model, list(rows.values())[:PROMPTS])


def _golden(model: nn.Module, rows: Sequence[Any]) -> Mapping[str, Tensor]:
    """The starts of prompts, of one length, and what the model says to them now."""
    length = min(map(len, rows))
    input_ids = torch.stack([torch.as_tensor(row[:length], dtype=torch.long) for row in rows])
    logits = last_logits(model, input_ids)
    if logits.shape[-1] > LARGE_VOCABULARY:
        input_ids, logits = input_ids[:2], logits[:2]
    return {"input_ids": input_ids.clone(), "logits": logits.clone()}


@torch.no_grad()
def last_logits(model: nn.Module, inputs: Tensor, name: str = "input_ids") -> Tensor:
    """(n, V) float32 on the CPU: logits at the last position, one prompt at a time, in eval mode."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        found = []
        for row in inputs.to(device):
            rest = {"attention_mask": torch.ones_like(row[None])} if name == "input_ids" else {}
            logits = model(**{name: row[None]}, **rest).logits
            found.append(logits[0, -1] if logits.dim() == 3 else logits[0])
    finally:
        model.train(training)
    return torch.stack(found).float().cpu()


def prove(
    adapter: Adapter | str | os.PathLike[str], model: nn.Module, *, allow_other_base: bool = False
) -> ProofReport:
    """Compare what an adapter says on this model with what it said when it was saved.

    Args:
        adapter: an adapter with a proof (weft saves one with each training), or its path.
        model: the base, with or without a bank; it is left as it was.
        allow_other_base: compare even on a base with another fingerprint.

    Raises:
        FormatError: the adapter has no proof.
        BaseMismatchError: it was made for another base.
    """
    with opened((model, None), adapter, allow_other_base=allow_other_base) as ready:
        assert ready.adapter is not None
        proof = ready.adapter.proof
        name = "pixel_values" if "pixel_values" in proof else "input_ids"
        if not {name, "logits"} <= proof.keys():
            where = "" if isinstance(adapter, Adapter) else adapter
            raise FormatError(
                "no golden prompts, so nothing can be proved; adapters that weft trains have them", path=where
            )
        with ready.using(True):
            now = last_logits(model, proof[name], name)
        with ready.using(False):
            without = last_logits(model, proof[name], name)
    stored = proof["logits"].float()
    spread = float(stored.std().clamp_min(1e-12))
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    error = float((now - stored).abs().max()) / spread
    effect = float((now - without).abs().max()) / spread
    tolerance = TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])
    same = int((now.argmax(-1) == stored.argmax(-1)).sum())
    return ProofReport(
        ok=error <= tolerance and effect > error,
        error=error,
        effect=effect,
        tolerance=tolerance,
        dtype=str(dtype).removeprefix("torch."),
        prompts=len(stored),
        same=same,
    )
