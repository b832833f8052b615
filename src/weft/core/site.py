"""Site: one weight of the base that is adapted, and how it is made from a place in the module tree.

This module knows kinds of layers and shapes, no patterns: what a spec means is for `weft.core.sites`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from weft.core.factors import Kind
from weft.core.tree import Node
from weft.errors import ShapeError, TargetError

__all__ = ["Site", "attention_site", "module_site", "parameter_site", "site_at"]


@dataclass(frozen=True)
class Site:
    """One weight of the base that is adapted.

    Attributes:
        path: dotted path: of the module; of the parameter for a bare parameter and for the in_proj of
            nn.MultiheadAttention.
        owner: path of the module that holds the weight.
        module: that module.
        weight_name: the weight's name in it: ``"weight"``, ``"in_proj_weight"``, ``"gate_up_proj"`` …
        kind: see `weft.core.factors.Factors`.
        d_in: columns of ΔW; for a convolution in_channels * prod(kernel), for an embedding the vocabulary.
        d_out: rows of ΔW; for an embedding its width.
        experts: E of stacked experts (E, d_out, d_in); None for all else.
        kernel: spatial kernel of a convolution; empty for all else.
        groups: groups of a convolution; 1 for all else.
        transposed: the weight is stored as (d_in, d_out): transformers' Conv1D, nn.Embedding, some experts.
        host: path of the nn.MultiheadAttention that reads this out_proj's weight without calling its forward.
    """

    path: str
    owner: str
    module: nn.Module
    weight_name: str
    kind: Kind
    d_in: int
    d_out: int
    experts: int | None = None
    kernel: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    host: str | None = None

    @property
    def weight(self) -> Tensor:
        """The base's weight as it is stored, see `transposed`; a quantised one may be packed."""
        weight = self.module._parameters.get(self.weight_name)
        weight = getattr(self.module, self.weight_name) if weight is None else weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def weight_path(self) -> str:
        """Path of the weight's parameter, as in ``model.named_parameters()``."""
        return f"{self.owner}.{self.weight_name}" if self.owner else self.weight_name

    def oriented(self, stored: Tensor) -> Tensor:
        """A tensor that is stored like the weight (the weight, its gradient) as ΔW is written; a view where it can be.

        Returns:
            (d_out, d_in), or (E, d_out, d_in) for stacked experts.

        Raises:
            ShapeError: a packed (quantised) weight, or a convolution with groups, whose weight is no (d_out, d_in).
        """
        seen = stored.mT if self.transposed else stored.flatten(1) if self.kind == "conv" else stored
        shape = (self.d_out, self.d_in) if self.experts is None else (self.experts, self.d_out, self.d_in)
        if tuple(seen.shape) != shape:
            why = f"a convolution with {self.groups} groups" if self.groups > 1 else "a quantised or sharded weight"
            raise ShapeError(f"{self.path!r}: a weight of shape {tuple(stored.shape)} is no {shape} matrix ({why})")
        return seen


def site_at(
    nodes: Mapping[str, Node], path: str, *, bare: bool = False, fan_in_fan_out: bool | None = None
) -> Site | None:
    """The site at one exact path: a lookup, not a search.

    Args:
        nodes: of the model, by every path that they stand at (`tree.by_path`).
        path: of a module; of a parameter where ``bare`` or for an attention's in_proj. An alias gives the site of the first path.
        bare: the path is a bare parameter's.
        fan_in_fan_out: of a bare matrix, see `LoraSpec`.

    Returns:
        The site; None where nothing stands at the path that could be one.

    Raises:
        TargetError: a parameter of a shape that can't be adapted; a lazy module without a weight yet.
    """
    node = nodes.get(path)
    if not bare and node is not None:
        return None if node.kind in (None, "attention") else module_site(node)
    owner, _, name = path.rpartition(".")
    node = nodes.get(owner)
    parameter = None if node is None else node.module._parameters.get(name)
    if node is None or parameter is None:
        return None
    if bare:
        return parameter_site(node.path_of(name), node, name, parameter, fan_in_fan_out)
    return attention_site(node) if node.kind == "attention" and name == "in_proj_weight" else None


def module_site(node: Node) -> Site:
    """The site of a module that is adapted as a whole."""
    module, path = node.module, node.path
    weight = module._parameters.get("weight")
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise TargetError(
            f"{path!r} is a lazy {type(module).__name__} without a weight yet: run one forward pass first"
        )
    if isinstance(module, nn.Linear):
        return Site(path, path, module, "weight", "linear", module.in_features, module.out_features, host=node.host)
    if isinstance(module, nn.Embedding):
        return Site(
            path, path, module, "weight", "embedding", module.num_embeddings, module.embedding_dim, transposed=True
        )
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        kernel = tuple(module.kernel_size)
        d_in = module.in_channels * math.prod(kernel)
        return Site(
            path, path, module, "weight", "conv", d_in, module.out_channels, kernel=kernel, groups=module.groups
        )
    assert weight is not None
    return Site(path, path, module, "weight", "linear", int(weight.shape[0]), int(weight.shape[1]), transposed=True)


def attention_site(node: Node) -> Site:
    """The site of an nn.MultiheadAttention's in_proj."""
    d = int(node.module.embed_dim)  # type: ignore[arg-type]
    return Site(node.path_of("in_proj_weight"), node.path, node.module, "in_proj_weight", "attention", d, 3 * d)


def parameter_site(path: str, node: Node, name: str, parameter: Tensor, fan_in_fan_out: bool | None) -> Site:
    """The site of a bare parameter: (d_out, d_in) or stacked experts (E, d_out, d_in)."""
    shape = tuple(int(size) for size in parameter.shape)
    if len(shape) not in (2, 3) or not parameter.is_floating_point():
        raise TargetError(
            f"LoraSpec.target_parameters: {path!r} is {shape} of {parameter.dtype}; expected floating point numbers, "
            "(d_out, d_in) or stacked experts (E, d_out, d_in)"
        )
    flipped = len(shape) == 3 and bool(getattr(node.module, "is_transposed", False))
    transposed = flipped or fan_in_fan_out is True
    d_in, d_out = (shape[-2], shape[-1]) if transposed else (shape[-1], shape[-2])
    experts = shape[0] if len(shape) == 3 else None
    return Site(path, node.path, node.module, name, "parameter", d_in, d_out, experts=experts, transposed=transposed)
