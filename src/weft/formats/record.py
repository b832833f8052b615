"""weft.json: what PEFT's two files have no place for.

It stands beside them and says the spec, every site with its kind, scale and shapes, the provenance, the digest, and the
hashes of the other files, so that a directory gives back exactly the adapter that was saved, or an error. Deleting it
leaves a plain PEFT directory. This module does not know PEFT's keys.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from weft.adapter import Adapter, Provenance
from weft.core.factors import Factors, Kind
from weft.errors import FormatError, SpecError
from weft.formats.checks import is_number, read_json, shortened
from weft.spec import LoraSpec

__all__ = ["RECORD", "Record", "SiteRecord", "config_hash", "plain", "read_record"]

RECORD = "weft.json"
VERSION = 1

_WAY_OUT = f"deleting {RECORD} leaves a plain PEFT directory, which loads without provenance and digest"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


@dataclass(frozen=True)
class SiteRecord:
    """One site, without its numbers.

    Attributes:
        A: shape of A.
        B: shape of B.
        dtypes: of A and of B, as text.
        bias: B has a bias of its own.
    """

    path: str
    kind: Kind
    scale: float
    A: tuple[int, ...]
    B: tuple[int, ...]
    dtypes: tuple[str, str]
    kernel: tuple[int, ...] = ()
    groups: int = 1
    bias: bool = False

    @classmethod
    def of(cls, path: str, item: Factors) -> SiteRecord:
        """The record of one site."""
        dtypes = (str(item.A.dtype).removeprefix("torch."), str(item.B.dtype).removeprefix("torch."))
        return cls(
            path,
            item.kind,
            item.scale,
            tuple(item.A.shape),
            tuple(item.B.shape),
            dtypes,
            tuple(item.kernel),
            item.groups,
            item.bias is not None,
        )

    @property
    def rank(self) -> int:
        """r, by expert."""
        return self.A[-2]


@dataclass(frozen=True)
class Record:
    """What weft.json says.

    Attributes:
        layout: ``"peft"``; ``"towers"``: a directory of PEFT's for each tower, in it; ``"weft"``: only weft reads it.
        digest: of the adapter.
        files: hashes of the tensor files by name, see `weft.hashes`; adapter_config.json by `config_hash`.
        sites: in the order of the model.
        modules: names of the tensors of each module trained whole.
        biases: parameter paths.
        proof: whether there is a proof.
    """

    layout: str
    digest: str
    files: Mapping[str, str]
    spec: LoraSpec
    sites: tuple[SiteRecord, ...]
    modules: Mapping[str, tuple[str, ...]]
    biases: tuple[str, ...]
    proof: bool
    provenance: Provenance

    @classmethod
    def of(cls, adapter: Adapter, layout: str, files: Mapping[str, str]) -> Record:
        """The record of an adapter."""
        sites = tuple(SiteRecord.of(path, item) for path, item in adapter.factors.items())
        modules = {path: tuple(tensors) for path, tensors in adapter.modules.items()}
        return cls(
            layout,
            adapter.digest,
            dict(files),
            adapter.spec,
            sites,
            modules,
            tuple(adapter.biases),
            bool(adapter.proof),
            adapter.provenance,
        )

    def to_json(self) -> str:
        """Text of weft.json."""
        from weft import __version__

        said = {
            "format": VERSION,
            "weft": __version__,
            "layout": self.layout,
            "digest": self.digest,
            "files": dict(self.files),
            "proof": self.proof,
            "spec": self.spec.to_dict(),
            "provenance": self.provenance.to_dict(),
            "modules": self.modules,
            "biases": self.biases,
        }
        text = json.dumps(plain(said), indent=1, ensure_ascii=False, allow_nan=False, default=str)
        sites = ",\n  ".join(json.dumps(asdict(site), allow_nan=False) for site in self.sites)
        return f'{text[:-2]},\n "sites": [\n  {sites}\n ]\n}}\n'  # a line a site: files that people can read


def config_hash(config: Mapping[str, Any]) -> str:
    """sha256 of a configuration, whatever its layout as text."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def plain(value: Any) -> Any:
    """Finite numbers and plain containers: what a recipe or an evaluation may hold beside, as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_record(folder: Path) -> Record:
    """Read weft.json.

    Raises:
        FormatError: it is damaged, or of a later version of weft; names the key.
    """
    path = folder / RECORD
    said = read_json(path, folder)
    version = said.get("format")
    if version != VERSION:
        raise FormatError(
            f"format {shortened(repr(version))}; this weft reads {VERSION}: use a newer weft, or know that {_WAY_OUT}",
            path=path,
            key="format",
        )
    key = ""
    try:
        for key in ("layout", "digest", "files", "spec", "sites", "modules", "biases", "proof", "provenance"):
            _expect(key in said)
        key = "layout"
        _expect(said[key] in ("peft", "weft", "towers"))
        key = "digest"
        _expect(isinstance(said[key], str))
        key = "files"
        _expect(_is_text(said[key].values()))
        key = "spec"
        spec = LoraSpec.from_dict(said[key])
        key = "modules"
        modules = {_text(name): tuple(_text(leaf) for leaf in leaves) for name, leaves in said[key].items()}
        key = "biases"
        biases = tuple(_text(name) for name in said[key])
        key = "provenance"
        provenance = Provenance.from_dict(said[key])
        key = "sites"
        sites = tuple(_site(facts) for facts in said[key])
        _expect(len({site.path for site in sites}) == len(sites))
    except (SpecError, TypeError, ValueError, KeyError, AttributeError, OverflowError) as problem:
        raise FormatError(
            f"damaged, or written by a later weft ({type(problem).__name__}: {str(problem)[:200]}); {_WAY_OUT}",
            path=path,
            key=key,
        ) from None
    return Record(
        said["layout"], said["digest"], said["files"], spec, sites, modules, biases, bool(said["proof"]), provenance
    )


def _expect(ok: bool) -> None:
    if not ok:
        raise ValueError("missing, or not what is expected here")


def _text(value: Any) -> str:
    _expect(isinstance(value, str) and bool(value))
    return str(value)


def _is_text(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def _numbers(value: Any, low: int = 1) -> tuple[int, ...]:
    _expect(isinstance(value, list) and all(type(number) is int and low <= number < 1 << 48 for number in value))
    return tuple(value)


def _site(facts: Any) -> SiteRecord:
    """One site of weft.json, checked."""
    _expect(is_number(facts["scale"]) and facts["kind"] in get_args(Kind) and type(facts["groups"]) is int)
    site = SiteRecord(
        _text(facts["path"]), facts["kind"], float(facts["scale"]), _numbers(facts["A"]), _numbers(facts["B"]),
        (_text(facts["dtypes"][0]), _text(facts["dtypes"][1])), _numbers(facts["kernel"]), facts["groups"], bool(facts["bias"]),
    )  # fmt: skip
    _expect(all(name in _DTYPES for name in site.dtypes) and len(site.A) in (2, 3) and len(site.A) == len(site.B))
    return site


def dtype_of(name: str) -> torch.dtype:
    """The dtype that a record names."""
    return _DTYPES[name]
