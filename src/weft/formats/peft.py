"""Adapters in PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``, read and written.

    adapter = read("out/mine")        # whatever PEFT 0.2 to 0.21 saved, or weft
    write(adapter, "out/again")       # a directory that PeftModel.from_pretrained loads

weft adds ``weft.json`` (see `weft.formats.record`) and ``weft_proof.safetensors``. This module puts the parts together;
the rules are in the modules beside it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapter import Adapter, Provenance
from weft.core.factors import Factors
from weft.errors import FormatError, KeysError, UnsupportedError, some_names
from weft.formats.by_tower import OUTER, joined, owned_by, tower_writers
from weft.formats.checks import listing, path_of, plain_file, read_json, shortened
from weft.formats.folders import home_of, write_folder
from weft.formats.peft_config import CONFIG, NOTHING, PeftConfig, read_config
from weft.formats.peft_keys import sort_keys
from weft.formats.peft_pack import pack, unpack
from weft.formats.peft_rest import read_rest
from weft.formats.peft_settings import settings_of
from weft.formats.peft_sites import ReadSites, read_sites, seat_sites
from weft.formats.peft_spec import read_spec
from weft.formats.peft_starts import check_start, without_start
from weft.formats.record import RECORD, Record, SiteRecord, config_hash, dtype_of, read_record
from weft.formats.tensor_files import TensorBytes, TensorFile, read_header, read_tensors
from weft.hashes import is_hash, sha256_of
from weft.identity import TensorHashes

__all__ = ["OWNED", "PROOF", "WEIGHTS", "is_adapter", "problem_for_peft", "read", "read_known", "write", "writers"]

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
OWN_WEIGHTS = "weft_model.safetensors"
PROOF = "weft_proof.safetensors"
Writer = Callable[[Path], str | None]
"""Writes one file, and gives its hash where it comes for nothing, see `weft.hashes`."""

OWNED = (CONFIG, *WEIGHTS, RECORD, OWN_WEIGHTS, PROOF)
"""Files of an adapter directory."""

_ATTEMPTS = 3
"""A directory that somebody writes at the same time is read again this often."""


def is_adapter(folder: Path) -> bool:
    """Whether a directory says that it is an adapter."""
    return any(os.path.lexists(home_of(folder) / name) for name in (CONFIG, RECORD))


def read(directory: str | os.PathLike[str], *, allow_partial: bool = False, base: nn.Module | None = None) -> Adapter:
    """Read an adapter directory of PEFT or weft.

    With a ``weft.json`` in it, the adapter comes back exactly as it was saved, digest included, or not at all. Without, it is read as
    PEFT reads it; what was found, ignored or concluded is in ``adapter.provenance.notes``.

    Args:
        directory: the directory.
        allow_partial: leave out sites that lack a tensor, and listed modules that the file has not; noted.
        base: the base model. Needed only for adapters that PEFT started by PiSSA or OLoRA, whose files count from a base that PEFT
            rewrote, and for bare parameters whose order nobody knows.

    Raises:
        FormatError: a file that is damaged, changed, of the wrong kind, or that contradicts another one; names the key.
        UnsupportedError: another method, or a feature that weft has not; says the way out.
        KeysError: keys without a site, sites without a key.
        NotFiniteError: NaN or infinity.
    """
    place = path_of(directory)
    if not os.path.isdir(place):
        raise FormatError("no such directory", path=place)
    for _ in range(_ATTEMPTS - 1):
        before = _state(place)
        try:
            return _read(home_of(place), allow_partial, base)
        except FormatError:
            if _state(place) == before:
                raise
    return _read(home_of(place), allow_partial, base)


def _state(place: Path) -> list[tuple[int, int]]:
    """What changes when somebody else writes into a directory."""
    folder = home_of(place)
    there = [folder / name for name in OWNED if os.path.lexists(folder / name)]
    try:
        facts = [os.stat(path) for path in (folder, *there)]
    except OSError:
        return []
    return [(fact.st_ino, fact.st_mtime_ns) for fact in facts]


def _read(folder: Path, allow_partial: bool, base: nn.Module | None) -> Adapter:
    if os.path.lexists(folder / RECORD):
        return _read_own(folder)
    config = read_config(folder)
    rewritten = check_start(config, base)
    path = _weights(folder)
    if path.suffix == ".safetensors":
        entries, _ = read_header(path, folder)
        blank = {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in entries.items()}
        _assemble(config, blank, path, allow_partial, base)
    found = read_tensors(path, folder)
    sites, modules, biases, notes = _assemble(config, found.tensors, path, allow_partial, base)
    factors = sites.factors
    if rewritten and base is not None:
        factors = without_start(config, factors, base)
        notes.append(
            f"init_lora_weights={config.start!r}: the start that PEFT wrote into its base was taken out of the factors; ranks doubled"
        )
    spec, more = read_spec(config, factors, sites.names, tuple(modules))
    return Adapter(spec, factors, modules, biases, _provenance(config, [*notes, *more]))


def _weights(folder: Path) -> Path:
    there = [folder / name for name in WEIGHTS if os.path.lexists(folder / name)]
    if not there:
        raise FormatError(
            f"the weights are missing: looked for {' and '.join(WEIGHTS)}. The folder holds {listing(folder)}: get the whole repository",
            path=folder,
        )
    return there[0]


def _assemble(
    config: PeftConfig, tensors: Mapping[str, Tensor], path: Path, allow_partial: bool, base: nn.Module | None
) -> tuple[ReadSites, dict[str, dict[str, Tensor]], dict[str, Tensor], list[str]]:
    """Factors, modules and biases of a file; on tensors without data everything but the numbers is checked."""
    keys = sort_keys(tensors, path)
    seated = seat_sites(config, keys, base)
    rest = read_rest(config, keys, tensors, allow_partial=allow_partial)
    if not seated and not rest.modules and not rest.biases:
        raise FormatError(f"holds no LoRA factors; its keys are {some_names(tensors, 3) or 'none'}", path=path)
    if not seated and config.get("target_modules") not in (None, [], NOTHING) and not allow_partial:
        raise KeysError(
            "the config targets modules, the file has factors for none: a part of it is missing; allow_partial=True takes the rest",
            path=path,
        )
    sites = read_sites(config, seated, tensors, allow_partial=allow_partial)
    modules = {home: {name: tensors[key] for name, key in names.items()} for home, names in rest.modules.items()}
    biases = {name: tensors[key] for name, key in rest.biases.items()}
    return sites, modules, biases, [*config.notes, *keys.notes, *rest.notes, *sites.notes]


def _provenance(config: PeftConfig, notes: list[str]) -> Provenance:
    version = config.get("peft_version")
    return Provenance(
        base_name=config.get("base_model_name_or_path") or None,
        versions={"peft": version} if version else {},
        notes=tuple(dict.fromkeys(notes)),
    )


# weft's own directories


def read_known(folder: Path, known: Mapping[str, str]) -> Adapter:
    """A directory that `write` wrote, by someone who kept the hashes of its files: every byte is compared with them, once.

    Numbers and digest were checked when it was written, by whoever kept the hashes; they aren't computed again.

    Args:
        known: the hash of every file by name, see `weft.hashes`, `RECORD` among them.

    Raises:
        FormatError: a file is missing, was changed, or can't be read.
    """
    for name in known:
        path = folder / name
        if not os.path.lexists(path):
            raise _changed(path, "is missing")
        plain_file(path, folder)
        if path.suffix != ".safetensors" and sha256_of(path) != known[name]:
            raise _changed(path, "was changed")
    return _read_own(folder, known)


def _read_own(folder: Path, known: Mapping[str, str] | None = None) -> Adapter:
    """A directory with a weft.json: nothing in it may have changed."""
    with TensorHashes() as hashes:
        return _proved(
            _read_recorded(folder, record := read_record(folder), known, hashes), folder, record, known, hashes
        )


def _read_recorded(folder: Path, record: Record, known: Mapping[str, str] | None, hashes: TensorHashes) -> Adapter:
    """The adapter that a record describes, without its golden outputs."""
    own = record.layout == "weft"
    if record.layout == "towers":
        outer = _verified(folder, OUTER, record, known, hashes).tensors if OUTER in record.files else {}
        return joined(record, folder, _read_own, outer)
    if not own:
        said = read_json(folder / CONFIG, folder) if os.path.lexists(folder / CONFIG) else None
        if said is None or config_hash(said) != record.files.get(CONFIG):
            raise _changed(folder / CONFIG, "is missing" if said is None else "was changed")
    found = _verified(folder, OWN_WEIGHTS if own else WEIGHTS[0], record, known, hashes)
    return _unpack_own(record, found) if own else unpack(record, found.tensors, found.path)


def _proved(
    adapter: Adapter, folder: Path, record: Record, known: Mapping[str, str] | None, hashes: TensorHashes
) -> Adapter:
    """With its golden outputs, if its digest is the record's."""
    if record.proof:
        adapter = adapter.replace(proof=_verified(folder, PROOF, record, known, hashes).tensors)
    if known is not None:
        adapter.__dict__["digest"] = record.digest
    if adapter.digest_with(hashes) != record.digest:
        raise _changed(
            folder / RECORD, f"was changed: the adapter's digest is {adapter.digest[:12]}, it says {record.digest[:12]}"
        )
    return adapter


