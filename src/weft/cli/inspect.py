"""``weft inspect``: what an adapter is, and whether it does on a base what it did when it was saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli import show
from weft.cli.options import Base, Dtype, Json, OtherBase, Quiet, Usage
from weft.errors import some_names

if TYPE_CHECKING:
    from weft.inspection import Inspection, SiteGroup

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Adapter: a directory, a file, or a run folder.")],
    base: Base = None,
    prove: Annotated[bool, typer.Option("--prove", help="Load it onto --base and compare its golden prompts.")] = False,
    dtype: Dtype = None,
    other: OtherBase = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what an adapter is.

    Sites, ranks, norms, size, digest, where it is from; with --prove also whether it is applied on a base.
    """
    if base is not None and not prove:
        raise Usage("--base is for --prove: to inspect an adapter, no base is needed")
    from weft.inspection import inspect_adapter, prove_adapter

    found = inspect_adapter(path)
    proof = prove_adapter(found.adapter, base, dtype=dtype, allow_other_base=other) if prove else None
    if json:
        show.as_json({**found.to_dict(), **({"proof": proof.to_dict()} if proof else {})})
    else:
        _show(found)
        if proof is not None:
            show.result(f"\n{proof.text()}")
    if proof is not None and not proof.ok:
        raise typer.Exit(1)


def _show(found: Inspection) -> None:
    """Facts, sites, provenance, warnings."""
    adapter = found.adapter
    show.pairs([
        ("adapter", found.path),
        ("digest", adapter.digest),
        ("numbers", f"{adapter.num_parameters:,} in {len(found.sites)} sites, rank {adapter.ranks()}; ‖ΔW‖ {found.norm:.4g}"),
        ("spec", _spec(found)),
        ("files", ", ".join(f"{name} {show.size(count)}" for name, count in found.files.items()) or "none"),
        *(("whole", f"{path}: " + ", ".join(f"{name} {'×'.join(map(str, tensor.shape))}" for name, tensor in tensors.items()))
          for path, tensors in adapter.modules.items()),
        *([("biases", f"{len(adapter.biases)} of the base, trained with it")] if adapter.biases else []),
        *([("proof", f"{len(adapter.proof['logits'])} golden prompts")] if "logits" in adapter.proof else []),
    ])  # fmt: skip
    show.result()
    common = show.common([group.pattern for group in found.groups])
    if common:
        show.result(f"sites in {common[:-1]}:\n")
    heads = (
        ("site", "left"),
        ("n", "right"),
        ("shape", "right"),
        ("scale", "right"),
        ("rank", "right"),
        ("eff.", "right"),
        ("‖ΔW‖", "right"),
    )
    show.table(heads, [_row(group, common) for group in found.groups])
    show.result("eff.: directions that the update really uses; ‖ΔW‖: the median of the n sites\n")
    show.pairs(_provenance(found))
    if found.run is not None:
        show.result(f"\n{found.run.text()}")
    if found.warnings:
        show.result()
    for warning in found.warnings:
        show.result(f"warning: {warning}")


def _row(group: SiteGroup, common: str) -> tuple[str, ...]:
    shape = "×".join(map(str, group.shape))
    return (
        group.pattern.removeprefix(common),
        str(group.count),
        shape,
        f"{group.scale:.4g}",
        str(group.rank),
        f"{group.effective_rank:.1f}",
        f"{group.norms[1]:.3g}",
    )


def _spec(found: Inspection) -> str:
    """What was asked for, where it is not the default."""
    from weft.spec import LoraSpec

    default = LoraSpec().to_dict()
    own = found.adapter.spec.to_dict()
    towers = own.pop("towers")
    if towers:
        parts = [f"{name}: {_changes(part, default)}" for name, part in towers.items()]
        return "; ".join([*parts, f"whole: {_short(own['save_modules'])}"])
    return _changes(own, default)


def _changes(own: Mapping[str, Any], default: Mapping[str, Any]) -> str:
    return " ".join(
        f"{name}={_short(value)}"
        for name, value in own.items()
        if name in ("rank", "alpha", "targets") or value != default[name]
    )


def _short(value: Any) -> Any:
    """A long list by its first names."""
    return f"[{some_names(value)}]" if isinstance(value, list) and value and isinstance(value[0], str) else value


def _provenance(found: Inspection) -> list[tuple[str, str]]:
    facts = found.adapter.provenance
    base = facts.base
    recipe = facts.recipe or {}
    told = ("kind", "steps", "learning_rate", "batch_size", "schedule", "seed")
    rows = [
        ("base", f"{base.name or '(no name)'}, {base.architecture} {base.dtype}, weights {base.weights[:12]}"
                 f"{', sampled' if base.sampled else ''}{f', commit {base.commit[:12]}' if base.commit else ''}" if base else "not said, so nothing can be compared"),
        *(("data", f"{part.get('role', '')} {part.get('source', '')}: {part.get('examples', '?')} examples, {str(part.get('digest', ''))[:12]}".strip())
          for part in facts.data),
        ("recipe", ", ".join(f"{name} {recipe[name]}" for name in told if recipe.get(name) is not None)),
        *([] if found.run else [("evaluation", ", ".join(f"{name} {value:.4g}" for name, value in facts.evaluation.items()))]),
        ("parents", ", ".join(_parent(parent) for parent in facts.parents)),
        ("mixture", _mixture(facts.mixture)),
        ("versions", ", ".join(f"{name} {version}" for name, version in facts.versions.items())),
        ("created", facts.created or ""),
        *(("note", note) for note in facts.notes),
    ]  # fmt: skip
    return [(name, value) for name, value in rows if value]


def _parent(parent: Mapping[str, Any]) -> str:
    """``0.7 × medical (a1b2c3d4e5f6)``."""
    weight = parent.get("weight", "")
    said = f"{weight:g} × " if isinstance(weight, int | float) else f"{weight} × " if weight else ""
    return f"{said}{parent.get('name', '')} ({str(parent.get('digest', ''))[:12]})"


def _mixture(made: Mapping[str, Any] | None) -> str:
    """The method, what it was given, and its error."""
    if not made:
        return ""
    settings = ", ".join(f"{name} {value}" for name, value in dict(made.get("settings") or {}).items())
    error = made.get("relative_error")
    lost = f"; relative error {error:.2%}" if isinstance(error, float) else ""
    return f"{made.get('method', '')}{f' ({settings})' if settings else ''}{lost}"
