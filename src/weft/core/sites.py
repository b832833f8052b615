"""Sites: which weights of a model a `LoraSpec` means, and which it fails to mean.

One walk over the module tree turns names, suffixes, regular expressions and layer indices into `Site` values. Nothing
matches silently: an entry that yields no site is an error that says why. This module does not know any architecture
(``targets="default"`` is resolved above it), no factors and no files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from weft.core.factors import Kind
from weft.core.patterns import Layers, Names, unmatched_patterns
from weft.errors import SpecError, TargetError, did_you_mean, some_names
from weft.spec import LoraSpec

__all__ = ["Site", "SiteMap", "find_sites"]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SHARED = "the update at {path!r} applies to this use only; a merged copy unties them"
_OWN_COPY = "{path!r} is trained whole as a weight of its own, the other keeps the base's"


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
        weight = getattr(self.module, self.weight_name)
        assert isinstance(weight, Tensor)
        return weight


@dataclass(frozen=True)
class SiteMap:
    """What a spec means on one model.

    Attributes:
        sites: in the order of the model.
        save_modules: paths of the modules to train whole.
        biases: full parameter paths of the biases to train.
        notes: what the user has to know, in sentences: tied weights, shared modules, experts that are left out.
    """

    sites: tuple[Site, ...]
    save_modules: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def find_sites(model: nn.Module, spec: LoraSpec) -> SiteMap:
    """Find what ``spec`` adapts in ``model``.

    Names match as in PEFT: an entry of a list equals a path or ends it after a dot; a string is a regular expression
    over whole paths. nn.MultiheadAttention gives two sites, ``attn.in_proj_weight`` and ``attn.out_proj``. Modules in
    `spec.save_modules`, and all inside of them, are never sites. A module that stands at several paths is one site, at
    its first path. `spec.layers` filters whatever is not named by its full path.

    Args:
        model: any module tree; one that weft is attached to already is fine.
        spec: what to adapt; `targets` may not be ``"default"`` any more.

    Returns:
        The sites in model order, and what is trained beside them.

    Raises:
        TargetError: an entry of a list, an expression, a layer index or a pattern's key without a match; a match that
            can't be adapted. Names near misses and the linear layers that there are.
        SpecError: a rank that a grouped convolution can't take, or settings that contradict each other.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [(site.path, site.d_in, site.d_out) for site in find_sites(model, LoraSpec(targets=["0", "2"])).sites]
        [('0', 4, 8), ('2', 8, 2)]
    """
    return _Search(model, spec).run()


@dataclass
class _Node:
    """One module of the tree, with every path it stands at."""

    path: str
    module: nn.Module
    kind: str | None
    aliases: list[str] = field(default_factory=list)
    host: str | None = None


class _Search:
    """One call of `find_sites`."""

    def __init__(self, model: nn.Module, spec: LoraSpec) -> None:
        if spec.targets == "default":
            raise TargetError(
                "LoraSpec.targets='default' was not resolved: the usual sites are known by architecture (weft.attach does it "
                f"for known ones); name them here.{_linears(model)}"
            )
        self.spec = spec
        self.all_linear = spec.targets == "all-linear"
        self.targets = Names("targets", () if self.all_linear else spec.targets)
        self.parameters = Names("target_parameters", spec.target_parameters)
        self.exclude = Names("exclude", spec.exclude)
        self.save = Names("save_modules", spec.save_modules)
        self.layers = Layers(spec.layers, spec.layers_pattern)
        self.nodes = list(_walk(model))
        self.uses = _weight_uses(self.nodes)
        self.model = model
        self.sites: dict[str, Site] = {}
        self.saved: list[str] = []
        self.notes: list[str] = []
        self.unfit: dict[str, nn.Module] = {}

    def run(self) -> SiteMap:
        heads = _output_heads(self.nodes) if self.all_linear else frozenset()
        whole_attention: set[str] = set()
        inside = ""
        for node in self.nodes:
            if inside and node.path.startswith(inside):
                self._mark_lost(node, "is part of save_modules")
                continue
            if self._saves(node):
                inside = f"{node.path}."
                self._mark_lost(node, "is one of save_modules")
                continue
            self._module(node, heads, whole_attention)
            self._parameters(node)
        self._check()
        self._say_shared()
        sites = tuple(self.sites.values())
        return SiteMap(sites, tuple(self.saved), self._biases(sites), tuple(self.notes))

    # matching

    def _saves(self, node: _Node) -> bool:
        found = [entry for path in (node.path, *node.aliases) for entry in self.save.find(path)]
        for entry in found:
            self.save.hit(entry)
        if found and node.path:
            self.saved.append(node.path)
        return bool(found) and bool(node.path)

    def _mark_lost(self, node: _Node, why: str) -> None:
        for path in (node.path, *node.aliases):
            for entry in self.targets.find(path):
                self.targets.miss(entry, f"{path!r} {why}")
            for entry in self.exclude.find(path):
                self.exclude.hit(entry)
        for name in node.module._parameters if self.parameters else ():
            self._miss(dict.fromkeys(self.parameters.find(f"{node.path}.{name}"), f"{node.path}.{name}"), why, self.parameters)

    def _module(self, node: _Node, heads: frozenset[int], whole_attention: set[str]) -> None:
        """Decide about one module, and its in_proj if it is an attention."""
        found = {entry: path for path in (node.path, *node.aliases) for entry in self.targets.find(path)} if node.path else {}
        by_kind = self.all_linear and bool(node.path) and node.kind in ("linear", "conv1d", "attention")
        by_host = node.host is not None and node.host in whole_attention
        if node.kind == "attention" and self._wants_in_proj(node, found, by_kind):
            whole_attention.add(node.path)
        excluded = self._excluded(node.path, node.aliases, adaptable=node.kind is not None, module=node.module)
        if not (found or by_kind or by_host) or (by_kind and id(node.module) in heads):
            return
        if excluded:
            self._miss(found, "is excluded")
        elif not self._in_layers(node.path, found):
            self._miss(found, f"is outside layers={list(self.spec.layers or ())}")
        elif node.kind is None:
            for entry, path in found.items():
                self.unfit[path] = node.module
                self.targets.hit(entry)
        else:
            for entry in found:
                self.targets.hit(entry)
            if node.kind != "attention":
                self._add(_module_site(node, self.spec))

    def _wants_in_proj(self, node: _Node, found: dict[str, str], by_kind: bool) -> bool:
        """Add the in_proj site of an attention if it is meant; True if the whole attention is meant."""
        path = f"{node.path}.in_proj_weight" if node.path else "in_proj_weight"
        named = dict.fromkeys(self.targets.find(path), path)
        by_name = dict.fromkeys(self.parameters.find(path), path)
        excluded = self._excluded(path, (), adaptable=True, module=node.module)
        if self._excluded(node.path, node.aliases, adaptable=True, module=node.module):
            self._miss(found | named, "is excluded")
            return False
        whole = bool(found or by_kind) and self._in_layers(node.path, found)
        if not (whole or named or by_name):
            return False
        if excluded:
            self._miss(named, "is excluded")
        elif not self._in_layers(path, named | by_name | found):
            self._miss(named, f"is outside layers={list(self.spec.layers or ())}")
        elif getattr(node.module, "_qkv_same_embed_dim", True):
            for entry in named:
                self.targets.hit(entry)
            for entry in by_name:
                self.parameters.hit(entry)
            d = int(node.module.embed_dim)  # type: ignore[arg-type]
            self._add(Site(path, node.path, node.module, "in_proj_weight", "attention", d, 3 * d))
        elif by_kind and not (found or named or by_name):
            self.notes.append(f"{path!r} is not adapted: its query, key and value have different widths (kdim, vdim)")
        else:
            raise TargetError(
                f"{node.path!r} is an nn.MultiheadAttention whose query, key and value have different widths: it has no "
                "in_proj_weight to adapt. Name its out_proj alone, or exclude it"
            )
        return whole

    def _parameters(self, node: _Node) -> None:
        """Decide about the bare parameters of one module."""
        for name, parameter in node.module._parameters.items():
            if parameter is None:
                continue
            path = f"{node.path}.{name}" if node.path else name
            if self.parameters:
                self._excluded(path, (), adaptable=parameter.ndim in (2, 3), module=None)
            if not self.parameters or (node.kind == "attention" and name == "in_proj_weight"):
                continue
            found = dict.fromkeys(self.parameters.find(path), path)
            if not found:
                continue
            if self.exclude.find(path):
                self._miss(found, "is excluded", self.parameters)
            elif not self._in_layers(path, found):
                self._miss(found, f"is outside layers={list(self.spec.layers or ())}", self.parameters)
            else:
                for entry in found:
                    self.parameters.hit(entry)
                if node.path in self.sites and name == "weight":
                    raise TargetError(f"{path!r} is adapted twice: by target_parameters, and by targets as {node.path!r}. Keep one")
                self._add(_parameter_site(path, node, name, parameter, self.spec))

    def _excluded(self, path: str, aliases: list[str] | tuple[()], *, adaptable: bool, module: nn.Module | None) -> bool:
        found = [(entry, p) for p in (path, *aliases) for entry in self.exclude.find(p)] if self.exclude and path else []
        for entry, p in found:
            if adaptable:
                self.exclude.hit(entry)
            elif module is not None:
                kind = "a container" if module._modules else f"a {type(module).__name__}"
                self.exclude.miss(entry, f"{p!r} is {kind}, which is no site anyway")
        return bool(found)

    def _in_layers(self, path: str, found: dict[str, str]) -> bool:
        return any(entry == p for entry, p in found.items()) or self.layers.allow(path)

    def _miss(self, found: dict[str, str], why: str, names: Names | None = None) -> None:
        for entry, path in found.items():
            (names or self.targets).miss(entry, f"{path!r} {why}")

    def _add(self, site: Site) -> None:
        if site.path in self.sites:
            return
        rank = self.spec.rank_at(site.path)
        if rank % site.groups:
            raise SpecError(
                f"rank {rank} at {site.path!r}: a convolution with {site.groups} groups needs a rank that is a multiple of "
                f"{site.groups}; set rank_pattern={{{re.escape(site.path)!r}: {math.ceil(rank / site.groups) * site.groups}}} "
                "or exclude it"
            )
        self.layers.count(site.path)
        self.sites[site.path] = site

    # checks and notes

    def _check(self) -> None:
        """Every entry has to have yielded something."""
        known = self._known()
        for names in (self.targets, self.parameters, self.save, self.exclude):
            lost = names.unmatched()
            if lost:
                raise TargetError(self._lost_message(names, lost, known))
        if self.unfit:
            raise TargetError(_unfit_message(self.unfit) + _linears(self.model))
        missing = self.layers.missing()
        if missing:
            there = sorted(self.layers.seen)
            raise TargetError(f"LoraSpec.layers: no site in layer {missing}; the sites that match lie in layers {there or 'without a number'}")
        if not self.sites and not self.saved:
            raise TargetError(f"LoraSpec.targets={self.spec.targets!r} adapts nothing in {type(self.model).__name__}.{_linears(self.model)}")
        for name in ("rank_pattern", "alpha_pattern"):
            lost = unmatched_patterns(getattr(self.spec, name), self.sites)
            if lost:
                hints = "".join(did_you_mean(key, {p.rpartition(".")[2] for p in self.sites}) for key in lost[:1])
                raise TargetError(f"LoraSpec.{name}: {some_names(lost)} match no site.{hints} Sites: {some_names(self.sites)}")

    def _known(self) -> set[str]:
        paths = [node.path for node in self.nodes] + [f"{node.path}.{n}" for node in self.nodes for n in node.module._parameters]
        return {".".join(path.split(".")[-count:]) for path in paths for count in (1, 2)}

    def _lost_message(self, names: Names, lost: list[str], known: set[str]) -> str:
        parts = []
        for entry in lost:
            why = names.reason(entry)
            parts.append(f"{entry!r} {f'yields nothing: {why}' if why else f'matches nothing.{did_you_mean(entry, known)}'}")
        message = f"LoraSpec.{names.field}: " + "; ".join(parts)
        if names.regex is not None:
            message += f" (one string is a regular expression over whole paths; a list, [{lost[0]!r}], holds names and suffixes)"
        if names is self.exclude and names.regex is None and any(names.reason(entry) for entry in lost):
            joined = "|".join(re.escape(entry) for entry in names.entries)
            expression = rf"(.*\.)?({joined})(\..*)?"
            message += f". To exclude all inside of it: exclude={expression!r}"
        if names is self.targets and any(entry in self._parameter_tails() for entry in lost):
            message += ". A bare parameter is named by target_parameters"
        return message + ("" if names is self.exclude else _linears(self.model))

    def _parameter_tails(self) -> set[str]:
        return {tail for tail in self._known() if not tail.endswith(("weight", "bias"))} & {
            suffix
            for node in self.nodes
            for name, value in node.module._parameters.items()
            if value is not None and value.ndim in (2, 3)
            for suffix in (name, f"{node.path.rpartition('.')[2]}.{name}")
        }

    def _say_shared(self) -> None:
        """Notes about weights with several uses, and about experts that "all-linear" leaves out."""
        for node in self.nodes:
            if node.aliases and any(site.owner == node.path for site in self.sites.values()):
                self.notes.append(f"{node.path!r} is one module that also stands at {some_names(node.aliases)}: it is adapted once")
        for site in self.sites.values():
            self._say_tied(site.path, getattr(site.module, site.weight_name), f"{site.owner}.{site.weight_name}", _SHARED)
        for path in self.saved:
            for name, parameter in self.model.get_submodule(path).named_parameters():
                self._say_tied(path, parameter, f"{path}.{name}", _OWN_COPY)
        if self.all_linear:
            self._say_experts()
        if self.spec.fan_in_fan_out is not None and self.sites:
            fits = [s for s in self.sites.values() if s.kind in ("linear", "parameter") and s.transposed == self.spec.fan_in_fan_out]
            if not fits:
                self.notes.append(f"fan_in_fan_out={self.spec.fan_in_fan_out} has no effect: the layers' classes say how weights are stored")

    def _say_tied(self, path: str, weight: object, own: str, text: str) -> None:
        others = [use for use in self.uses.get(id(weight), ()) if use != own]
        if others:
            self.notes.append(f"{own!r} and {some_names(others)} are one tied weight: {text.format(path=path)}")

    def _say_experts(self) -> None:
        left = {}
        for node in self.nodes:
            for name, p in node.module._parameters.items():
                stacked = p is not None and p.ndim == 3 and min(p.shape) > 1 and node.kind is None
                if stacked and "expert" in node.path.lower() and f"{node.path}.{name}" not in self.sites:
                    left[f"{node.path.rpartition('.')[2]}.{name}"] = f"{node.path}.{name}"
        if left:
            self.notes.append(
                f"stacked experts are not adapted by 'all-linear' ({some_names(left.values(), 2)}); "
                f"add target_parameters={sorted(left)} to adapt them"
            )

    def _biases(self, sites: tuple[Site, ...]) -> tuple[str, ...]:
        if self.spec.bias == "none":
            return ()
        inside = tuple(f"{path}." for path in self.saved)
        if self.spec.bias == "all":
            found = [
                f"{node.path}.{name}" if node.path else name
                for node in self.nodes
                if not f"{node.path}.".startswith(inside or ("\0",))
                for name, p in node.module._parameters.items()
                if p is not None and (name == "bias" or name.endswith("_bias"))
            ]
        else:
            found = [f"{s.owner}.{name}" if s.owner else name for s in sites for name in _bias_names(s)]
        if not found:
            self.notes.append(f"bias={self.spec.bias!r} trains nothing: there is no such bias in the model")
        return tuple(dict.fromkeys(found))


def _walk(model: nn.Module) -> Iterator[_Node]:
    """All modules, depth first in model order, each once; weft's own children are left out."""
    seen: dict[int, _Node] = {}
    kinds: dict[type, str | None] = {}
    order: list[_Node] = []

    def visit(path: str, module: nn.Module, host: str | None, above: frozenset[int]) -> None:
        node = seen.get(id(module))
        if node is None:
            cls = type(module)
            if cls not in kinds:
                kinds[cls] = _module_kind(module)
            node = seen[id(module)] = _Node(path, module, kinds[cls], host=host)
            order.append(node)
        elif id(module) in above:
            return
        else:
            node.aliases.append(path)
        children = module._modules
        if not children:
            return
        attached = getattr(type(module), "_weft_site", False)
        above = above | {id(module)}
        for name, child in children.items():
            if child is None or (name == "weft" and (attached or type(child).__module__.startswith("weft."))):
                continue
            inner = path if node.kind == "attention" and name == "out_proj" else None
            visit(f"{path}.{name}" if path else name, child, inner, above)

    visit("", model, None, frozenset())
    return iter(order)


