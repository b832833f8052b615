"""Merge: a new, plain model with an adapter written into its weights, and a report of how much of it survived.

The base is copied, never written to. Each site is computed in float32 (float64 where the weight is) and rounded once, into the
target dtype: what rounding took away is measured, site by site.
"""

from __future__ import annotations

import copy
import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapter import Adapter
from weft.core import loading
from weft.core.adapted import magnitude_share, row_norms
from weft.core.factors import Factors
from weft.core.site import Site
from weft.core.tree import by_path, has_plain_forward, walk
from weft.errors import MergeError, NotFiniteError

__all__ = ["MergeReport", "MergedSite", "dense_update", "merge"]


@dataclass(frozen=True)
class MergedSite:
    """What became of one site's update.

    Attributes:
        norm: ‖ΔW‖, the change that was wanted (with DoRA: of the whole weight).
        relative: ‖ΔW‖ / ‖W‖.
        survived: 1 - ‖written - wanted‖ / ‖wanted‖, at least 0: the share of the change that the target dtype could hold. Written is
            the merged weight less the base's in the same dtype. 1.0 for a zero update.
    """

    path: str
    norm: float
    relative: float
    survived: float


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        sites: one `MergedSite` a site.
        dtype: the target dtype, as text.
        untied: paths of weights that shared their memory with another module in the base and don't any more.
        replaced: modules and biases that were taken over whole.
    """

    sites: tuple[MergedSite, ...]
    dtype: str
    untied: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def survived(self) -> float:
        """The share of the whole update that survived, weighted by norm; 1.0 for a zero update."""
        wanted = sum(site.norm**2 for site in self.sites)
        lost = sum((site.norm * (1 - site.survived)) ** 2 for site in self.sites)
        return 1 - math.sqrt(lost / wanted) if wanted else 1.0

    @property
    def worst(self) -> MergedSite | None:
        """The site that lost most."""
        return min(self.sites, key=lambda site: site.survived, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        rows = [{"path": s.path, "norm": s.norm, "relative": s.relative, "survived": s.survived} for s in self.sites]
        return {"dtype": self.dtype, "survived": self.survived, "untied": list(self.untied),
                "replaced": list(self.replaced), "notes": list(self.notes), "sites": rows}  # fmt: skip

    def summary(self) -> str:
        """A few lines for people."""
        worst = self.worst
        lines = [f"{len(self.sites)} sites merged in {self.dtype}; {self.survived:.2%} of the update survived rounding"]
        if worst is not None:
            lines.append(
                f"least at {worst.path}: {worst.survived:.2%} of ‖ΔW‖ = {worst.norm:.3g} ({worst.relative:.2%} of ‖W‖)"
            )
        if self.untied:
            lines.append(f"no longer tied: {', '.join(self.untied)}")
        if self.replaced:
            lines.append(f"taken over whole: {', '.join(self.replaced)}")
        return "\n".join([*lines, *self.notes])


def merge(
    model: nn.Module, adapter: Adapter, *, dtype: torch.dtype | None = None, allow_other_base: bool = False
) -> tuple[nn.Module, MergeReport]:
    """Write an adapter into a copy of the model.

    Args:
        model: the base, also one with a bank on it. It is not changed.
        adapter: what to write.
        dtype: of the merged model's floating weights; None: each weight's own.
        allow_other_base: skip the comparison of fingerprints.

    Returns:
        the new model (evaluation mode, no bank) and the report.

    Raises:
        MergeError: an update that a plain weight can't hold: a quantised base, B's bias where the base has none, a grouped
            convolution's update across groups.
        NotFiniteError: NaN or infinity in the adapter or in the result.
        BaseMismatchError, KeysError, ShapeError: the adapter doesn't fit.
    """
    adapter.check_finite()
    merged = _copy(model)
    if not allow_other_base and adapter.provenance.base is not None:
        from weft.identity import fingerprint

        here = fingerprint(merged, loading.base_weights(merged, tuple(adapter.modules)))
        loading.check_base(adapter, here)
    found = loading.locate(by_path(walk(merged)), adapter)
    if dtype is not None:
        _cast(merged, dtype)
    shared = _shared_parameters(merged)
    untied: list[str] = []
    _take_over(merged, adapter, shared, untied)
    rows = []
    for site, factors in zip(found.sites, adapter.factors.values(), strict=True):
        _check_plain(site)
        if id(site.weight) in shared:
            untied.append(site.weight_path)
        rows.append(_merge_site(site, factors, _original(model, site.weight_path)))
        _merge_own_bias(site, factors, rows[-1])
    if untied:
        _say_untied(merged, untied)
    target = dtype or loading_dtype(merged)
    replaced = (*adapter.modules, *adapter.biases)
    return merged.eval(), MergeReport(tuple(rows), str(target).removeprefix("torch."), tuple(untied), replaced)


def loading_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of most of a model's weights."""
    counts: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype])


