"""Pictures that the vision demo draws itself: shapes on a light ground, and what is said of them.

Everything is a function of the seed. Some pairs of colour and shape are never learned: who finds them has understood both words.
"""

from __future__ import annotations

import colorsys
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.errors import MissingDependencyError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["COLOURS", "HELD", "SHAPES", "SIDE", "SIZES", "Scene", "draw", "held_out", "learned", "scenes"]

SIDE = 32
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {"red": 0.0, "orange": 0.08, "yellow": 0.15, "green": 0.35, "blue": 0.6, "purple": 0.78}
"""Names and hues."""

SIZES = {"small": 0.24, "large": 0.42}
"""Names and radii, in sides of the picture."""

HELD = tuple(zip(COLOURS, ("star", "circle", "cross", "triangle", "ring", "square"), strict=True))
"""Colour and shape that never meet in what is learned: each colour once, each shape once."""


@dataclass(frozen=True)
class Scene:
    """What a picture shows. Attributes: size, colour, shape: names; seed: of place, turn, shade and ground."""

    size: str
    colour: str
    shape: str
    seed: str

    @property
    def caption(self) -> str:
        """Such as ``a small red star``."""
        return f"a {self.size} {self.colour} {self.shape}"


def learned() -> list[tuple[str, str]]:
    """Pairs of colour and shape to learn."""
    return [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD]


def held_out() -> list[tuple[str, str]]:
    """Pairs to find without having learned them."""
    return list(HELD)


def scenes(pairs: list[tuple[str, str]], each: int, seed: str) -> Iterator[Scene]:
    """So many pictures of each pair in each size."""
    for colour, shape in pairs:
        for size in SIZES:
            for number in range(each):
                yield Scene(size, colour, shape, f"{seed}-{colour}-{shape}-{size}-{number}")


def draw(scene: Scene, *, grey: bool = False) -> Image:
    """The picture, RGB of `SIDE` x `SIDE`.

    Args:
        grey: without colour, for a base that shall know shapes alone.

    Raises:
        MissingDependencyError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise MissingDependencyError(
            "the vision demo draws with Pillow; pip install 'weft[vision]', or pip install pillow"
        ) from error
    chance, fine = random.Random(scene.seed), 4 * SIDE
    ground = _colour(chance.random(), chance.uniform(0, 0.12), chance.uniform(0.85, 1.0))
    hue = COLOURS[scene.colour] + chance.uniform(-0.015, 0.015)
    shape = _colour(hue % 1, chance.uniform(0.75, 1.0), chance.uniform(0.7, 0.95))
    radius = SIZES[scene.size] * fine * chance.uniform(0.9, 1.05)
    x, y = (chance.uniform(radius + 2, fine - radius - 2) for _ in range(2))
    image = Image.new("RGB", (fine, fine), ground)
    _put(ImageDraw.Draw(image), scene.shape, x, y, radius, chance.uniform(-0.25, 0.25), shape, ground)
    small = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return small.convert("L").convert("RGB") if grey else small


def _colour(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def _put(pen: object, shape: str, x: float, y: float, radius: float, turn: float, ink: object, ground: object) -> None:
    """One shape around (x, y)."""

    def around(corners: int, inner: float | None = None) -> list[tuple[float, float]]:
        many = corners if inner is None else 2 * corners
        lengths = [radius if inner is None or index % 2 == 0 else radius * inner for index in range(many)]
        angles = [turn - math.pi / 2 + 2 * math.pi * index / many for index in range(many)]
        return [(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(lengths, angles, strict=True)]

    def disc(size: float, fill: object) -> None:
        pen.ellipse((x - size, y - size, x + size, y + size), fill=fill)  # type: ignore[attr-defined]

    if shape in ("circle", "ring"):
        disc(radius, ink)
        if shape == "ring":
            disc(0.5 * radius, ground)
    elif shape == "cross":
        for angle in (turn, turn + math.pi / 2):
            far, wide = (math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))
            corners = [(s * radius, t * 0.3 * radius) for s, t in ((1, 1), (1, -1), (-1, -1), (-1, 1))]
            pen.polygon([(x + a * far[0] + b * wide[0], y + a * far[1] + b * wide[1]) for a, b in corners], fill=ink)  # type: ignore[attr-defined]
    else:
        corners = {"triangle": (3, None), "star": (5, 0.42)}
        points = around(*corners[shape]) if shape in corners else _square(x, y, radius, turn)
        pen.polygon(points, fill=ink)  # type: ignore[attr-defined]


def _square(x: float, y: float, radius: float, turn: float) -> list[tuple[float, float]]:
    angles = [turn + math.pi / 4 + math.pi / 2 * index for index in range(4)]
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]