def _verified(
    folder: Path, name: str, record: Record, known: Mapping[str, str] | None, hashes: TensorHashes
) -> TensorFile:
    path = folder / name
    if not os.path.lexists(path):
        raise _changed(path, "is missing")
    expected = record.files.get(name, "")
    if not is_hash(expected) or (known is not None and known.get(name) != expected):
        raise _changed(path, "was changed")
    found = read_tensors(path, folder, like=expected, hashes=hashes, trusted=known is not None)
    if found.hash != expected:
        raise _changed(path, "was changed")
    return found


def _changed(path: Path, what: str) -> FormatError:
    return FormatError(
        f"{what} since weft wrote the directory. Get the directory again; or, if the change is meant, delete {RECORD}: what is left is read as a plain PEFT "
        "adapter, without provenance and proof", path=path
    )  # fmt: skip


def _unpack_own(record: Record, found: TensorFile) -> Adapter:
    """The layout that only weft reads: every tensor under the name that `Adapter.tensors` gives it."""
    left = dict(found.tensors)
    try:
        factors = {site.path: _own_factors(site, left) for site in record.sites}
        modules = {path: {name: left.pop(f"{path}.{name}") for name in names} for path, names in record.modules.items()}
        biases = {name: left.pop(name) for name in record.biases}
    except KeyError as problem:
        raise FormatError(
            "missing: a part of the file is lost", path=found.path, key=shortened(str(problem.args[0]))
        ) from None
    except ValueError as problem:
        raise FormatError(str(problem), path=found.path) from None
    if left:
        raise FormatError(f"tensors that belong to nothing: {some_names(left)}", path=found.path)
    return Adapter(record.spec, factors, modules, biases, record.provenance)


