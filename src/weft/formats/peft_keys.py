"""The keys of an adapter_model file, taken apart: which module, which tensor of it, inside of how many wrappers.

    base_model.model.<path>.lora_A.weight                       factors of a module; also .<adapter name>. before "weight"
    base_model.model.<path>.lora_embedding_A                    of an embedding
    base_model.model.<path>.lora_magnitude_vector               DoRA
    base_model.model.<path>.base_layer.lora_A.weight            an inner wrapper: one of several parameters of a module
    base_model.model.<attention>.base_layer.out_proj.lora_A…    inside of a wrapper: nn.MultiheadAttention
    base_model.model.<path>.base_layer.bias                     a bias of the base, trained
    base_model.model.<path>.weight                              a module trained whole

This module does not know configs, and no tensors but their names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from weft.errors import KeysError, UnsupportedError, some_names
from weft.formats.checks import shortened

__all__ = ["PREFIX", "Part", "SortedKeys", "natural", "sort_keys"]

PREFIX = "base_model.model."

_PARTS = {
    "lora_A": "A", "lora_B": "B", "lora_embedding_A": "A", "lora_embedding_B": "B", "lora_magnitude_vector": "magnitude",
}  # fmt: skip
_FOREIGN_PARTS = {
    "lora_E": "AdaLoRA", "ranknum": "AdaLoRA", "lora_diag": "KaSA", "trainable_tokens_delta": "trainable tokens", "lora_arrow": "Arrow",
    "hada_w1_a": "LoHa", "hada_w1_b": "LoHa", "hada_w2_a": "LoHa", "hada_w2_b": "LoHa", "lokr_w1": "LoKr", "lokr_w1_a": "LoKr",
    "lokr_w2": "LoKr", "lokr_w2_a": "LoKr", "oft_R": "OFT", "oft_r": "OFT", "ia3_l": "IA3", "vera_lambda_b": "VeRA", "prompt_embeddings": "prompt tuning",
}  # fmt: skip
_SHELLS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass(frozen=True)
class Part:
    """One tensor of an update.

    Attributes:
        key: as in the file.
        embedding: it is called lora_embedding_A or _B.
    """

    key: str
    embedding: bool = False


@dataclass
class SortedKeys:
    """All keys of a file by what they are; paths are those of the base, without wrappers.

    Attributes:
        updates: parts (``A``, ``B``, ``magnitude``, ``bias``) by (module path, number of wrappers further in).
        hosts: for a module path, the wrapped modules that it is inside of, as the keys say.
        whole: keys of everything else by full parameter path.
        copies: keys of copies of base weights by module path: PEFT saves targeted embeddings whole.
        adapter: the adapter's name, where the keys hold it.
    """

    updates: dict[tuple[str, int], dict[str, Part]] = field(default_factory=dict)
    hosts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def natural(path: str) -> list[tuple[int, str]]:
    """Sort key that counts: layer 2 before layer 10."""
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"(\d+)", path)]


def sort_keys(keys: Iterable[str], path: Path) -> SortedKeys:
    """Take the keys of a file apart.

    Raises:
        UnsupportedError: tensors of another method.
        KeysError: two keys for one tensor, several adapters in one file.
    """
    found = SortedKeys()
    names: set[str] = set()
    dropped: list[str] = []
    inner: list[tuple[list[str], str]] = []
    bare = 0
    for key in sorted(keys, key=natural):
        pieces = _unwrapped(key.split("."), found)
        if pieces[:2] == ["base_model", "model"]:
            pieces = pieces[2:]
        else:
            bare += 1
        if "original_module" in pieces:
            dropped.append(key)
            continue
        at = next((index for index in reversed(range(len(pieces))) if pieces[index] in _PARTS), None)
        if at is None and "modules_to_save" in pieces:
            inner.append((pieces, key))
        elif at is None:
            _whole(found, pieces, key, path)
        else:
            names |= _part(found, pieces, at, key, path)
    if len(names) > 1:
        raise KeysError(f"its keys name several adapters, {some_names(sorted(names))}: keep the keys of one", path=path)
    _inner(found, inner, names | {"default"}, path)
    if names:
        found.notes.append(f"the keys hold the name of the adapter, {shortened(names.pop())!r}; left out")
    if dropped:
        found.notes.append(
            f"{len(dropped)} keys are the base's own weights beside modules trained whole ({shortened(dropped[0])}); left out"
        )
    if bare:
        found.notes.append(f"{bare} keys don't begin with {PREFIX!r}; taken as paths of the base")
    return found


def _unwrapped(pieces: list[str], found: SortedKeys) -> list[str]:
    """Without what torch.compile, FSDP and DDP put into names."""
    clean = [piece for piece in pieces if piece not in _SHELLS]
    if clean[:1] == ["module"] and clean[1:2] == ["base_model"]:
        clean = clean[1:]
    note = "names of wrappers (torch.compile, FSDP, DDP) in the keys; left out"
    if len(clean) != len(pieces) and note not in found.notes:
        found.notes.append(note)
    return clean


def _part(found: SortedKeys, pieces: list[str], at: int, key: str, path: Path) -> set[str]:
    """Sort in one tensor of an update; the adapter's name, if the key holds it."""
    name, tail = pieces[at], pieces[at + 1 :]
    leaf = tail.pop() if tail and tail[-1] in ("weight", "bias") else ""
    if len(tail) > 1 or at == 0:
        raise KeysError(
            "no key of a LoRA file: expected <path>.lora_A.weight and the like", path=path, key=shortened(key)
        )
    part = "bias" if leaf == "bias" else _PARTS[name]
    if leaf == "bias" and name != "lora_B":
        raise KeysError("a bias where no update has one: only lora_B can have it", path=path, key=shortened(key))
    module, depth, hosts = _module(pieces[:at])
    parts = found.updates.setdefault((module, depth), {})
    if part in parts:
        raise KeysError(
            f"a second {part} for {module!r}, beside {shortened(parts[part].key)!r}", path=path, key=shortened(key)
        )
    parts[part] = Part(key, "embedding" in name)
    if hosts:
        found.hosts[module] = hosts
    return set(tail)


