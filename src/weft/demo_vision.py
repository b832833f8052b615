"""The story of text and vision: a small CNN that knows shapes in grey, the embedded base, and captions that name colours.

    demo = VisionDemo()              # runs/demo-vision, or the next free number
    demo.look()                      # draws, and teaches a small CNN the shapes: the vision base
    demo.train()                     # LoRA in both towers, through `weft.train`
    demo.compare()                   # recall on new pictures, of colours and shapes that never met in training too
    demo.picture()                   # what each caption finds, before and after

Offline, two cores, under two minutes. Each step gives a value; printing is the command line's.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.demo import free_folder
from weft.demo_pictures import SHAPES, SIDE, Scene, draw, held_out, learned, scenes
from weft.errors import RunError
from weft.spec import LoraSpec
from weft.train.evaluation import Evaluation
from weft.train.recipe import Recipe
from weft.train.run import Run

__all__ = ["RECIPE", "Found", "VisionDemo"]

RECIPE = Recipe(
    kind="contrastive",
    spec=LoraSpec(
        towers={
            "text_model": LoraSpec(rank=8, targets=("q_proj", "v_proj")),
            "vision_model": LoraSpec(rank=8, targets=("conv1", "conv2")),
        }
    ),
    max_steps=240,
    batch_size=60,
    learning_rate=5e-3,
    eval_every=80,
    two_tower={"dim": 64},  # type: ignore[arg-type]
)
TRAINED, ASKED, GREY = 16, 5, 1200
"""Pictures of each caption to learn, and of each to find; grey ones for the vision base."""

SHOWN = 5
"""Pictures beside a caption."""


@dataclass(frozen=True)
class Found:
    """What a caption finds, best first: files of the nearest pictures, what they show, and whether that is right."""

    caption: str
    files: tuple[Path, ...]
    shows: tuple[str, ...]

    @property
    def right(self) -> tuple[bool, ...]:
        """By picture."""
        return tuple(shown == self.caption for shown in self.shows)


class VisionDemo:
    """The story's state: a folder, a vision base, and what came of each step.

    Args:
        out: the folder; None: the first free one of ``runs/demo-vision``, ``runs/demo-vision-2`` …
        recipe: how to train.
        trained, asked, grey: numbers of pictures.

    Raises:
        RunError: ``out`` is not empty.
    """

    shown = SHOWN

    def __init__(
        self,
        out: str | os.PathLike[str] | None = None,
        *,
        recipe: Recipe = RECIPE,
        trained: int = TRAINED,
        asked: int = ASKED,
        grey: int = GREY,
    ) -> None:
        self.folder = free_folder("demo-vision") if out is None else Path(out)
        if out is not None and self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise RunError(f"{self.folder}: this is not an empty folder; give the demo another name")
        self.recipe, self.grey = recipe, grey
        self.learned, self.asked = (
            list(scenes(pairs, each, seed))
            for pairs, each, seed in ((learned(), trained, "learned"), (held_out(), asked, "asked"))
        )
        self.others = list(scenes(learned(), max(1, asked // 5), "others"))
        self.run: Run | None = None

    @property
    def images(self) -> Path:
        """The folder that paths of images begin in."""
        return self.folder / "data"

    @property
    def bases(self) -> dict[str, str]:
        """The towers."""
        from weft.models.source import EMBEDDED

        return {"text_model": EMBEDDED, "vision_model": str(self.folder / "vision-base")}

    @property
    def result(self) -> Run:
        """The run.

        Raises:
            RunError: `train` has not been called.
        """
        if self.run is None:
            raise RunError("the demo has not trained yet: call train() first")
        return self.run

    def look(self) -> float:
        """Draw all pictures, and teach a small CNN the shapes in grey ones; gives its share of right shapes on grey ones it didn't see."""
        for name, part in (("train", self.learned), ("test", self.asked + self.others)):
            _write(part, self.images, name)
        accuracy, model = _shapes(self.grey)
        _save(model, self.folder / "vision-base")
        return accuracy

    def train(self, progress: bool | None = False) -> Run:
        """Train the adapter: factors in both towers, projections and temperature."""
        from weft.train.training import train

        self.run = train(
            base=self.bases, data=self.images / "train.jsonl", eval_data=self.images / "test.jsonl", images=self.images, recipe=self.recipe,
            out=self.folder / "run", progress=progress,
        )  # fmt: skip
        return self.run

    def compare(self, progress: bool | None = False) -> Evaluation:
        """Recall both ways and zero-shot accuracy, before and after, on new pictures: what was held out, among all the others."""
        from weft.train.pair_evaluation import evaluate_pairs

        return evaluate_pairs(
            self.result.path, self.images / "test.jsonl", images=self.images, template="{}", progress=progress
        )

    def finds(self) -> dict[str, list[Found]]:
        """What each held-out caption finds among all new pictures, ``before`` and ``after``."""
        from weft.train.pair_evaluation import embedded_pairs

        found: dict[str, list[Found]] = {}
        captions = [scene.caption for scene in self.asked + self.others]
        sides = embedded_pairs(self.result.path, self.images / "test.jsonl", images=self.images)
        for name, (text, image) in zip(("before", "after"), sides, strict=True):
            found[name] = []
            for caption in dict.fromkeys(captions[: len(self.asked)]):
                near = (image @ text[captions.index(caption)]).topk(min(SHOWN, len(image))).indices.tolist()
                files = tuple(self.images / _file("test", index) for index in near)
                found[name].append(Found(caption, files, tuple(captions[index] for index in near)))
        return found

    def picture(self, found: dict[str, list[Found]] | None = None) -> Path:
        """Draw what captions find, one row each; gives the file."""
        path = self.folder / "found.png"
        _sheet(self.finds() if found is None else found).save(path)
        return path


