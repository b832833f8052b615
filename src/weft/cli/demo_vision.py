"""``weft demo vision``: text and pictures brought together, told step by step."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from weft.cli import show

if TYPE_CHECKING:
    from weft.demo_vision import Found, VisionDemo

__all__ = ["tell"]


def tell(out: str | None, quiet: bool) -> None:
    """Print the whole story."""
    started = time.monotonic()
    show.remark("Two towers, on pictures that the demo draws itself.", quiet)
    from weft.demo_vision import VisionDemo

    story = VisionDemo(out)
    show.heading("1", "Two frozen bases that never met")
    accuracy = story.look()
    show.pairs(
        [
            ("text", "the embedded base: it reads plain English and has never seen a picture"),
            ("vision", f"a small CNN that names shapes in grey pictures ({accuracy:.0%} right); it has never seen a colour"),
        ]
    )  # fmt: skip
    held = ", ".join(dict.fromkeys(f"{scene.colour} {scene.shape}" for scene in story.asked))
    show.result(
        f"\n{len(story.learned):,} pictures with captions to learn. To find: {len(story.asked)} of colours and shapes that never meet in them\n"
        f"({held}), among {len(story.others)} others."
    )
    show.heading("2", "Train: LoRA in both towers, projections, temperature")
    run = story.train(show.progress(quiet))
    report = run.report
    show.result(f"{report.steps} steps in {report.seconds:.0f} s; {report.trainable:,} numbers; one adapter {run.adapter.digest[:12]} with "
                f"towers {' and '.join(run.adapter.towers)}")  # fmt: skip
    show.heading("3", "Compare")
    found = story.finds()
    _compare(story, found, show.progress(quiet))
    show.heading("4", "A picture of it")
    example = _telling(found)
    show.pairs(
        [("caption", found["before"][example].caption), *((side, _words(found[side][example])) for side in found)]
    )
    show.result(f"\nwritten: {story.picture(found)}")
    show.heading("5", "Next")
    for line in _lines(story):
        show.result(f"  {line}")
    show.remark(f"\n{time.monotonic() - started:.0f} seconds in all", quiet)


def _compare(story: VisionDemo, found: dict[str, list[Found]], progress: bool | None) -> None:
    measured = story.compare(progress)
    before, after = measured.base, measured.adapter or {}
    new = story.asked + story.others
    captions = len({scene.caption for scene in new})
    rows = [
        (f"new pictures: the right one of {captions} captions", f"{before['image_to_text_r1']:.0%}", f"{after['image_to_text_r1']:.0%}"),
        (f"captions: a right one of {len(new)} pictures first", f"{before['text_to_image_r1']:.0%}", f"{after['text_to_image_r1']:.0%}"),
        (
            f"held-out captions: right among the first {story.shown}",
            *(f"{sum(sum(one.right) for one in side)} of {sum(len(one.right) for one in side)}" for side in found.values()),
        ),
    ]  # fmt: skip
    show.table([("right", "left"), ("before", "right"), ("after", "right")], rows)


def _telling(found: dict[str, list[Found]]) -> int:
    """The caption for which most changed."""
    gains = [
        sum(after.right) - sum(before.right) for before, after in zip(found["before"], found["after"], strict=True)
    ]
    return gains.index(max(gains))


def _words(found: Found) -> str:
    return ", ".join(found.shows)


def _lines(story: VisionDemo) -> list[str]:
    run, images = story.folder / "run", story.images
    towers = ("--text-base", "DIR", "--vision-base", "DIR")
    return [
        f"{show.command('weft', 'eval', str(run), '--data', str(images / 'test.jsonl'), '--images', str(images))} --template '{{}}'",
        show.command("weft", "inspect", str(run)),
        show.command("weft", "train", "--task", "contrastive", *towers, "--data", "pairs.jsonl", "--images", "DIR", "--out", "runs/pairs"),
    ]  # fmt: skip
