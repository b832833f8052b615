"""Where the tensors of a site stand in PEFT's file, and in which shape: both directions.

PEFT wraps modules. A wrapped module's own weights move to ``<path>.base_layer``; several parameters of one module
(stacked experts) are wrapped one around the other, the first one innermost; nn.MultiheadAttention is wrapped as a
whole, with its out_proj wrapped once more inside.

Shapes: r rank, o = d_out, i = d_in, E experts, c in_channels. This module does not know configs or directories.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from weft.core.factors import Factors, Kind, compact_groups, spread_groups
from weft.errors import ShapeError, UnsupportedError
from weft.formats.peft_keys import PREFIX

__all__ = ["OUT_PROJ_TWICE", "Form", "Layout", "Seat", "decode", "definition_order", "encode", "renamed_by_peft"]

Form = Literal["linear", "embedding", "conv", "parameter", "in_proj", "out_proj"]

OUT_PROJ_TWICE = 2.0
"""PEFT (0.15 to 0.21) adds the update of an nn.MultiheadAttention's out_proj twice in its forward and its merge. Its
files are read and written so that the outputs agree."""

_KNOWN_ORDERS = (
    ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
    ("gate_proj", "up_proj", "down_proj"),
)  # fmt: skip
"""In which order the expert modules of transformers define their parameters."""


def definition_order(names: Iterable[str]) -> list[str] | None:
    """Names of parameters of one module in the order in which it defines them; None where nobody can know."""
    given = list(names)
    if len(given) < 2:
        return given
    for known in _KNOWN_ORDERS:
        if set(given) <= set(known):
            return sorted(given, key=known.index)
    return None


_RENAMED = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
_MIXTURES = re.compile(
    r"moe|mixtral|minimax|deepseek|dots1|longcat|solaropen|qwen3next|qwen3omni|flexolmo", re.IGNORECASE
)


def renamed_by_peft(architecture: str, paths: Iterable[str]) -> frozenset[str]:
    """Linear layers that PEFT 0.21, on transformers 5, takes for something else.

    In mixture-of-experts architectures it takes every target module of these names for the stacked experts, also those of dense layers and
    shared experts, whose updates are then lost. Targeted by their parameter, ``up_proj.weight``, they are found.

    Args:
        architecture: class name of the base, empty if nobody knows.
        paths: of all linear sites.
    """
    known = list(paths)
    if not _MIXTURES.search(architecture) and not any("expert" in path for path in known):
        return frozenset()
    return frozenset(path for path in known if path.rpartition(".")[2] in _RENAMED)


@dataclass(frozen=True)
class Seat:
    """Where one site's tensors stand.

    Attributes:
        key: their keys without the last part: ``base_model.model.<…>.experts.base_layer``.
        name: what PEFT matches its patterns against: the module's path; the parameter's for a bare parameter.
    """

    key: str
    name: str
    form: Form


class Layout:
    """How PEFT wraps the modules of an adapter.

    Args:
        sites: (path, kind) in the order of the model.
        by_weight: linear sites that PEFT has to target by their parameter, see `renamed_by_peft`; their keys are the same.

    Attributes:
        seats: by site.
        targets: module paths that PEFT has to target.
        parameters: parameter paths that PEFT has to target.
        partners: for an attention of which one projection only is adapted, the other one: PEFT has both or none.

    Raises:
        UnsupportedError: a parameter of the model itself, which PEFT can't wrap.
    """

    def __init__(self, sites: Sequence[tuple[str, Kind]], by_weight: frozenset[str] = frozenset()) -> None:
        self.seats: dict[str, Seat] = {}
        self.targets: list[str] = []
        self.parameters: list[str] = []
        self.partners: dict[str, str] = {}
        self._depth: dict[str, int] = {}
        attentions = {path.rpartition(".")[0] for path, kind in sites if kind == "attention"}
        bare: dict[str, list[str]] = {}
        if "" in attentions:
            raise UnsupportedError("PEFT can't adapt an nn.MultiheadAttention that is the model itself, only one in it")
        for path, kind in sites:
            owner, _, leaf = path.rpartition(".")
            if kind == "parameter":
                bare.setdefault(owner, []).append(leaf)
            elif owner in attentions and leaf in ("in_proj_weight", "out_proj"):
                self._depth[owner] = self._depth[f"{owner}.out_proj"] = 1
            else:
                self._depth[path] = 1
        for owner, leaves in bare.items():
            if not owner:
                raise UnsupportedError(
                    f"PEFT can't adapt {leaves[0]!r}, a parameter of the model itself and not of a module in it"
                )
            self._depth[owner] = len(leaves)
        self._seat(
            sites, attentions, {owner: definition_order(leaves) or leaves for owner, leaves in bare.items()}, by_weight
        )

    def _seat(
        self,
        sites: Sequence[tuple[str, Kind]],
        attentions: set[str],
        bare: Mapping[str, list[str]],
        by_weight: frozenset[str],
    ) -> None:
        for path, kind in sites:
            owner, _, leaf = path.rpartition(".")
            if kind == "parameter":
                further_in = len(bare[owner]) - 1 - bare[owner].index(leaf)
                self.seats[path] = Seat(self._module(owner) + ".base_layer" * further_in, path, "parameter")
                self.parameters.append(path)
            elif owner in attentions and leaf in ("in_proj_weight", "out_proj"):
                if owner not in self.targets:
                    self.targets.append(owner)
                inner = leaf == "out_proj"
                self.seats[path] = Seat(
                    self._module(path if inner else owner), owner, "out_proj" if inner else "in_proj"
                )
            else:
                form: Form = "embedding" if kind == "embedding" else "conv" if kind == "conv" else "linear"
                self.seats[path] = Seat(self._module(path), f"{path}.weight" if path in by_weight else path, form)
                (self.parameters if path in by_weight else self.targets).append(self.seats[path].name)
        for owner in attentions:
            pair = (f"{owner}.in_proj_weight", f"{owner}.out_proj")
            for path, other in (pair, pair[::-1]):
                if path in self.seats and other not in self.seats:
                    self.partners[path] = other
                    inner = other == pair[1]
                    self.seats[other] = Seat(
                        self._module(other if inner else owner), owner, "out_proj" if inner else "in_proj"
                    )

    def _module(self, path: str) -> str:
        """The key of a module, with the wrappers that it is inside of."""
        pieces: list[str] = []
        parts = path.split(".")
        for index, part in enumerate(parts):
            pieces.append(part)
            if index < len(parts) - 1:
                pieces += ["base_layer"] * self._depth.get(".".join(parts[: index + 1]), 0)
        return PREFIX + ".".join(pieces)

    def module_key(self, path: str) -> str:
        """The key of a module that is trained whole."""
        return self._module(path)

    def parameter_key(self, path: str) -> str:
        """The key of one of the base's own parameters, such as a bias that is trained."""
        owner, _, leaf = path.rpartition(".")
        if not owner:
            return PREFIX + leaf
        return self._module(owner) + ".base_layer" * self._depth.get(owner, 0) + "." + leaf


