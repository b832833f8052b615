"""The folder of a many-run.

    runs/users/NAME/         one run folder an adapter (recipe.yaml, log.jsonl, adapter/, report.json …), as `weft.train` leaves it;
                             failed.json instead of a report where it was stopped
               users.json    who is in which folder, with which recipe: what a resumed run needs
               environment.json
               checkpoints/  of all adapters at once
               report.html, report.json

Files are written beside and renamed. This module does not know how a training goes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.errors import RunError, did_you_mean, some_names
from weft.many.names import folder_names
from weft.train.recipe import Recipe
from weft.train.run import Folder, plain_json, write_beside

__all__ = ["RESERVED", "ManyFolder", "failure"]

RESERVED = (
    "users.json",
    "environment.json",
    "checkpoints",
    "report.html",
    "report.json",
    "sweep.json",
    "sweep.svg",
    "winner.yaml",
    ".lock",
)

FAILED = "failed.json"


def failure(folder: str | os.PathLike[str]) -> str:
    """Why the adapter of one run folder was stopped; empty where it wasn't."""
    try:
        return str(json.loads((Path(folder) / FAILED).read_text(encoding="utf-8"))["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


class ManyFolder:
    """Its paths, and how they are written."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self.users, self.environment = self.root / "users.json", self.root / "environment.json"
        self.checkpoints, self.report = self.root / "checkpoints", self.root / "report.json"
        self.page = self.root / "report.html"

    @property
    def finished(self) -> bool:
        """The report is the last thing that a run writes."""
        return self.report.is_file()

    def require(self) -> ManyFolder:
        """This folder, if it is a many-run's.

        Raises:
            RunError: it isn't; names those near it.
        """
        if self.users.is_file() and self.environment.is_file():
            return self
        above = self.root.parent
        near = [child.name for child in above.iterdir() if (child / "users.json").is_file()] if above.is_dir() else []
        if (self.root / "recipe.yaml").is_file():
            raise RunError(
                f"{self.root}: this is the run of one adapter; go on with it by weft train --resume {self.root}"
            )
        found = "a folder without users.json" if self.root.is_dir() else "nothing"
        raise RunError(
            f"{self.root}: expected the folder of a many-run, got {found}.{did_you_mean(self.root.name, near)}"
        )

    def check(self, overwrite: bool = False) -> None:
        """See that a new run can be made here; changes nothing.

        Raises:
            RunError: it holds a run or other files; or it can't be written.
        """
        if self.users.is_file() and not overwrite:
            raise RunError(
                f"{self.root}: there is a run in this folder; resume it (resume=True, --resume), replace it (overwrite=True, "
                "--overwrite), or give another name"
            )
        if not self.users.is_file():
            there = [child.name for child in self.root.iterdir()] if self.root.is_dir() else []
            if there:
                raise RunError(
                    f"{self.root}: this folder is not empty and holds no many-run ({some_names(there)}); files of others are left alone: give another name"
                )
            Folder(self.root).check()

    def create(self, overwrite: bool = False) -> None:
        """Make the folder; a run that stood there is removed, if it may be.

        Raises:
            RunError: see `check`.
        """
        self.check(overwrite)
        if self.users.is_file():
            self._remove()
        try:
            self.checkpoints.mkdir(parents=True)
        except OSError as error:
            raise RunError(f"{self.root}: a run can't be written here: {error}") from error

    def lock(self) -> Any:
        """Hold the folder for this process; see `weft.train.run.Folder.lock`."""
        return Folder(self.root).lock()

    def of(self, key: str) -> Folder:
        """The run folder of one adapter."""
        return Folder(self.root / key)

    def failed(self, key: str) -> Path:
        """Where it stands why an adapter was stopped."""
        return self.root / key / FAILED

    def save_users(self, keys: Mapping[str, str], recipes: Mapping[str, Recipe]) -> None:
        """Write users.json; equal recipes are written once."""
        kinds = list(dict.fromkeys(recipes.values()))
        numbers = {recipe: number for number, recipe in enumerate(kinds)}
        values = {
            "recipes": [recipe.to_dict() for recipe in kinds],
            "users": [{"name": name, "folder": key, "recipe": numbers[recipes[name]]} for name, key in keys.items()],
        }
        write_beside(self.users, json.dumps(values, indent=1, ensure_ascii=False) + "\n")

    def read_users(self) -> tuple[dict[str, str], dict[str, Recipe]]:
        """Folders and recipes by name.

        Raises:
            RunError: the file can't be read.
        """
        try:
            values = json.loads(self.users.read_text(encoding="utf-8"))
            kinds = [Recipe.from_dict(recipe) for recipe in values["recipes"]]
            rows = values["users"]
            return {row["name"]: row["folder"] for row in rows}, {row["name"]: kinds[row["recipe"]] for row in rows}
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise RunError(f"{self.users}: this file can't be read: {error}") from error

    def save_environment(self, values: Mapping[str, Any]) -> None:
        """Write environment.json."""
        write_beside(self.environment, json.dumps(plain_json(values), indent=2, ensure_ascii=False) + "\n")

    def read_environment(self) -> dict[str, Any]:
        """What environment.json says."""
        return Folder(self.root).read_environment()

    def clear(self, key: str) -> None:
        """Remove what an earlier, killed process wrote of one adapter's end."""
        folder = self.of(key)
        for path in (folder.adapter, folder.report, self.failed(key)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _remove(self) -> None:
        keys, _ = self.read_users()
        allowed = set(folder_names(list(keys), RESERVED).values())
        for key in (*(key for key in keys.values() if key in allowed), *RESERVED):
            path = self.root / key
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
