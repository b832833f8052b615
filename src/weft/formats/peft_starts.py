"""PiSSA and OLoRA of PEFT: their files count from a base that PEFT rewrote; here the start is taken out of the factors again.

PEFT loads such a file by computing the start once more from the base and subtracting it from the base's weights. weft
never writes into a base: the same start becomes part of the update, ``B A - B₀ A₀``, of rank 2r.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from weft.core.factors import Factors
from weft.errors import FormatError, UnsupportedError
from weft.formats.peft_config import REWRITES, PeftConfig

__all__ = ["check_start", "without_start"]


def check_start(config: PeftConfig, base: nn.Module | None) -> bool:
    """Whether the file counts from a rewritten base, whose start can be computed again.

    Raises:
        UnsupportedError: it counts from a base that can't be told from the file; with the ways out.
    """
    start = config.start
    if not start.startswith(REWRITES):
        return False
    known = start in ("pissa", "olora")
    if known and base is not None:
        return True
    ways = [
        "pass the base that it was trained on, weft.load(path, base=model)" if known else "",
        f"save it with PEFT's path_initial_model_for_weight_conversion={'...' if start != 'loftq' else '(not for LoftQ)'}"
        if start != "loftq"
        else "",
        "or, if you attach it to the rewritten base that was saved with it, set init_lora_weights to true in the config",
    ]
    raise UnsupportedError(
        f"init_lora_weights={start!r}: PEFT wrote the start of this adapter into its base, so the factors don't count from the base that you have. "
        + "; ".join(way for way in ways if way), path=config.path, key="init_lora_weights"
    )  # fmt: skip


@torch.no_grad()
def without_start(config: PeftConfig, factors: Mapping[str, Factors], base: nn.Module) -> dict[str, Factors]:
    """The same updates, counted from the base as it is.

    Raises:
        FormatError: a site that the base has not, or of another shape.
    """
    found: dict[str, Factors] = {}
    for path, item in factors.items():
        if item.kind != "linear":
            found[path] = item  # PEFT starts other kinds with B = 0
            continue
        W = _weight(base, path, item, config)
        A0, B0 = _pissa(W, item) if config.start == "pissa" else _olora(W, item)
        A = torch.cat([item.A, A0.to(item.A)])
        B = torch.cat([item.B, -B0.to(item.B)], dim=1)
        found[path] = dataclasses.replace(item, A=A, B=B)
    return found


def _weight(base: nn.Module, path: str, item: Factors, config: PeftConfig) -> Tensor:
    """(d_out, d_in) in float32."""
    try:
        module = base.get_submodule(path)
    except AttributeError:
        raise FormatError(f"the base has no module {path!r}", path=config.path.parent, key=path) from None
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point() or weight.dim() != 2:
        raise FormatError(
            f"the base's {path!r} has no plain matrix to compute the start from", path=config.path.parent, key=path
        )
    W = weight.detach().float()
    W = W.t() if any(cls.__name__ == "Conv1D" for cls in type(module).__mro__) else W
    if tuple(W.shape) != (item.d_out, item.d_in):
        raise FormatError(
            f"the base's {path!r} is {tuple(W.shape)}, the update {(item.d_out, item.d_in)}: another base",
            path=config.path.parent,
            key=path,
        )
    return W


def _pissa(W: Tensor, item: Factors) -> tuple[Tensor, Tensor]:
    """A₀ and B₀ with ``scale · B₀ A₀`` = the largest singular directions of W.

    Source:
        Meng et al. 2024, PiSSA, arXiv:2404.02948, section 3.
    """
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = (S[: item.rank] / item.scale).sqrt()
    return root[:, None] * Vh[: item.rank], U[:, : item.rank] * root


def _olora(W: Tensor, item: Factors) -> tuple[Tensor, Tensor]:
    """A₀ and B₀: the first rows of R and columns of Q of W's QR decomposition.

    Source:
        Büyükakyüz 2024, OLoRA, arXiv:2406.01775, section 3.
    """
    Q, R = torch.linalg.qr(W)
    return R[: item.rank], Q[:, : item.rank]