def encode(item: Factors, form: Form) -> dict[str, Tensor]:
    """The tensors of one site as PEFT stores them, by the ends of their keys.

    Raises:
        ShapeError: a grouped convolution whose B reaches across groups.
        UnsupportedError: a part that PEFT has not for this kind of site.
    """
    A, B = item.A, item.B
    plain = form in ("parameter", "in_proj", "out_proj")
    if item.magnitude is not None and (plain or item.groups > 1):
        raise UnsupportedError("PEFT has no DoRA for bare parameters, nn.MultiheadAttention and grouped convolutions")
    if item.bias is not None and (plain or form == "embedding"):
        raise UnsupportedError(
            "PEFT has no bias of B (lora_bias) for bare parameters, embeddings and nn.MultiheadAttention"
        )
    if item.bias is not None and item.magnitude is not None:
        raise UnsupportedError("PEFT has no bias of B (lora_bias) together with DoRA")
    if form == "embedding":
        named = {"lora_embedding_A": A, "lora_embedding_B": B}
    else:
        if form == "conv":
            ones = (1,) * len(item.kernel)
            A = A.reshape(A.shape[0], -1, *item.kernel)
            B = compact_groups(B, item.groups)
            B = B.reshape(*B.shape, *ones)
        elif A.dim() == 3:
            A = A.reshape(-1, A.shape[-1])  # (E, r, i) -> (E * r, i)
            B = B.permute(1, 2, 0).reshape(B.shape[1], -1)  # (E, o, r) -> (o, r * E)
        named = {"lora_A.weight": A, "lora_B.weight": B}
    if item.bias is not None:
        named["lora_B.bias"] = item.bias
    if item.magnitude is not None:
        shape = (1, -1, *(1 for _ in item.kernel)) if form == "conv" else (-1,)
        named["lora_magnitude_vector"] = item.magnitude.reshape(shape)
    return named


