"""``weft convert``: an adapter in the form that another program reads."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from weft.cli import show
from weft.cli.options import Json, Out, Quiet

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


class Form(StrEnum):
    """For whom."""

    peft = "peft"
    vllm = "vllm"


@app.command()
def convert(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Adapter: a directory, a file, or a run folder.")],
    to: Annotated[Form, typer.Option("--to", help="peft: as PEFT writes; vllm: one rank, alpha = rank, for servers.")],
    out: Out,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that stands in --out.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an adapter for PEFT or for vLLM.

    For vLLM and other servers scale and patterns are folded into factors of one rank, with alpha = rank.
    """
    from weft import convert as run_conversion

    written = run_conversion(path, to=to.value, out=out, overwrite=overwrite)
    show.result(str(written))