def _own_factors(site: SiteRecord, left: dict[str, Tensor]) -> Factors:
    A, B = (
        left.pop(f"{site.path}.{name}").to(dtype_of(dtype))
        for name, dtype in zip(("lora_A", "lora_B"), site.dtypes, strict=True)
    )
    magnitude, bias = (
        left.pop(f"{site.path}.magnitude", None),
        left.pop(f"{site.path}.bias", None) if site.bias else None,
    )
    return Factors(A, B, site.scale, site.kind, site.kernel, magnitude, bias, site.groups)


def problem_for_peft(adapter: Adapter) -> str | None:
    """What of an adapter PEFT's files can't hold, in words; None where they can hold all of it.

    To be asked before a training starts: the answer depends on sites and settings, not on numbers.
    """
    try:
        settings_of(adapter, (packed := pack(adapter)).layout, packed.scales)
    except UnsupportedError as problem:
        return str(problem)
    return None


def write(
    adapter: Adapter,
    directory: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    for_peft: bool = True,
    leaf_names: bool = False,
    by_tower: bool = False,
) -> Path:
    """Write an adapter directory: all of it or nothing, flushed to the disk.

    ``PeftModel.from_pretrained`` loads it and gives the same outputs; `read` gives back the same adapter. Towers whose specs don't
    go into one PEFT directory have one each, see `weft.formats.by_tower`.

    Args:
        adapter: any; dtypes are kept.
        directory: where to.
        overwrite: replace an adapter that is there; other files in the directory are left alone.
        for_peft: False writes a layout of weft's own, for what PEFT has no place for. PEFT finds no adapter in such a
            directory.
        leaf_names: target modules by the last part of their paths alone, for servers that read no paths.
        by_tower: a PEFT directory for each tower in any case.

    Returns:
        The directory.

    Raises:
        FormatError: the directory holds an adapter already, or can't be written.
        UnsupportedError: something that PEFT can't express; names the site and the way out.
        NotFiniteError: NaN or infinity in the adapter.
    """
    place = path_of(directory)
    with TensorHashes() as hashes:
        if by_tower or (for_peft and adapter.towers and not leaf_names and problem_for_peft(adapter)):
            files = tower_writers(adapter, lambda part: writers(part, hashes, where=place), PROOF)
        else:
            files = writers(adapter, hashes, for_peft=for_peft, leaf_names=leaf_names, where=place)
        return write_folder(directory, files, owned=(*OWNED, *_in_towers(place)), overwrite=overwrite)