def decode(tensors: Mapping[str, Tensor], form: Form, scale: float, rank: int) -> Factors:
    """The inverse of `encode`.

    Args:
        tensors: ``A``, ``B`` and, where there are, ``magnitude`` and ``bias``, as they are stored.
        form: of the site.
        scale: of the update.
        rank: r, of one expert.

    Raises:
        ShapeError: shapes that don't fit together or that hold another rank.
    """
    A, B, bias = tensors["A"], tensors["B"], tensors.get("bias")
    kernel: tuple[int, ...] = ()
    groups = 1
    if 0 in (*A.shape, *B.shape):
        raise ShapeError(
            f"lora_A is {tuple(A.shape)}, lora_B {tuple(B.shape)}: no numbers; shards were not gathered when it was saved"
        )
    if form == "conv":
        A, B, kernel, groups = _conv(A, B)
    elif A.dim() != 2 or B.dim() != 2:
        raise ShapeError(f"lora_A is {tuple(A.shape)}, lora_B {tuple(B.shape)}; expected two matrices")
    elif form == "parameter":
        A, B = _experts(A, B, rank)
    if A.shape[-2] != rank or B.shape[-1] != rank:
        raise ShapeError(
            f"lora_A is {tuple(A.shape)}, lora_B {tuple(B.shape)}, which is rank {A.shape[-2]} and {B.shape[-1]}; expected rank {rank}"
        )
    if form == "in_proj" and B.shape[0] != 3 * A.shape[1]:
        raise ShapeError(
            f"lora_A is {tuple(A.shape)}, lora_B {tuple(B.shape)}; expected 3 · {A.shape[1]} rows for query, key and value"
        )
    kind: Kind = "attention" if form == "in_proj" or form == "out_proj" else form
    magnitude = tensors.get("magnitude")
    if magnitude is not None:
        if magnitude.numel() != B.shape[-2]:
            raise ShapeError(f"lora_magnitude_vector is {tuple(magnitude.shape)}; expected {B.shape[-2]} numbers")
        magnitude = magnitude.reshape(-1)
    return Factors(A, B, scale, kind, kernel, magnitude, bias, groups)


def _conv(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...], int]:
    """(r, c, *kernel) and (o, r / groups, 1 …) -> (r, c · kernel), (o, r) block-diagonal, the kernel and the groups."""
    if (
        A.dim() not in (3, 4, 5)
        or B.dim() != A.dim()
        or math.prod(B.shape[2:]) != 1
        or A.shape[0] % B.shape[1]
        or B.shape[0] % (A.shape[0] // B.shape[1])
    ):
        raise ShapeError(
            f"lora_A is {tuple(A.shape)}, lora_B {tuple(B.shape)}; expected (r, c, *kernel) and (d_out, r / groups, 1 …)"
        )
    groups = A.shape[0] // B.shape[1]
    return A.flatten(1), spread_groups(B.flatten(1), groups), tuple(A.shape[2:]), groups


def _experts(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(E · r, i) and (o, r · E) -> (E, r, i) and (E, o, r); a plain matrix where E is 1."""
    rows = A.shape[0]
    if rows != B.shape[1] or rows % rank:
        raise ShapeError(
            f"lora_A is {tuple(A.shape)}, lora_B {tuple(B.shape)}; expected (E · {rank}, d_in) and (d_out, {rank} · E)"
        )
    if rows == rank:
        return A, B
    experts = rows // rank
    return A.reshape(experts, rank, -1), B.reshape(B.shape[0], rank, experts).permute(2, 0, 1).contiguous()


def halved(B: Tensor, factor: float) -> Tensor:
    """B times a power of two, exactly: half-precision numbers become float32, whose range has room."""
    wide = B.float() if B.itemsize < 4 else B
    return wide * factor


def padded(item: Factors, rank: int) -> Factors:
    """The same update with rows and columns of zeros up to ``rank``."""
    missing = rank - item.rank
    if not missing:
        return item
    pad = torch.nn.functional.pad
    A, B = pad(item.A, (0, 0, 0, missing)), pad(item.B, (0, missing))
    return Factors(A, B, item.scale, item.kind, item.kernel, item.magnitude, item.bias, item.groups)
