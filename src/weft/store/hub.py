"""A catalog in a repository of the Hugging Face hub: a version's files and its record arrive in one commit, or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.store.remote import RemoteBlobs, open_blobs, problems
from weft.store.shelves import Catalog, Record

__all__ = ["HubCatalog"]


class HubCatalog(Catalog):
    """Reads as every catalog does; writes by commits. A repository that isn't there is made, as a private one."""

    def __init__(self, url: str, options: Mapping[str, Any] | None) -> None:
        blobs = open_blobs(url, options)
        assert isinstance(blobs, RemoteBlobs)
        super().__init__(blobs)
        self.filesystem, self.root = blobs.filesystem, blobs.root

    def send(self, record: Record, folder: Path) -> None:
        """See `Shelf.send`."""
        from huggingface_hub import CommitOperationAdd

        home = f"blobs/{record.address[:2]}/{record.address}"
        files: list[tuple[str, Path | bytes]] = [(f"{home}/{name}", folder / name) for name in record.files]
        files.append((f"catalog/{record.name}/{record.number}.json", record.to_json()))
        operations = [CommitOperationAdd(self._inside(path), data) for path, data in files]
        self._commit(operations, f"{record}")

    def point(self, name: str, aliases: Mapping[str, int]) -> None:
        """See `Shelf.point`."""
        from huggingface_hub import CommitOperationAdd

        there = self.aliases(name)
        if aliases and {**there, **aliases} != there:
            data = json.dumps({**there, **aliases}, indent=1, sort_keys=True).encode()
            self._commit([CommitOperationAdd(self._inside(f"catalog/{name}/aliases.json"), data)], f"aliases of {name}")

    def _inside(self, path: str) -> str:
        return "/".join(part for part in (*self._parts()[2:], path) if part)

    def _parts(self) -> list[str]:
        """Organization, repository, and the folders in it."""
        return self.root.removeprefix("datasets/").removeprefix("spaces/").split("/")

    def _commit(self, operations: list[Any], message: str) -> None:
        """One commit; the repository is made if it isn't there."""
        from huggingface_hub import HfApi

        kind = (
            "dataset" if self.root.startswith("datasets/") else "space" if self.root.startswith("spaces/") else "model"
        )
        with problems(self.shown):
            api = HfApi(
                endpoint=getattr(self.filesystem, "endpoint", None), token=getattr(self.filesystem, "token", None)
            )
            home, _, revision = "/".join(self._parts()[:2]).partition("@")
            if kind != "space":
                api.create_repo(home, repo_type=kind, private=True, exist_ok=True)
            api.create_commit(
                home, operations, commit_message=f"weft: {message}", repo_type=kind, revision=revision or None
            )
        self.filesystem.invalidate_cache()
