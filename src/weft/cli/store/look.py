"""``weft store ls``, ``show``, ``log``, ``diff``: what there is."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli import show
from weft.cli.options import Json, Quiet, Usage
from weft.cli.store.opening import Ref, opened, pairs_of
from weft.errors import StoreError

if TYPE_CHECKING:
    from weft.store import Store, Version
    from weft.store.differing import Difference

__all__ = ["add_to"]

_BETWEEN = 3
"""Letters between two columns of a table."""

_LEAST = 14
"""Letters that a cell is not cut below."""


def add_to(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command()(ls)
    app.command(name="show")(show_version)
    app.command()(log)
    app.command()(diff)


def ls(
    ctx: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A name, or its start: med*; default: all.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="BASE", help="Of this base: its name, or first digits of its fingerprint."),
    ] = None,
    tags: Annotated[
        list[str] | None, typer.Option("--tag", metavar="KEY=VALUE", help="With this tag; may be repeated.")
    ] = None,
    where: Annotated[
        str | None, typer.Option("--where", metavar="CONDITION", help="As in 'eval_loss<2 and rank>=8'.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="DIGEST", help="Trained on this data set: first digits of its digest, or its source."
        ),
    ] = None,
    alias: Annotated[str | None, typer.Option("--alias", metavar="ALIAS", help="What this alias points to.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every version, not the newest of each name alone.")] = False,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, max=1_000_000, help="At most as many.")] = 50,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List adapters, the newest first."""
    labels = pairs_of("--tag", tags)
    store = opened(ctx)
    found = store.find(
        name=name, base=base, tags=labels, where=where, data=data, alias=alias, all_versions=every, limit=limit + 1
    )
    if json:
        return show.as_json([version.to_dict() for version in found[:limit]])
    if not found:
        asked = any(item is not None for item in (name, base, where, data, alias)) or bool(labels)
        older = (
            asked
            and not every
            and store.find(
                name=name, base=base, tags=labels, where=where, data=data, alias=alias, all_versions=True, limit=1
            )
        )
        if older:
            return show.remark("no newest version is let through by these; older ones are: --all shows them", quiet)
        return show.remark(
            "no adapter is let through by these"
            if asked
            else f"nothing yet in {store.place}: weft store put PATH --name NAME",
            quiet,
        )
    _table(found[:limit], with_name=True, quiet=quiet)
    if len(found) > limit:
        show.remark(f"… and more: --limit {limit * 10} shows them", quiet)


def _table(versions: list[Version], *, with_name: bool, quiet: bool) -> None:
    """Versions, with those metrics and tags that one of them has."""
    metrics = list(dict.fromkeys(name for version in versions for name in version.metrics))[:3]
    heads = [("version", "left"), ("alias", "left"), ("base", "left"), ("rank", "right"), *((name, "right") for name in metrics), ("tags", "left"),
             ("put", "right"), ("digest", "right")]  # fmt: skip
    rows = []
    for version in versions:
        numbers = (f"{version.metrics[name]:.4g}" if name in version.metrics else "" for name in metrics)
        tags = " ".join(f"{key}={value}" for key, value in version.tags.items())
        name = str(version) if with_name else f"@{version.number}"
        rows.append(
            (
                name,
                " ".join(version.aliases),
                _base(version),
                str(version.rank),
                *numbers,
                tags,
                _when(version.created)[:10],
                version.digest[:8],
            )
        )
    kept = [column for column in range(len(heads)) if any(row[column] for row in rows)]
    columns = {heads[column][0]: [row[column] for row in rows] for column in kept}
    left_out = _fit(columns, shutil.get_terminal_size((80, 24)).columns)
    sides = dict(heads)
    show.table([(head, sides[head]) for head in columns], zip(*columns.values(), strict=True))
    if left_out:
        show.remark(f"no room for: {', '.join(left_out)}; a wider window or --json has it", quiet)


def _fit(columns: dict[str, list[str]], room: int) -> list[str]:
    """Make a table as narrow as a terminal, so that each row is one line: long text is cut, then columns go.

    Args:
        columns: cells by heading; changed in place.
        room: letters in a line.

    Returns:
        Headings of the columns that went.
    """

    def too_much() -> int:
        return sum(wide(head) for head in columns) + _BETWEEN * (len(columns) - 1) - room

    def wide(head: str) -> int:
        return max(len(head), *map(len, columns[head]))

    while too_much() > 0:
        longest = max((head for head in ("tags", "base", "alias") if head in columns), key=wide, default="")
        if not longest or wide(longest) <= _LEAST:
            break
        width = max(_LEAST, wide(longest) - too_much())
        columns[longest] = [cell if len(cell) <= width else f"{cell[: width - 1]}…" for cell in columns[longest]]
    gone = []
    for head in ("put", "rank", "tags", "base", *list(columns)[:0:-1]):
        if too_much() > 0 and head in columns and len(columns) > 1:
            del columns[head]
            gone.append(head)
    return gone


def _when(seconds: float) -> str:
    """Local time."""
    return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def _base(version: Version) -> str:
    return version.base_name.rstrip("/").rpartition("/")[2] or version.base[:12]


