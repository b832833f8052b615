"""Killed writers, many writers, flipped bytes, full disks, an index of another time."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.unit.store.support import as_of_first_migration, make_adapter
from weft.errors import DamagedError, StoreError, WeftError
from weft.store import Store, tables
from weft.store.database import Database, migrate, sqlite_url

REPOSITORY = Path(__file__).resolve().parents[3]


def run(module: str, *words: object, timeout: int = 240) -> dict[str, object]:
    """The last line of a module's output, as JSON."""
    command = [sys.executable, "-m", f"tests.unit.store.{module}", *map(str, words)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_killed_writers_lose_nothing(tmp_path: Path) -> None:
    kills = int(os.environ.get("WEFT_TEST_KILLS", "24"))
    found = run("crash", tmp_path, kills, timeout=60 + 3 * kills)
    assert sum(found["deaths"].values()) >= kills
    assert set(found["deaths"]) >= {"put", "promote", "gc"}


@pytest.mark.slow
def test_many_processes_on_sqlite(tmp_path: Path) -> None:
    assert run("load", tmp_path, 4, 15)["operations"] == 60


@pytest.mark.slow
def test_many_processes_on_postgresql(tmp_path: Path, fresh_database: Callable[[], str]) -> None:
    assert run("load", tmp_path, 4, 15, fresh_database())["operations"] == 60


# damage


def test_a_flipped_byte_anywhere_is_found(store: Store) -> None:
    version = store.put(make_adapter(1, width=4, layers=1, rank=2), "m")
    folder = Path(store.place) / "blobs" / version.digest[:2] / version.digest
    assert store.verify().ok
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        places = range(len(whole)) if len(whole) < 400 else sorted(random.sample(range(len(whole)), 60))
        for place in places:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << random.randrange(8))]) + whole[place + 1 :])
            with pytest.raises(DamagedError):
                store.get("m")
        assert not store.verify().ok
        for changed in (whole[:-1], whole + b"\n", b""):
            path.write_bytes(changed)
            with pytest.raises(DamagedError):
                store.get("m")
            assert not store.verify().ok
        path.unlink()
        with pytest.raises(DamagedError, match="is missing"):
            store.get("m")
        assert not store.verify().ok
        path.write_bytes(whole)
    assert store.verify().ok
    assert store.get("m").digest == version.digest


def test_putting_again_heals(store: Store) -> None:
    adapter = make_adapter(1)
    version = store.put(adapter, "m")
    folder = Path(store.place) / "blobs" / version.digest[:2] / version.digest
    for name in ("adapter_model.safetensors", "weft.json"):
        (folder / name).write_bytes(b"x" * (folder / name).stat().st_size)
        with pytest.raises(DamagedError):
            store.get("m")
        assert not store.put(adapter, "m").is_new
        assert store.get("m") == adapter
    (folder / "provenance" / f"{version.provenance}.json").unlink()
    store.put(adapter, "m")
    assert store.verify().ok
    assert store.get("m") == adapter


def test_a_strange_file_and_a_lost_blob_are_problems(store: Store) -> None:
    import shutil

    version = store.put(make_adapter(1), "m")
    folder = Path(store.place) / "blobs" / version.digest[:2] / version.digest
    (folder / "more.txt").write_text("x")
    assert "more.txt is no file of it" in store.verify().problems[0]
    shutil.rmtree(folder)
    assert "is missing" in store.verify().problems[0]


def test_a_link_in_the_place_of_a_file_is_not_followed(store: Store, tmp_path: Path) -> None:
    version = store.put(make_adapter(1), "m")
    path = Path(store.place) / "blobs" / version.digest[:2] / version.digest / "adapter_model.safetensors"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedError, match="link"):
        store.get("m")


