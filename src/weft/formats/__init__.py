"""Adapters in files.

    adapter = load("out/mine")                       # PEFT's and weft's directories, run folders, files of diffusers, kohya, loralib
    convert("runs/mine", to="vllm", out="served")    # for servers that read r and lora_alpha alone
    fitted = resolve(load("style.safetensors"), unet)

Nothing in a file is trusted: no pickle but of plain tensors, no code, and everything is checked before it is used.
Refusals are `weft.errors.FormatError` with ``path`` and ``key``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from weft import sources
from weft.adapter import Adapter
from weft.errors import FormatError, did_you_mean, some_names
from weft.formats import hub, peft
from weft.formats.checks import listing, path_of
from weft.formats.experts import stack_experts
from weft.formats.export import to_vllm
from weft.formats.other import FILES, read_file
from weft.formats.resolve import resolve

__all__ = ["TARGETS", "convert", "load", "resolve", "to_vllm"]

TARGETS = ("peft", "towers", "vllm")
"""What `convert` can write."""

_SINGLE = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def load(
    source: str | os.PathLike[str],
    *,
    allow_partial: bool = False,
    base: nn.Module | None = None,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
    component: str | None = None,
    revision: str | None = None,
) -> Adapter:
    """Read an adapter, whoever wrote it.

    Args:
        source: a directory of PEFT or weft; a run folder (its ``adapter/`` is taken); a file of diffusers, kohya or loralib; or a hub id
            ``"org/name"``, of which only the adapter's files are fetched; or a name in the store (``"medical"``, ``"medical@3"``,
            ``"medical@prod"``, the first digits of a digest), if no path is called so.
        allow_partial: leave out what is incomplete or belongs to nothing, with a note, in place of an error.
        base: the model that it is for. Needed only where the file doesn't say enough: kohya's flattened names are fitted to its paths, PEFT's
            PiSSA and OLoRA are counted from it, and updates of single experts are stacked where it stacks its experts.
        alpha: for files without one (loralib).
        enable_lora: for loralib's fused layers, which of their parts are adapted.
        component: which model of a pipeline (``"unet"``, ``"text_encoder"`` …), where a file holds several.
        revision: branch, tag or commit of a hub id.

    Returns:
        The adapter. What was ignored, concluded or left out is in ``adapter.provenance.notes``.

    Raises:
        FormatError: nothing there, damaged, incomplete, contradictory; names the file, the key and the way out.
        UnsupportedError: another method, or a feature that weft has not.
        KeysError: keys without a site, sites without a key.
        NotFiniteError: NaN or infinity.

    Example:
        >>> adapter = weft.load("out/mine")  # doctest: +SKIP
        >>> adapter.sites[:2], adapter.ranks()  # doctest: +SKIP
        (('model.layers.0.self_attn.q_proj', 'model.layers.0.self_attn.v_proj'), '8')
    """
    commit = None
    place = path_of(source)
    named = sources.find(source, is_path=os.path.lexists(place))
    if named is not None and named.load is not None and revision is None:
        adapter = named.load()
        return adapter if base is None else stack_experts(adapter, base)
    if not os.path.lexists(place) and hub.is_hub_id(source):
        place, commit = hub.fetch(os.fspath(source), revision)
    elif revision is not None:
        raise FormatError(f"revision={revision!r} is for hub ids, and this is a path; leave it out", path=source)
    found = _find(place, named.hint if named is not None else "")
    if found.is_dir():
        adapter = peft.read(found, allow_partial=allow_partial, base=base)
        adapter = adapter if base is None else stack_experts(adapter, base)
    else:
        adapter = read_file(
            found, alpha=alpha, enable_lora=enable_lora, component=component, allow_partial=allow_partial
        )
        if found.parent == place:
            adapter = _noted(adapter, f"read from {found.name}")
        adapter = resolve(adapter, base) if base is not None else adapter
    return _noted(adapter, f"from the hub: {source} at commit {commit}") if commit else adapter


def _noted(adapter: Adapter, note: str) -> Adapter:
    provenance = dataclasses.replace(adapter.provenance, notes=(note, *adapter.provenance.notes))
    return adapter.replace(provenance=provenance)


def _find(place: Path, hint: str = "") -> Path:
    """The adapter directory, or the single file, that a path means; ``hint``: where else it was looked for.

    Raises:
        FormatError: neither; says what is there.
    """
    if os.path.isdir(place):
        return _in_folder(place)
    if not os.path.lexists(place):
        above = next((path for path in place.absolute().parents if os.path.isdir(path)), Path("/"))
        near = (
            did_you_mean(place.name, [entry.name for entry in above.iterdir()])
            if above == place.absolute().parent
            else ""
        )
        elsewhere = f", {hint}" if hint else ""
        raise FormatError(f"no such file or directory{elsewhere}.{near} {above} holds {listing(above)}", path=place)
    if place.name in peft.OWNED and peft.is_adapter(place.parent):
        return place.parent
    if place.suffix not in _SINGLE:
        raise FormatError(f"expected an adapter directory, or a file that ends in {', '.join(_SINGLE)}", path=place)
    return place


def _in_folder(folder: Path) -> Path:
    if peft.is_adapter(folder):
        return folder
    if peft.is_adapter(folder / "adapter"):
        return folder / "adapter"
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    holds = f"The folder holds {listing(folder)}"
    if (folder / "recipe.yaml").is_file():
        raise FormatError(
            f"a run folder without an adapter: the run didn't come to its end; weft train --resume {folder} goes on with it",
            path=folder,
        )
    if (folder / "config.json").is_file():
        raise FormatError(f"a model, not an adapter: adapter_config.json is missing. {holds}", path=folder)
    if any((folder / name).is_file() for name in peft.WEIGHTS):
        raise FormatError(
            f"adapter_config.json is missing, which says rank and alpha: get it from where the weights are from; the smallest one is "
            f'{{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}}. {holds}', path=folder
        )  # fmt: skip
    single = sorted(path for path in folder.iterdir() if path.suffix in _SINGLE and path.is_file())
    if len(single) == 1:
        return single[0]
    if single:
        raise FormatError(
            f"no adapter_config.json, and several files that could be meant: {some_names([path.name for path in single])}. Name one",
            path=folder,
        )
    raise FormatError(f"no adapter: looked for adapter_config.json, adapter/ and {FILES[0]}. {holds}", path=folder)


def convert(
    source: str | os.PathLike[str] | Adapter, to: str, out: str | os.PathLike[str], *, overwrite: bool = False
) -> Path:
    """Write an adapter for another tool.

    Args:
        source: an adapter, or whatever `load` reads.
        to: ``"peft"``: a directory as PEFT writes it. ``"vllm"``: one rank, alpha = rank, see `to_vllm`. ``"towers"``: a
            directory of PEFT's for each tower, in one directory.
        out: the directory to write.
        overwrite: replace an adapter that is there.

    Returns:
        The directory.

    Raises:
        FormatError: an unknown ``to``; see `load` and `weft.formats.peft.write`.
        UnsupportedError: what the other tool doesn't have.
    """
    if to not in TARGETS:
        raise FormatError(f"to={to!r} is unknown.{did_you_mean(to, TARGETS)} There are: {', '.join(TARGETS)}")
    adapter = source if isinstance(source, Adapter) else load(source)
    if to == "towers":
        return peft.write(adapter, out, overwrite=overwrite, by_tower=True)
    if to == "vllm":
        return peft.write(to_vllm(adapter), out, overwrite=overwrite, leaf_names=True)
    return peft.write(adapter, out, overwrite=overwrite)
