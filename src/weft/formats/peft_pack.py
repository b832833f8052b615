"""From an adapter to the tensors and the config of a PEFT directory, and, with its record, exactly back.

This module does not know files.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from weft.adapter import Adapter
from weft.core.factors import Factors, Kind
from weft.errors import FormatError, KeysError, ShapeError, UnsupportedError, some_names
from weft.formats.checks import shortened
from weft.formats.peft_layout import OUT_PROJ_TWICE, Layout, Seat, decode, encode, halved, padded, renamed_by_peft
from weft.formats.record import Record, SiteRecord, dtype_of

__all__ = ["Packed", "pack", "unpack"]

_PARTS = {
    "lora_A.weight": "A", "lora_B.weight": "B", "lora_embedding_A": "A", "lora_embedding_B": "B", "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
}  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """An adapter in PEFT's terms.

    Attributes:
        tensors: by key.
        layout: where sites stand.
        scales: (rank, scale) by the name that PEFT matches patterns against.
    """

    tensors: Mapping[str, Tensor]
    layout: Layout
    scales: Mapping[str, tuple[int, float]]


@dataclass(frozen=True)
class _Pair:
    """How the two projections of an nn.MultiheadAttention, which PEFT gives one rank and one alpha, are brought together.

    Attributes:
        factor: what out_proj's B is multiplied with in the file; a power of two, so that nothing is rounded.
    """

    rank: int
    scale: float
    factor: float

    @classmethod
    def of(cls, owner: str, inner: tuple[int, float] | None, outer: tuple[int, float] | None) -> _Pair:
        """From (rank, scale) of in_proj and of out_proj; None where one is not adapted.

        Raises:
            UnsupportedError: scales whose ratio is no power of two.
        """
        rank = max(part[0] for part in (inner, outer) if part is not None)
        if inner is None or outer is None:
            scale = inner[1] if inner is not None else outer[1] / OUT_PROJ_TWICE  # type: ignore[index]
            return cls(rank, scale, 1.0)
        factor = outer[1] / (OUT_PROJ_TWICE * inner[1]) if inner[1] else 0.0
        if not factor or abs(math.frexp(factor)[0]) != 0.5:
            raise UnsupportedError(
                f"the scales of {owner}.in_proj_weight ({inner[1]:g}) and {owner}.out_proj ({outer[1]:g}) differ, and PEFT has one alpha for both"
            )
        return cls(rank, inner[1], factor)


def pack(adapter: Adapter, *, for_servers: bool = False) -> Packed:
    """PEFT's tensors of an adapter; dtypes are kept.

    Args:
        adapter: any.
        for_servers: they read PEFT's files, but don't rename modules as PEFT does, see `renamed_by_peft`.

    Raises:
        UnsupportedError: something that PEFT can't express; names the site.
    """
    sites: list[tuple[str, Kind]] = [(path, item.kind) for path, item in adapter.factors.items()]
    layout = Layout(sites, frozenset() if for_servers else _by_weight(adapter))
    _check_alike(adapter)
    pairs = _pairs(layout, {path: (item.rank, item.scale) for path, item in adapter.factors.items()})
    tensors: dict[str, Tensor] = {}
    scales: dict[str, tuple[int, float]] = {}
    for path, item in adapter.factors.items():
        seat = layout.seats[path]
        try:
            ready = _ready(item, seat, pairs.get(seat.name), adapter.spec.at(path).fan_in_fan_out is True)
            named = encode(ready, seat.form)
        except (UnsupportedError, ShapeError) as problem:
            raise UnsupportedError(f"{path!r}: {problem}") from None
        _add(tensors, {f"{seat.key}.{name}": tensor for name, tensor in named.items()})
        scales[seat.name] = (
            (pairs[seat.name].rank, pairs[seat.name].scale) if seat.name in pairs else (ready.rank, ready.scale)
        )
        if path in layout.partners:
            _add(tensors, _idle(item, layout.seats[layout.partners[path]], scales[seat.name][0]))
    if any(item.bias is not None for item in adapter.factors.values()):
        _add(tensors, dict(_missing_biases(adapter, layout, tensors)))
    for path, module in adapter.modules.items():
        _add(tensors, {f"{layout.module_key(path)}.{name}": tensor for name, tensor in module.items()})
    _add(tensors, {layout.parameter_key(path): tensor for path, tensor in adapter.biases.items()})
    return Packed(tensors, layout, scales)


def _add(tensors: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Put tensors in; a key that is taken would lose one of the two."""
    twice = [key for key in more if key in tensors]
    if twice:
        raise UnsupportedError(
            f"two parts of the adapter would be stored as {twice[0]!r}: a weight that is adapted twice, or trained whole as well"
        )
    tensors |= more


