"""A folder of images as rows: the class is the name of the folder that an image is in."""

from __future__ import annotations

from pathlib import Path

from weft.data.sources import Table
from weft.errors import DataError, some_names

__all__ = ["ENDINGS", "holds_images", "read_image_folder"]

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


def holds_images(path: Path) -> bool:
    """Whether some folder in this one has images in it, directly."""
    try:
        return any(entry.is_dir() and any(_is_image(file) for file in entry.iterdir()) for entry in path.iterdir())
    except OSError:
        return False


def read_image_folder(path: Path, limit: int | None) -> Table:
    """Rows ``{"image": "cat/1.png", "label": "cat"}``, in the order of names.

    Raises:
        DataError: folders in folders of classes, such as ``train/cat``; names them.
    """
    classes = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    rows, skipped = [], 0
    for folder in classes:
        entries = sorted(folder.iterdir())
        inner = [entry.name for entry in entries if entry.is_dir() and holds_images(folder)]
        if inner:
            raise DataError(
                f"{path}: {folder.name} has folders of images in it ({some_names(inner)}); give {folder} as the data"
            )
        images = [entry for entry in entries if _is_image(entry)]
        skipped += len(entries) - len(images)
        rows += [{"image": f"{folder.name}/{image.name}", "label": folder.name} for image in images]
    names = tuple(folder.name for folder in classes if any(row["label"] == folder.name for row in rows))
    notes = (f"{skipped:,} files without the ending of an image are left out",) if skipped else ()
    rows = rows[:limit]
    return Table(list(rows), list(range(1, len(rows) + 1)), str(path), "image", notes, {"label": names})


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS and not path.is_dir()
