"""From the sorted keys of a PEFT file to factors by site.

Which parameter of a module is meant stands nowhere in the keys: it follows from the config's target_parameters and from how the
wrappers are nested. This module does not know what is trained beside the factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weft.core.factors import Factors, spread_groups
from weft.core.patterns import Names
from weft.errors import FormatError, KeysError, ShapeError
from weft.formats.checks import shortened
from weft.formats.peft_config import PeftConfig
from weft.formats.peft_keys import Part, SortedKeys
from weft.formats.peft_layout import OUT_PROJ_TWICE, Form, decode, definition_order

__all__ = ["ReadSites", "Seated", "read_sites", "seat_sites"]


@dataclass(frozen=True)
class Seated:
    """One site of a file.

    Attributes:
        path: of the site in weft.
        name: what PEFT matches patterns against.
        parts: keys of its tensors.
    """

    path: str
    name: str
    form: Form
    parts: Mapping[str, Part]

    @property
    def key(self) -> str:
        """A key to name in messages."""
        return shortened(next(iter(self.parts.values())).key)


@dataclass(frozen=True)
class ReadSites:
    """Factors by site, and PEFT's names of these sites."""

    factors: Mapping[str, Factors]
    names: Mapping[str, str]
    notes: Sequence[str]


def seat_sites(config: PeftConfig, keys: SortedKeys, base: nn.Module | None) -> list[Seated]:
    """Decide for every update which weight of the base it is for.

    Args:
        config: whose target_parameters say which updates are for bare parameters.
        keys: of the file.
        base: the base, where the order in which a module defines its parameters has to be looked up.

    Raises:
        KeysError: wrappers that the config doesn't explain.
    """
    targets = _Targets(config, base)
    attentions = {
        host
        for module, hosts in keys.hosts.items()
        for host in hosts
        if module == f"{host}.out_proj" and (host, 0) in keys.updates and not targets.parameters_of(host)
    }
    depths: dict[str, int] = {}
    for module, depth in keys.updates:
        depths[module] = max(depths.get(module, 0), depth + 1)
    found: dict[str, list[Seated]] = {module: [] for module in depths}
    for (module, depth), parts in sorted(
        keys.updates.items(), key=lambda item: -item[0][1]
    ):  # innermost first: the first one defined
        leaves = targets.order(module, depths[module], next(iter(parts.values())).key)
        if leaves:
            path = f"{module}.{leaves[depths[module] - 1 - depth]}"
            seated = Seated(path, path, "parameter", parts)
        elif module in attentions:
            seated = Seated(f"{module}.in_proj_weight", module, "in_proj", parts)
        elif module.rpartition(".")[0] in attentions and module.endswith(".out_proj"):
            seated = Seated(module, module.rpartition(".")[0], "out_proj", parts)
        else:
            seated = Seated(
                module, module, "embedding" if any(part.embedding for part in parts.values()) else "linear", parts
            )
        found[module].append(seated)
    return [seated for module in dict.fromkeys(module for module, _ in keys.updates) for seated in found[module]]


class _Targets:
    """What a config targets: modules, or bare parameters of modules."""

    def __init__(self, config: PeftConfig, base: nn.Module | None) -> None:
        modules, exclude = config.get("target_modules", []), config.get("exclude_modules", [])
        self.config, self.base = config, base
        self.modules = Names("target_modules", modules if isinstance(modules, str) else tuple(modules))
        self.exclude = Names("exclude_modules", exclude if isinstance(exclude, str) else tuple(exclude))

    def parameters_of(self, module: str) -> list[str]:
        """Names of parameters targeted in a module; none in one that is adapted as a module, PEFT has one or the other."""
        if self.modules.find(module) and not self.exclude.find(module):
            return []
        owners = (entry.rpartition(".") for entry in self.config.get("target_parameters", []))
        leaves = [leaf for owner, _, leaf in owners if not owner or module == owner or module.endswith(f".{owner}")]
        return list(dict.fromkeys(leaves))

    def order(self, module: str, wrappers: int, key: str) -> list[str]:
        """Names of the wrapped parameters of a module, innermost wrapper first; empty if it is adapted as a module.

        Raises:
            KeysError: the config doesn't explain so many wrappers, or their order can't be known without the base.
        """
        leaves = self.parameters_of(module)
        if not leaves and wrappers > 1:
            raise KeysError(
                f"{wrappers} updates for {module!r}, one inside of the other, but the config's target_parameters name no parameter of it",
                path=self.config.path, key="target_parameters",
            )  # fmt: skip
        if not leaves:
            return []
        folder = self.config.path.parent
        if self.base is not None:
            try:
                own = [name for name, _ in self.base.get_submodule(module).named_parameters(recurse=False)]
            except AttributeError:
                raise KeysError(f"the base has no module {module!r}", path=folder, key=shortened(key)) from None
            leaves = [name for name in own if name in leaves]
        if len(leaves) != wrappers:
            raise KeysError(
                f"{wrappers} updates for the {len(leaves)} parameters {leaves} of {module!r} that target_parameters name: which is which can't be known",
                path=folder, key=shortened(key),
            )  # fmt: skip
        ordered = leaves if self.base is not None else definition_order(leaves)
        if ordered is None:
            raise KeysError(
                f"the parameters {leaves} of {module!r} are told apart only by the order in which the module defines them: pass the base, "
                "weft.load(path, base=model)", path=folder, key=shortened(key)
            )  # fmt: skip
        return ordered