def _file(part: str, index: int) -> str:
    return f"{part}/{index:04}.png"


def _write(part: list[Scene], folder: Path, name: str) -> None:
    """Pictures as files, and their captions as JSON lines."""
    (folder / name).mkdir(parents=True)
    lines = []
    for index, scene in enumerate(part):
        draw(scene).save(folder / _file(name, index))
        lines.append(json.dumps({"image": _file(name, index), "text": scene.caption, "label": scene.caption}) + "\n")
    (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _shapes(count: int, steps: int = 150, batch: int = 36) -> tuple[float, Any]:
    """A CNN of three blocks that names shapes in grey pictures, trained whole; and its accuracy on others."""
    import torch
    import torch.nn.functional as F

    from weft.data.transforms import ImageTransform
    from weft.models.plain_vision import CifarResNet

    transform, pairs = ImageTransform(SIDE), learned() + held_out()
    several = list(scenes(pairs, -(-count // (2 * len(pairs))), "grey"))
    pixels = torch.stack([transform(draw(scene, grey=True)) for scene in several])
    wanted = torch.tensor([SHAPES.index(scene.shape) for scene in several])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = CifarResNet(blocks=1, width=16, classes=len(SHAPES))
        order = torch.randperm(len(several))
        held, known = order[: len(several) // 6], order[len(several) // 6 :]
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
        model.train()
        for _ in range(steps):
            rows = known[torch.randint(len(known), (batch,))]
            F.cross_entropy(model(pixels[rows]).logits, wanted[rows]).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    with torch.no_grad():
        right = model.eval()(pixels[held]).logits.argmax(1) == wanted[held]
    return float(right.float().mean()), model


def _save(model: Any, folder: Path) -> None:
    """A directory that `--base` and `--vision-base` read."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    settings = {"size": {"height": SIDE, "width": SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")


def _sheet(found: dict[str, list[Found]]) -> Any:
    """A picture: a row a caption, its nearest images before on the left and after on the right, the right ones framed in green."""
    from PIL import Image, ImageDraw, ImageFont

    tile, gap, words, top = 48, 6, 190, 46
    half = SHOWN * (tile + gap)
    rows = len(found["before"])
    sheet = Image.new("RGB", (words + 2 * half + 40, top + rows * (tile + gap) + 10), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for column, name in enumerate(found):
        left = words + column * (half + 24)
        right = sum(sum(item.right) for item in found[name])
        shown = sum(len(item.right) for item in found[name])
        pen.text((left, 14), f"{name}: {right} of {shown} right", fill="black", font=font)
        for row, item in enumerate(found[name]):
            y = top + row * (tile + gap)
            if column == 0:
                pen.text((12, y + 15), item.caption, fill="black", font=font)
            for place, (file, is_right) in enumerate(zip(item.files, item.right, strict=True)):
                x = left + place * (tile + gap)
                with Image.open(file) as image:
                    sheet.paste(image.resize((tile, tile), Image.Resampling.LANCZOS), (x, y))
                frame = "#1a9850" if is_right else "#d9d9d9"
                pen.rectangle((x - 2, y - 2, x + tile + 1, y + tile + 1), outline=frame, width=3 if is_right else 1)
    return sheet