def test_an_index_that_lies_leads_nowhere(store: Store, tmp_path: Path) -> None:
    store.put(make_adapter(1), "m")
    (tmp_path / "secret.json").write_text("{}")
    database = store.index.database
    for column, value in (
        (tables.versions.c.provenance, "../../../../../secret"),
        (tables.versions.c.digest, "0" * 64),
    ):
        database.write(
            lambda c, column=column, value=value: c.execute(sa.update(tables.versions).values({column: value}))
        )
        with pytest.raises(DamagedError):
            store.get("m")
    files = json.dumps({"../../../../secret.json": [2, "x"]})
    database.write(lambda c: c.execute(sa.update(tables.blobs).values(files=files)))
    with pytest.raises(WeftError):
        store.get("m")


# a crash of the machine


def test_all_of_a_blob_is_on_the_disk_before_the_index_counts_on_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[int] = set()
    real = os.fsync

    def fsync(handle: int) -> None:
        real(handle)
        flushed.add(os.fstat(handle).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    missing: list[Path] = []

    def look(_: object) -> None:
        root = Path(store.place) / "blobs"
        missing.extend(path for path in (root, *root.rglob("*")) if path.stat().st_ino not in flushed)

    sa.event.listen(store.index.database.engine, "commit", look)
    first = make_adapter(1, evaluation={"eval_loss": 1.0})
    store.put(first, "m")
    store.put(make_adapter(2), "m")
    store.put(make_adapter(1, evaluation={"eval_loss": 2.0}), "m")  # the blob is there, its provenance is not
    assert len(store.versions("m")) == 3
    assert missing == []


# full disks


@pytest.mark.parametrize("where", ["fsync", "rename", "mkdir"])
def test_a_full_disk_is_a_clear_error_and_no_damage(store: Store, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    store.put(make_adapter(1), "m")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real = getattr(os, where)

    def fail(*words: object, **named: object) -> object:
        if left[0] <= 0:
            raise full
        left[0] -= 1
        return real(*words, **named)

    left = [0]
    for count in range(6):
        left[0] = count
        with monkeypatch.context() as patch:
            patch.setattr(os, where, fail)
            problem = _problem_of_put(store, 2 + count)
        assert problem is None or ("No space left on device" in problem and "nothing was changed" in problem)
        assert store.verify().ok
        assert all(store.get(version).digest == version.digest for version in store.versions("m"))
    store.put(make_adapter(50), "m")
    assert store.get("m") == make_adapter(50)


def _problem_of_put(store: Store, seed: int) -> str | None:
    try:
        store.put(make_adapter(seed), "m")
    except StoreError as problem:
        return str(problem)
    return None


def test_a_file_that_cannot_grow(store: Store) -> None:
    """A real limit of the kernel: files may have 1 MB, the adapter needs 2 MB."""
    store.put(make_adapter(1), "m")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
        with pytest.raises(StoreError, match="File too large"):
            store.put(make_adapter(2, width=65536, layers=1), "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert store.verify().ok
    assert not list((Path(store.place) / "tmp").iterdir())
    assert [str(version) for version in store.versions("m")] == ["m@1"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(StoreError, match="Permission denied"):
        Store(tmp_path / "closed" / "store")


def test_a_place_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="give another directory"):
        Store(tmp_path / "file")


# the schema


def test_the_last_migration_is_the_one_that_the_code_knows() -> None:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(REPOSITORY / "src/weft/store/migrations"))
    assert ScriptDirectory.from_config(config).get_heads() == [tables.HEAD]


def _shape(connection: sa.Connection) -> dict[str, object]:
    """Tables, columns, keys and indices, as a database tells them."""
    found = sa.inspect(connection)
    return {
        name: (
            [(column["name"], str(column["type"]), column["nullable"]) for column in found.get_columns(name)],
            sorted(
                (str(index["name"]), tuple(index["column_names"]))
                for index in found.get_indexes(name)
                if not index.get("duplicates_constraint")
            ),
            sorted((str(item["name"]), tuple(item["column_names"])) for item in found.get_unique_constraints(name)),
            sorted(
                (tuple(item["constrained_columns"]), item["referred_table"], str(item["options"].get("ondelete")))
                for item in found.get_foreign_keys(name)
            ),
            found.get_pk_constraint(name)["constrained_columns"],
        )
        for name in sorted(found.get_table_names())
        if name != "alembic_version"
    }


def test_the_migrations_make_the_tables_that_the_code_knows(
    open_store: Callable[..., Store], index: str | None, fresh_database_or_file: Callable[[], str]
) -> None:
    migrated = open_store(index=index).index.database
    engine = sa.create_engine(fresh_database_or_file())
    tables.metadata.create_all(engine)
    with migrated.engine.connect() as one, engine.connect() as other:
        assert _shape(one) == _shape(other)
    engine.dispose()


@pytest.fixture
def fresh_database_or_file(request: pytest.FixtureRequest, index: str | None, tmp_path: Path) -> Callable[[], str]:
    if index is None:
        return lambda: f"sqlite:///{tmp_path}/other.sqlite"
    make = request.getfixturevalue("fresh_database")
    return lambda: make().replace("postgresql:", "postgresql+psycopg:")


def test_an_index_of_the_first_migration_is_brought_up_to_date(
    open_store: Callable[..., Store], tmp_path: Path
) -> None:
    store = open_store()
    for number in (1, 2):
        store.put(make_adapter(number), "m", tags={"a": "b"})
    store.promote("m@1", "prod")
    store.close()
    as_of_first_migration(tmp_path / "store" / "index.sqlite")
    again = open_store()
    assert [(move.kind, move.before, move.after) for move in again.moves("m")] == [("promote", None, 1)]
    assert again.get("m@prod") == make_adapter(1)
    assert again.promote("m@2", "prod").before == 1


def test_a_later_schema_is_refused_and_left_alone(open_store: Callable[..., Store], tmp_path: Path) -> None:
    open_store().put(make_adapter(1), "m")
    with sqlite3.connect(tmp_path / "store" / "index.sqlite") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(StoreError, match="a later weft made it"):
        open_store()
    with sqlite3.connect(tmp_path / "store" / "index.sqlite") as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("9999",)]
    connection.close()


def test_another_program_s_database_is_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "other.sqlite") as connection:
        connection.execute("CREATE TABLE invoices (id)")
    connection.close()
    with pytest.raises(StoreError, match="tables of something else: invoices"):
        Database.at(sqlite_url(tmp_path / "other.sqlite"))


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "index.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(StoreError, match="not a database"):
        Store(tmp_path / "store")


