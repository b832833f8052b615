"""Options that several verbs share, and how their values are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

__all__ = [
    "AdapterOption",
    "Base",
    "Columns",
    "Dtype",
    "Images",
    "Json",
    "Kind",
    "OtherBase",
    "Out",
    "Quiet",
    "Usage",
    "columns_of",
    "held_out",
]

Usage: type[Exception] = typer.BadParameter.__base__  # type: ignore[assignment] # click's UsageError, which typer carries but doesn't name

Base = Annotated[
    str | None,
    typer.Option(
        "--base", metavar="BASE", help="Directory in Hugging Face layout, or hub id; default: the embedded base."
    ),
]
AdapterOption = Annotated[
    str | None,
    typer.Option("--adapter", metavar="PATH", help="Directory of an adapter, or of a run; default: the base alone."),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--columns",
        metavar="NAME=COLUMN",
        help="Where the data call it otherwise, as in prompt=question,completion=answer.",
    ),
]
Kind = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="KIND",
        help="What the examples are, where it isn't recognised: chat, completion, classification, text, classify-images,"
        " image-text, contrastive, fused.",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", metavar="DTYPE", help="Of the base's weights: float32, bfloat16, float16; default: as stored."
    ),
]
OtherBase = Annotated[
    bool, typer.Option("--allow-other-base", help="Use an adapter although it was made for another base.")
]
Images = Annotated[
    str | None,
    typer.Option("--images", metavar="DIR", help="Folder that paths of images begin in; default: that of the data."),
]
Out = Annotated[str, typer.Option("--out", metavar="DIR", help="Directory to write; must not exist.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", help="No progress and no remarks; only the result, warnings and errors.")
]


def columns_of(values: Sequence[str] | None) -> dict[str, str] | None:
    """``["prompt=question,completion=answer"]`` as a mapping; None without any.

    Raises:
        Usage: a part without ``=``, or a name that stands twice.
    """
    found: dict[str, str] = {}
    for part in (part.strip() for value in values or () for part in value.split(",")):
        name, equals, column = part.partition("=")
        if not (equals and name and column):
            raise Usage(f"--columns: {part!r} is no NAME=COLUMN, as in prompt=question")
        if name in found:
            raise Usage(f"--columns: {name!r} stands twice: {found[name]!r} and {column!r}")
        found[name] = column
    return found or None


def held_out(text: str | None) -> str | float | None:
    """A share of the data to hold out, where it is a number; else the name of a file or data set."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text
