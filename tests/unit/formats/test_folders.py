"""A directory is written as one: whenever the writer dies, a reader finds the old adapter, the new one, or an error."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.unit.formats.support import simple
from weft.errors import FormatError
from weft.formats import load
from weft.formats.folders import STAGED
from weft.formats.peft import read, write

STEPS = ("rename", "replace", "link", "unlink", "mkdir", "fsync", "rmdir")


class Killed(BaseException):
    """The writer is dead: nothing of it runs any more, not even its clean-up."""


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing to the disk takes most of the time of these tests."""
    monkeypatch.setattr(os, "fsync", lambda *_: None)


def test_existing_adapters_are_not_overwritten(tmp_path: Path) -> None:
    first = simple()
    write(first, tmp_path / "a")
    with pytest.raises(
        FormatError, match=r"'adapter_config\.json', 'adapter_model\.safetensors', 'weft\.json'.*overwrite=True"
    ) as caught:
        write(simple(), tmp_path / "a")
    assert caught.value.path == str(tmp_path / "a")
    assert read(tmp_path / "a").digest == first.digest


def test_overwriting_takes_all_of_the_old_and_nothing_else(tmp_path: Path) -> None:
    at = tmp_path / "a"
    at.mkdir()
    (at / "notes.md").write_text("mine")
    (at / "adapter_model.bin").write_bytes(b"old")
    (at / "adapter_config.json").write_text("old")
    (at / "checkpoints").mkdir()
    adapter = simple()
    write(adapter, at, overwrite=True)
    assert read(at).digest == adapter.digest
    assert sorted(path.name for path in at.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoints",
        "notes.md",
        "weft.json",
    ]
    write(adapter, at, overwrite=True, for_peft=False)
    assert sorted(path.name for path in at.iterdir()) == [
        "checkpoints",
        "notes.md",
        "weft.json",
        "weft_model.safetensors",
    ]
    assert read(at).digest == adapter.digest
    assert (at / "notes.md").read_text() == "mine"


def test_a_directory_with_other_things_needs_no_leave(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "README.md").write_text("mine")
    assert write(simple(), tmp_path / "a").is_dir()
    assert (tmp_path / "a" / "README.md").read_text() == "mine"


def test_parents_are_made_and_nothing_is_left_beside(tmp_path: Path) -> None:
    write(simple(), tmp_path / "deep" / "er" / "a")
    assert [path.name for path in (tmp_path / "deep" / "er").iterdir()] == ["a"]
    assert not [path for path in (tmp_path / "deep" / "er" / "a").iterdir() if path.name.startswith(".")]
    assert (tmp_path / "deep" / "er" / "a").stat().st_mode & 0o777 == (tmp_path / "deep").stat().st_mode & 0o777


def test_places_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FormatError, match="a file stands there"):
        write(simple(), tmp_path / "file")
    with pytest.raises(FormatError, match="can't be written"):
        write(simple(), tmp_path / "file" / "inside")


def test_a_link_to_a_directory_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    adapter = simple()
    write(adapter, tmp_path / "link")
    assert read(tmp_path / "real").digest == read(tmp_path / "link").digest == adapter.digest


def test_a_full_disk_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = simple()
    write(old, tmp_path / "a")

    def full(_: object, path: Path, *more: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("weft.formats.tensor_files.TensorBytes.write", full)
    with pytest.raises(FormatError, match="No space left on device"):
        write(simple(), tmp_path / "a", overwrite=True)
    with pytest.raises(FormatError, match="No space left on device"):
        write(simple(), tmp_path / "b")
    assert read(tmp_path / "a").digest == old.digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    assert not [path for path in (tmp_path / "a").iterdir() if path.name.startswith(".")]


def killed_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the operating system do this many more steps, then nothing."""
    left = [count]

    def counted(name: str) -> None:
        original = getattr(os, name) if name != "fsync" else lambda *_: None  # a step, but not a slow one

        def step(*arguments: object, **options: object) -> object:
            if left[0] <= 0:
                raise Killed(name)
            left[0] -= 1
            return original(*arguments, **options)

        monkeypatch.setattr(os, name, step)

    for name in STEPS:
        counted(name)
    remove = shutil.rmtree
    monkeypatch.setattr(
        shutil, "rmtree", lambda *arguments, **options: remove(*arguments, **options) if left[0] > 0 else None
    )


@pytest.mark.parametrize("old_exists", [False, True])
def test_killed_at_every_step(old_exists: bool, tmp_path: Path) -> None:
    """Each run dies one step later, until one comes to its end."""
    old, new = simple(), simple()
    states = []
    for count in range(200):
        at = tmp_path / str(count) / "a"
        at.parent.mkdir()
        if old_exists:
            write(old, at)
            (at / "mine.txt").write_text("mine")
        with pytest.MonkeyPatch.context() as patched:
            killed_after(count, patched)
            try:
                write(new, at, overwrite=True)
                finished = True
            except Killed:
                finished = False
        try:
            states.append({old.digest: "old", new.digest: "new"}[load(at).digest])
        except FormatError:
            states.append("error")
        assert not old_exists or (at / "mine.txt").read_text() == "mine"
        write(new, at, overwrite=True)  # the next write always works
        assert load(at).digest == new.digest
        assert not (at / STAGED).exists()
        if finished:
            break
    first = "old" if old_exists else "error"
    assert states[0] == first
    assert states[-1] == "new"
    assert states == sorted(
        states, key=(first, "new").index
    )  # old until a certain step, new from then on, nothing in between
    assert len(states) > (10 if old_exists else 5)


def test_other_tools_see_the_old_the_new_or_nothing(tmp_path: Path) -> None:
    """They don't know the staging folder: while files move, the config is away."""
    old, new = simple(), simple()
    for count in range(200):
        at = tmp_path / str(count) / "a"
        at.parent.mkdir()
        write(old, at)
        with pytest.MonkeyPatch.context() as patched:
            killed_after(count, patched)
            try:
                write(new, at, overwrite=True)
                finished = True
            except Killed:
                finished = False
        shutil.rmtree(at / STAGED, ignore_errors=True)
        if (at / "adapter_config.json").exists():
            (at / "weft.json").unlink(missing_ok=True)
            item = read(at).factors["model.layers.0.q_proj"]
            assert any(item.A.equal(whole.factors["model.layers.0.q_proj"].A) for whole in (old, new))
        if finished:
            break
    assert finished


def test_somebody_else_writes_while_we_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.formats import peft

    old, new = simple(), simple()
    write(old, tmp_path / "a")
    original, calls = peft.read_record, []

    def interrupted(folder: Path) -> object:
        record = original(folder)
        calls.append(folder)
        if len(calls) == 1:
            write(new, tmp_path / "a", overwrite=True)
        return record

    monkeypatch.setattr(peft, "read_record", interrupted)
    assert read(tmp_path / "a").digest == new.digest
    assert len(calls) == 2