def dense_update(site: Site, factors: Factors) -> Tensor:
    """ΔW of one site in the layout of its weight, at least float32; without DoRA's magnitude.

    Raises:
        MergeError: a grouped convolution whose update reaches across groups.
    """
    wide = torch.promote_types(factors.A.dtype, torch.float32)
    delta = factors.map(lambda tensor: tensor.to(wide)).delta()
    if site.kind == "conv" and site.groups > 1:
        delta = _within_groups(site, delta)
    if site.transposed:
        delta = delta.mT
    return delta.reshape(site.weight.shape)


def _within_groups(site: Site, delta: Tensor) -> Tensor:
    """(out, in · kernel) over all channels -> (out, in / groups · kernel), where nothing is lost."""
    by_group = delta.view(site.groups, delta.shape[0] // site.groups, site.groups, -1)
    own = torch.stack([by_group[g, :, g] for g in range(site.groups)])
    if not math.isclose(float(own.norm()), float(delta.norm()), rel_tol=1e-6, abs_tol=1e-12):
        raise MergeError(
            f"{site.path}: a convolution with {site.groups} groups, and an update that reads channels across groups: no weight of this "
            "layer holds it. Keep the adapter beside the base (weft.attach, bank.load), or train without this site"
        )
    return own.flatten(0, 1)


def _copy(model: nn.Module) -> nn.Module:
    merged = copy.deepcopy(model)
    for module in list(merged.modules()):
        bank = module.__dict__.get("_weft_bank")
        if bank is not None:
            bank.detach()
    return merged


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """All that a file holds, as loading it in this dtype does; what a model computes itself (rotary frequencies) keeps its precision."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)  # tied ones stay one object
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                module._buffers[name] = buffer.to(dtype)


def _original(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    weight = model.get_submodule(owner)._parameters[leaf]
    assert weight is not None
    return weight.detach()


def _check_plain(site: Site) -> None:
    """A changed weight has to mean a changed product, and nothing else."""
    layer, weight = type(site.module), site.module._parameters.get(site.weight_name)
    beside = "keep the adapter beside the base (weft.attach, bank.load)"
    if weight is None:
        raise MergeError(f"{site.path}: this {layer.__name__} computes its weight from other parameters; {beside}")
    if not weight.is_floating_point() or getattr(weight, "quant_state", None) is not None:
        raise MergeError(
            f"{site.path}: the base's weight is quantised; load the base unquantised (dtype=…) to merge into it"
        )
    whole = site.kind in ("attention", "parameter") or has_plain_forward(layer)
    if not whole and not (site.kind == "embedding" and hasattr(site.module, "embed_scale")):
        raise MergeError(
            f"{site.path}: this {layer.__name__} has a forward of its own, so what a changed weight does there is not known; {beside}"
        )


def _merge_site(site: Site, factors: Factors, original: Tensor) -> MergedSite:
    weight = site.weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    W = original.to(weight.device, wide)
    new = W + dense_update(site, factors).to(weight.device, wide)
    if factors.magnitude is not None:
        new = _with_magnitude(site, factors, W, new)
    if not bool(torch.isfinite(new).all()):
        raise NotFiniteError(f"{site.path}: the merged weight has NaN or infinite values")
    written = new.to(weight.dtype)
    if not bool(torch.isfinite(written).all()):
        raise NotFiniteError(f"{site.path}: the merged weight overflows {weight.dtype}; merge with dtype=torch.float32")
    wanted, got = new - W, written.to(wide) - W.to(weight.dtype).to(wide)
    norm, base = float(wanted.norm()), float(W.norm())
    survived = 1.0 if norm == 0 else max(0.0, 1 - float((got - wanted).norm()) / norm)
    site.module._parameters[site.weight_name] = nn.Parameter(written, requires_grad=weight.requires_grad)
    return MergedSite(site.path, norm, norm / base if base else math.inf, survived)


def _with_magnitude(site: Site, factors: Factors, W: Tensor, new: Tensor) -> Tensor:
    assert factors.magnitude is not None
    math_W = W.mT if site.transposed else W
    A, B = (tensor.to(W.device, W.dtype) for tensor in (factors.A, factors.B))
    norms = row_norms(math_W, A, B, factors.scale)
    factor = magnitude_share(factors.magnitude.to(W.device, W.dtype), norms)
    return new * (factor if site.transposed else factor.view(-1, *(1,) * (new.dim() - 1)))


def _merge_own_bias(site: Site, factors: Factors, row: MergedSite) -> None:
    if factors.bias is None:
        return
    name = "bias" if site.weight_name == "weight" else site.weight_name.replace("_weight", "_bias")
    bias = site.module._parameters.get(name)
    if bias is None:
        raise MergeError(
            f"{row.path}: the adapter has a bias of B (lora_bias), but this layer of the base has no bias to take it. Keep the adapter "
            "beside the base, or train without lora_bias"
        )
    addend = factors.scale * factors.bias.to(bias.device, torch.promote_types(bias.dtype, torch.float32))
    if factors.magnitude is not None:
        raise MergeError(
            f"{row.path}: a bias of B under DoRA's magnitude can't be merged; keep the adapter beside the base"
        )
    new = (bias.detach().to(addend.dtype) + addend).to(bias.dtype)
    site.module._parameters[name] = nn.Parameter(new, requires_grad=bias.requires_grad)


def _take_over(merged: nn.Module, adapter: Adapter, shared: dict[int, list[str]], untied: list[str]) -> None:
    """Biases and whole modules; a parameter that others share is replaced, not overwritten."""
    for path, value in adapter.biases.items():
        owner, _, leaf = path.rpartition(".")
        module = merged.get_submodule(owner)
        old = module._parameters[leaf]
        assert old is not None
        module._parameters[leaf] = nn.Parameter(value.to(old.device, old.dtype), requires_grad=old.requires_grad)
    replaced = {f"{path}.{name}" for path, tensors in adapter.modules.items() for name in tensors}
    for path, tensors in adapter.modules.items():
        module = merged.get_submodule(path)
        for name, parameter in list(module.named_parameters()):
            partners = [other for other in shared.get(id(parameter), []) if other not in replaced]
            if partners:
                owner, _, leaf = f"{path}.{name}".rpartition(".")
                merged.get_submodule(owner)._parameters[leaf] = nn.Parameter(
                    parameter.detach().clone(), requires_grad=False
                )
                untied.append(f"{path}.{name}")
        loading.fill_whole(module, tensors, path)


def _shared_parameters(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {key: found for key, found in names.items() if len(found) > 1}


def _say_untied(model: nn.Module, untied: list[str]) -> None:
    """A config that promises a tie would undo the merge when the model is saved and loaded.

    Raises:
        MergeError: the model's own forward asks whether its weights are tied: untied it would compute something else.
    """
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        if part is None or not getattr(part, "tie_word_embeddings", False):
            continue
        code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
        if code is not None and "tie_word_embeddings" in code.co_names:
            raise MergeError(
                f"{untied[0]}: this weight is tied, and the forward of {type(model).__name__} scales its output because it is: a copy in "
                "which it is not would give other numbers. Keep the adapter beside the base (weft.attach, bank.load)"
            )
        part.tie_word_embeddings = False
