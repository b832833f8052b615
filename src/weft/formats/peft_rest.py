"""What stands in a PEFT file beside factors: modules trained whole, biases, copies of the base's embeddings.

This module does not know factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from weft.errors import FormatError, KeysError, some_names
from weft.formats.checks import shortened
from weft.formats.peft_config import PeftConfig
from weft.formats.peft_keys import Part, SortedKeys

__all__ = ["Rest", "read_rest"]

_USUAL_HEADS = ("classifier", "score")
"""Heads that PEFT adds to the config of every classification adapter, whether the model has them or not."""

_RESIZED = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out")


@dataclass(frozen=True)
class Rest:
    """Modules trained whole by path, biases by parameter path, and what has to be said about them."""

    modules: Mapping[str, Mapping[str, str]]
    biases: Mapping[str, str]
    notes: tuple[str, ...]


def read_rest(
    config: PeftConfig, keys: SortedKeys, tensors: Mapping[str, Tensor], *, allow_partial: bool = False
) -> Rest:
    """Sort everything that is no factor.

    Args:
        config: for modules_to_save and bias.
        keys: of the file.
        tensors: by key; for shapes.
        allow_partial: accept that modules which the config lists are not in the file.

    Returns:
        Keys of the file by module path and name, and by bias path.

    Raises:
        KeysError: a tensor that belongs to nothing; a listed module without tensors.
        FormatError: a copy of an embedding that doesn't fit its factors.
    """
    notes = _copies(config, keys, tensors)
    listed: list[str] = config.get("modules_to_save", [])
    owners = {path.rpartition(".")[0] for path in keys.whole if not _says_bias(path)}
    modules: dict[str, dict[str, str]] = {}
    biases: dict[str, str] = {}
    unlisted: list[str] = []
    by_letters: set[str] = set()
    hit: set[str] = set()
    for path, key in keys.whole.items():
        owner, _, leaf = path.rpartition(".")
        home = _listed_home(owner, listed, hit)
        if home is not None:
            modules.setdefault(home, {})[path[len(home) + 1 :]] = key
            if not any(home == name or home.endswith(f".{name}") for name in listed):
                by_letters.add(home)
        elif _is_bias(config, path, owner, owners, keys):
            biases[path] = key
        elif not owner or not leaf:
            raise KeysError(
                "no part of an update, of a module that is trained whole, or of a bias: it belongs to nothing",
                path=config.path.parent,
                key=shortened(key),
            )
        else:
            modules.setdefault(owner, {})[leaf] = key
            unlisted.append(owner)
    if by_letters:
        notes.append(
            f"the file holds {some_names(sorted(by_letters))}, which modules_to_save names by its last letters only; loaded with the others"
        )
    if unlisted:
        notes.append(_unlisted(sorted(set(unlisted))))
    if biases and config.get("bias", "none") == "none":
        notes.append(
            f"{len(biases)} biases are in the file, although the config says bias: none ({some_names(biases, 2)}); they are loaded"
        )
    notes += _absent(config, [name for name in listed if name not in hit], allow_partial)
    return Rest(modules, biases, tuple(notes))


def _says_bias(path: str) -> bool:
    leaf = path.rpartition(".")[2]
    return leaf == "bias" or leaf.endswith("_bias")


def _is_bias(config: PeftConfig, path: str, owner: str, owners: Iterable[str], keys: SortedKeys) -> bool:
    """A bias by itself: not the one of a head that is there with its weight. Old PEFT saved all that has "bias" in its name."""
    if config.get("bias", "none") == "all" and "bias" in path and owner not in _heads(owners, path):
        return True
    return _says_bias(path) and (owner not in owners or (owner, 0) in keys.updates)


def _heads(owners: Iterable[str], path: str) -> set[str]:
    """Owners of weights whose names have no "bias" in them: with bias: all, everything else in the file is a bias."""
    return {owner for owner in owners if "bias" not in owner} if _says_bias(path) else set()


def _listed_home(owner: str, listed: list[str], hit: set[str]) -> str | None:
    """The outermost module around a tensor that the config lists; PEFT compares the ends of paths, letter by letter."""
    pieces = owner.split(".")
    for count in range(1, len(pieces) + 1):
        home = ".".join(pieces[:count])
        matching = [name for name in listed if home.endswith(name)]
        if matching:
            hit.update(matching)
            return home
    return None


def _unlisted(owners: list[str]) -> str:
    resized = [owner for owner in owners if owner.rpartition(".")[2] in _RESIZED]
    note = f"the file holds {some_names(owners)}, which modules_to_save doesn't list: trained whole, and replaced when the adapter is loaded"
    if resized:
        note += f"; PEFT writes {some_names(resized)} after the vocabulary was resized: the base has to be resized in the same way"
    return note


def _absent(config: PeftConfig, names: list[str], allow_partial: bool) -> list[str]:
    """Notes on listed modules that are not in the file."""
    lost = [name for name in names if name not in _USUAL_HEADS]
    if lost and not allow_partial:
        raise KeysError(
            f"modules_to_save lists {some_names(lost)}, of which the file has nothing: trained modules are lost, and without them the outputs are others. "
            "Get the whole file, or pass allow_partial=True if the model has no such module", path=config.path, key="modules_to_save"
        )  # fmt: skip
    return [
        f"modules_to_save lists {name!r}, of which the file has nothing: the base's own is used, if it has one"
        for name in names
    ]


def _copies(config: PeftConfig, keys: SortedKeys, tensors: Mapping[str, Tensor]) -> list[str]:
    """Check and drop copies of embeddings that PEFT saves when they are targeted."""
    for module, key in keys.copies.items():
        parts: Mapping[str, Part] = keys.updates.get((module, 0), {})
        copy = tuple(tensors[key].shape)
        if "A" not in parts or "B" not in parts:
            raise KeysError(
                f"a copy of the weight of {module!r}, which this file doesn't adapt: it belongs to nothing",
                path=config.path.parent,
                key=shortened(key),
            )
        A, B = tensors[parts["A"].key], tensors[parts["B"].key]
        expected = (A.shape[-1], B.shape[0]) if parts["A"].embedding else (B.shape[0], A.shape[-1])
        if copy != expected:
            raise FormatError(
                f"the copy of the base's weight is {copy}, the update of {module!r} is for {expected}: the vocabulary was resized after the adapter was made. "
                "Save it again with save_embedding_layers=False, from a base of the right size", path=config.path.parent, key=shortened(key)
            )  # fmt: skip
    if not keys.copies:
        return []
    return [
        f"the file holds copies of the base's weights of {some_names(sorted(keys.copies))}: no part of the update; left out"
    ]
