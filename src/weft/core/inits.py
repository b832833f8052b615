"""Initialisations: where the factors of each site start. One function for each, with its paper.

None writes into the base. Those whose product B @ A starts at the base's (PiSSA, OLoRA) or at the gradient's directions (LoRA-GA)
subtract that product again in the adapter, so the model's function at the start is the base's. EVA and LoRA-GA, which look
at data first, are in `weft.core.data_inits`.

Shapes: r rank, o = d_out, i = d_in, E experts (a leading dimension that all functions carry along).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from weft.core import data_inits  # noqa: F401 (registers EVA and LoRA-GA)
from weft.core.decompose import leading
from weft.core.site import Site
from weft.core.starts import INITIALISERS, Data, Initialiser, Plan, Start, initialiser
from weft.errors import SpecError
from weft.spec import LoraSpec

__all__ = ["INITIALISERS", "Plan", "Start", "initialise", "initialiser"]

_ALL = ("linear", "conv", "embedding", "attention", "parameter")


def initialise(
    sites: Iterable[Site],
    spec: LoraSpec,
    *,
    generator: torch.Generator | None = None,
    batches: Iterable[Any] | None = None,
    model: nn.Module | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Start]:
    """Starting factors of all sites, by `spec.init`. The base is only read.

    Args:
        sites: from `find_sites`.
        spec: rank, alpha and init. EVA shares the ranks out anew: read them off the results.
        generator: makes the result repeatable; None: torch's own random numbers.
        batches: inputs of the model, for EVA (labels mask tokens, if there are any) and LoRA-GA (with labels).
        model: the model that the sites are in; needed with ``batches``.
        dtype: of the results; None: float32, and float64 where the base is float64.

    Returns:
        one `Start` for each site, in the order of ``sites``, on the device of its weight. Everything is computed in
        float32 (float64 for a float64 base).

    Raises:
        SpecError: the initialisation doesn't know a site's kind, needs data and got none, or can't have this rank.
        NotFiniteError: a weight or a gradient with NaN or infinity.
    """
    sites = tuple(sites)
    towers: dict[str | None, list[Site]] = {}
    for site in sites:
        towers.setdefault(spec.tower_of(site.path), []).append(site)
    if len(towers) > 1 or None not in towers:  # each part of a model has an initialisation of its own
        rest: dict[str, Any] = {"generator": generator, "batches": batches, "model": model, "dtype": dtype}
        rest["batches"] = None if batches is None else list(batches)
        apart = [_initialise(tuple(own), spec, spec.at(own[0].path).init, **rest) for own in towers.values()]
        found = {path: start for part in apart for path, start in part.items()}
        return {site.path: found[site.path] for site in sites}
    return _initialise(sites, spec, spec.init, generator=generator, batches=batches, model=model, dtype=dtype)


def _initialise(
    sites: tuple[Site, ...],
    spec: LoraSpec,
    named: str,
    *,
    generator: torch.Generator | None,
    batches: Iterable[Any] | None,
    model: nn.Module | None,
    dtype: torch.dtype | None,
) -> dict[str, Start]:
    """Sites of one initialisation."""
    name, _, steps = named.partition("_niter_")
    init = INITIALISERS[name]
    init.check(sites)
    starts = {}
    for site, rank, statistics in _statistics(init, sites, spec, model, batches):
        scale = (
            spec.scale_at(site.path, rank) * rank / spec.rank_at(site.path)
        )  # alpha grows with a rank that EVA changed
        wanted = dtype or (torch.float64 if site.weight.dtype == torch.float64 else torch.float32)
        plan = Plan(site, rank, scale, wanted, generator, int(steps or 0), statistics)
        with torch.no_grad():
            starts[site.path] = init.function(plan)
    return {site.path: starts[site.path] for site in sites}


def _statistics(
    init: Initialiser, sites: tuple[Site, ...], spec: LoraSpec, model: nn.Module | None, batches: Iterable[Any] | None
) -> Iterable[tuple[Site, int, Tensor | None]]:
    """Sites with their rank and what the data say about them."""
    if init.prepare is None:
        return ((site, spec.rank_at(site.path), None) for site in sites)
    batches = [] if batches is None else list(batches)
    if model is None or not batches:
        raise SpecError(
            f"LoraSpec.init={init.name!r} looks at data first and got none; give some batches of the model's inputs, as in "
            "weft.attach(model, {…}, batches=[{'input_ids': …, 'attention_mask': …, 'labels': …}, …])"
        )
    return init.prepare(sites, Data(model, batches, spec))


@initialiser("kaiming", paper="https://arxiv.org/abs/2106.09685", kinds=_ALL, groups=True)
def kaiming(plan: Plan) -> Start:
    """The paper's: A uniform in ±1/sqrt(d_in), B zero. Embeddings: A zero, B standard normal, as in the paper's code.

    The fan-in is d_in: A is (r, d_in), and Kaiming's bound with a = sqrt(5) is 1/sqrt(fan-in).

    Source:
        Hu et al. 2021, LoRA, arXiv:2106.09685, and its code, loralib/layers.py.
    """
    if plan.site.kind == "embedding":
        return plan.start(plan.zeros(plan.shape_A), plan.drawn(plan.shape_B, Tensor.normal_))
    bound = plan.site.d_in**-0.5
    return plan.start(plan.drawn(plan.shape_A, Tensor.uniform_, -bound, bound), plan.zeros(plan.shape_B))


@initialiser("gaussian", paper="https://arxiv.org/abs/2106.09685", kinds=_ALL, groups=True)
def gaussian(plan: Plan) -> Start:
    """A normal with deviation 1/r, B zero. Embeddings as in `kaiming`.

    Source:
        Hu et al. 2021, LoRA, arXiv:2106.09685, section 4.1 ("a random Gaussian initialization for A"); the deviation is
        diffusers' and PEFT's.
    """
    if plan.site.kind == "embedding":
        return kaiming(plan)
    return plan.start(plan.drawn(plan.shape_A, Tensor.normal_, 0.0, 1.0 / plan.rank), plan.zeros(plan.shape_B))


@initialiser("orthogonal", paper="https://datta0.github.io/posts/rethink-lora-init/", kinds=_ALL)
def orthogonal(plan: Plan) -> Start:
    """A and B both random, from orthogonal halves of one r × r rotation: B @ A is zero, yet both get gradients at once.

    Zero up to rounding in the dtype of the factors.

    Raises:
        SpecError: an odd rank.

    Source:
        Datta 2024, Rethinking LoRA initialisation, https://datta0.github.io/posts/rethink-lora-init/.
    """
    if plan.rank % 2:
        raise SpecError(
            f"init='orthogonal' halves the rank: rank {plan.rank} at {plan.site.path!r} is odd; use {plan.rank + 1}"
        )
    lead, half = plan.shape_A[:-2], plan.rank // 2
    rotation = torch.linalg.qr(plan.drawn((*lead, plan.rank, plan.rank), Tensor.normal_)).Q
    A = rotation[..., 0::2, :].mT @ plan.drawn((*lead, half, plan.site.d_in), Tensor.normal_, 0.0, 0.1)
    B = plan.drawn((*lead, plan.site.d_out, half), Tensor.normal_, 0.0, 0.1) @ rotation[..., 1::2, :]
    return plan.start(A, B)


@initialiser("pissa", paper="https://arxiv.org/abs/2404.02948", kinds=_ALL)
def pissa(plan: Plan) -> Start:
    """A and B carry the r largest singular triplets of W; their product is subtracted again.

    ``"pissa_niter_4"`` finds them by a randomised SVD with 4 power iterations, much faster for large matrices.

    Source:
        Meng et al. 2024, PiSSA, arXiv:2404.02948; Halko et al. 2011, arXiv:0909.4061, for the randomised one.
    """
    U, S, Vh = leading(plan.weight(), plan.rank, steps=plan.steps, generator=plan.generator)
    root = (S / abs(plan.scale)).sqrt()
    return plan.start(root[..., :, None] * Vh, U * root[..., None, :] * math.copysign(1.0, plan.scale), subtract=True)


@initialiser("olora", paper="https://arxiv.org/abs/2406.01775", kinds=_ALL)
def olora(plan: Plan) -> Start:
    """W = QR: B the first r columns of Q, A the first r rows of R; their product is subtracted again.

    Source:
        Büyükakyüz 2024, OLoRA, arXiv:2406.01775.
    """
    Q, R = torch.linalg.qr(plan.weight())
    return plan.start(R[..., : plan.rank, :], Q[..., : plan.rank], subtract=True)