def read_sites(
    config: PeftConfig, sites: Sequence[Seated], tensors: Mapping[str, Tensor], *, allow_partial: bool = False
) -> ReadSites:
    """Factors of all sites.

    Args:
        config: for ranks and scales.
        sites: from `seat_sites`.
        tensors: by key; without data (on the meta device) everything but the numbers is checked.
        allow_partial: leave out sites that lack a tensor.

    Raises:
        KeysError: a site without A or B, or with parts that the config doesn't announce.
        FormatError: no floating point numbers, shapes that don't fit, another rank than the config says.
    """
    factors: dict[str, Factors] = {}
    names: dict[str, str] = {}
    notes: list[str] = []
    lost_bias = []
    for site in sites:
        missing = _missing(config, site)
        if missing and allow_partial:
            notes.append(f"left out: {site.path!r}, for which the file has no {missing}")
            continue
        if missing:
            raise KeysError(
                f"{site.path!r} has no {missing}: a part of the file is missing; allow_partial=True leaves the site out",
                path=config.path.parent,
                key=site.key,
            )
        if site.form == "in_proj" and "bias" in site.parts:
            lost_bias.append(site.path)
        factors[site.path] = _factors(config, site, tensors)
        names[site.path] = site.name
    if lost_bias:
        notes.append(
            f"B's own bias of {lost_bias[0]!r} (and {len(lost_bias) - 1} more) is left out, as PEFT's forward leaves it out"
        )
    if any(site.form == "out_proj" for site in sites):
        notes.append(
            "PEFT adds the update of an nn.MultiheadAttention's out_proj twice; its scale is doubled here, so that the outputs are PEFT's"
        )
    if factors and all(not item.B.is_meta and not bool(item.B.any()) for item in factors.values()):
        notes.append("every B is zero: this adapter was saved before its first step and changes nothing")
    return ReadSites(factors, names, notes)


def _missing(config: PeftConfig, site: Seated) -> str:
    """What a site lacks; parts that the config doesn't announce are an error at once."""
    layer = site.form in ("linear", "embedding", "conv")
    for part, field, name in (("magnitude", "use_dora", "lora_magnitude_vector"), ("bias", "lora_bias", "lora_B.bias")):
        there, announced = part in site.parts, bool(config.get(field, False))
        if there and not announced:
            raise KeysError(
                f"{site.path!r} has a {name}, but the config says {field}: false; one of both is wrong",
                path=config.path,
                key=field,
            )
        if announced and not there and (layer if part == "magnitude" else site.form in ("linear", "conv")):
            return name
    return " and no ".join(f"lora_{part}" for part in ("A", "B") if part not in site.parts)


def _factors(config: PeftConfig, site: Seated, tensors: Mapping[str, Tensor]) -> Factors:
    """Factors of one site, every complaint with its key."""
    found = {
        part: tensors[where.key]
        for part, where in site.parts.items()
        if not (part == "bias" and site.form == "in_proj")
    }
    for part, tensor in found.items():
        if not tensor.is_floating_point():
            raise FormatError(
                f"{tensor.dtype}: factors are float64, float32, bfloat16 or float16; a quantised file has to be dequantised where it came from",
                path=config.path.parent, key=shortened(site.parts[part].key),
            )  # fmt: skip
    rank, scale, form = config.rank_at(site.name), config.scale_at(site.name), site.form
    try:
        if config.get("enable_lora") is not None and form == "linear":
            return fused_factors(found["A"], found["B"], config.get("enable_lora"), rank, scale)
        if form == "linear" and found["A"].dim() > 2:
            form = "conv"
        return decode(found, form, scale * (OUT_PROJ_TWICE if form == "out_proj" else 1.0), rank)
    except ShapeError as problem:
        raise FormatError(
            f"{site.path!r}: {problem} (r={rank} for {site.name!r}, as {config.path.name} says). The config belongs to another file, or one of both was changed",
            path=config.path.parent, key=site.key,
        ) from None  # fmt: skip


def fused_factors(A: Tensor, B: Tensor, enabled: Sequence[bool], rank: int, scale: float) -> Factors:
    """The update of a fused query-key-value layer of loralib and PEFT 0.2 (``enable_lora``) as plain factors.

    Args:
        A: (r · n, i) for n enabled parts.
        B: (o · n / parts, r · n / groups) or with a third dimension of 1, the weight of a grouped convolution.
        enabled: which parts of the fused output are adapted.
        rank: r, of one part.
        scale: alpha / r.

    Returns:
        Factors of rank r · n; rows of parts that are not enabled are zero.

    Raises:
        ShapeError: A and B don't fit the parts.
    """
    parts, n = len(enabled), sum(enabled)
    B = B.flatten(1)
    fits = (
        n
        and A.dim() == B.dim() == 2
        and A.shape[0] == rank * n
        and B.shape[1]
        and A.shape[0] % B.shape[1] == 0
        and B.shape[0] % n == 0
    )
    if not fits or B.shape[0] % (A.shape[0] // B.shape[1]):
        raise ShapeError(
            f"lora_A is {tuple(A.shape)}, lora_B {tuple(B.shape)}; expected the factors of {n} of {parts} fused parts"
        )
    dense = spread_groups(B, A.shape[0] // B.shape[1])
    rows = dense.shape[0] // n
    pieces = iter(dense.reshape(n, rows, -1))
    whole = torch.cat([next(pieces) if use else dense.new_zeros(rows, dense.shape[1]) for use in enabled])
    return Factors(A, whole, scale)
