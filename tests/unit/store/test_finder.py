"""References where directories are taken."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

import weft
from tests.unit.store.support import make_adapter
from weft.errors import FormatError, StoreError
from weft.inspection import inspect_adapter
from weft.store import Store, finder


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store that nobody has to name, and an empty working directory."""
    monkeypatch.setenv("WEFT_STORE", str(tmp_path / "store"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    finder._opened.cache_clear()
    store = Store()
    store.put(make_adapter(1), "medical")
    store.put(make_adapter(2), "medical")
    store.promote("medical@1", "prod")
    return store


def test_references_are_loaded(known: Store) -> None:
    assert weft.load("medical") == weft.load("medical@2") == make_adapter(2)
    assert weft.load("medical@prod") == weft.load(make_adapter(1).digest[:10]) == make_adapter(1)
    found = inspect_adapter("medical@prod")
    assert (found.adapter, set(found.files)) == (
        make_adapter(1),
        {"adapter_config.json", "adapter_model.safetensors", "weft.json"},
    )


def test_a_directory_wins_and_it_is_said(known: Store, caplog: pytest.LogCaptureFixture) -> None:
    make_adapter(7).save("medical")
    with caplog.at_level(logging.WARNING, "weft"):
        assert weft.load("medical") == make_adapter(7)
    assert (
        "medical is a path here, and medical@2 in the store: the path is taken; medical@2 is the store's" in caplog.text
    )
    assert weft.load("medical@2") == make_adapter(2)
    caplog.clear()
    assert weft.load("./medical") == make_adapter(7)
    assert caplog.text == ""


def test_a_name_wins_over_first_digits_and_it_is_said(known: Store, caplog: pytest.LogCaptureFixture) -> None:
    digest = make_adapter(1).digest
    known.put(make_adapter(3), digest[:8])
    with caplog.at_level(logging.WARNING, "weft"):
        assert weft.load(digest[:8]) == make_adapter(3)
    assert f"{digest[:8]} is a name here, and the first digits of {digest[:16]}: the name is taken" in caplog.text
    caplog.clear()
    for plain in (f"{digest[:8]}@1", digest[:9], f"sha256:{digest[:16]}", "medical"):
        weft.load(plain)
    assert weft.load(f"sha256:{digest[:16]}") == make_adapter(1)
    assert caplog.text == ""


def test_what_is_neither_names_both(known: Store) -> None:
    with pytest.raises(
        FormatError, match=r"no such file or directory, and the store has no 'medcal'. Did you mean 'medical'"
    ):
        weft.load("medcal")
    with pytest.raises(FormatError, match="has no version 9"):
        weft.load("medical@9")
    with pytest.raises(FormatError, match="no such file") as problem:
        weft.load("./runs/medical")
    assert "the store" not in str(problem.value)


def test_without_a_store_nothing_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_STORE", str(tmp_path / "none"))
    with pytest.raises(FormatError, match="there is no store in"):
        weft.load("medical@prod")
    assert not (tmp_path / "none").exists()
    code = "import sys, weft\ntry: weft.load('nothing')\nexcept weft.WeftError: print('sqlalchemy' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ), timeout=120
    )
    assert done.stdout.strip() == "False"


def test_a_store_that_cannot_be_opened_is_no_bar_to_directories(known: Store, tmp_path: Path) -> None:
    make_adapter(7).save("medical")
    known.close()
    finder._opened.cache_clear()
    (tmp_path / "store" / "index.sqlite").write_bytes(b"x" * 5000)
    for path in (tmp_path / "store").glob("index.sqlite-*"):
        path.unlink()
    assert weft.load("medical") == make_adapter(7)
    with pytest.raises(StoreError):
        weft.load("medical@prod")
    with pytest.raises(FormatError, match="not a database"):
        weft.load("elsewhere")


def test_listing_needs_no_torch(known: Store) -> None:
    code = "import sys, weft; s = weft.Store(); print([str(v) for v in s.find()], s.version('medical@prod').number, 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ), timeout=120
    )
    assert done.stdout.strip() == "['medical@2'] 1 False"
