"""The vision demo's steps in small: pictures, a vision base, a run, and a picture of what is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.command_line import weft
from weft.demo_pictures import COLOURS, SHAPES, draw, held_out, learned, scenes
from weft.demo_vision import RECIPE, VisionDemo
from weft.errors import RunError


def test_pictures_are_functions_of_their_seed_and_show_their_colour() -> None:
    several = list(scenes(learned() + held_out(), 1, "test"))
    assert len({scene.caption for scene in several}) == 2 * len(COLOURS) * len(SHAPES)
    for scene in several[::7]:
        pixels = np.asarray(draw(scene), dtype=int)
        assert (pixels == np.asarray(draw(scene))).all()
        grey = np.asarray(draw(scene, grey=True), dtype=int)
        assert (grey == grey[..., :1]).all()
        assert (pixels.max(2) - pixels.min(2)).max() > 80, scene
    assert not set(learned()) & set(held_out())
    assert {colour for colour, _ in held_out()} == set(COLOURS)
    assert {shape for _, shape in held_out()} == set(SHAPES)


def test_the_story(tmp_path: Path) -> None:
    demo = VisionDemo(tmp_path / "d", recipe=RECIPE.replace(max_steps=2, eval_every=2), trained=1, asked=1, grey=72)
    with pytest.raises(RunError, match="call train"):
        demo.compare()
    assert 0 <= demo.look() <= 1
    run = demo.train()
    assert run.adapter.towers == ("text_model", "vision_model")
    found = demo.compare()
    assert found.adapter is not None
    sides = demo.finds()
    assert [item.caption for item in sides["before"]] == [item.caption for item in sides["after"]]
    assert len(sides["after"]) == 12
    with Image.open(demo.picture(sides)) as image:
        assert image.width > 500
    with pytest.raises(RunError, match="not an empty folder"):
        VisionDemo(tmp_path / "d")


def test_the_command_refuses_what_it_does_not_know() -> None:
    for words, said in (("visoin", "vision"), ("vision --base x", "leave --base out")):
        done = weft(f"demo {words}", ok=False)
        assert done.status == 2
        assert said in done.err
