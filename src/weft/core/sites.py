"""Sites: which weights of a model a `LoraSpec` means, and which it fails to mean.

One walk over the module tree turns names, suffixes, regular expressions and layer indices into `Site` values. Nothing
matches silently: an entry that yields no site is an error that says why. This module does not know any architecture
(``targets="default"`` is resolved above it), no factors and no files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from weft.core.norms import norm_notes, norm_paths
from weft.core.patterns import Layers, Names, unmatched_patterns
from weft.core.site import Site, attention_site, module_site, parameter_site
from weft.core.site_errors import linears, lost_message, unfit_message
from weft.core.towers import moved, towers_of, under
from weft.core.tree import Node, output_heads, shared_weights, walk
from weft.errors import SpecError, TargetError, did_you_mean, some_names
from weft.spec import LoraSpec

__all__ = ["SiteMap", "find_sites", "tie_notes"]

_SHARED = "the update at {path!r} applies to this use only; a merged copy unties them"
_OWN_COPY = "{path!r} is trained whole as a weight of its own, the other keeps the base's"


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

    With `spec.towers` each tower is searched by its own spec; paths are those in the whole model.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [(site.path, site.d_in, site.d_out) for site in find_sites(model, LoraSpec(targets=["0", "2"])).sites]
        [('0', 4, 8), ('2', 8, 2)]
    """
    if spec.towers:
        return _by_tower(model, spec)
    search = _Search(model, spec)
    search.match()
    search.check()
    sites = tuple(search.sites.values())
    biases = _biases(search, sites)
    statistics = norm_paths(search.nodes, (*search.saved, *search.sites))
    notes = [*_notes(search, sites, biases), *norm_notes(spec, statistics)]
    saved = search.saved if spec.batch_norm == "frozen" else [*search.saved, *statistics]
    biases = tuple(path for path in biases if path.rpartition(".")[0] not in saved)
    return SiteMap(sites, tuple(saved), biases, tuple(notes))


def _by_tower(model: nn.Module, spec: LoraSpec) -> SiteMap:
    """The sites of all towers, by their paths in the whole model."""
    parts = {name: find_sites(tower, spec.towers[name]) for name, tower in towers_of(model, spec).items()}
    outer: list[str] = []
    if spec.save_modules:
        search = _Search(model, LoraSpec(targets=(), save_modules=spec.save_modules))
        search.match()
        search.check()
        outer = search.saved
    inside = [path for path in outer if spec.tower_of(path)]
    if inside:
        raise SpecError(
            f"LoraSpec.save_modules: {some_names(inside)} is in a tower; name it in save_modules of that tower's spec"
        )
    whole = tuple(path for name, part in parts.items() for path in under(name, part.save_modules))
    return SiteMap(
        tuple(moved(site, name) for name, part in parts.items() for site in part.sites),
        (*whole, *outer),
        tuple(path for name, part in parts.items() for path in under(name, part.biases)),
        tuple(f"{name}: {note}" for name, part in parts.items() for note in part.notes),
    )


