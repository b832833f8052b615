"""What an adapter is: sites, sizes, norms, spectra, where it is from. Numbers for people, computed from the factors alone.

    found = inspect_adapter("runs/NAME")      # or any directory or file that `weft.load` reads
    found.groups, found.warnings, found.to_dict()

Needs no base. Does not print.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from weft import sources
from weft.adapter import Adapter
from weft.core.factors import Factors, effective_rank
from weft.errors import FormatError
from weft.train.opening import BaseLike, open_base, trained_format
from weft.train.proof import ProofReport, prove
from weft.train.run import Report, Run

__all__ = ["Inspection", "SiteFacts", "SiteGroup", "inspect_adapter", "prove_adapter"]


@dataclass(frozen=True)
class SiteFacts:
    """One site.

    Attributes:
        shape: (d_out, d_in), or (experts, d_out, d_in).
        norm: Frobenius norm of ΔW.
        effective_rank: see `effective_rank`; the mean over experts; 0 for a zero update.
        trained: False where the update is zero: B never moved.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    scale: float
    parameters: int
    norm: float
    effective_rank: float
    trained: bool


@dataclass(frozen=True)
class SiteGroup:
    """Sites whose paths differ in layer numbers only, and are alike in kind, shape, rank and scale.

    Attributes:
        pattern: the path with ``*`` for layer numbers.
        norms: smallest, median and largest ‖ΔW‖.
        effective_rank: mean.
    """

    pattern: str
    count: int
    kind: str
    shape: tuple[int, ...]
    rank: int
    scale: float
    parameters: int
    norms: tuple[float, float, float]
    effective_rank: float


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        path: what was looked at.
        files: name and bytes of each file that belongs to the adapter.
        run: the report of the run, where ``path`` is a run folder.
        warnings: what is wrong with it: sites that never moved.
    """

    path: str
    adapter: Adapter
    sites: tuple[SiteFacts, ...]
    files: dict[str, int]
    run: Report | None
    warnings: tuple[str, ...]

    @property
    def norm(self) -> float:
        """Frobenius norm of all updates together."""
        return math.sqrt(sum(site.norm**2 for site in self.sites))

    @property
    def groups(self) -> tuple[SiteGroup, ...]:
        """The sites by layer pattern, in the order of the model."""
        found: dict[tuple[Any, ...], list[SiteFacts]] = {}
        for site in self.sites:
            pattern = re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", site.path)
            found.setdefault((pattern, site.kind, site.shape, site.rank, site.scale), []).append(site)
        return tuple(_group(key[0], sites) for key, sites in found.items())

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; every site by itself."""
        whole = {
            path: {name: list(tensor.shape) for name, tensor in tensors.items()}
            for path, tensors in self.adapter.modules.items()
        }
        return {
            "path": self.path,
            "digest": self.adapter.digest,
            "parameters": self.adapter.num_parameters,
            "norm": self.norm,
            "files": self.files,
            "spec": self.adapter.spec.to_dict(),
            "sites": [asdict(site) for site in self.sites],
            "modules": whole,
            "biases": {path: list(tensor.shape) for path, tensor in self.adapter.biases.items()},
            "golden_prompts": len(self.adapter.proof["logits"]) if "logits" in self.adapter.proof else 0,
            "provenance": self.adapter.provenance.to_dict(),
            "run": self.run.to_dict() if self.run else None,
            "warnings": list(self.warnings),
        }


def inspect_adapter(path: str | os.PathLike[str]) -> Inspection:
    """Read an adapter and compute what there is to know of it without its base.

    Args:
        path: a directory, a file, a run folder, or a name in the store.

    Raises:
        FormatError: it can't be read as an adapter.
        NotFiniteError: NaN or infinity in it.
        RunError: a run folder whose training has not ended.
    """
    place = Path(path)
    run = Run.open(place) if (place / "recipe.yaml").is_file() else None
    if run is not None:
        adapter, place = run.adapter, place / "adapter"
    else:
        from weft.formats import load

        adapter = load(path)
    adapter.check_finite()
    sites = tuple(_facts(name, factors) for name, factors in adapter.factors.items())
    named = None if os.path.lexists(place) else sources.find(path, is_path=False)
    files = _files(place) if named is None else dict(named.files)
    return Inspection(os.fspath(path), adapter, sites, files, run.report if run else None, _warnings(adapter, sites))


def prove_adapter(
    adapter: Adapter, base: BaseLike = None, *, dtype: str | None = None, allow_other_base: bool = False
) -> ProofReport:
    """Load the base that a caller names, as the adapter needs it, and `prove`.

    Raises:
        FormatError: the adapter has no golden prompts.
        BaseError: the base can't be loaded; BaseMismatchError: it is another one.
    """
    if "logits" not in adapter.proof:
        raise FormatError(
            "no golden prompts in this adapter, so nothing can be proved; adapters that weft trains have them"
        )
    model, _ = open_base(
        base, labels=(trained := trained_format(adapter)).get("labels"), dtype=dtype, kind=trained.get("kind")
    )
    return prove(adapter, model, allow_other_base=allow_other_base)


def _facts(path: str, factors: Factors) -> SiteFacts:
    experts = tuple(factors.A.shape[:-2])
    return SiteFacts(
        path=path,
        kind=factors.kind,
        shape=(*experts, factors.d_out, factors.d_in),
        rank=factors.rank,
        scale=factors.scale,
        parameters=factors.num_parameters,
        norm=factors.norm(),
        effective_rank=effective_rank(factors.spectrum()) if factors.moved else 0.0,
        trained=factors.moved or factors.magnitude is not None,
    )


def _group(pattern: str, sites: Sequence[SiteFacts]) -> SiteGroup:
    first = sites[0]
    norms = sorted(site.norm for site in sites)
    return SiteGroup(
        pattern=pattern if len(sites) > 1 else first.path,
        count=len(sites),
        kind=first.kind,
        shape=first.shape,
        rank=first.rank,
        scale=first.scale,
        parameters=sum(site.parameters for site in sites),
        norms=(norms[0], norms[len(norms) // 2], norms[-1]),
        effective_rank=sum(site.effective_rank for site in sites) / len(sites),
    )


def _files(place: Path) -> dict[str, int]:
    """Files of the adapter and their bytes; of a directory those that adapters consist of; none of a hub id."""
    if not place.exists():
        return {}
    if place.is_file():
        return {place.name: place.stat().st_size}
    own = re.compile(r"(adapter_|weft|pytorch_lora_weights).*\.(json|safetensors|bin)")
    return {
        entry.name: entry.stat().st_size
        for entry in sorted(place.iterdir())
        if entry.is_file() and own.fullmatch(entry.name)
    }


def _warnings(adapter: Adapter, sites: Sequence[SiteFacts]) -> tuple[str, ...]:
    found = []
    idle = [site.path for site in sites if not site.trained]
    if idle and len(idle) == len(sites):
        found.append("untrained: every update is zero (B never moved); with this adapter the base answers as without")
    elif idle:
        found.append(
            f"{len(idle)} of {len(sites)} sites have an update of zero: {', '.join(idle[:3])}{' …' if len(idle) > 3 else ''}"
        )
    return tuple(found)
