"""Checkpoints: folders ``checkpoint-N`` that are complete or not there.

A checkpoint is written into a folder of another name, which is renamed when all is on the disk. It holds every trained
tensor by its name in the model (``factors.safetensors``), what the trainer needs to go on, and an adapter that `weft.load`
reads. This module does not know the trainer.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from weft.errors import RunError, some_names

__all__ = ["STATE", "beside", "clean", "load_state", "newest", "path_of", "publish", "rotate", "save_state", "steps"]

STATE = "factors.safetensors"
TRAINER_STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return folder / f"checkpoint-{step}"


def beside(folder: Path, step: int) -> Path:
    """Where it is written."""
    return folder / f".partial-{step}"


def steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    found = (_NAME.fullmatch(child.name) for child in folder.iterdir()) if folder.is_dir() else ()
    return sorted(
        int(match[1]) for match in found if match and (path_of(folder, int(match[1])) / TRAINER_STATE).is_file()
    )


def newest(folder: Path) -> Path | None:
    """The checkpoint to go on from; None: there is none."""
    there = steps(folder)
    return path_of(folder, there[-1]) if there else None


def publish(folder: Path, step: int) -> Path:
    """Bring a checkpoint that was written beside to the disk, and give it its name."""
    source, target = beside(folder, step), path_of(folder, step)
    for path in [*source.rglob("*"), source]:
        _sync(path)
    if target.exists():  # written by an earlier process that was resumed from before it
        shutil.rmtree(target)
    os.rename(source, target)
    _sync(folder)
    return target


def clean(folder: Path) -> None:
    """Remove what a killed process left unfinished."""
    for path in folder.glob(".partial-*"):
        shutil.rmtree(path, ignore_errors=True)


def rotate(folder: Path, keep: int, best: int | None) -> None:
    """Remove old checkpoints: the newest ``keep`` and the best stay."""
    for step in steps(folder)[:-keep]:
        if step != best:
            shutil.rmtree(path_of(folder, step), ignore_errors=True)


def save_state(path: Path, tensors: Mapping[str, Tensor], step: int) -> None:
    """Write tensors by name, as they are in training (no rounding, no folding)."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    save_file(plain, path, metadata={"format": "pt", "step": str(step)})


@torch.no_grad()
def load_state(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved values into tensors of the same names.

    Raises:
        RunError: the file can't be read, or its names or shapes are not those of this model and spec.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{path}: this checkpoint can't be read: {error}; remove its folder to go on from the one before"
        ) from error
    odd = sorted(saved.keys() ^ tensors.keys())
    if odd:
        raise RunError(
            f"{path}: the checkpoint and the model disagree on {len(odd)} tensors: {some_names(odd)}; base and spec must be those of the run"
        )
    for name, tensor in tensors.items():
        if saved[name].shape != tensor.shape:
            raise RunError(
                f"{path}: {name} is {tuple(saved[name].shape)}; expected {tuple(tensor.shape)}: base and spec must be those of the run"
            )
        tensor.copy_(saved[name])


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
