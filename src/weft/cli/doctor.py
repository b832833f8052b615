"""``weft doctor``: what is wrong with a run or an adapter, and what to change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from weft.cli import show
from weft.cli.options import Base, Dtype, Json, Quiet

if TYPE_CHECKING:
    from weft.diagnosis import Finding

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

EPILOG = (
    "Severities: high: the result is not to be used, or the run is lost; medium: it would be better otherwise; low: good to know."
    " Exit status 1 where a finding is high or medium, else 0."
)


@app.command(epilog=EPILOG)
def doctor(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A run folder, also of a run that goes on; or an adapter.")
    ],
    base: Base = None,
    dtype: Dtype = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what is wrong with a run or an adapter, and the cure."""
    from weft.diagnosing import look_at

    found = look_at(path, base, dtype=dtype)
    if json:
        show.as_json(found.to_dict())
    else:
        show.remark(found.subject, quiet)
        for item in found.findings:
            show.result(f"\n{_headline(item)}\n  {item.evidence}\n  → {item.advice}")
        for note in found.notes:
            show.remark(f"\nnote: {note}", quiet)
        if not found.findings:
            show.result("nothing is wrong")
    if any(item.severity != "low" for item in found.findings):
        raise typer.Exit(1)


def _headline(found: Finding) -> str:
    """``high    loss-explosion, step 31, at model.layers.0.q_proj``."""
    where = (f"step {found.step}" if found.step is not None else "", f"at {found.site}" if found.site else "")
    return ", ".join([f"{found.severity:<7} {found.rule}", *filter(None, where)])
