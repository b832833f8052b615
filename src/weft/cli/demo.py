"""``weft demo``: the whole story on the embedded base, told step by step."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from weft.cli import show
from weft.cli.options import Usage
from weft.errors import did_you_mean

if TYPE_CHECKING:
    from weft.demo import Demo, DemoPlan
    from weft.train import Evaluation

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def demo(
    story: Annotated[
        str | None, typer.Argument(metavar="[STORY]", help="vision: text and images; default: the story of text.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Where to write; default: runs/demo (runs/demo-vision), or the next free number.",
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="BASE", help="Another base than the embedded one.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """See the whole story on the embedded base.

    Plan, train, compare, merge, prove: an adapter for a task that the base can't do. Offline, in a minute or two.

    weft demo vision: two towers learn which picture a caption means, on pictures that the demo draws.
    """
    if story not in (None, "text", "vision"):
        raise Usage(f"no story {story!r}.{did_you_mean(str(story), ('text', 'vision'))} Expected vision, or nothing")
    if story == "vision":
        if base is not None:
            raise Usage("the vision demo makes its own vision base and reads with the embedded one; leave --base out")
        from weft.cli.demo_vision import tell

        return tell(out, quiet)
    started = time.monotonic()
    show.remark("The whole life of an adapter, on a small base that comes with weft.", quiet)
    from weft.demo import Demo

    story = Demo(out, base=base)
    _plan(story, story.plan())
    show.heading("2", "Train")
    run = story.train(show.progress(quiet))
    report = run.report
    show.result(f"{report.steps} steps, {report.tokens:,} tokens in {report.seconds:.0f} s; loss on held-out orders "
                f"{report.base['loss']:.3g} -> {report.adapter['loss']:.3g}")  # fmt: skip
    show.heading("3", "Compare, on orders that were held out")
    _compare(story.compare(show.progress(quiet)))
    show.heading("4", "Merge and prove")
    _, merged = story.merge()
    show.pairs(
        [
            ("merge", f"{merged.summary().splitlines()[0]}; written, read again, compared"),
            ("prove", story.prove().text()),
        ]
    )
    _files(story)
    _next(story)
    show.remark(f"\n{time.monotonic() - started:.0f} seconds in all", quiet)


def _plan(story: Demo, plan: DemoPlan) -> None:
    example = story.learned[0]
    show.heading("1", "Plan")
    show.result("The base is a small language model: it reads plain English, and knows no records.\n")
    show.pairs([("task", "a message becomes a record"), ("  from", example["prompt"]), ("  to", example["completion"])])
    share = plan.adapter_parameters / plan.base_parameters
    spec = story.recipe.spec
    rank = spec.rank if spec is not None else 0
    show.result()
    show.table(
        [("", "left"), ("numbers", "right"), ("weights", "right"), ("gradients", "right"), ("optimizer", "right"), ("in all", "right")],
        [
            _memory("adapter, trained", plan.adapter_parameters, plan.adapter),
            ("base, frozen", f"{plan.base_parameters:,}", show.size(plan.base_bytes), "-", "-", show.size(plan.base_bytes)),
            _memory("base, if it was trained", plan.base_parameters, plan.full),
        ],
    )  # fmt: skip
    show.result(f"\nRank {rank} at {plan.sites} sites: {share:.1%} of the base's numbers. Activations come on top.")


def _memory(name: str, count: int, held: object) -> tuple[str, ...]:
    parts = [getattr(held, part) for part in ("weights", "gradients", "optimizer", "total")]
    return name, f"{count:,}", *(show.size(part) for part in parts)


def _compare(found: Evaluation) -> None:
    after = found.adapter or {}
    show.table(
        [(f"{found.generated} orders", "left"), ("base", "right"), ("adapter", "right")],
        [
            ("records that are exactly right", f"{found.base['exact_match']:.0%}", f"{after['exact_match']:.0%}"),
            ("loss (nats a token)", f"{found.base['loss']:.3f}", f"{after['loss']:.3f}"),
        ],
    )  # fmt: skip
    example = found.examples[0]
    show.result()
    show.pairs(
        [
            ("prompt", example["prompt"]),
            ("base", example["base"]),
            ("adapter", example["adapter"]),
            ("wanted", example["references"][0]),
        ],
        lines=3,
    )


def _files(story: Demo) -> None:
    told = {
        "data": "the examples",
        "run": "recipe, log, curve, checkpoints, report",
        "adapter": "the adapter; PEFT reads it too",
        "merged": "a plain model directory",
    }
    show.heading("5", "Files")
    show.table(
        [("", "left"), ("", "right"), ("", "left")],
        [(f"{place}/", show.size(size), told[place.name]) for place, size in story.files().items()],
    )


def _next(story: Demo) -> None:
    base = ("--base", str(story.base)) if story.base else ()
    run = story.folder / "run"
    show.heading("6", "Next")
    show.result("With this adapter:\n")
    test = story.folder / "data" / "test.jsonl"
    lines = [
        show.command(
            "weft", "generate", *base, "--adapter", str(run), min((row["prompt"] for row in story.asked), key=len)
        ),
        show.command("weft", "eval", *base, "--adapter", str(run), "--data", str(test)),
        show.command("weft", "inspect", str(run), *base, "--prove"),
    ]
    for line in lines:
        show.result(f"  {line}")
    show.result("\nWith a model and data of yours (JSON lines with prompt and completion):\n")
    for line in (
        "weft train    --base MODEL --data train.jsonl --eval 0.1 --out runs/mine",
        "weft eval     --base MODEL --adapter runs/mine --data test.jsonl",
        'weft generate --base MODEL --adapter runs/mine "a prompt"',
        "weft merge    --base MODEL --adapter runs/mine --out merged",
    ):
        show.result(f"  {line}")