def tie_notes(nodes: Iterable[Node], sites: Iterable[Site], whole: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """What the user has to know of sites and of modules trained whole, (path, module), whose weights other modules share."""
    uses = shared_weights(nodes)
    tied = [(site.path, site.weight, site.weight_path, _SHARED) for site in sites] if uses else []
    for path, module in whole if uses else ():
        tied += [(path, parameter, f"{path}.{name}", _OWN_COPY) for name, parameter in module.named_parameters()]
    notes = []
    for path, weight, own, text in tied:
        others = [use for use in uses.get(id(weight), ()) if use != own]
        if others:
            notes.append(f"{own!r} and {some_names(others)} are one tied weight: {text.format(path=path)}")
    return notes


class _Search:
    """One call of `find_sites`: the matching, and the account of what came of every entry."""

    def __init__(self, model: nn.Module, spec: LoraSpec) -> None:
        self.model, self.spec = model, spec
        self.nodes = walk(model)
        if spec.targets == "default":
            raise TargetError(
                "LoraSpec.targets='default' stands for an architecture's usual sites, which only weft.attach knows; name the sites"
                f" here.{linears(self.nodes)}"
            )
        self.all_linear = spec.targets == "all-linear"
        self.targets = Names("targets", () if self.all_linear else spec.targets)
        self.parameters = Names("target_parameters", spec.target_parameters)
        self.exclude = Names("exclude", spec.exclude)
        self.save = Names("save_modules", spec.save_modules)
        self.layers = Layers(spec.layers, spec.layers_pattern)
        self.sites: dict[str, Site] = {}
        self.saved: list[str] = []
        self.skipped: list[str] = []
        self.unfit: dict[str, nn.Module] = {}

    def match(self) -> None:
        """One pass over the modules, in model order."""
        heads = output_heads(self.nodes) if self.all_linear else frozenset()
        whole: dict[str, bool] = {}  # attentions that are adapted (True) or excluded (False) as a whole
        inside = "\0"
        for node in self.nodes:
            if node.path.startswith(inside):
                self._lose(node, "is part of a module in save_modules")
            elif node.path and self._saves(node):
                inside = f"{node.path}."
                self._lose(node, "is in save_modules")
            else:
                if node.kind == "attention":
                    self._attention(node, whole)
                elif node.path:
                    by_host = None if node.host is None else whole.get(node.host)
                    self._module(node, by_host, is_head=id(node.module) in heads)
                self._parameters(node)

    def check(self) -> None:
        """Every entry has to have yielded something."""
        for names in (self.targets, self.parameters, self.save, self.exclude):
            if names.unmatched():
                raise TargetError(lost_message(names, self.nodes))
        if self.unfit:
            raise TargetError(unfit_message(self.unfit, self.nodes))
        if self.layers.missing():
            there = f"in layers {sorted(self.layers.seen)}" if self.layers.seen else "in no numbered layer"
            raise TargetError(
                f"LoraSpec.layers: nothing to adapt in layer {self.layers.missing()}; what matches lies {there}"
            )
        if not self.sites and not self.saved:
            raise TargetError(
                f"LoraSpec.targets={self.spec.targets!r} adapts nothing in {type(self.model).__name__}.{linears(self.nodes)}"
            )
        for name in ("rank_pattern", "alpha_pattern"):
            lost = unmatched_patterns(getattr(self.spec, name), self.sites)
            if lost:
                hint = did_you_mean(lost[0], {part for path in self.sites for part in path.split(".")})
                raise TargetError(
                    f"LoraSpec.{name}: {some_names(lost)} match no site.{hint} Sites: {some_names(self.sites, 4)}"
                )

    # one module

    def _saves(self, node: Node) -> bool:
        found = _find(self.save, node.paths)
        for entry in found:
            self.save.hit(entry)
        if found:
            self.saved.append(node.path)
        return bool(found)

    def _lose(self, node: Node, why: str) -> None:
        """Entries that match inside of a module that is trained whole."""
        self.targets.miss(_find(self.targets, node.paths), why)
        for entry in _find(self.exclude, node.paths):
            self.exclude.hit(entry)
        for name in node.module._parameters if self.parameters else ():
            self.parameters.miss(_find(self.parameters, [node.path_of(name)]), why)

    def _module(self, node: Node, by_host: bool | None, is_head: bool) -> None:
        """Decide about a module; ``by_host``: what was decided about the attention that it is the out_proj of."""
        found = _find(self.targets, node.paths)
        excluded = self._excluded(node.paths, node) or by_host is False
        by_kind = self.all_linear and node.kind in ("linear", "conv1d") and not is_head
        if not (found or by_kind or by_host):
            return
        if excluded:
            self.targets.miss(found, "is excluded")
        elif not (by_host or self._in_layers(node.path, found)):
            self.targets.miss(found, f"is outside layers={list(self.spec.layers or ())}")
        else:
            for entry, path in found.items():
                self.targets.hit(entry)
                if node.kind is None:
                    self.unfit[path] = node.module
            if node.kind is not None:
                self._add(module_site(node))

    def _attention(self, node: Node, whole: dict[str, bool]) -> None:
        """Decide about an nn.MultiheadAttention: about its in_proj now, about its out_proj when the walk comes to it."""
        path = node.path_of("in_proj_weight")
        found, named = _find(self.targets, node.paths), _find(self.targets, [path])
        by_parameter = _find(self.parameters, [path])
        if self._excluded(node.paths, node):
            whole[node.path] = False
        elif (found or self.all_linear) and self._in_layers(node.path, found):
            whole[node.path] = True
        meant = {**(found if whole.get(node.path) else {}), **named, **by_parameter}
        if not meant and not (self.all_linear and whole.get(node.path)):
            self.targets.miss(
                found, f"is outside layers={list(self.spec.layers or ())}" if node.path not in whole else "is excluded"
            )
            return
        if self._excluded([path], node) or whole.get(node.path) is False:
            self.targets.miss(found | named, "is excluded")
            self.parameters.miss(by_parameter, "is excluded")
        elif not (whole.get(node.path) or self._in_layers(path, meant)):
            self.targets.miss(named, f"is outside layers={list(self.spec.layers or ())}")
            self.parameters.miss(by_parameter, f"is outside layers={list(self.spec.layers or ())}")
        elif node.module._parameters.get("in_proj_weight") is None:
            self._in_proj_missing(node, path, bool(meant))
        else:
            self._add(attention_site(node))
            for entry in named:
                self.targets.hit(entry)
            for entry in by_parameter:
                self.parameters.hit(entry)
        for entry in found if whole.get(node.path) else ():
            self.targets.hit(entry)

    def _in_proj_missing(self, node: Node, path: str, meant: bool) -> None:
        if meant:
            raise TargetError(
                f"{node.path!r} is an nn.MultiheadAttention whose query, key and value have different widths (kdim, vdim): "
                f"it has no in_proj_weight to adapt. Name {node.path_of('out_proj')!r} alone, or exclude it"
            )
        self.skipped.append(
            f"{path!r} is not adapted: the query, key and value of this attention have different widths (kdim, vdim)"
        )

    def _parameters(self, node: Node) -> None:
        """Decide about a module's bare parameters."""
        if not self.parameters:
            return
        for name, parameter in node.parameters():
            path = node.path_of(name)
            found = _find(self.parameters, [path])
            if not found or (node.kind == "attention" and name == "in_proj_weight"):
                continue
            if self._excluded([path], node):
                self.parameters.miss(found, "is excluded")
            elif not self._in_layers(path, found):
                self.parameters.miss(found, f"is outside layers={list(self.spec.layers or ())}")
            else:
                for entry in found:
                    self.parameters.hit(entry)
                if name == "weight" and node.path in self.sites:
                    raise TargetError(
                        f"{path!r} is adapted twice: by target_parameters, and as {node.path!r} by targets. Keep one"
                    )
                self._add(parameter_site(path, node, name, parameter, self.spec.fan_in_fan_out))

    def _excluded(self, paths: Iterable[str], node: Node) -> bool:
        found = _find(self.exclude, paths) if self.exclude else {}
        for entry in found:
            if node.kind is not None or found[entry] not in node.paths:
                self.exclude.hit(entry)
        what = (
            f"is {'a container, ' if node.module._modules else 'a '}{type(node.module).__name__}, which is never a site"
        )
        self.exclude.miss(found, what)
        return bool(found)

    def _in_layers(self, path: str, found: Mapping[str, str]) -> bool:
        return any(entry == where for entry, where in found.items()) or self.layers.allow(path)

    def _add(self, site: Site) -> None:
        rank = self.spec.rank_at(site.path)
        if rank % site.groups:
            fitting = math.ceil(rank / site.groups) * site.groups
            raise SpecError(
                f"rank {rank} at {site.path!r}: a convolution with {site.groups} groups needs a rank that is a multiple of "
                f"{site.groups}; set rank_pattern={{{re.escape(site.path)!r}: {fitting}}} or exclude it"
            )
        self.layers.count(site.path)
        self.sites[site.path] = site


def _find(names: Names, paths: Iterable[str]) -> dict[str, str]:
    """Entries that match one of the paths, and which one."""
    return {entry: path for path in paths for entry in names.find(path)}


def _biases(search: _Search, sites: tuple[Site, ...]) -> tuple[str, ...]:
    """Full paths of the biases that `spec.bias` trains; those of modules that are trained whole are in there already."""
    if search.spec.bias == "none":
        return ()
    if search.spec.bias == "lora_only":
        named = (
            (s, "bias" if s.weight_name == "weight" else f"{s.weight_name.removesuffix('_weight')}_bias") for s in sites
        )
        return tuple(f"{s.owner}.{name}".lstrip(".") for s, name in named if s.module._parameters.get(name) is not None)
    inside = tuple(f"{path}." for path in search.saved)
    nodes = (node for node in search.nodes if not f"{node.path}.".startswith(inside or ("\0",)))
    return tuple(
        n.path_of(name) for n in nodes for name, _ in n.parameters() if name == "bias" or name.endswith("_bias")
    )


def _notes(search: _Search, sites: tuple[Site, ...], biases: tuple[str, ...]) -> list[str]:
    """What the user has to know about a spec that is fine."""
    notes = list(search.skipped)
    owners = {site.owner for site in sites}
    notes += [
        f"{node.path!r} is one module that also stands at {some_names(node.aliases)}: it is adapted once"
        for node in search.nodes
        if node.aliases and node.path in owners
    ]
    notes += tie_notes(search.nodes, sites, [(path, search.model.get_submodule(path)) for path in search.saved])
    if search.all_linear:
        notes += _experts_left_out(search)
    if search.spec.bias != "none" and not biases:
        notes.append(f"bias={search.spec.bias!r} trains nothing: there is no such bias in the model")
    fan = search.spec.fan_in_fan_out
    if fan is not None and not any(site.kind in ("linear", "parameter") and site.transposed is fan for site in sites):
        notes.append(
            f"fan_in_fan_out={fan} has no effect here: the classes of the layers say how their weights are stored"
        )
    return notes


def _experts_left_out(search: _Search) -> list[str]:
    left = {
        f"{node.path.rpartition('.')[2]}.{name}": node.path_of(name)
        for node in search.nodes
        if node.kind is None and "expert" in node.path.lower()
        for name, parameter in node.parameters()
        if parameter.ndim == 3 and min(parameter.shape) > 1 and node.path_of(name) not in search.sites
    }
    if not left:
        return []
    return [
        f"the stacked experts {some_names(left.values(), 2)} are not adapted: 'all-linear' means modules; "
        f"add target_parameters={sorted(left)} to adapt them"
    ]
