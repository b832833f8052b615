"""``weft store put``, ``tag``, ``rm``, ``gc``, ``verify``: what is kept, and whether it is whole."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from weft.cli import show
from weft.cli.options import Json, Quiet, Usage
from weft.cli.store.opening import Ref, metrics_of, opened, pairs_of

__all__ = ["add_to"]

Tags = Annotated[list[str] | None, typer.Option("--tag", metavar="KEY=VALUE", help="A label; may be repeated.")]
Metrics = Annotated[
    list[str] | None, typer.Option("--metric", metavar="NAME=NUMBER", help="What was measured; may be repeated.")
]


def add_to(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command()(put)
    app.command()(tag)
    app.command()(rm)
    app.command()(gc)
    app.command()(verify)


def put(
    ctx: typer.Context,
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="Adapter: a directory, a file, a run folder, or another one of the store."),
    ],
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="New or known: it becomes the next version.")
    ] = ...,  # type: ignore[assignment]
    tags: Tags = None,
    metrics: Metrics = None,
    note: Annotated[str, typer.Option("--note", metavar="TEXT", help="One remark.")] = "",
    again: Annotated[bool, typer.Option("--again", help="A version also where the newest one is the same.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Keep an adapter as the next version of a name."""
    labels, measured = pairs_of("--tag", tags), metrics_of(metrics)
    version = opened(ctx, create=True).put(path, name, tags=labels, metrics=measured, note=note, again=again)
    if json:
        return show.as_json(version.to_dict() | {"new": version.is_new})
    show.result(f"{version}  {version.digest[:12]}  {show.size(version.bytes)}")
    if not version.is_new:
        show.remark("it was there already; --again makes a version of it all the same", quiet)


def tag(
    ctx: typer.Context,
    ref: Ref,
    pairs: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Tags to set.")] = None,
    remove: Annotated[
        list[str] | None, typer.Option("--remove", metavar="KEY", help="A tag to remove; may be repeated.")
    ] = None,
    metrics: Metrics = None,
    json: Json = False,
) -> None:
    """Set or remove tags of a version; add metrics to it."""
    if not (pairs or remove or metrics):
        raise Usage("nothing to do: give KEY=VALUE, --remove KEY or --metric NAME=NUMBER")
    labels, measured = pairs_of("tags", pairs), metrics_of(metrics)
    version = opened(ctx).tag(ref, labels, remove=remove or (), metrics=measured)
    if json:
        return show.as_json(version.to_dict())
    said = [f"{key}={value}" for key, value in version.tags.items()] + [
        f"{key} {value:g}" for key, value in version.metrics.items()
    ]
    show.result(f"{version}  {'  '.join(said)}".rstrip())


def rm(
    ctx: typer.Context,
    ref: Annotated[
        str,
        typer.Argument(
            metavar="REF", help="NAME@3: a version; NAME@prod: an alias; NAME: all its versions, with --all."
        ),
    ],
    whole: Annotated[bool, typer.Option("--all", help="Remove all versions of NAME.")] = False,
    json: Json = False,
) -> None:
    """Remove a version, an alias, or a name.

    Files stay until weft store gc. Numbers of versions are never given again.
    """
    name, at, version = ref.partition("@")
    if at and not version.isdigit() and version != "latest":
        opened(ctx).unalias(name, version)
        return show.as_json({"alias": ref}) if json else show.result(f"removed: the alias {ref}; its version stays")
    if not at and not whole:
        raise Usage(f"{ref} can have many versions: give {ref}@NUMBER, or --all for all of them")
    if at and whole:
        raise Usage(f"--all removes all versions of a name: give {name} without a version")
    removed = opened(ctx).remove(ref)
    if json:
        return show.as_json({"removed": [str(item) for item in removed]})
    show.result(f"removed: {', '.join(str(item) for item in removed)}")


def gc(
    ctx: typer.Context,
    grace: Annotated[
        str, typer.Option("--grace", metavar="TIME", help="Keep what was put or removed in this time: 30m, 24h, 7d.")
    ] = "24h",
    dry: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    json: Json = False,
) -> None:
    """Remove files that no version refers to."""
    found = opened(ctx).gc(grace=_seconds(grace), dry_run=dry)
    if json:
        return show.as_json(
            {
                "removed": list(found.blobs),
                "bytes": found.bytes,
                "leftovers": found.leftovers,
                "kept": found.kept,
                "dry_run": dry,
            }
        )
    verb = "would remove" if dry else "removed"
    rest = f", and {show.number(found.leftovers, 'leftover')} of writers that died" if found.leftovers else ""
    kept = f"; {found.kept} more are younger than {grace}" if found.kept else ""
    show.result(
        f"{verb} {show.number(len(found.blobs), 'adapter')} of {show.size(found.bytes)} that nothing refers to{rest}{kept}"
    )


def verify(ctx: typer.Context, json: Json = False, quiet: Quiet = False) -> None:
    """Hash all files, and compare them with the index."""
    found = opened(ctx).verify(progress=show.progress(quiet))
    if json:
        show.as_json(
            {
                "ok": found.ok,
                "adapters": found.blobs,
                "bytes": found.bytes,
                "problems": list(found.problems),
                "leftovers": found.leftovers,
            }
        )
    else:
        for problem in found.problems:
            show.result(problem)
        rest = f"; {found.leftovers} that nothing refers to: weft store gc" if found.leftovers else ""
        said = "all as they were written" if found.ok else show.number(len(found.problems), "problem")
        show.result(f"{show.number(found.blobs, 'adapter')}, {show.size(found.bytes)}: {said}{rest}")
    if not found.ok:
        raise typer.Exit(1)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)([smhdw]?)", text.strip())
    if match is None:
        raise Usage(f"--grace: {text!r} is no time, as in 30m, 24h or 7d")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[match[2]]