def _in_towers(place: Path) -> tuple[str, ...]:
    """Files of the towers of an adapter that stands there."""
    folder = home_of(place)
    if not (folder / RECORD).is_file():
        return ()
    try:
        return owned_by(read_json(folder / RECORD, folder), OWNED)
    except FormatError:
        return ()  # not weft's, or damaged: what is not known is left alone


def writers(
    adapter: Adapter,
    hashes: TensorHashes,
    *,
    for_peft: bool = True,
    leaf_names: bool = False,
    where: Path | None = None,
    flushed: bool = True,
) -> dict[str, Writer]:
    """A function for each file of a directory, those of tensors first: see `write`.

    Args:
        hashes: stays open until all were called.
        where: the directory, for messages.
        flushed: tensor files are on the disk when they are written; False: whoever asked flushes them.

    Raises:
        UnsupportedError, NotFiniteError: as `write`.
    """
    adapter.check_finite()
    settings: dict[str, Any] | None = None
    tensors = {OWN_WEIGHTS: adapter.tensors()}
    if for_peft:
        try:
            packed = pack(adapter, for_servers=leaf_names)
            settings = settings_of(adapter, packed.layout, packed.scales, leaf_names=leaf_names)
        except UnsupportedError as problem:
            raise UnsupportedError(
                f"PEFT's files can't hold this adapter: {problem}. adapter.save(directory, for_peft=False) keeps it in a "
                "layout that weft reads, and weft.merge writes it into a plain model",
                path=where,
            ) from None
        tensors = {WEIGHTS[0]: dict(packed.tensors)}
    if adapter.proof:
        tensors[PROOF] = dict(adapter.proof)
    made = {name: TensorBytes(part, hashes=hashes) for name, part in tensors.items()}
    return _writers(adapter, made, settings, hashes, flushed)


def _writers(
    adapter: Adapter,
    made: Mapping[str, TensorBytes],
    settings: dict[str, Any] | None,
    hashes: TensorHashes,
    flushed: bool,
) -> dict[str, Writer]:
    """One function a file; the record knows the hashes of the others."""

    def weights(part: TensorBytes) -> Writer:
        def writer(path: Path) -> str:
            part.write(path, flushed)
            return part.hash

        return writer

    def record(path: Path) -> None:
        layout = "peft" if settings is not None else "weft"
        known = {CONFIG: config_hash(settings)} if settings is not None else {}
        adapter.digest_with(hashes)
        said = Record.of(adapter, layout, known | {name: part.hash for name, part in made.items()})
        path.write_text(said.to_json(), encoding="utf-8")

    files: dict[str, Writer] = {name: weights(part) for name, part in made.items()}
    files[RECORD] = record
    if settings is not None:
        text = json.dumps(settings, indent=2, sort_keys=True, allow_nan=False) + "\n"
        files[CONFIG] = lambda path: _write_text(path, text)
    return files


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