def show_version(ctx: typer.Context, ref: Ref, json: Json = False) -> None:
    """Say all that is known of a version."""
    store = opened(ctx)
    version = store.version(ref)
    facts, files = store.provenance(version), store.files(version)
    if json:
        return show.as_json({**version.to_dict(), "files": files, "provenance": facts.to_dict()})
    from weft.store.records import moment

    recipe = facts.recipe or {}
    told = ("kind", "steps", "max_steps", "epochs", "learning_rate", "batch_size", "schedule", "seed")
    rows = [
        ("version", str(version) + (f"  ({', '.join(version.aliases)})" if version.aliases else "")),
        ("digest", version.digest),
        ("owner", version.owner),
        ("put", moment(version.created)),
        ("note", version.note),
        ("base", f"{version.base_name or '(no name)'}, {version.architecture} {version.base[:12]}" if version.base else version.base_name or "not known"),
        ("numbers", f"{version.parameters:,} in {version.sites} sites, rank {version.rank}"),
        ("files", ", ".join(f"{name} {show.size(size)}" for name, size in files.items())),
        ("tags", ", ".join(f"{key}={value}" for key, value in version.tags.items())),
        ("metrics", ", ".join(f"{name} {value:.6g}" for name, value in version.metrics.items())),
        *(("data", f"{item['role']} {item['source']} {item['digest'][:12]}".strip()) for item in version.data),
        *(("parent", f"{digest[:12]}" + (f" × {weight:g}" if weight is not None else "")) for digest, weight in version.parents),
        ("recipe", ", ".join(f"{name} {recipe[name]}" for name in told if recipe.get(name) is not None)),
        ("made by", ", ".join(f"{name} {version}" for name, version in facts.versions.items())),
        ("created", facts.created or ""),
        *(("note", note) for note in facts.notes),
    ]  # fmt: skip
    show.pairs((name, value) for name, value in rows if value)


def log(
    ctx: typer.Context,
    ref: Ref,
    graph: Annotated[bool, typer.Option("--graph", help="What it was made of, and that of what.")] = False,
    picture: Annotated[
        str | None, typer.Option("--picture", metavar="FILE", help="Write that graph as a picture (SVG).")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tell the history of a name: its versions, and the moves of its aliases."""
    store = opened(ctx)
    if graph or picture is not None:
        return _graph(store, ref, picture, json, quiet)
    name = store.version(ref).name
    versions, moves = store.versions(name), store.moves(name)
    if json:
        return show.as_json(
            {"versions": [version.to_dict() for version in versions], "moves": [vars(move) for move in moves]}
        )
    _table(versions, with_name=False, quiet=quiet)
    if moves:
        show.result()
        heads = [
            ("alias", "left"),
            ("", "left"),
            ("from", "right"),
            ("to", "right"),
            ("required", "left"),
            ("by", "left"),
            ("when", "right"),
        ]
        show.table(heads, [(move.alias, move.kind + (", taken back" if move.undone else ""), str(move.before or ""), str(move.after or ""), move.required, move.by,
                            _when(move.at)) for move in moves])  # fmt: skip


def _graph(store: Store, ref: str, picture: str | None, json: bool, quiet: bool) -> None:
    """Lineage, as text or as a picture."""
    found = store.lineage(ref)
    if json:
        nodes = [{"digest": node.digest, "refs": [str(version) for version in node.versions], "parents": [{"digest": digest, "weight": weight} for digest, weight in node.parents]}
                 for node in found.nodes.values()]  # fmt: skip
        show.as_json({"asked": found.asked, "nodes": nodes, "cut": found.cut})
    else:
        show.result(found.text())
    if picture is None:
        return
    if not picture.endswith(".svg"):
        raise Usage(f"--picture: {picture!r} is to end in .svg")
    try:
        Path(picture).write_text(found.svg(), encoding="utf-8")
    except OSError as problem:
        raise StoreError(f"{picture}: the picture can't be written: {problem.strerror or problem}") from None
    show.remark(f"\nwritten: {picture}", quiet)


def diff(ctx: typer.Context, first: Ref, second: Ref, json: Json = False) -> None:
    """Say what differs between two versions."""
    found = opened(ctx).diff(first, second)
    if json:
        return show.as_json(found.to_dict())
    if found.same and not found.facts:
        return show.result(f"{found.first} and {found.second} are the same adapter: {found.first.digest[:12]}")
    if found.facts:
        rows = [(name, _value(one), _value(two)) for name, (one, two) in found.facts.items()]
        show.table([("", "left"), (str(found.first), "left"), (str(found.second), "left")], rows)
        show.result()
    _updates(found)


def _updates(found: Difference) -> None:
    """How far the updates themselves are apart."""
    if found.same:
        return show.result("the updates are the same, to the last bit")
    cosine = f", cosine {found.cosine:.4f}" if found.cosine is not None else ""
    show.result(f"‖ΔW₁ − ΔW₂‖ / ‖ΔW₁‖ = {found.relative:.4g}{cosine}")
    for site, relative in sorted(found.sites.items(), key=lambda item: -item[1])[:8]:
        show.result(f"  {relative:8.4g}  {site}")
    if len(found.sites) > 8:
        show.result(f"  … and {len(found.sites) - 8} more sites; --json has all")
    for version, only in zip((found.first, found.second), found.only, strict=True):
        if only:
            show.result(f"only {version} has {len(only)} sites: {', '.join(only[:3])}{' …' if len(only) > 3 else ''}")


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = "" if value is None else str(value)
    return text if len(text) <= 120 else f"{text[:117]}…"