def _module_kind(module: nn.Module) -> str | None:
    """How a module of this class is adapted; None: it can't be."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, _CONVS):
        return "conv"
    if isinstance(module, nn.MultiheadAttention):
        return "attention"
    named = any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)
    return "conv1d" if named and getattr(getattr(module, "weight", None), "ndim", 0) == 2 else None


def _module_site(node: _Node, spec: LoraSpec) -> Site:
    """The site of a module that is adapted as a whole."""
    module, path = node.module, node.path
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise TargetError(f"{path!r} is a lazy {type(module).__name__} without a weight yet: run one forward pass first")
    if isinstance(module, nn.Linear):
        return Site(path, path, module, "weight", "linear", module.in_features, module.out_features, host=node.host)
    if isinstance(module, nn.Embedding):
        return Site(path, path, module, "weight", "embedding", module.num_embeddings, module.embedding_dim, transposed=True)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        kernel = tuple(module.kernel_size)
        d_in = module.in_channels * math.prod(kernel)
        return Site(path, path, module, "weight", "conv", d_in, module.out_channels, kernel=kernel, groups=module.groups)
    assert isinstance(weight, Tensor)
    return Site(path, path, module, "weight", "linear", int(weight.shape[0]), int(weight.shape[1]), transposed=True)


def _parameter_site(path: str, node: _Node, name: str, parameter: Tensor, spec: LoraSpec) -> Site:
    """The site of a bare parameter: (d_out, d_in) or stacked experts (E, d_out, d_in)."""
    shape = tuple(int(size) for size in parameter.shape)
    if len(shape) not in (2, 3) or not parameter.is_floating_point():
        raise TargetError(
            f"LoraSpec.target_parameters: {path!r} is {shape} of {parameter.dtype}; expected floating point numbers, "
            "(d_out, d_in) or stacked experts (E, d_out, d_in)"
        )
    stored = bool(getattr(node.module, "is_transposed", False)) if len(shape) == 3 else False
    transposed = stored if spec.fan_in_fan_out is None else spec.fan_in_fan_out
    d_in, d_out = (shape[-2], shape[-1]) if transposed else (shape[-1], shape[-2])
    experts = shape[0] if len(shape) == 3 else None
    return Site(path, node.path, node.module, name, "parameter", d_in, d_out, experts=experts, transposed=transposed)


def _weight_uses(nodes: list[_Node]) -> dict[int, list[str]]:
    """Paths by the identity of a parameter that several modules hold."""
    uses: dict[int, list[str]] = {}
    for node in nodes:
        for name, parameter in node.module._parameters.items():
            if parameter is not None:
                uses.setdefault(id(parameter), []).append(f"{node.path}.{name}" if node.path else name)
    return {key: paths for key, paths in uses.items() if len(paths) > 1}


def _output_heads(nodes: list[_Node]) -> frozenset[int]:
    """Identities of the output embeddings of the model and of every model inside of it."""
    heads = set()
    for node in nodes:
        if hasattr(type(node.module), "get_output_embeddings"):
            try:
                heads.add(id(node.module.get_output_embeddings()))  # type: ignore[operator]
            except (NotImplementedError, AttributeError):
                continue
    return frozenset(heads - {id(None)})


def _bias_names(site: Site) -> list[str]:
    stem = site.weight_name.removesuffix("_weight")
    names = ["bias"] if site.weight_name == "weight" else [f"{stem}_bias"]
    return [name for name in names if isinstance(getattr(site.module, name, None), nn.Parameter)]


def _linears(model: nn.Module) -> str:
    names = dict.fromkeys(n.path.rpartition(".")[2] for n in _walk(model) if n.kind in ("linear", "conv1d") and n.path)
    return f" Linear layers here: {some_names(names, 12)}" if names else " There are no linear layers here"


def _unfit_message(unfit: dict[str, nn.Module]) -> str:
    """Modules that were named and can't be adapted, and what could be meant."""
    parts = []
    for path, module in list(unfit.items())[:4]:
        inside = dict.fromkeys(n.path.rpartition(".")[2] for n in _walk(module) if n.kind is not None and n.path)
        hint = f"; did you mean {some_names(inside, 8)} inside of it?" if inside else ""
        bare = [name for name, p in module._parameters.items() if p is not None and p.ndim in (2, 3)]
        hint += f"; its parameters {some_names(bare)} are named by target_parameters" if bare and not inside else ""
        parts.append(f"{path!r} is {'a container, ' if module._modules else 'a '}{type(module).__name__}{hint}")
    more = f" … and {len(unfit) - 4} more" if len(unfit) > 4 else ""
    return (
        f"LoraSpec.targets names what can't be adapted: {'; '.join(parts)}{more}. "
        "Linear, Conv1D, Conv1d/2d/3d, Embedding and MultiheadAttention can."
    )