def test_many_open_a_new_store_at_once(open_store: Callable[..., Store], index: str | None) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(6) as pool:
        stores = list(pool.map(lambda number: open_store(index=index), range(6)))
        refs = list(pool.map(lambda number: str(stores[number].put(make_adapter(number), "m")), range(6)))
    assert sorted(refs) == [f"m@{number}" for number in range(1, 7)]


def test_index_and_blobs_belong_together(open_store: Callable[..., Store], tmp_path: Path) -> None:
    open_store(tmp_path / "a").close()
    open_store(tmp_path / "b").close()
    with pytest.raises(StoreError, match="another store"):
        open_store(tmp_path / "a", index=f"sqlite:///{tmp_path}/b/index.sqlite")


@pytest.mark.parametrize(
    "url", ["mysql://x/y", "no url", "sqlite+nothing:///x", "postgresql://127.0.0.1:1/none?connect_timeout=1"]
)
def test_an_index_that_cannot_be(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.store.database.PATIENCE", 0.0)
    with pytest.raises(WeftError):
        Store(tmp_path / "store", index=url)


def test_passwords_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psycopg")
    monkeypatch.setattr("weft.store.database.PATIENCE", 0.0)
    with pytest.raises(StoreError) as problem:
        Store(tmp_path / "store", index="postgresql://me:geheim@127.0.0.1:1/none?connect_timeout=1")
    assert "geheim" not in str(problem.value)


def test_migrations_are_undone_when_they_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.store.database.migrate", _migrate_and_fail)
    with pytest.raises(RuntimeError):
        Database.at(sqlite_url(tmp_path / "i.sqlite"))
    monkeypatch.undo()
    with sqlite3.connect(tmp_path / "i.sqlite") as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == []
    connection.close()
    Database.at(sqlite_url(tmp_path / "i.sqlite")).close()


def _migrate_and_fail(connection: sa.Connection) -> None:
    migrate(connection)
    raise RuntimeError
