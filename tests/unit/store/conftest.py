"""Stores of every kind: index in SQLite or on a real PostgreSQL server, blobs on the disk or on a server of the S3 protocol."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from weft.store import Store

S3_BUCKET = "adapters"


@pytest.fixture(scope="session")
def postgres() -> str:
    """URL of a PostgreSQL server; a test that needs it is skipped where there is none."""
    url = os.environ.get("WEFT_TEST_POSTGRES", "")
    if not url:
        pytest.skip("needs a PostgreSQL server: scripts/with_postgres.sh starts one, and sets WEFT_TEST_POSTGRES")
    return url


@pytest.fixture
def fresh_database(postgres: str) -> Iterator[Callable[[], str]]:
    """Makes databases, which are gone after the test."""
    psycopg = pytest.importorskip("psycopg")
    made: list[str] = []

    def make() -> str:
        name = f"weft_{secrets.token_hex(6)}"
        with psycopg.connect(postgres, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        made.append(name)
        return f"{postgres.rpartition('/')[0]}/{name}"

    yield make
    with psycopg.connect(postgres, autocommit=True) as connection:
        for name in made:
            connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@pytest.fixture(params=["sqlite", "postgresql"])
def index(request: pytest.FixtureRequest) -> str | None:
    """Index of a store: None for the file beside the blobs, or the URL of an empty database."""
    return None if request.param == "sqlite" else request.getfixturevalue("fresh_database")()


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Callable[..., Store]]:
    """Opens stores, by default in one folder with SQLite, and closes them after the test."""
    opened: list[Store] = []

    def open_(place: object = None, **options: object) -> Store:
        store = Store(tmp_path / "store" if place is None else place, **options)  # type: ignore[arg-type]
        opened.append(store)
        return store

    yield open_
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Callable[..., Store]) -> Store:
    """An empty store on SQLite."""
    return open_store()


@pytest.fixture
def any_store(open_store: Callable[..., Store], index: str | None) -> Store:
    """An empty store, on each database."""
    return open_store(index=index)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of a server that speaks the S3 protocol, on a loopback port."""
    server = pytest.importorskip("moto.server", reason="needs moto, a server of the S3 protocol")
    pytest.importorskip("s3fs", reason="needs s3fs: pip install 'weft[s3]'")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of an empty place in a bucket; the environment says how it is reached, as a user's would."""
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", s3_server),
    ):
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    filesystem = s3fs.S3FileSystem()
    if not filesystem.exists(S3_BUCKET):
        filesystem.mkdir(S3_BUCKET)
    return f"s3://{S3_BUCKET}/{secrets.token_hex(6)}"
