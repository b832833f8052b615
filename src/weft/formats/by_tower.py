"""Adapters of several towers in one directory: a PEFT directory for each tower, in it, and weft.json as their index.

    out/weft.json                                   what belongs together, with the hash of each tower's record
    out/weft_model.safetensors                      modules outside of the towers: projections, a head
    out/text_model/adapter_config.json …            loads with PEFT, on the text model alone; also with weft.load
    out/vision_model/adapter_config.json …

Written where one PEFT directory can't hold the specs of all towers, or where somebody asks for it. This module doesn't know how the
directory of one tower is written: see `weft.formats.peft`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from weft.adapter import Adapter
from weft.errors import FormatError, KeysError, UnsupportedError, some_names
from weft.formats.record import RECORD, Record
from weft.formats.tensor_files import write_tensors
from weft.hashes import sha256_of

__all__ = ["OUTER", "joined", "owned_by", "tower_writers"]

OUTER = "weft_model.safetensors"

Writer = Callable[[Path], str | None]


def tower_writers(adapter: Adapter, of_part: Callable[[Adapter], dict[str, Writer]], proof: str) -> dict[str, Writer]:
    """A function for each file, in the order in which they have to be called.

    Args:
        adapter: with towers.
        of_part: the writers of one tower's directory.
        proof: name of the file of golden inputs and outputs.

    Raises:
        UnsupportedError: no towers; or one that PEFT can't express.
    """
    if not adapter.towers:
        raise UnsupportedError("this adapter has one spec for the whole base, and no towers to be written apart")
    hashes: dict[str, str] = {}

    def noted(name: str, write: Writer) -> Writer:
        def writer(path: Path) -> str:
            hashes[name] = write(path) or sha256_of(path)
            return hashes[name]

        return writer

    files: dict[str, Writer] = {}
    for tower in adapter.towers:
        part = adapter.tower(tower)
        for name, write in of_part(part).items():
            files[f"{tower}/{name}"] = noted(f"{tower}/{name}", write) if name == RECORD else write
    outer = {
        f"{path}.{name}": tensor
        for path, module in adapter.modules.items()
        if adapter.spec.tower_of(path) is None
        for name, tensor in module.items()
    }
    if outer:
        files[OUTER] = noted(OUTER, lambda path: write_tensors(path, outer))
    if adapter.proof:
        files[proof] = noted(proof, lambda path: write_tensors(path, dict(adapter.proof)))

    def record(path: Path) -> None:
        path.write_text(Record.of(adapter, "towers", hashes).to_json(), encoding="utf-8")

    files[RECORD] = record
    return files


def joined(record: Record, folder: Path, read_part: Callable[[Path], Adapter], outer: Mapping[str, Tensor]) -> Adapter:
    """The adapter that an index describes.

    Args:
        record: the index.
        folder: where it is.
        read_part: reads the directory of one tower.
        outer: tensors outside of the towers.

    Raises:
        FormatError: a tower's directory is missing or was changed.
        KeysError: sites or modules of the index that no file has, or the other way round.
    """
    parts = {}
    for tower in record.spec.towers:
        place = folder / tower / RECORD
        if not place.is_file() or sha256_of(place) != record.files.get(f"{tower}/{RECORD}"):
            what = "was changed" if place.is_file() else "is missing"
            raise FormatError(
                f"{what} since weft wrote the directory: the towers in it belong together. Get all of it again",
                path=place,
            )
        parts[tower] = read_part(folder / tower)
    left = dict(outer)
    modules: dict[str, dict[str, Tensor]] = {}
    for path, names in record.modules.items():
        own = record.spec.tower_of(path)
        found = (
            {f"{path}.{name}": t for name, t in parts[own].modules.get(path[len(own) + 1 :], {}).items()}
            if own
            else left
        )
        lost = [name for name in names if f"{path}.{name}" not in found]
        if lost:
            raise KeysError(
                f"the trained module {path!r} lacks {some_names(lost)}: a part of the directory is lost", path=folder
            )
        modules[path] = {name: found[f"{path}.{name}"] for name in names}
        for name in names if own is None else ():
            del left[f"{path}.{name}"]
    factors = {f"{tower}.{path}": item for tower, part in parts.items() for path, item in part.factors.items()}
    biases = {f"{tower}.{path}": item for tower, part in parts.items() for path, item in part.biases.items()}
    sites = [site.path for site in record.sites]
    if left or set(sites) != set(factors) or set(record.biases) != set(biases):
        odd = [*left, *(set(sites) ^ set(factors)), *(set(record.biases) ^ set(biases))]
        raise KeysError(f"{some_names(odd)}: the index and the towers' directories don't have the same", path=folder)
    ordered = {path: factors[path] for path in sites}
    return Adapter(record.spec, ordered, modules, {path: biases[path] for path in record.biases}, record.provenance)


def owned_by(said: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, ...]:
    """Files of the towers of a directory whose weft.json says this, by their names in it."""
    spec = said.get("spec")
    towers = spec.get("towers") if isinstance(spec, Mapping) and said.get("layout") == "towers" else None
    return tuple(f"{tower}/{name}" for tower in towers for name in names) if isinstance(towers, Mapping) else ()