def _module(pieces: list[str]) -> tuple[str, int, tuple[str, ...]]:
    """The module's path, the wrappers further in, and the wrapped modules that it is inside of."""
    depth = 0
    while pieces and pieces[-1] == "base_layer":
        pieces = pieces[:-1]
        depth += 1
    clean: list[str] = []
    hosts: list[str] = []
    for piece in pieces:
        if piece != "base_layer":
            clean.append(piece)
        elif clean and ".".join(clean) not in hosts:
            hosts.append(".".join(clean))
    return ".".join(clean), depth, tuple(hosts)


def _whole(found: SortedKeys, pieces: list[str], key: str, path: Path) -> None:
    """Sort in a tensor that is no part of an update."""
    foreign = next((piece for piece in pieces if piece in _FOREIGN_PARTS), None)
    if foreign is not None:
        raise UnsupportedError(
            f"a tensor of {_FOREIGN_PARTS[foreign]}, which weft has not: use it with the tool that made it, or merge it there",
            path=path,
            key=shortened(key),
        )
    if any(piece.startswith("lora_") for piece in pieces):
        raise UnsupportedError(
            "a tensor of a LoRA variant that weft doesn't know; use it with the tool that made it",
            path=path,
            key=shortened(key),
        )
    if pieces[-2:] == ["base_layer", "weight"]:
        module, _, _ = _module(pieces[:-1])
        found.copies[module] = key
        return
    clean = ".".join(piece for piece in pieces if piece != "base_layer")
    if clean in found.whole:
        raise KeysError(f"the same tensor as {shortened(found.whole[clean])!r}", path=path, key=shortened(key))
    found.whole[clean] = key


def _inner(found: SortedKeys, keys: list[tuple[list[str], str]], names: set[str], path: Path) -> None:
    """Sort in ``<path>.modules_to_save.<adapter>.<name>``, as a state dict has it; PEFT also writes it beside the plain name."""
    for pieces, key in keys:
        at = pieces.index("modules_to_save")
        tail = pieces[at + 1 :]
        clean = pieces[:at] + (tail[1:] if len(tail) > 1 and tail[0] in names else tail)
        if ".".join(clean) not in found.whole:
            _whole(found, clean, key, path)
