"""Initialisations that look at the user's data first: EVA at activations, LoRA-GA at gradients.

Shapes: r rank, o = d_out, i = d_in, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from weft.core.data_passes import collect_activations, collect_gradients
from weft.core.decompose import leading
from weft.core.site import Site
from weft.core.starts import Data, Plan, Start, initialiser
from weft.errors import ShapeError, SpecError

__all__ = ["EVA_RHO", "LORA_GA_GAMMA", "eva", "lora_ga", "redistribute"]

EVA_RHO = 2.0
"""A site's rank grows at most by this factor when EVA shares ranks out anew."""

LORA_GA_GAMMA = 16.0
"""The paper's gamma: the larger, the smaller the start."""

_KEEP = 256
_EXACT_BELOW = 512
_POWER_STEPS = 4


def _eva_statistics(sites: tuple[Site, ...], data: Data) -> Iterator[tuple[Site, int, Tensor]]:
    """The principal axes of every site's input, and ranks by how much of its variance they explain."""
    ranks = {site.path: data.spec.rank_at(site.path) for site in sites}
    most = {path: round(rank * EVA_RHO) for path, rank in ranks.items()}
    axes = collect_activations(data.model, sites, data.batches, keep=max(4 * max(most.values()), _KEEP))
    for path, found in axes.items():
        assert found.squares is not None
        if len(found.squares) < ranks[path]:
            raise SpecError(
                f"init='eva' at {path!r}: the {found.count} tokens of the batches span {len(found.squares)} directions, and rank "
                f"{ranks[path]} needs as many; give more or longer batches"
            )
    shared: dict[int, int] = {}
    for path in ranks:
        shared[id(axes[path])] = max(shared.get(id(axes[path]), 0), most[path])
    fixed = {site.path for site in sites if site.groups > 1}
    ratios = {path: axes[path].ratios[: shared[id(axes[path])]] for path in ranks if path not in fixed}
    new = redistribute(ratios, {path: ranks[path] for path in ratios})
    for site in sites:
        rank, found = new.get(site.path, ranks[site.path]), axes[site.path]
        assert found.axes is not None
        yield site, rank, found.axes[:rank]


def redistribute(ratios: Mapping[str, Tensor | Sequence[float]], ranks: Mapping[str, int]) -> dict[str, int]:
    """Share the sum of all ranks out anew: to the axes that explain most, wherever they are.

    Every site keeps a rank of at least 1, so that none is dropped silently.

    Args:
        ratios: by site, the share of the variance that each axis explains, falling; its length is the largest rank allowed.
        ranks: by site, the rank that the spec gives it.

    Returns:
        rank by site, the same in sum.

    Source:
        Paischer et al. 2024, EVA, arXiv:2410.07170, section 3.3.
    """
    extra = [(-float(ratio), path) for path, row in ratios.items() for ratio in list(row)[1:]]
    chosen = sorted(extra, key=lambda item: item[0])[: sum(ranks.values()) - len(ranks)]
    new = dict.fromkeys(ranks, 1)
    for _, path in chosen:
        new[path] += 1
    return new


@initialiser(
    "eva",
    paper="https://arxiv.org/abs/2410.07170",
    kinds=("linear", "conv", "attention"),
    groups=True,
    prepare=_eva_statistics,
)
def eva(plan: Plan) -> Start:
    """A: the principal axes of the site's input on the user's data; B zero; ranks where the variance is.

    The axes are those of the centred activations, without whitening, as in the authors' code. Alpha grows with the rank, so the scale
    alpha / rank stays what the spec says. Sites with the same input (q, k, v) are analysed once.

    Source:
        Paischer et al. 2024, One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation,
        arXiv:2410.07170.
    """
    assert plan.statistics is not None
    axes = plan.statistics.to(
        plan.site.weight.device, plan.dtype, copy=True
    )  # sites that share their input share the original
    return plan.start(axes, plan.zeros(plan.shape_B))


def _lora_ga_statistics(sites: tuple[Site, ...], data: Data) -> Iterator[tuple[Site, int, Tensor]]:
    for site, gradient in collect_gradients(data.model, sites, data.batches):
        try:
            yield site, data.spec.rank_at(site.path), site.oriented(gradient)
        except ShapeError as problem:
            raise SpecError(f"init='lora_ga': {problem}") from None


@initialiser(
    "lora_ga",
    paper="https://arxiv.org/abs/2407.05000",
    kinds=("linear", "conv", "embedding", "attention", "parameter"),
    prepare=_lora_ga_statistics,
)
def lora_ga(plan: Plan) -> Start:
    """The first step of LoRA follows the first step of full fine-tuning: A and B from the gradient's singular vectors.

    A takes the first r right vectors, B the r left vectors after them (the last r where there are fewer than 2r), both times
    d_out^(1/4) / sqrt(gamma), gamma = 16; their product is subtracted again.

    Source:
        Wang et al. 2024, LoRA-GA, arXiv:2407.05000, algorithm 1 and theorem 3.3.
    """
    assert plan.statistics is not None
    plan.check_rank()
    gradient, r = plan.statistics.to(plan.compute), plan.rank
    least = min(gradient.shape[-2:])
    exact = least <= max(_EXACT_BELOW, 4 * r)
    U, _, Vh = leading(
        gradient, min(2 * r, least) if exact else 4 * r, steps=0 if exact else _POWER_STEPS, generator=plan.generator
    )
    size = plan.site.d_out**0.25 / LORA_GA_GAMMA**0.5
    last = min(2 * r, least)
    return plan.start(Vh[..., :r, :] * size, U[..., last - r : last] * size, subtract=True)
