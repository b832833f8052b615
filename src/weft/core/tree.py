"""The module tree of a model as weft sees it: one walk, each module once, with what could be adapted in it.

This module does not know specs or patterns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

__all__ = ["Node", "by_path", "has_plain_forward", "output_heads", "shared_weights", "walk"]


@dataclass(eq=False)
class Node:
    """One module of the tree.

    Attributes:
        path: dotted path, the first one where it stands at several.
        module: the module.
        kind: ``linear``, ``conv1d`` (transformers' Conv1D), ``conv``, ``embedding``, ``attention``, or None: not adapted
            as a module.
        aliases: its other paths.
        host: path of the nn.MultiheadAttention that this is the out_proj of.
    """

    path: str
    module: nn.Module
    kind: str | None
    aliases: list[str] = field(default_factory=list)
    host: str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """Every path that it stands at."""
        return (self.path, *self.aliases)

    def path_of(self, name: str) -> str:
        """Path of one of its own parameters."""
        return f"{self.path}.{name}" if self.path else name

    def parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Its own parameters by name, those of children not included."""
        return [(name, value) for name, value in self.module._parameters.items() if value is not None]


def walk(model: nn.Module) -> list[Node]:
    """All modules, depth first in model order, each once; what weft attached is left out."""
    seen: dict[int, Node] = {}
    kinds: dict[type, str | None] = {}

    def visit(path: str, module: nn.Module, host: str | None, above: frozenset[int]) -> None:
        key = id(module)
        node = seen.get(key)
        if node is None:
            cls = type(module)
            if cls not in kinds:
                kinds[cls] = _kind(module)
            node = seen[key] = Node(path, module, kinds[cls], host=host)
        elif key in above:
            return
        else:
            node.aliases.append(path)
        if not module._modules:
            return
        attached = getattr(type(module), "_weft_site", False)
        above = above | {key}
        for name, child in module._modules.items():
            if child is not None and not (attached and name == "weft"):
                inside = node.path if node.kind == "attention" and name == "out_proj" else None
                visit(f"{path}.{name}" if path else name, child, inside, above)

    visit("", model, None, frozenset())
    return list(seen.values())


def by_path(nodes: Iterable[Node]) -> dict[str, Node]:
    """Nodes by every path that they stand at."""
    return {path: node for node in nodes for path in node.paths}


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv"
    if isinstance(module, nn.MultiheadAttention):
        return "attention"
    by_name = any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)
    return "conv1d" if by_name and getattr(module._parameters.get("weight"), "ndim", 0) == 2 else None


def has_plain_forward(layer: type) -> bool:
    """Whether a class of layers computes what its kind computes, and nothing else."""
    for plain in (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if issubclass(layer, plain):
            own = getattr(layer, "_conv_forward", None) is getattr(plain, "_conv_forward", None)
            return own and getattr(layer, "forward", None) is plain.forward
    return layer.__name__ == "Conv1D"


def shared_weights(nodes: Iterable[Node]) -> dict[int, list[str]]:
    """Paths of the parameters that several modules hold (tied weights), by the parameter's identity."""
    uses: dict[int, list[str]] = {}
    for node in nodes:
        for name, parameter in node.module._parameters.items():
            if parameter is not None:
                uses.setdefault(id(parameter), []).append(node.path_of(name))
    return {key: paths for key, paths in uses.items() if len(paths) > 1}


def output_heads(nodes: Iterable[Node]) -> frozenset[int]:
    """Identities of the output embeddings of the model and of every model inside of it."""
    heads = set()
    for node in nodes:
        if hasattr(type(node.module), "get_output_embeddings"):
            try:
                heads.add(id(node.module.get_output_embeddings()))  # type: ignore[operator]
            except (NotImplementedError, AttributeError):
                continue
    return frozenset(heads - {id(None)})