def _by_weight(adapter: Adapter) -> frozenset[str]:
    """Linear sites to be targeted by their parameter, which PEFT has only for plain updates."""
    base = adapter.provenance.base
    linear = [path for path, item in adapter.factors.items() if item.kind == "linear"]
    bare = [path for path, item in adapter.factors.items() if item.kind == "parameter"]
    found = renamed_by_peft(base.architecture if base else "", [*linear, *bare]) & set(linear)
    for path in found:
        if adapter.factors[path].magnitude is not None or adapter.factors[path].bias is not None:
            raise UnsupportedError(
                f"{path!r}: PEFT takes layers of this name for stacked experts, where it has neither DoRA nor lora_bias"
            )
    return found


def _check_alike(adapter: Adapter) -> None:
    """PEFT switches DoRA for a whole adapter."""
    plain = [path for path, item in adapter.factors.items() if item.magnitude is None]
    if plain and len(plain) < len(adapter.factors):
        raise UnsupportedError(
            f"some sites have a DoRA magnitude, {some_names(plain, 3)} have none; PEFT has DoRA for all sites or for none"
        )
    for path, item in adapter.factors.items():
        if not item.A.is_floating_point() or item.A.itemsize < 2 or item.B.itemsize < 2:
            raise UnsupportedError(
                f"{path!r}: factors of {item.A.dtype} and {item.B.dtype}; cast them, adapter.map(lambda t: t.float())"
            )


def _pairs(layout: Layout, facts: Mapping[str, tuple[int, float]]) -> dict[str, _Pair]:
    owners = {seat.name for seat in layout.seats.values() if seat.form in ("in_proj", "out_proj")}
    return {
        owner: _Pair.of(owner, facts.get(f"{owner}.in_proj_weight"), facts.get(f"{owner}.out_proj")) for owner in owners
    }


def _ready(item: Factors, seat: Seat, pair: _Pair | None, flipped: bool) -> Factors:
    """Factors with the rank, scale and orientation that PEFT's file needs."""
    if pair is not None:
        ready = padded(item, pair.rank)
        if seat.form == "out_proj" and pair.factor != 1.0:
            ready = dataclasses.replace(ready, B=halved(ready.B, pair.factor))
        return ready
    if seat.form == "parameter" and flipped:
        return _transposed(item)
    return item


def _transposed(item: Factors) -> Factors:
    """The update of a matrix that is stored as (d_in, d_out), which PEFT takes as it is stored."""
    if item.A.dim() == 3:
        raise UnsupportedError(
            "stacked experts with fan_in_fan_out=True: PEFT asks the module (is_transposed) how they are stored"
        )
    return dataclasses.replace(item, A=item.B.mT, B=item.A.mT)


def _idle(item: Factors, seat: Seat, rank: int) -> dict[str, Tensor]:
    """Zeros for the projection of an attention that isn't adapted; PEFT has both or none."""
    width = item.d_in
    out = width if seat.form == "out_proj" else 3 * width
    return {
        f"{seat.key}.lora_A.weight": item.A.new_zeros(rank, width),
        f"{seat.key}.lora_B.weight": item.B.new_zeros(out, rank),
    }


def _missing_biases(adapter: Adapter, layout: Layout, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Zeros where only some sites have a bias of B."""
    for path, item in adapter.factors.items():
        seat = layout.seats[path]
        if item.bias is None and seat.form not in ("linear", "conv"):
            raise UnsupportedError(
                f"{path!r}: PEFT has no lora_bias for a site of this kind; keep it in an adapter of its own"
            )
        key = f"{seat.key}.lora_B.bias"
        if key not in tensors:
            yield key, item.B.new_zeros(item.d_out)


def unpack(record: Record, tensors: Mapping[str, Tensor], path: Path) -> Adapter:
    """The adapter that was packed.

    Args:
        record: what weft.json says.
        tensors: of the file, by key.
        path: of the file, for messages.

    Raises:
        KeysError: a tensor is missing, or belongs to nothing.
        FormatError: shapes or dtypes that aren't those of the record.
    """
    try:
        layout = Layout([(site.path, site.kind) for site in record.sites])
        pairs = _pairs(layout, {site.path: (site.rank, site.scale) for site in record.sites})
    except (UnsupportedError, ValueError, OverflowError) as problem:
        raise FormatError(f"the record and the file don't belong together: {problem}", path=path) from None
    left = dict(tensors)
    factors: dict[str, Factors] = {}
    for site in record.sites:
        seat = layout.seats[site.path]
        found = {part: left.pop(f"{seat.key}.{name}") for name, part in _PARTS.items() if f"{seat.key}.{name}" in left}
        if "A" not in found or "B" not in found:
            raise KeysError(
                f"the factors of {site.path!r} are missing: a part of the file is lost",
                path=path,
                key=shortened(seat.key),
            )
        try:
            factors[site.path] = _restored(
                site, seat, found, pairs.get(seat.name), record.spec.at(site.path).fan_in_fan_out is True
            )
        except (ShapeError, UnsupportedError) as problem:
            raise FormatError(f"{site.path!r}: {problem}", path=path, key=shortened(seat.key)) from None
        if site.path in layout.partners:
            for name in ("lora_A.weight", "lora_B.weight"):
                left.pop(f"{layout.seats[layout.partners[site.path]].key}.{name}", None)
    modules = {
        home: {name: _taken(left, f"{layout.module_key(home)}.{name}", path) for name in names}
        for home, names in record.modules.items()
    }
    biases = {name: _taken(left, layout.parameter_key(name), path) for name in record.biases}
    if left:
        raise KeysError(
            f"{len(left)} tensors that belong to nothing: {some_names(left)}",
            path=path,
            key=shortened(next(iter(left))),
        )
    return Adapter(record.spec, factors, modules, biases, record.provenance)


def _taken(left: dict[str, Tensor], key: str, path: Path) -> Tensor:
    if key not in left:
        raise KeysError("missing: a part of the file is lost", path=path, key=shortened(key))
    return left.pop(key)


def _restored(site: SiteRecord, seat: Seat, found: Mapping[str, Tensor], pair: _Pair | None, flipped: bool) -> Factors:
    """Factors as they were before `_ready`."""
    item = decode(found, seat.form, site.scale, pair.rank if pair is not None else site.rank)
    A, B = item.A, item.B
    if pair is not None:
        A, B = A[: site.rank], B[:, : site.rank]
        B = B / pair.factor if seat.form == "out_proj" else B
    elif seat.form == "parameter":
        A, B = (B.mT, A.mT) if flipped else (A, B)
        A, B = A.reshape(site.A), B.reshape(site.B)
    if tuple(A.shape) != site.A or tuple(B.shape) != site.B:
        raise ShapeError(f"A is {tuple(A.shape)} and B {tuple(B.shape)}; saved were {site.A} and {site.B}")
    A, B = A.to(dtype_of(site.dtypes[0])).contiguous(), B.to(dtype_of(site.dtypes[1])).contiguous()
    groups = site.groups if site.kind == "conv" else 1
    return dataclasses.replace(item, A=A, B=B, kind=site.kind, groups=groups, bias=item.bias if site.bias else None)
